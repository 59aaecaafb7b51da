"""What techniques share that change a site's weights and nothing else."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..numerics.derived import Derived
from ..numerics.weights import folded_affine
from ..site import Record, Site
from ..technique import Cell, No, Technique
from ._masked import refusal


class Weights(nn.Module, ABC):
    """Makes other weights of a site's: the same shape, with a gradient."""

    @abstractmethod
    def forward(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """``weight``: output channels first, the normalisation behind folded in if the technique ``folds``. ``scale``:
        the step of the integers that the result is stored as, shaped to multiply it; None: it is stored as floats."""

    def step(self, done: int, total: int) -> None:
        """As of :meth:`Cell.step`."""


class WeightTechnique(Technique, ABC):
    """A technique that changes weights only: it stands at a site alone, or inside another one that quantizes them."""

    folds: ClassVar[bool] = False
    """Whether it works on weights with the normalisation behind folded in, where there is one."""

    @abstractmethod
    def weights(self, site: Site, record: Record, folded: Tensor, scale: Tensor | None) -> Weights:
        """What makes the weights. ``folded``: those of the record with the normalisation behind folded in, float32;
        ``scale`` as in :meth:`Weights.forward`."""

    @abstractmethod
    def stored(self, site: Site, bits: float) -> float:
        """Storage of the site's weights in bits, where a value by itself takes ``bits``."""

    def fits(self, site: Site) -> bool | No:
        reason = refusal(site)
        return No(reason) if reason else True

    def bits(self, site: Site) -> float:
        """What is stored as float32, and where or which it is."""
        return self.stored(site, 32.0) if self.fits(site) else super().bits(site)

    def compact(self) -> bool:
        return True

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return WeightCell(site, record, self)


class WeightCell(Cell):
    """The operation with the weights that :class:`Weights` makes."""

    fresh = True

    def __init__(self, site: Site, record: Record, technique: WeightTechnique) -> None:
        super().__init__(site)
        self.folds = technique.folds
        self.frozen = False
        self.makes = technique.weights(site, record, folded_weight(site, record), None)
        self._computed: Derived[tuple[Tensor, Tensor | None]] = Derived()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Any:
        if self.frozen:
            weight = self.get_buffer("weight_f")
            bias = self.get_buffer("bias_f") if self.norm else bias
        else:
            given, added = weight, bias
            statistics = self._statistics()
            sources = [t for t in (given, added, *self.makes.buffers(), *statistics) if t is not None]
            weight, bias = self._computed.of(sources, lambda: self._made(given, added))
        return self.op(self.read(0, x), weight, bias, **rest)

    def _made(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.norm:
            return self.makes(weight), bias
        module: Any = self.norm[0]
        factor, shift = folded_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        along = factor.reshape(-1, *[1] * (weight.dim() - 1))
        folded: Tensor = self.makes(weight * along)
        if module.training:  # the normalisation itself runs, on what became of the folded weights
            return folded / torch.where(along == 0, torch.ones_like(along), along), bias
        return folded, shift + bias * factor if bias is not None else shift

    def _statistics(self) -> tuple[Any, ...]:
        if not self.norm:
            return ()
        module: Any = self.norm[0]
        return module.running_mean, module.running_var, module.weight, module.bias

    def train(self, mode: bool = True) -> WeightCell:
        self._computed.clear()  # the normalisation may have changed its mode
        super().train(mode)
        return self

    def step(self, done: int, total: int) -> None:
        self.makes.step(done, total)

    def materialise(self) -> None:
        if self._computed.value is None:
            return
        weight, bias = self._computed.value
        self.register_buffer("weight_f", weight.detach().clone())
        if self.norm and bias is not None:
            self.register_buffer("bias_f", bias.detach().clone())
        self._computed.clear()
        self.frozen = True


def folded_weight(site: Site, record: Record) -> Tensor:
    """The site's weight with the normalisation behind folded in, where there is one; float32."""
    weight = record.weights[site.name, 1].detach().float()
    if site.name not in record.folds:
        return weight
    factor, _ = folded_affine(*record.folds[site.name])
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def changed(technique: Technique, *always: str) -> str:
    """A technique with those fields and every other one that is not at its default."""
    shown = [
        f"{field.name}={getattr(technique, field.name)!r}"
        for field in dataclasses.fields(technique)  # type: ignore[arg-type]
        if field.name in always or getattr(technique, field.name) != field.default
    ]
    return f"{type(technique).__name__}({', '.join(shown)})"
