"""One-dimensional clustering against the equations written plainly in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from bitsmith.numerics.palette import kmeans, looked_up, nearest, soft, uniform


def best_error(values: np.ndarray, count: int) -> float:
    """The least squared error of ``count`` clusters, which are intervals of the sorted values: dynamic programming."""
    x = np.sort(values.astype(np.float64))
    n = len(x)

    def error(i: int, j: int) -> float:
        return float(np.square(x[i:j] - x[i:j].mean()).sum())

    best = [0.0] + [error(0, j) for j in range(1, n + 1)]
    for _ in range(count - 1):
        best = [0.0] + [min(best[i] + (error(i, j) if i < j else 0.0) for i in range(j + 1)) for j in range(1, n + 1)]
    return best[n]


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_best_clusters(seed: int, count: int) -> None:
    values = np.random.default_rng(seed).normal(size=24)
    codebook = kmeans(torch.tensor(values)[None], count)
    found = looked_up(codebook, nearest(torch.tensor(values)[None].float(), codebook))[0].double().numpy()
    error = float(np.square(found - values).sum())
    least = best_error(values, count)
    assert error == pytest.approx(least, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("count", [4, 16])
def test_no_worse_than_the_best_of_ten_starts_of_scikit_learn(count: int) -> None:
    values = np.random.default_rng(count).standard_t(3, 5000)  # tails as weights have them
    codebook = kmeans(torch.tensor(values)[None], count)
    found = looked_up(codebook, nearest(torch.tensor(values)[None].float(), codebook))[0].double().numpy()
    least = KMeans(count, n_init=10, random_state=0).fit(values[:, None]).inertia_
    assert np.square(found - values).sum() <= 1.001 * least


def test_every_value_is_the_weighted_mean_of_its_members() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 500, generator=generator)
    importance = torch.rand(2, 500, generator=generator)
    codebook = kmeans(values, 8, importance)
    index = nearest(values, codebook)
    for row in range(2):
        for k in range(8):
            member = index[row] == k
            mean = (values[row, member].double() * importance[row, member]).sum() / importance[row, member].sum()
            assert float(codebook[row, k]) == pytest.approx(float(mean), rel=1e-3, abs=1e-4)


def test_importance_pulls_the_values() -> None:
    values = torch.linspace(0, 1, 101)[None]
    heavy = torch.where(values < 0.2, 1.0, 1e-4)
    plain, pulled = kmeans(values, 4), kmeans(values, 4, heavy)
    assert float(pulled[0, 1]) < float(plain[0, 1])
    assert torch.equal(kmeans(values, 4, torch.zeros_like(values)), plain)


@given(st.integers(1, 8), st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_few_different_values_are_kept(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, generator=generator)
    values = own[torch.randint(count, (3, 40), generator=generator)]
    codebook = kmeans(values, count)
    assert torch.equal(looked_up(codebook, nearest(values, codebook)), values)


def test_a_constant_row_and_a_row_by_itself() -> None:
    assert torch.equal(kmeans(torch.full((1, 9), 0.3), 4), torch.full((1, 4), 0.3))
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kmeans(rows, 5), torch.cat([kmeans(row[None], 5) for row in rows]))


def test_uniform_and_nearest() -> None:
    values = torch.tensor([[-1.0, 0.4, 2.0]])
    codebook = uniform(values, 4)
    torch.testing.assert_close(codebook, torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    distance = (x[0, :, None] - codebook[0]).abs()
    torch.testing.assert_close(looked_up(codebook, nearest(x, codebook))[0], codebook[0][distance.argmin(1)])


def test_soft_clusters_as_the_paper_writes_them() -> None:
    x = torch.randn(1, 30, generator=torch.Generator().manual_seed(2)).requires_grad_()
    start = torch.tensor([[-1.0, 0.0, 1.0]])
    found, centres = soft(x, start, 0.5, iterations=3)
    w, c = x.detach().double().numpy()[0], start.double().numpy()[0]
    for _ in range(3):
        d = -np.abs(w[:, None] - c) / 0.5  # the values it begins with lie 1 apart
        a = np.exp(d) / np.exp(d).sum(1, keepdims=True)
        c = (a * w[:, None]).sum(0) / a.sum(0)
    np.testing.assert_allclose(centres.detach().numpy()[0], c, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.detach().numpy()[0], a @ c, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_the_gradient_of_soft_clusters_goes_through_every_iteration() -> None:
    x = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    start = torch.tensor([[-1.0, 0.1, 1.0], [-0.5, 0.0, 0.7]], dtype=torch.float64)
    for iterations in (1, 2, 5):
        torch.autograd.gradcheck(lambda v, n=iterations: soft(v, start, 0.5, n), (x,))
