"""Adder: L1 distances in place of products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..numerics import adder
from ..numerics.straight_through import rounded
from ..site import Record, Site
from ..technique import Cell, No, Technique
from ._masked import refusal

_MOMENTUM = 0.1
"""Of the range of the inputs."""


@dataclass(frozen=True)
class Adder(Technique):
    """Adder layers (Chen et al. 2020, arXiv:1912.13200): ``Y = -sum |X - F|`` over what an output sees, plus the bias.

    Convolutions in one and two dimensions and linear layers, with the filters F in the weight's place. Zeros that a
    convolution pads with count as any X. Outputs are never positive before the bias: a normalisation must follow. The
    first and the last layer of a network stay as they are, as in the paper.

    ``gradient`` of the filters: ``full``, that of half the squared difference, ``X - F``; or ``sign``, the true one, a
    control. That of the input is clipped, ``clamp(F - X, -1, 1)``. ``rate``, the paper's eta: the filters' gradient of
    the layer is then scaled to the norm ``eta sqrt(k)``, k being its number of weights, in every backward pass; None
    leaves it as it is.

    ``precision``: bits of inputs and filters, 4 to 16, symmetric; None for float. Differences of integers need one grid
    for both: ``scales`` ``shared`` has the scale that the greater of both ranges needs (Wang et al. 2021,
    arXiv:2101.10015), ``separate`` one for each, a control that must multiply before it subtracts. The range of the
    inputs is a running mean of the greatest magnitudes of batches in training mode, as calibration sees the float
    network, which computes products here; before the first every batch is rounded in its own range.

    Needs training, best from filters of deviation 1. No runtime here has a kernel of distances: what is exported
    subtracts, takes magnitudes and adds in float, at a layer's memory many times over.

    >>> Adder(precision=8)
    Adder(gradient='full', rate=0.2, precision=8, scales='shared')
    """

    needs_training: ClassVar[bool] = True

    gradient: Literal["full", "sign"] = "full"
    rate: float | None = 0.2
    precision: int | None = None
    scales: Literal["shared", "separate"] = "shared"

    def __post_init__(self) -> None:
        if self.gradient not in ("full", "sign"):
            raise ValueError(f"Adder(gradient={self.gradient!r}): must be 'full' or 'sign'")
        number = isinstance(self.rate, (int, float)) and not isinstance(self.rate, bool)
        if self.rate is not None and not (number and 0.0 < self.rate < float("inf")):
            raise ValueError(f"Adder(rate={self.rate!r}): must be above 0 and finite, or None")
        if self.precision is not None and not (isinstance(self.precision, int) and 4 <= self.precision <= 16):
            raise ValueError(f"Adder(precision={self.precision!r}): must be 4 to 16 bits, or None for float")
        if self.scales not in ("shared", "separate"):
            raise ValueError(f"Adder(scales={self.scales!r}): must be 'shared' or 'separate'")

    def fits(self, site: Site) -> bool | No:
        reason = refusal(site)
        if reason:
            return No(reason)
        if site.kind == "conv3d":
            return No("a convolution in three dimensions has no adder form here")
        dims = {"conv1d": 3, "conv2d": 4}.get(site.kind)
        if dims is not None and len(site.operands[0].shape) != dims:
            return No(f"its input has {len(site.operands[0].shape)} dimensions; one of batch is needed")
        return True

    def bits(self, site: Site) -> float:
        """Filters in ``precision`` bits and a float32 scale, or two; in float32."""
        weight = site.weight
        if weight is None or not self.fits(site) or self.precision is None:
            return super().bits(site)
        return float(weight.numel * self.precision + 32 * (1 if self.scales == "shared" else 2))

    def keeps_function(self) -> bool:
        return False

    def operations(self, site: Site) -> Mapping[str, float]:
        """A difference and a sum for each multiply-accumulate that there was."""
        return {"subtract": site.macs, "add": site.macs}

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _AdderCell(site, self)


class _AdderCell(Cell):
    """Distances to the filters. ``greatest``: float32 (), the range of the inputs; ``seen``: int64 (), batches that it
    was made of."""

    fresh = True

    def __init__(self, site: Site, technique: Adder) -> None:
        super().__init__(site)
        adder.load()
        self.technique = technique
        self.geometry = _geometry(site)
        self.greatest: Tensor
        self.seen: Tensor
        if technique.precision is not None:
            self.register_buffer("greatest", torch.zeros(()))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        given = self.read(0, x)
        if self.technique.precision is not None:
            given, weight = self._rounded(given, weight, self.technique.precision)
        found = self._distances(given, weight)
        bias = rest.get("bias")
        if bias is None:
            return found
        shift: Tensor = (bias if self.kind == "linear" else bias.view(-1, *[1] * (found.dim() - 2))).to(found.dtype)
        return found + shift

    def _rounded(self, x: Tensor, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        limit = 2 ** (bits - 1) - 1
        with torch.no_grad():
            here = x.detach().abs().max().float()
            if self.training:
                share = torch.where(self.seen == 0, 1.0, _MOMENTUM)
                self.greatest.copy_(self.greatest.lerp(here, share))
                self.seen.add_(1)
            of_input = torch.where(self.seen == 0, here, self.greatest)
            of_filters = weight.detach().abs().max().float()
            if self.technique.scales == "shared":
                of_input = of_filters = torch.maximum(of_input, of_filters)
            steps = [(limit_of.clamp(min=1e-12) / limit).to(weight.dtype) for limit_of in (of_input, of_filters)]
        on_grid = rounded(x.to(weight.dtype) / steps[0], limit) * steps[0]
        return on_grid.to(x.dtype), rounded(weight / steps[1], limit) * steps[1]

    def _distances(self, x: Tensor, weight: Tensor) -> Tensor:
        how = self.geometry, self.technique.gradient, self.technique.rate
        if self.kind == "linear":
            return adder.negative_distance(x.flatten(0, -2), weight, *how).view(*x.shape[:-1], len(weight))
        if self.kind == "conv1d":
            return adder.negative_distance(x.unsqueeze(2), weight.unsqueeze(2), *how).squeeze(2)
        return adder.negative_distance(x, weight, *how)


def _geometry(site: Site) -> adder.Geometry:
    assert site.weight is not None
    if site.kind == "linear":
        return adder.LINEAR
    kernel = site.weight.shape[2:]
    line = len(kernel) == 1

    def both(name: str) -> tuple[int, int]:
        found = adder.pair(site.arguments.get(name, 1))
        return (1, found[-1]) if line else found

    size = (1, kernel[0]) if line else (kernel[0], kernel[1])
    padding = site.arguments.get("padding", 0)
    if line and not isinstance(padding, str):
        padding = (0, adder.pair(padding)[-1])
    dilation = both("dilation")
    pads = adder.pads_of(padding, size, dilation)
    return adder.Geometry(size, both("stride"), dilation, pads, int(site.arguments.get("groups", 1)))
