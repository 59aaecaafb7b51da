"""What a network under a plan takes to store, as a function of what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..data import device_of
from ..model.apply import computer_of
from ..numerics.quantizer import Quantizer
from ..technique import Cell
from ..techniques.float_ import Float

Count = Literal["sum", "max"]
"""Of activations: what all tensors take together, or the greatest of them."""


@dataclass(frozen=True)
class Sizes:
    """Bytes, each a tensor of shape () with a gradient by the grids that are learned: ``weights``, and ``activations``
    of one sample."""

    weights: Tensor
    activations: Tensor

    @property
    def total(self) -> Tensor:
        return self.weights + self.activations

    def __repr__(self) -> str:
        return f"Sizes(weights={float(self.weights):.0f} B, activations={float(self.activations):.0f} B)"


def learned_sizes(net: nn.Module, count: Count = "sum") -> Sizes:
    """What an applied network takes to store now (Uhlich et al. 2020, arXiv:1905.11452, section 3).

    Weights: those of every site that has one, once; float32 where the plan does not name it; what a technique says its
    scales and widths take is counted. Activations: every tensor that a planned site reads, once, of one sample; float32
    where nothing quantizes it. A site that the plan leaves in ``Float`` counts as not planned. ``count``: their
    ``sum``, or the ``max``, whose gradient goes to the greatest.
    """
    computer, device = computer_of(net), device_of(net)
    weights, seen = torch.zeros((), device=device), set()
    for name, site in computer.record_sites.items():
        weight = site.weight
        if weight is None or (weight.parameters and weight.parameters in seen):
            continue
        seen.add(weight.parameters)
        cell, technique = computer.cells[name], computer.plan.get(name)
        bits = cell.weight_bits() if isinstance(cell, Cell) else None
        if bits is None:
            bits = torch.tensor(technique.bits(site) if technique is not None else 8.0 * site.parameter_bytes)
        weights = weights + bits.to(weights) / 8
    tensors: dict[str, Tensor] = {}
    for name, technique in computer.plan.sites.items():
        if isinstance(technique, Float):
            continue
        cell, site = computer.cells[name], computer.record_sites[name]
        if not isinstance(cell, Cell):
            continue
        for operand, quantizer in zip(site.operands, cell.quantizers, strict=False):
            if operand.constant or not operand.floating:
                continue
            values = operand.numel // (operand.shape[0] if operand.shape else 1)
            tensors[operand.tensor] = _bits(quantizer).to(weights) * values / 8
    found = torch.stack([*tensors.values()]) if tensors else torch.zeros(1, device=device)
    return Sizes(weights, found.sum() if count == "sum" else found.max())


def _bits(quantizer: object) -> Tensor:
    if not isinstance(quantizer, Quantizer):
        return torch.tensor(32.0)
    if quantizer.grid is not None and quantizer.grid.infers_bits:
        return quantizer.grid.bits()
    return torch.tensor(float(quantizer.fmt.bits))
