"""Distil: it trains what needs it, leaves the rest, and gives an ordinary model back."""

from __future__ import annotations

import pytest
import torch

import bitsmith as bs
from bitsmith.learn.distil import output_error
from smallnet import batches, small

BINARY = bs.Plan({"left": bs.Binary(), "right": bs.Binary()})


def distance(net: torch.nn.Module, model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(sum(output_error(net(x), model(x)) for x, _ in batches(4, seed=9)))


def test_a_plan_that_needs_training_comes_closer_to_the_float_network() -> None:
    model, data = small(), batches(6, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = bs.apply(model, BINARY, data)
    trained = bs.apply(model, BINARY.replace(prepare=(bs.Distil(steps=40, lr=3e-3),)), data)
    assert distance(trained, model) < 0.5 * distance(plain, model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    again = bs.apply(model, BINARY.replace(prepare=(bs.Distil(steps=40, lr=3e-3),)), data)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_a_plan_without_such_techniques_is_left_as_it_is_unless_asked() -> None:
    model, data, plan = small(), batches(6, seed=3), bs.Plan({"left": bs.Int(3, 4), "right": bs.Int(3, 4)})
    plain = bs.apply(model, plan, data)
    left = bs.apply(model, plan.replace(prepare=(bs.Distil(steps=3),)), data)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), left.parameters(), strict=True))
    trained = bs.apply(model, plan.replace(prepare=(bs.Distil(steps=40, always=True, distance="divergence"),)), data)
    assert distance(trained, model) < distance(plain, model)


def test_it_is_part_of_a_plan_on_disk(tmp_path) -> None:
    plan = BINARY.replace(prepare=(bs.Distil(steps=7),))
    plan.save(tmp_path / "plan.json")
    assert bs.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"distance": "far"}])
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"Distil\\({next(iter(bad))}"):
        bs.Distil(**bad)


def test_a_frozen_network_says_what_to_do() -> None:
    model = small().requires_grad_(False)
    with pytest.raises(bs.PrepareError, match="thaw"):
        bs.apply(model, bs.Plan({"left": bs.Binary()}, prepare=(bs.Distil(),)), batches(2))
