"""Small layers for tests of Winograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import computer_of


class Normalised(nn.Module):
    """A 3x3 convolution, a normalisation that has seen something, and a ReLU."""

    def __init__(self, channels: int = 5, out: int = 6, pads: Any = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=pads, bias=bias)
        self.norm = nn.BatchNorm2d(out)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias, std=0.3)
        nn.init.normal_(self.norm.running_mean, std=0.3)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def one(layer: nn.Module, technique: bs.Technique, *data: Tensor) -> tuple[nn.Module, Any]:
    """The layer (the site ``0``) under a technique, in eval, and its cell."""
    net = bs.apply(nn.Sequential(layer).eval(), bs.Plan({"0": technique}), [(x, None) for x in data])
    return net, computer_of(net).cells["0"]
