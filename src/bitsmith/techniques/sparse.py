"""Sparse: the largest weights are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..site import Record, Site
from ..technique import Cell, No, Technique
from ._masked import MaskedCell, refusal


@dataclass(frozen=True)
class Sparse(Technique):
    """Magnitude pruning (Han et al. 2015, arXiv:1506.02626): the largest weights of a layer are left, the others are 0.

    ``density``: the part that is left, above 0 and at most 1. ``granularity``: single weights by magnitude, or whole
    kernels, between one input and one output channel, by their Euclidean norm. Which are left is decided once, by the
    weights that ``apply`` finds; training goes on with these. For convolutions and linear layers.

    >>> Sparse(0.1)
    Sparse(density=0.1, granularity='weight')
    """

    density: float = 0.5
    granularity: Literal["weight", "kernel"] = "weight"

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"Sparse(density={self.density}): must be above 0 and at most 1")
        if self.granularity not in ("weight", "kernel"):
            raise ValueError(f"Sparse(granularity={self.granularity!r}): must be 'weight' or 'kernel'")

    def fits(self, site: Site) -> bool | No:
        reason = refusal(site)
        return No(reason) if reason else True

    def bits(self, site: Site) -> float:
        """What is left in float32, and where it is: a bit for each that could be, or the index of each that is."""
        weight = site.weight
        if weight is None or refusal(site):  # stored as it was
            return super().bits(site)
        size = 1 if self.granularity == "weight" else math.prod(weight.shape[2:])
        places = weight.numel // size
        left = self.left(places)
        return 32.0 * left * size + min(places, left * math.ceil(math.log2(places)))

    def left(self, places: int) -> int:
        """How many of ``places`` stay: at least one.

        >>> Sparse(0.25).left(10)
        2
        """
        return max(1, round(self.density * places))

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        weight = record.weights[site.name, 1].detach().float()
        if self.granularity == "weight":
            size = weight.abs()
        else:
            size = weight.flatten(2).norm(dim=2) if weight.dim() > 2 else weight.abs()
        kept = torch.zeros(size.numel(), dtype=torch.int8)
        kept[size.flatten().topk(self.left(size.numel())).indices] = 1
        kept = kept.reshape(size.shape)
        return MaskedCell(site, kept.reshape(*size.shape, *[1] * (weight.dim() - size.dim())))
