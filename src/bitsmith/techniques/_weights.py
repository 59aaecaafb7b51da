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
        """``weight``: output channels first. ``scale``: the step of the integers that the result is stored as, shaped
        to multiply it, the normalisation behind folded in; None: it is stored as floats."""

    def step(self, done: int, total: int) -> None:
        """As of :meth:`Cell.step`."""


class WeightTechnique(Technique, ABC):
    """A technique that changes weights only: it stands at a site alone, or inside another one that quantizes them."""

    folds: ClassVar[bool] = False
    """Whether by itself it absorbs the normalisation behind: its weights keep few values, a factor by output channel is
    stored beside them."""

    @abstractmethod
    def weights(self, site: Site, record: Record, given: Tensor, scale: Tensor | None) -> Weights:
        """What makes the weights. ``given``: what they are made from, float32: those of the record, with the
        normalisation behind folded in where there is a ``scale``, which is as in :meth:`Weights.forward`."""

    @abstractmethod
    def stored(self, site: Site, bits: float) -> float:
        """Storage of the site's weights in bits, where a value by itself takes ``bits``."""

    def fits(self, site: Site) -> bool | No:
        reason = refusal(site)
        return No(reason) if reason else True

    def bits(self, site: Site) -> float:
        """What is stored as float32, and where or which it is; with a normalisation behind, a factor by channel."""
        if not self.fits(site):
            return super().bits(site)
        assert site.weight is not None
        factors = site.weight.shape[0] if self.folds and site.fold is not None else 0
        return self.stored(site, 32.0) + 32.0 * factors

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
        self.makes = technique.weights(site, record, record.weights[site.name, 1].detach().float(), None)
        self._computed: Derived[tuple[Tensor, Tensor, Tensor | None]] = Derived()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Any:
        if self.frozen and self.norm:  # a factor behind: folded into the weights each channel would have its own values
            output = self.op(self.read(0, x), self.get_buffer("weight_f"), None, **rest)
            return output * self.get_buffer("factor_f") + self.get_buffer("bias_f")
        if self.frozen:
            weight = self.get_buffer("weight_f")
        else:
            given, added = weight, bias
            statistics = self._statistics()
            sources = [t for t in (given, added, *self.makes.buffers(), *statistics) if t is not None]
            _, weight, bias = self._computed.of(sources, lambda: self._made(given, added))
        return self.op(self.read(0, x), weight, bias, **rest)

    def _made(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weights, and what the operation computes with: the normalisation folded in where it does not run."""
        made: Tensor = self.makes(weight)
        if not self.norm or self._module.training:
            return made, made, bias
        factor, shift = self._affine()
        along = factor.reshape(-1, *[1] * (weight.dim() - 1))
        return made, made * along, shift + bias * factor if bias is not None else shift

    @property
    def _module(self) -> Any:
        return self.norm[0]

    def _affine(self) -> tuple[Tensor, Tensor]:
        module = self._module
        return folded_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)

    def _statistics(self) -> tuple[Any, ...]:
        if not self.norm:
            return ()
        return self._module.running_mean, self._module.running_var, self._module.weight, self._module.bias

    def train(self, mode: bool = True) -> WeightCell:
        self._computed.clear()  # the normalisation may have changed its mode
        super().train(mode)
        return self

    def step(self, done: int, total: int) -> None:
        self.makes.step(done, total)

    def materialise(self) -> None:
        if self._computed.value is None:
            return
        weight, _, bias = self._computed.value
        self.register_buffer("weight_f", weight.detach().clone())
        if self.norm and bias is not None:
            shape = (-1,) if self.kind == "linear" else (-1, *[1] * (weight.dim() - 2))
            self.register_buffer("factor_f", self._affine()[0].detach().reshape(shape).clone())
            self.register_buffer("bias_f", bias.detach().reshape(shape).clone())
        self._computed.clear()
        self.frozen = True


def changed(technique: Technique, *always: str) -> str:
    """A technique with those fields and every other one that is not at its default."""
    shown = [
        f"{field.name}={getattr(technique, field.name)!r}"
        for field in dataclasses.fields(technique)  # type: ignore[arg-type]
        if field.name in always or getattr(technique, field.name) != field.default
    ]
    return f"{type(technique).__name__}({', '.join(shown)})"
