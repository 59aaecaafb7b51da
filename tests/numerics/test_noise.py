"""The counter's numbers against SplitMix64 in Python's own integers, and their distribution."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.numerics.noise import uniform

MASK = 2**64 - 1


def splitmix(seed: int, skip: int, count: int) -> list[float]:
    """The published generator: a state that grows by the golden gamma, and its mix."""
    state, found = seed & MASK, []
    for index in range(skip + count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        if index < skip:
            continue
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        z ^= z >> 31
        found.append((z >> 40) / 2**24)
    return found


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 20))
def test_it_is_splitmix64(seed: int, draw: int) -> None:
    got = uniform((2, 3), torch.tensor(seed), torch.tensor(draw))
    assert got.shape == (2, 3)
    assert got.flatten().tolist() == splitmix(seed, 6 * draw, 6)


def test_it_is_uniform_and_draws_are_independent() -> None:
    seed, count = torch.tensor(5), 100_000
    first, second = (uniform((count,), seed, torch.tensor(draw)).double().numpy() for draw in (0, 1))
    assert 0 <= first.min() <= first.max() < 1
    places = np.arange(1, count + 1) / count
    for numbers in (first, second):
        # Kolmogorov-Smirnov at about 1e-4
        assert np.abs(np.sort(numbers) - places).max() < 2.23 / count**0.5
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / count**0.5


def test_it_compiles_in_one_graph() -> None:
    compiled = torch.compile(uniform, fullgraph=True, backend="eager")
    seed, draw = torch.tensor(3), torch.tensor(2)
    assert torch.equal(compiled((4, 5), seed, draw), uniform((4, 5), seed, draw))
