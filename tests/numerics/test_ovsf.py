"""The codes, the choice among them, and least squares, against plain recursion and plain search in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics import ovsf


def recursion(length: int) -> list[list[int]]:
    codes = [[1]]
    while len(codes) < length:
        codes = [child for c in codes for child in (c + c, c + [-x for x in c])]
    return codes


AXES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("length", [1, 2, 4, 32])
def test_tree_is_the_recursion_and_orthogonal(length: int) -> None:
    tree = ovsf.tree(length)
    assert tree.tolist() == recursion(length)
    assert torch.equal(tree.long() @ tree.long().T, length * torch.eye(length, dtype=torch.int64))


@pytest.mark.parametrize("length", [0, 3, -4])
def test_other_lengths_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        ovsf.tree(length)


@given(AXES)
@settings(max_examples=30, deadline=None)
def test_codes_are_rows_of_the_tree_laid_out_and_cropped(axes: tuple[int, ...]) -> None:
    box = ovsf.box(axes)
    whole = np.array(recursion(math.prod(box))).reshape(-1, *box)
    wanted = whole[(slice(None), *(slice(size) for size in axes))]
    np.testing.assert_array_equal(ovsf.codes(torch.arange(len(whole)), axes).numpy(), wanted)


def test_the_first_codes_of_the_tree_are_dependent_once_cropped() -> None:
    matrix = ovsf.codes(torch.arange(16), (3, 3)).flatten(1).double()
    ranks = [int(torch.linalg.matrix_rank(matrix[:count])) for count in range(1, 17)]
    assert ranks[7] == 6
    assert ranks.index(9) + 1 == 11


@given(AXES, st.integers(1, 6), st.integers(0, 10**6), st.data())
@settings(max_examples=40, deadline=None)
def test_each_choice_takes_the_most_energy(axes: tuple[int, ...], vectors: int, seed: int, data: st.DataObject) -> None:
    values = torch.randn(vectors, *axes, generator=torch.Generator().manual_seed(seed))
    count = data.draw(st.integers(1, math.prod(axes)))
    index = ovsf.chosen(values, count).tolist()
    assert len(set(index)) == count
    every = np.array(recursion(math.prod(ovsf.box(axes)))).reshape(-1, *ovsf.box(axes))
    every = every[(slice(None), *(slice(size) for size in axes))].reshape(len(every), -1).astype(float)
    wanted = values.double().reshape(vectors, -1).numpy()
    assert np.linalg.matrix_rank(every[index]) == count
    basis = np.zeros((0, every.shape[1]))
    for code in index:  # plain search: the gain of every code that is independent of those before
        left = every - every @ basis.T @ basis
        norms = np.linalg.norm(left, axis=1)
        gains = np.where(norms > 1e-3, ((left @ wanted.T) ** 2).sum(1) / np.maximum(norms, 1e-9) ** 2, -1.0)
        assert gains[code] >= gains.max() - 1e-6 * (1 + gains.max())
        basis = np.vstack((basis, left[code] / norms[code]))


@given(AXES, st.integers(1, 5), st.integers(0, 10**6), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_coefficients_are_least_squares(
    axes: tuple[int, ...], vectors: int, seed: int, first: bool, data: st.DataObject
) -> None:
    values = torch.randn(vectors, *axes, generator=torch.Generator().manual_seed(seed))
    count = data.draw(st.integers(1, math.prod(axes)))
    index = ovsf.first(count) if first else ovsf.chosen(values, count)
    matrix = ovsf.codes(index, axes).flatten(1).double().numpy()
    wanted = np.linalg.lstsq(matrix.T, values.double().flatten(1).numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(ovsf.coefficients(values, index).numpy(), wanted, atol=1e-8)


def test_weights_that_are_zero_have_independent_codes_too() -> None:
    index = ovsf.chosen(torch.zeros(4, 3, 3), 9)
    assert int(torch.linalg.matrix_rank(ovsf.codes(index, (3, 3)).flatten(1).double())) == 9


@pytest.mark.parametrize("count", [0, 10])
def test_impossible_counts(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 9"):
        ovsf.chosen(torch.zeros(2, 3, 3), count)
