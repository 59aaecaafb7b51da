"""Which weights are left, against sorting written plainly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics.masks import largest, left, places, polynomial


@given(st.integers(0, 100), st.sampled_from([0.25, 0.5, 0.75]))
@settings(max_examples=20, deadline=None)
def test_n_of_m_along_input_channels(seed: int, density: float) -> None:
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
    kept = largest(weight, density, "n:m", m=4).numpy()
    size = np.abs(weight.numpy())
    for o, i, y, x in itertools.product(range(6), range(0, 8, 4), range(3), range(3)):
        part = size[o, i : i + 4, y, x]
        wanted = part >= np.sort(part)[4 - round(4 * density)]
        assert kept[o, i : i + 4, y, x].tolist() == wanted.astype(int).tolist()


def test_blocks_by_norm() -> None:
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    kept = largest(weight, 0.3, "block", (4, 2)).numpy()
    norms = {}
    for o, i, y, x in itertools.product(range(0, 8, 4), range(0, 6, 2), range(3), range(3)):
        norms[o, i, y, x] = float(weight[o : o + 4, i : i + 2, y, x].double().square().sum())
    count, size = places((8, 6, 3, 3), "block", (4, 2))
    assert (count, size) == (len(norms), 8)
    best = set(sorted(norms, key=norms.__getitem__)[-left(count, 0.3) :])
    for (o, i, y, x), _ in norms.items():
        part = kept[o : o + 4, i : i + 2, y, x]
        assert (part == int((o, i, y, x) in best)).all()


def test_linear_weights_have_blocks_and_parts() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert largest(weight, 0.5, "n:m", m=2).sum(1).tolist() == [4] * 4
    assert largest(weight, 0.5, "block", (2, 4)).sum() == 16


def test_polynomial_is_zhu_and_guptas() -> None:
    for t in range(0, 11):
        sparsity = 0.9 + (0.2 - 0.9) * (1 - min(max((t - 2) / 6, 0), 1)) ** 3
        assert 1 - polynomial(t, 2, 8, 0.8, 0.1) == pytest.approx(sparsity)
