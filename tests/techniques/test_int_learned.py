"""Int whose grids are trained: the same values at the start, gradients in training, integers at the end."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import additions_of
from bitsmith.numerics.grid import Grid
from bitsmith.numerics.quantizer import Quantizer
from smallnet import batches, small

SITES = ("stem", "left", "right", "head")


def applied(**changes: Any) -> nn.Module:
    return bs.apply(small(), bs.Plan(dict.fromkeys(SITES, bs.Int(4, 4, **changes))), batches(2))


def grids(net: nn.Module) -> dict[str, Grid]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Grid)}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("form", ["fixed", "step"])
def test_nothing_changes_before_training(granularity: Any, form: Any) -> None:
    learn = bs.Learn(form, backward="ewgs")
    plain, learned = applied(granularity=granularity), applied(granularity=granularity, learn=learn, weight_learn=learn)
    x = batches(1, seed=5)[0][0]
    with torch.no_grad():
        assert torch.equal(plain(x), learned(x))
    torch.testing.assert_close(plain.train()(x), learned.train()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["step", "step_range"])
def test_training_moves_every_grid_and_lowers_the_loss(form: Any) -> None:
    torch.manual_seed(0)
    net = bs.apply(
        small(),
        bs.Plan(dict.fromkeys(SITES, bs.Int(2, 2, learn=bs.Learn(form), weight_learn=bs.Learn(form)))),
        batches(2),
    )
    data = batches(30, seed=6)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(F.cross_entropy(net(x), y)) for x, y in batches(4, seed=9))

    before, frozen = loss(), copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for x, y in data:  # anyone's own loop
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert loss() < 0.7 * before
    for (name, grid), old in zip(grids(net).items(), grids(frozen).values(), strict=True):
        for parameter, first in zip(grid.parameters(), old.parameters(), strict=True):
            assert not torch.equal(parameter, first), name


def test_one_grid_belongs_to_a_tensor_and_is_stored_once() -> None:
    net = applied(learn=bs.Learn())
    assert len([key for key in net.state_dict() if key.endswith("log_step")]) == len(additions_of(net).tensors)
    again = applied(learn=bs.Learn())
    with torch.no_grad():
        for grid in grids(net).values():
            grid.log_step.add_(0.5)
    again.load_state_dict(net.state_dict())
    x = batches(1, seed=5)[0][0]
    with torch.no_grad():
        assert torch.equal(net(x), again(x))
    assert not torch.equal(applied()(x), again(x))


def test_values_without_a_gradient_follow_the_grid() -> None:
    learn = bs.Learn("step_range")
    net = applied(learn=learn, weight_learn=learn)
    quantizer = next(module for module in net.modules() if isinstance(module, Quantizer))
    x = torch.randn(4, 8, 5, 5).relu()
    with torch.no_grad():
        assert quantizer.grid is not None
        quantizer.grid.log_step.add_(1.3)
        quantizer.grid.log_range.sub_(0.4)
    through = quantizer(x)  # a parameter of its own asks for a gradient
    with torch.no_grad():
        plain = quantizer(x)
    assert through.requires_grad
    torch.testing.assert_close(plain, through.detach(), atol=1e-5, rtol=1e-5)
    step, low, high = (float(value.detach()) for value in quantizer.grid.values())
    assert float(quantizer.scale) == pytest.approx(step)
    assert len(plain.unique()) <= round((high - low) / step) + 1
    assert quantizer.fmt.bits < 4
    with torch.no_grad():
        integers = quantizer.integers(x).float()
        torch.testing.assert_close((integers - float(quantizer.zero_point)) * step, plain)


def test_what_was_learned_is_the_plan_of_the_trained_network() -> None:
    learn = bs.Learn("step_range")
    net = applied(learn=learn, weight_learn=learn)
    with torch.no_grad():
        for name, grid in grids(net).items():
            grid.log_step.add_(1.2 if "cells" in name else 0.0)
    trained = bs.finetune(net, batches(1), F.cross_entropy, steps=1, lr=1e-9)
    found = bs.plan_of(trained)["left"]
    assert isinstance(found, bs.Int)
    assert (found.w, found.a) == (3, 4)
    assert bs.plan_of(net)["left"] == bs.Int(4, 4, learn=learn, weight_learn=learn)  # not in place


def test_learned_grids_export_and_run_as_simulated(tmp_path: Path) -> None:
    learn = bs.Learn("step", backward="inverse_tanh")
    target = bs.targets.OnnxRuntime(threads=1)
    model, data = small(), batches(4)
    plan = bs.plan_of(bs.quantize(model, data, target, prepare=(), choose=False))
    sites = {
        name: _learning(technique, learn) for name, technique in plan.sites.items() if isinstance(technique, bs.Int)
    }
    net = bs.finetune(bs.apply(model, bs.Plan(sites), data), data, F.cross_entropy, steps=20, lr=3e-3)
    assert all(bool(grid.log_step.any()) for grid in grids(net).values())
    x = data[0][0][:1]
    artifact = bs.export(net, target, tmp_path / "net.onnx", x)
    (got,) = target.run(artifact, [x.numpy()])
    with torch.no_grad():
        expected: Tensor = net(x)
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-2 * float(expected.abs().max()))
    realised = target.inspect(artifact)
    assert {realised[name].precision for name in sites} == {"int8"}


def _learning(technique: bs.Int, learn: bs.Learn) -> bs.Int:
    out = None if technique.out is None else dataclasses.replace(technique.out, learn=learn)
    return dataclasses.replace(technique, learn=learn, weight_learn=learn, out=out)


def test_a_plan_with_learned_grids_is_a_file_like_any_other(tmp_path: Path) -> None:
    learn = bs.Learn("step_range", "ewgs", 0.01)
    plan = bs.Plan({"left": bs.Int(4, 4, learn=learn, weight_learn=bs.Learn("fixed", "tanh"))})
    assert bs.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert bs.Int(4, 4, learn=learn).label() == "Int(w=4, a=4, learn=step_range)"


@pytest.mark.parametrize(
    "bad",
    [
        {"a": None, "learn": bs.Learn()},
        {"a": 16, "learn": bs.Learn()},
        {"affine_weights": True, "weight_learn": bs.Learn()},
    ],
)
def test_what_cannot_be_learned_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="learned"):
        bs.Int(4, **bad)
