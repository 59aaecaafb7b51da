"""Sparse: the largest weights are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..numerics.masks import Granularity, largest, left, places, polynomial
from ..site import Record, Site
from ..technique import No
from ._weights import Weights, WeightTechnique, changed


@dataclass(frozen=True, repr=False)
class Sparse(WeightTechnique):
    """Magnitude pruning (Han et al. 2015, arXiv:1506.02626): the largest weights of a layer are left, the others are 0.

    ``density``: the part that is left, above 0 and at most 1. ``granularity``: single weights by magnitude; whole
    kernels, between one input and one output channel, by their Euclidean norm; a ``block`` of (output, input) channels
    at one position of the kernel, by norm (Narang et al. 2017, arXiv:1711.02782); or ``n:m``, of every ``m`` input
    channels in a row the ``density m`` largest weights (Mishra et al. 2021, arXiv:2104.08378: 2 of 4).

    ``schedule``: with ``constant`` which are left is decided once, by the weights that ``apply`` finds, and training
    goes on with these. ``polynomial`` opens the layer to the density ``first`` when training begins and closes it again
    from ``begin`` to ``end``, as parts of the training, choosing anew ``every`` so many steps by the weights of then
    (Zhu and Gupta 2017, arXiv:1710.01878). :class:`~bitsmith.SparseGpt`, a prepare step, makes up for what is left out.

    For convolutions and linear layers. Runtimes compute the zeros as well: size only.

    >>> Sparse(0.1), Sparse(0.5, "n:m")
    (Sparse(density=0.1), Sparse(density=0.5, granularity='n:m'))
    """

    density: float = 0.5
    granularity: Granularity = "weight"
    m: int = 4
    block: tuple[int, int] = (4, 1)
    schedule: Literal["constant", "polynomial"] = "constant"
    first: float = 1.0
    begin: float = 0.0
    end: float = 0.75
    every: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        for name in ("density", "first"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"Sparse({name}={getattr(self, name)}): must be above 0 and at most 1")
        if self.granularity not in ("weight", "kernel", "block", "n:m"):
            raise ValueError(f"Sparse(granularity={self.granularity!r}): must be 'weight', 'kernel', 'block' or 'n:m'")
        if not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"Sparse(m={self.m!r}): a whole number of input channels, 1 or more")
        if self.granularity == "n:m" and abs(self.density * self.m - round(self.density * self.m)) > 1e-9:
            raise ValueError(f"Sparse({self.density}, 'n:m', m={self.m}): density times m must be a whole number")
        if len(self.block) != 2 or not all(isinstance(size, int) and size > 0 for size in self.block):
            raise ValueError(f"Sparse(block={self.block}): numbers of output and input channels, both 1 or more")
        if self.schedule not in ("constant", "polynomial"):
            raise ValueError(f"Sparse(schedule={self.schedule!r}): must be 'constant' or 'polynomial'")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(f"Sparse(begin={self.begin}, end={self.end}): parts of training, 0 <= begin < end <= 1")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Sparse(every={self.every!r}): a number of steps, 1 or more")

    def __repr__(self) -> str:
        return changed(self, "density")

    def fits(self, site: Site) -> bool | No:
        verdict = super().fits(site)
        if not verdict:
            return verdict
        assert site.weight is not None
        outputs, inputs = site.weight.shape[:2]
        if self.granularity == "n:m" and inputs % self.m:
            return No(f"{inputs} input channels of its weight cannot be divided into parts of m={self.m}")
        if self.granularity == "block" and (outputs % self.block[0] or inputs % self.block[1]):
            return No(f"a weight of {outputs} x {inputs} channels cannot be divided into blocks of {self.block}")
        return True

    def stored(self, site: Site, bits: float) -> float:
        """What is left, and where it is: a bit for each place, or the index of each that is left, if that is less."""
        assert site.weight is not None
        count, size = places(site.weight.shape, self.granularity, self.block)
        kept = left(count, self.density)
        index = self.m if self.granularity == "n:m" else count
        return bits * kept * size + min(count, kept * math.ceil(math.log2(index)))

    def mask(self, weight: Tensor, density: float | None = None) -> Tensor:
        """Which weights are left, as :func:`~bitsmith.numerics.masks.largest` says."""
        return largest(weight, self.density if density is None else density, self.granularity, self.block, self.m)

    def weights(self, site: Site, record: Record, given: Tensor, scale: Tensor | None) -> Weights:
        return _Sparse(self, self.mask(record.weights[site.name, 1]))


class _Sparse(Weights):
    """``kept``: int8, 1 where a weight is left, of the weight's shape or with 1 on axes on which it is constant."""

    def __init__(self, technique: Sparse, kept: Tensor) -> None:
        super().__init__()
        self.technique = technique
        self.wanted: float | None = None
        self.kept: Tensor
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.wanted is not None:
            with torch.no_grad():
                self.kept.copy_(self.technique.mask(weight, self.wanted))
            self.wanted = None
        return weight * self.kept.to(weight.dtype)

    def step(self, done: int, total: int) -> None:
        technique = self.technique
        if technique.schedule == "constant":
            return
        before, time = done / max(total, 1), (done + 1) / max(total, 1)
        closing = before < technique.end <= time
        if closing or (time < technique.end and done % technique.every == 0):
            self.wanted = polynomial(time, technique.begin, technique.end, technique.first, technique.density)
