"""The cell of techniques that leave weights out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics.derived import Derived
from ..prepare._layers import KINDS
from ..site import Site
from ..technique import Cell


def refusal(site: Site) -> str:
    """Why the site has no weight that could be left out; "" if it has."""
    if site.kind not in KINDS:
        return f"{site.kind} is no convolution and no linear layer"
    if len(site.operands) != 2 or not site.operands[1].constant or not site.operands[1].floating:
        return "its weights are computed while it runs"
    return ""


class MaskedCell(Cell):
    """The operation with the weights that are left: no gradient reaches the others.

    ``kept``: int8, 1 or -1 where a weight is left and 0 elsewhere; of the weight's shape, or with 1 on axes on which
    whole kernels stay or go. ``fixed``: the sign is that of ``kept``, and the parameter gives the magnitude.
    """

    fresh = True

    def __init__(self, site: Site, kept: Tensor, fixed: bool = False) -> None:
        super().__init__(site)
        self.fixed, self.frozen = fixed, False
        self.kept: Tensor
        self.register_buffer("kept", kept.to(torch.int8))
        self._computed: Derived[Tensor] = Derived()

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        if self.frozen:
            weight = self.get_buffer("weight_f")
        else:
            dense = weight
            weight = self._computed.of([dense, self.kept], lambda: self._left(dense))
        return self.op(self.read(0, x), weight, **rest)

    def _left(self, weight: Tensor) -> Tensor:
        kept = self.kept.to(weight.dtype)
        return weight.abs() * kept if self.fixed else weight * kept.abs()

    def materialise(self) -> None:
        if self._computed.value is not None:
            self.register_buffer("weight_f", self._computed.value.detach().clone())
            self._computed.clear()
            self.frozen = True
