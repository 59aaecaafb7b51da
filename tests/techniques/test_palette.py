"""Palettes: values, gradients, sizes, what stands inside them and what they stand inside, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.numerics.palette import kmeans


def block() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()


X = torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def weight_of(net: nn.Module, x: Tensor = X) -> Tensor:
    """What the first cell computes with, the normalisation folded in."""
    from bitsmith.model.apply import additions_of, materialised

    replica = materialised(net, lambda module: module(x))
    return additions_of(replica).cells["0"].get_buffer("weight_f")


@given(st.integers(1, 6), st.sampled_from([0, 1, 2, 4]), st.sampled_from(["kmeans", "uniform"]))
@settings(max_examples=20, deadline=None)
def test_each_weight_is_the_nearest_value(w: int, group: int, init: Any) -> None:
    technique = bs.Palette(w, init, group)
    site = bs.sites(block(), X)["0"]
    if not technique.fits(site):
        return
    net = bs.apply(block(), bs.Plan({"0": technique}), [(X, None)])
    weight = block()[0].weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().double().reshape(8 // group if group else 1, -1)
    if init == "uniform":
        values = torch.stack([torch.linspace(0, 1, 2**w).double() * (r.max() - r.min()) + r.min() for r in rows])
    else:
        values = kmeans(rows, 2**w).double()
    wanted = torch.stack([v[(r[:, None] - v).abs().argmin(1)] for r, v in zip(rows, values, strict=True)])
    found = weight_of(net).double().reshape(wanted.shape)
    # a weight halfway between two values may fall either way
    assert (found - wanted).abs().gt(1e-5).float().mean() < 0.01
    assert all(len(row.unique()) <= 2**w for row in found)


def test_the_network_computes_with_them() -> None:
    net = bs.apply(block(), bs.Plan({"0": bs.Palette(3)}), [(X, None)])
    norm = block()[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        shift = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        wanted = block()[4](
            torch.relu(nn.functional.conv2d(X, weight_of(net) * factor[:, None, None, None], shift)).flatten(1)
        )
        torch.testing.assert_close(net(X), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.train()(X), block().train()(X), rtol=0.5, atol=0.5)


def test_given_values_and_zero_for_pruned_weights() -> None:
    net = bs.apply(block(), bs.Plan({"0": bs.Palette(2, values=(0.5, -0.5, 0.0))}), [(X, None)])
    assert set(weight_of(net).unique().tolist()) <= {-0.5, 0.0, 0.5}
    technique = bs.Palette(2, of=bs.Sparse(0.4))
    pruned = weight_of(bs.apply(block(), bs.Plan({"0": technique}), [(X, None)]))
    kept = bs.Sparse(0.4).mask(block()[0].weight)  # type: ignore[arg-type]
    assert not pruned[kept == 0].any()
    assert len(pruned.unique()) == 4


def test_of_integers_the_values_are_integers() -> None:
    technique = bs.Int(8, None, of=bs.Palette(3, of=bs.Sparse(0.5)))
    net = bs.apply(block(), bs.Plan({"0": technique}), [(X, None)])
    from bitsmith.model.apply import additions_of, materialised

    cell = additions_of(materialised(net, lambda module: module(X))).cells["0"]
    integers = cell.get_buffer("weight_q")
    assert integers.dtype == torch.int8
    assert len(integers.unique()) <= 8
    assert (integers == 0).float().mean() >= 0.5
    norm, weight = block()[1], block()[0].weight
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(weight, Tensor)
    folded = weight.double() * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None].double()  # type: ignore[operator]
    steps = folded / (folded.abs().amax((1, 2, 3), keepdim=True) / 127)
    steps = torch.where(bs.Sparse(0.5).mask(weight) == 1, steps, 0.0)
    values = integers.unique().double()
    distance = (steps[..., None] - values).abs()
    wanted = values[distance.argmin(-1)]
    assert (wanted != integers).float().mean() < 0.02


@pytest.mark.parametrize("learn", ["straight_through", "soft"])
def test_training_lowers_the_loss(learn: Any) -> None:
    torch.manual_seed(0)
    teacher, start = block(), block()
    data = [(torch.randn(32, 4, 6, 6), None) for _ in range(4)]
    data = [(x, teacher(x).detach()) for x, _ in data]
    plan = bs.Plan(dict.fromkeys(("0", "4"), bs.Palette(2, learn=learn)))
    net = bs.apply(start, plan, data)

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([float(nn.functional.mse_loss(net.eval()(x), y)) for x, y in data]))

    before = loss(net)
    net = bs.finetune(net, data, nn.functional.mse_loss, steps=60, seed=0)
    assert loss(net) < before
    assert len(weight_of(net).unique()) <= 4  # hard in evaluation


def test_sizes_charge_the_palette() -> None:
    site = bs.sites(block(), X)["0"]
    norm = 8 * 32  # its factor by channel
    assert bs.Palette(4).bits(site) == 288 * 4 + 16 * 32 + norm
    assert bs.Palette(2, group=2).bits(site) == 288 * 2 + 4 * 4 * 32 + norm
    assert bs.Palette(2, values=(0.0, 1.0, 2.0)).bits(site) == 288 * 2 + 3 * 32 + norm
    assert bs.Palette(4, of=bs.Sparse(0.25)).bits(site) == 72 * 4 + 288 + 16 * 32 + norm
    assert bs.Palette(1, of=bs.Sparse(0.5)).bits(site) == 288 + 2 * 32 + norm  # an index for all is less than a bitmap
    assert bs.Int(8, 8, of=bs.Palette(4)).bits(site) == 288 * 4 + 16 * 8 + 8 * 32
    assert bs.Int(8, 8, of=bs.Sparse(0.25)).bits(site) == 72 * 8 + 288 + 8 * 32


def test_what_does_not_fit_says_why() -> None:
    site = bs.sites(block(), X)["0"]
    assert "larger than the 36 weights" in str(bs.Palette(6, group=1).fits(site))
    assert "groups of 3" in str(bs.Palette(2, group=3).fits(site))
    assert "m=8" in str(bs.Palette(2, of=bs.Sparse(0.5, "n:m", m=8)).fits(site))
    with pytest.raises(ValueError, match="larger than"):
        bs.apply(nn.Sequential(nn.Linear(3, 4)), bs.Plan({"0": bs.Palette(4)}), [(torch.zeros(1, 3), None)])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: bs.Palette(0), "1 to 8"),
        (lambda: bs.Palette(9), "1 to 8"),
        (lambda: bs.Palette(init="random"), "kmeans"),  # type: ignore[arg-type]
        (lambda: bs.Palette(1, values=(1, 2, 3)), "at most"),
        (lambda: bs.Palette(group=-1), "share a palette"),
        (lambda: bs.Palette(of=bs.Palette(2)), "another technique"),
        (lambda: bs.Palette(of=bs.Int(8, 8)), "another technique"),  # type: ignore[arg-type]
        (lambda: bs.Palette(temperature=0.0), "above 0"),
        (lambda: bs.Palette(learn="values"), "straight_through"),  # type: ignore[arg-type]
        (lambda: bs.Int(8, 8, of=bs.Float()), "another technique"),  # type: ignore[arg-type]
        (lambda: bs.Int(4, None, granularity="group", group=2, of=bs.Palette(2)), "one symmetric scale"),
    ],
)
def test_impossible_settings(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_a_plan_file_keeps_what_stands_inside(tmp_path: Any) -> None:
    plan = bs.Plan({"0": bs.Int(8, 8, of=bs.Palette(4, of=bs.Sparse(0.5, "block", block=(2, 1))))})
    assert bs.Plan.load(plan.save(tmp_path / "plan.json")) == plan
