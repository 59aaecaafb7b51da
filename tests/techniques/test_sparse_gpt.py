"""SparseGPT against optimal brain surgery written out in float64, and against magnitude pruning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitsmith as bs
from bitsmith.technique import PrepareError
from smallnet import batches, small


def correlated(seed: int, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + 0.5 * torch.eye(width)
    return torch.randn(1, rows, width, generator=generator) @ mixing


def surgery(weight: Any, x: Any, density: float, block: int, damp: float) -> Any:
    """Weights go column by column; the columns behind take the optimal update of optimal brain surgeon, and the row and
    column of the inverse Hessian are eliminated. No Cholesky factor."""
    w = weight.copy()
    width = w.shape[1]
    hessian = 2 * x.T @ x
    hessian += damp * np.diag(hessian).mean() * np.eye(width)
    inverse = np.linalg.inv(hessian)
    # diagonal of the inverse of what is left when a column's turn comes
    felt, rest = np.zeros(width), inverse.copy()
    for k in range(width):
        felt[k] = rest[k, k]
        rest = rest - np.outer(rest[:, k], rest[k]) / rest[k, k]
    done = 0
    for start in range(0, width, block):
        stop = min(start + block, width)
        stays = max(1, round(density * w.shape[0] * stop)) - done
        done += stays
        score = w[:, start:stop] ** 2 / felt[start:stop]
        keep = np.zeros(score.size, dtype=bool)
        keep[np.argsort(score.ravel())[score.size - stays :]] = True
        keep = keep.reshape(score.shape)
        for k in range(start, stop):
            error = np.where(keep[:, k - start], 0.0, w[:, k]) / inverse[k, k]
            w -= np.outer(error, inverse[k])
            w[:, k] = np.where(keep[:, k - start], w[:, k], 0.0)
            inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return w


@given(st.integers(0, 50), st.sampled_from([0.25, 0.5]), st.sampled_from([4, 128]))
@settings(max_examples=15, deadline=None)
def test_it_is_optimal_brain_surgery(seed: int, density: float, block: int) -> None:
    x = correlated(seed, 80, 12)
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed + 1))
    found = bs.SparseGpt(block=block, damp=0.05).pruned(weight, x, bs.Sparse(density))
    wanted = surgery(weight.double().numpy(), x[0].double().numpy(), density, block, 0.05)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "sparse",
    [
        bs.Sparse(0.3),
        bs.Sparse(0.5, "n:m"),
        bs.Sparse(0.5, "kernel"),
        bs.Sparse(0.5, "block", block=(2, 2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_zeros_are_where_the_mask_will_be_and_the_output_is_nearer(sparse: bs.Sparse, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8 * groups, 8 * groups, 3, padding=1, groups=groups)
    mixing = nn.Conv2d(8 * groups, 8 * groups, 3, padding=1).requires_grad_(False)
    x = torch.relu(mixing(torch.randn(8, 8 * groups, 10, 10))) + 0.3
    model, data = nn.Sequential(conv), [(x, None)]
    plain = bs.apply(model, bs.Plan({"0": sparse}), data)
    better = bs.apply(model, bs.Plan({"0": sparse}, (bs.SparseGpt(),)), data)
    left = better.get_parameter("0.weight").detach()
    mask = dict(better.named_buffers())["_bitsmith.cells.0.makes.kept"].expand_as(left)
    assert int((left != 0).sum()) == int(mask.sum())
    assert not left[mask == 0].any()
    with torch.no_grad():
        errors = [float((net(x) - model(x)).square().mean()) for net in (better, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_layers_see_what_the_pruned_ones_before_give() -> None:
    data = batches(2, seed=0)
    sites = {name: bs.Sparse(0.3) for name, site in bs.sites(small(), data[0][0]).items() if bs.Sparse().fits(site)}
    plan = bs.Plan(sites)
    net = bs.apply(small(), plan.replace(prepare=(bs.SparseGpt(),)), data)
    plain = bs.apply(small(), plan, data)
    x, model = data[0][0], small()
    with torch.no_grad():
        errors = [float((n(x) - model(x)).square().mean()) for n in (net, plain)]
    assert errors[0] < errors[1]
    assert torch.equal(net(x), bs.apply(small(), plan.replace(prepare=(bs.SparseGpt(),)), data)(x))


def test_inside_other_techniques() -> None:
    data = batches(2, seed=0)
    name = next(name for name, site in bs.sites(small(), data[0][0]).items() if bs.Palette().fits(site))
    plan = bs.Plan({name: bs.Int(8, 8, of=bs.Palette(3, of=bs.Sparse(0.5)))}, (bs.SparseGpt(), bs.FisherPalettes(8)))
    net = bs.apply(small(), plan, data)
    assert float((net.get_parameter(f"{name}.weight") == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_nothing_to_do() -> None:
    with pytest.raises(PrepareError, match="Sparse"):
        bs.apply(small(), bs.Plan({}, (bs.SparseGpt(),)), batches(1))
    for options in ({"damp": 0.0}, {"block": 0}, {"samples": 0}, {"rows": 0}):
        with pytest.raises(ValueError, match="SparseGpt"):
            bs.SparseGpt(**options)  # type: ignore[arg-type]
