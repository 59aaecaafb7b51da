"""Magnitude pruning: which weights are left, their gradients, their size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitsmith as bs


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
    with pytest.raises(ValueError, match="block"):
        bs.Sparse(0.5, "block")  # type: ignore[arg-type]
