"""Magnitude pruning: which weights are left, their gradients, their size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitsmith as bs
from bitsmith.model.apply import additions_of


def pruned(model: nn.Module, x: torch.Tensor, technique: bs.Sparse) -> nn.Module:
    return bs.apply(nn.Sequential(model), bs.Plan({"0": technique}), [(x, None)])


@given(st.floats(0.01, 1.0), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_the_largest_weights_are_left(density: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Linear(12, 7), torch.randn(3, 12)
    net = pruned(model, x, bs.Sparse(density))
    weight = model.weight.detach().double().numpy()
    left = max(1, round(density * weight.size))
    limit = np.sort(np.abs(weight).ravel())[-left]
    wanted = x.double().numpy() @ np.where(np.abs(weight) >= limit, weight, 0).T + model.bias.detach().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_whole_kernels_by_their_norm() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    net = pruned(model, x, bs.Sparse(0.25, "kernel"))
    norms = model.weight.detach().double().square().sum((2, 3)).numpy()
    kept = norms >= np.sort(norms.ravel())[-6]
    weight = model.weight.detach() * torch.from_numpy(kept)[:, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(net(x), torch.nn.functional.conv2d(x, weight, model.bias))
    net(x).sum().backward()
    grad = net.get_parameter("0.weight").grad
    assert grad is not None
    assert (grad.abs().sum((2, 3)).numpy() > 0).tolist() == kept.tolist()


def test_size_counts_weights_and_where_they_are() -> None:
    site = bs.sites(nn.Sequential(nn.Conv2d(16, 16, 3)), torch.zeros(1, 16, 5, 5))["0"]
    assert bs.Sparse(0.5).bits(site) == 32 * 1152 + 2304  # a bitmap
    assert bs.Sparse(0.01).bits(site) == 23 * (32 + 12)  # indices
    assert bs.Sparse(0.5, "kernel").bits(site) == 32 * 128 * 9 + 256


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_impossible_densities(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        bs.Sparse(density)


def test_impossible_granularity() -> None:
    with pytest.raises(ValueError, match="row"):
        bs.Sparse(0.5, "row")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "n:m", "density": 0.3},
        {"m": 0},
        {"block": (0, 1)},
        {"first": 0.0},
        {"schedule": "linear"},
        {"begin": 0.5, "end": 0.5},
        {"every": 0},
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Sparse"):
        bs.Sparse(**options)


def test_what_does_not_divide_is_refused() -> None:
    site = bs.sites(nn.Sequential(nn.Conv2d(6, 8, 3)), torch.zeros(1, 6, 5, 5))["0"]
    assert "m=4" in str(bs.Sparse(0.5, "n:m").fits(site))
    assert "(3, 1)" in str(bs.Sparse(0.5, "block", block=(3, 1)).fits(site))
    assert bs.Sparse(0.5, "n:m", m=2).fits(site)
    assert bs.Sparse(0.5, "block").fits(site)
    with pytest.raises(ValueError, match="m=4"):
        bs.apply(
            nn.Sequential(nn.Conv2d(6, 8, 3)), bs.Plan({"0": bs.Sparse(0.5, "n:m")}), [(torch.zeros(1, 6, 5, 5), None)]
        )


def test_sizes_of_structures() -> None:
    site = bs.sites(nn.Sequential(nn.Conv2d(16, 16, 3)), torch.zeros(1, 16, 5, 5))["0"]
    assert bs.Sparse(0.5, "n:m").bits(site) == 32 * 1152 + 2304  # a bit each is as much as 2 for each that is left
    assert bs.Sparse(0.25, "n:m").bits(site) == 32 * 576 + 576 * 2
    assert bs.Sparse(0.5, "block").bits(site) == 32 * 288 * 4 + 576


def test_the_polynomial_schedule_opens_and_closes() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(16, 8), torch.randn(16, 4)) for _ in range(3)]
    technique = bs.Sparse(0.25, schedule="polynomial", end=0.8, every=1)
    net = bs.apply(nn.Sequential(nn.Linear(8, 4)), bs.Plan({"0": technique}), data)
    cell = additions_of(net).cells["0"]
    assert isinstance(cell, bs.Cell)
    mask = dict(cell.named_buffers())["makes.kept"]
    assert int(mask.sum()) == 8  # without training it is as sparse as asked
    seen = []
    for done in range(20):
        cell.step(done, 20)
        net(data[0][0])
        seen.append(int(mask.sum()))
    for done, count in enumerate(seen):
        sparsity = 0.75 * (1 - (1 - min((done + 1) / 20 / 0.8, 1)) ** 3)
        assert count == max(1, round((1 - sparsity) * 32))
    assert seen[-1] == 8
    trained = bs.finetune(net, data, nn.functional.mse_loss, steps=20, seed=1)
    assert int(dict(trained.named_buffers())["_bitsmith.cells.0.makes.kept"].sum()) == 8
