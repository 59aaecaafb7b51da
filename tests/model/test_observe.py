"""Cells see the arguments of the top-level forward, by name, at its start."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import bitsmith as bs


@dataclass(frozen=True)
class Watching(bs.Technique):
    """Notes what it is shown (no source)."""

    def fits(self, site):
        return True

    def build(self, site, record, rng):
        return _Cell(site)


class _Cell(bs.Cell):
    def __init__(self, site):
        super().__init__(site)
        self.told = []

    def reset(self):
        self.told.append("reset")

    def observe(self, inputs):
        self.told.append(dict(inputs))

    def forward(self, x, weight, **rest):
        self.told.append("forward")
        return self.op(x, weight, **rest)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, factor=1.0, *, shift=0.0):
        return self.layer(x) * factor + shift


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, *inputs):
        return self.layer(inputs[0]) + inputs[1]


def watched(model, inputs):
    net = bs.apply(model, bs.Plan({"layer": Watching()}), [(inputs, None)])
    return net, net._bitsmith.cells["layer"].told


def test_arguments_by_name_behind_the_reset() -> None:
    x = torch.ones(4, 3)
    net, told = watched(Scaled(), x)
    net(x, 2.0, shift=1.0)
    assert told[0] == "reset"
    assert told[1].keys() == {"x", "factor", "shift"}
    assert told[1]["x"] is x
    assert (told[1]["factor"], told[1]["shift"], told[2]) == (2.0, 1.0, "forward")
    told.clear()
    net(factor=3.0, x=x)
    assert told[1] == {"factor": 3.0, "x": x}


def test_any_number_of_arguments_is_numbered() -> None:
    x = torch.ones(4, 3)
    net, told = watched(Many(), (x, torch.ones(2)))
    net(x, torch.zeros(2))
    assert list(told[1]) == ["input0", "input1"]


def test_a_copy_shows_its_own_cells() -> None:
    x = torch.ones(4, 3)
    net, told = watched(Scaled(), x)
    other = copy.deepcopy(net)
    other(x)
    assert not told
    assert len(other._bitsmith.cells["layer"].told) == 3


def test_what_is_raised_there_reaches_the_caller() -> None:
    class Refusing(_Cell):
        def observe(self, inputs):
            raise ValueError("not these")

    @dataclass(frozen=True)
    class Refuse(bs.Technique):
        """Refuses (no source)."""

        def fits(self, site):
            return True

        def build(self, site, record, rng):
            return Refusing(site)

    net = bs.apply(Scaled(), bs.Plan({"layer": Refuse()}), [(torch.ones(4, 3), None)])
    for _ in range(2):
        with pytest.raises(ValueError, match="not these"):
            net(torch.ones(4, 3))
