"""Paths by quasi-random points: balance, the sequence itself, coalesced edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc

from bitsmith.numerics import paths


@given(st.integers(0, 6), st.integers(0, 40), st.integers(0, 10), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_blocks_of_a_power_of_two_are_permutations(power: int, component: int, seed: int, block: int) -> None:
    width = 2**power
    visited = paths.neurons(4 * width, width, component, seed)[block * width : (block + 1) * width]
    assert sorted(visited.tolist()) == list(range(width))


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 30), st.sampled_from(["sobol", "random"]))
@settings(max_examples=40, deadline=None)
def test_neurons_lie_in_the_layer_and_come_again(count: int, width: int, component: int, generator: str) -> None:
    found = paths.neurons(count, width, component, 7, generator)
    assert found.shape == (count,)
    assert found.dtype == torch.int64
    assert 0 <= found.min() <= found.max() < width
    assert torch.equal(found, paths.neurons(count, width, component, 7, generator))


@given(st.integers(1, 200), st.integers(1, 100), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_more_points_continue_the_sequence(count: int, more: int, component: int) -> None:
    longer = paths.points(count + more, component, 3)
    assert torch.equal(longer[:count], paths.points(count, component, 3))


def test_every_fan_in_is_the_same_where_widths_are_powers_of_two() -> None:
    for components in ((1, 2), (2, 3), (7, 8)):
        source, target = (paths.neurons(512, 64, component, 0) for component in components)
        assert torch.bincount(source, minlength=64).tolist() == [8] * 64
        assert torch.bincount(target, minlength=64).tolist() == [8] * 64


def test_signs_are_coins_that_go_on() -> None:
    one = paths.signs(1000, 9, 3)
    assert set(one.flatten().tolist()) == {-1, 1}
    assert abs(float(one.double().mean())) < 4 / math.sqrt(9000)
    assert torch.equal(one[:10], paths.signs(10, 9, 3))
    assert not torch.equal(one, paths.signs(1000, 9, 4))


def test_points_are_scrambled_sobol_points() -> None:
    """The scrambling undone digit by digit gives scipy's plain sequence: one matrix and one shift for all points."""
    plain = qmc.Sobol(5, scramble=False).random(64)
    for component in range(5):
        digits = _digits(plain[:, component])
        ours = _digits(paths.points(64, component, 11).numpy())
        for place in range(6):
            # digit k of a scrambled point is digit k of the plain one, plus a sum of digits before it, plus a constant
            rest = ours[:, place] ^ digits[:, place]
            inputs = np.concatenate([np.ones((64, 1), int), digits[:, :place]], axis=1)
            assert any(
                np.array_equal((inputs @ np.array(choice)) % 2, rest) for choice in np.ndindex(*[2] * (place + 1))
            ), (component, place)


def _digits(x: np.ndarray) -> np.ndarray:
    return (np.floor(x[:, None] * 2.0 ** np.arange(1, 7)).astype(int)) & 1


def test_seeds_and_components_scramble_apart() -> None:
    one, other, again = paths.points(64, 3, 0), paths.points(64, 3, 1), paths.points(64, 4, 0)
    assert not torch.equal(one, other)
    assert not torch.equal(one, again)
    assert float(one[0]) > 0


def test_pairs_fill_elementary_intervals() -> None:
    """The first two components make a (0, m, 2)-net: one of 2^m points in each box of that many equal ones."""
    m = 6
    x, y = (paths.points(2**m, component, 5) for component in (0, 1))
    for rows in range(m + 1):
        boxes = (x * 2**rows).long() * 2 ** (m - rows) + (y * 2 ** (m - rows)).long()
        assert torch.bincount(boxes, minlength=2**m).tolist() == [1] * 2**m


@pytest.mark.parametrize("generator", ["sobol", "random"])
def test_paths_that_share_an_edge_are_coalesced(generator: str) -> None:
    found = paths.edges(200, 8, 6, (1, 2), 0, generator, 9)
    source, target = (paths.neurons(200, width, component, 0, generator) for width, component in ((8, 1), (6, 2)))
    wanted: dict[tuple[int, int], list[int]] = {}
    for a, b, sign in zip(source.tolist(), target.tolist(), paths.signs(200, 9, 0).tolist(), strict=True):
        wanted.setdefault((b, a), sign)
    got = dict(zip(zip(found.target.tolist(), found.source.tolist(), strict=True), found.sign.tolist(), strict=True))
    assert got == wanted
    assert len(found) == len(wanted) <= 48
    dense = found.signs(6, 8)
    assert int(dense.ne(0).sum()) == 9 * len(found)
    assert all(dense[b, a].tolist() == sign for (b, a), sign in wanted.items())


def test_random_paths_meet_as_often_as_chance_has_it() -> None:
    count, places = 4096, 64 * 64
    found = len(paths.edges(count, 64, 64, (1, 2), 0, "random"))
    expected = places * (1 - (1 - 1 / places) ** count)
    assert abs(found - expected) < 4 * math.sqrt(places / 4)
    assert len(paths.edges(count, 64, 64, (1, 2), 0)) > found


@pytest.mark.parametrize(("count", "component"), [(0, 0), (1, -1), (1, paths.COMPONENTS)])
def test_what_is_out_of_bounds_is_an_error(count: int, component: int) -> None:
    with pytest.raises(ValueError, match="points"):
        paths.points(count, component, 0)
