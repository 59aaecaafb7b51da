"""Quantizing in the memory of a fresh output changes no number and nobody else's tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmith.model import apply as module
from bitsmith.model.apply import apply
from bitsmith.plan import Plan
from bitsmith.site import Format, Record, Site
from bitsmith.technique import Cell, Technique
from bitsmith.techniques.int_ import Int


class Block(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu1, self.relu2 = nn.ReLU(inplace), nn.ReLU(inplace)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)) + y)
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


def planned(inplace: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Block(inplace).eval(), torch.randn(2, 3, 8, 8)
    plan = Plan(dict.fromkeys(("conv1", "conv2", ":add", "fc"), Int(8, 8)))
    return apply(model, plan, [(x, None)]), x


@pytest.mark.parametrize("inplace", [False, True])
def test_values_are_those_of_new_memory(inplace, monkeypatch):
    net, x = planned(inplace)
    kept = x.clone()
    with torch.no_grad():
        fast = net(x)
        assert torch.equal(net(x), fast)
        monkeypatch.setattr(module, "_frozen", lambda: False)
        slow = net(x)
    assert torch.equal(fast, slow)
    assert torch.equal(x, kept)
    with torch.enable_grad():
        assert torch.allclose(net(x), fast, atol=1e-5)


class _Remembering(Cell):
    """Returns the same tensor at every call, so it may not be overwritten."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.last: Tensor | None = None

    def forward(self, *operands: Any, **rest: Any) -> Any:
        if self.last is None:
            self.last = self.op(*operands, **rest)
        return self.last


@dataclass(frozen=True)
class Remembering(Technique):
    def fits(self, site: Site) -> bool:
        return True

    def writes(self, site: Site) -> Format:
        return Format(8)

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _Remembering(site)


def test_a_cell_that_keeps_its_output_is_not_overwritten():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    net = apply(model, Plan({"0": Remembering()}), [(x, None)])
    with torch.no_grad():
        net(x)
        (cell,) = (m for m in net.modules() if isinstance(m, _Remembering))
        assert torch.equal(cell.last, model[0](x))
