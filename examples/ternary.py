"""A technique of one's own: ternary weights. It plugs in without a change to Bitsmith."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitsmith.site import Record, Site
from bitsmith.technique import Cell, No, Technique


@dataclass(frozen=True)
class Ternary(Technique):
    """Ternary weights (Li et al. 2016, arXiv:1605.04711, eqs. 3, 5 and 6): each is -s, 0 or +s.

    ``threshold``: weights below that fraction of the mean magnitude become 0. One scale s per output channel.
    """

    threshold: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"Ternary(threshold={self.threshold}): must be a number, 0 or more")

    def fits(self, site: Site) -> bool | No:
        if site.kind not in ("conv2d", "linear"):
            return No(f"only conv2d and linear have output channels first; this is {site.kind}")
        if site.weight is None:
            return No("it has no weight: both operands are activations")
        return True

    def bits(self, site: Site) -> float:
        """log2(3) bits a weight, and one float32 scale for each output channel."""
        weight = site.weight
        return weight.numel * math.log2(3) + 32.0 * weight.shape[0] if weight is not None else 0.0

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _TernaryCell(site, self.threshold)


class _TernaryCell(Cell):
    def __init__(self, site: Site, threshold: float) -> None:
        super().__init__(site)
        self.threshold = threshold

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        return self.op(self.read(0, x), ternary(weight, self.threshold), **rest)


def ternary(weight: Tensor, threshold: float) -> Tensor:
    """(out, ...) -> the same shape, three values per output channel; the gradient passes straight through."""
    rows = weight.detach().flatten(1)
    magnitude = rows.abs()
    kept = magnitude > threshold * magnitude.mean(1, keepdim=True)
    # the scale with the least squared error is the mean magnitude of what is kept (eq. 5)
    scale = (magnitude * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    values = (rows.sign() * kept * scale).view_as(weight)
    return weight + (values - weight).detach()
