"""Palette: weights are indices into a few shared values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.palette import kmeans, looked_up, nearest, soft, uniform
from ..numerics.straight_through import straight_through
from ..site import Record, Site
from ..technique import No
from ._weights import Weights, WeightTechnique, changed


@dataclass(frozen=True, repr=False)
class Palette(WeightTechnique):
    """Weight sharing (Han et al. 2016, Deep Compression, arXiv:1510.00149, section 3).

    Each weight becomes the nearest of ``2^w`` values, w from 1 to 8. ``init``: how the values are found, by k-means
    (least squared error of the weights) or ``uniform``, evenly from the least to the greatest weight; or ``values``
    gives them, at most ``2^w``, in the weights' unit. ``group``: that many output channels share a palette; 0: all of
    them do. Where many weights are exactly 0, as pruned ones are, 0 is one of the values. A normalisation behind
    becomes a factor by channel, stored beside the palette.

    ``of``: the weights that another technique left, ``Palette(4, of=Sparse(0.5))``. ``Int(8, 8, of=Palette(4))``
    clusters integers: the palette holds 8-bit values, scales stay per channel, and integer kernels compute.
    :class:`~bitsmith.FisherPalettes`, a prepare step, weighs each weight's error by what the loss feels of it.

    ``learn``: ``straight_through`` keeps the values in training and gives each weight the gradient of its value.
    ``soft`` is differentiable k-means (Cho et al. 2022, arXiv:2108.12659) at that ``temperature``, relative to the
    distance of neighbouring values: weights are mixtures of values in training, the nearest value in evaluation.

    For convolutions and linear layers. Runtimes look the weights up when they load a file, and compute as before.

    >>> Palette(4), Palette(2, values=(-1, 0, 1)).entries
    (Palette(w=4), 3)
    """

    folds: ClassVar[bool] = True

    w: int = 4
    init: Literal["kmeans", "uniform"] = "kmeans"
    group: int = 0
    values: tuple[float, ...] = ()
    of: WeightTechnique | None = None
    learn: Literal["straight_through", "soft"] = "straight_through"
    temperature: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(sorted(float(value) for value in self.values)))
        if not isinstance(self.w, int) or not 1 <= self.w <= 8:
            raise ValueError(f"Palette(w={self.w!r}): bits of an index must be 1 to 8")
        if self.init not in ("kmeans", "uniform"):
            raise ValueError(f"Palette(init={self.init!r}): must be 'kmeans' or 'uniform'")
        if not isinstance(self.group, int) or self.group < 0:
            raise ValueError(f"Palette(group={self.group!r}): output channels that share a palette, or 0 for all")
        if len(self.values) > 2**self.w or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"Palette(values={self.values}): at most 2^{self.w} finite numbers")
        if self.of is not None and (not isinstance(self.of, WeightTechnique) or isinstance(self.of, Palette)):
            raise ValueError(f"Palette(of={self.of!r}): weights that another technique left, such as Sparse(0.5)")
        if self.learn not in ("straight_through", "soft"):
            raise ValueError(f"Palette(learn={self.learn!r}): must be 'straight_through' or 'soft'")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"Palette(temperature={self.temperature}): must be above 0 and finite")

    def __repr__(self) -> str:
        return changed(self, "w")

    @property
    def entries(self) -> int:
        """How many values a palette has."""
        return len(self.values) or 2**self.w

    def fits(self, site: Site) -> bool | No:
        verdict = self.of.fits(site) if self.of is not None else super().fits(site)
        if not verdict:
            return verdict
        assert site.weight is not None
        channels = site.weight.shape[0]
        if self.group and channels % self.group:
            return No(f"{channels} output channels cannot be divided into groups of {self.group}")
        members = site.weight.numel // self.palettes(site)
        if members < self.entries:
            return No(f"a palette of {self.entries} values is larger than the {members} weights that would share it")
        return True

    def palettes(self, site: Site) -> int:
        """How many palettes a site that it fits has."""
        assert site.weight is not None
        return site.weight.shape[0] // self.group if self.group else 1

    def stored(self, site: Site, bits: float) -> float:
        """An index for every weight, or with ``of`` for every weight that is left, if that is less; and the values."""
        assert site.weight is not None
        indices = float(site.weight.numel * self.w)
        if self.of is not None:
            indices = min(indices, self.of.stored(site, self.w))
        return indices + self.palettes(site) * self.entries * bits

    def weights(self, site: Site, record: Record, given: Tensor, scale: Tensor | None) -> Weights:
        inner = self.of.weights(site, record, given, None) if self.of is not None else None
        values = given if inner is None else inner(given).detach()
        importance = _importance(site, record, given, scale)
        rows = (values if scale is None else values / scale).reshape(self.palettes(site), -1)
        codebook = self.codebook(rows, None if importance is None else importance.reshape(rows.shape))
        return _Palette(self, codebook if scale is None else codebook.round(), inner)

    def codebook(self, rows: Tensor, importance: Tensor | None = None) -> Tensor:
        """The values of each palette, (palettes, entries), ascending, for the weights that share it: (palettes, n)."""
        if self.values:
            return rows.new_tensor(self.values).expand(len(rows), -1).contiguous()
        zero = rows == 0
        if self.entries == 1 or not bool((zero.sum(1) * self.entries >= rows.shape[1]).any()):
            return self._found(rows, self.entries, importance)
        left = (~zero).to(rows.dtype)
        found = self._found(rows, self.entries - 1, left if importance is None else left * importance)
        return torch.cat((found, torch.zeros_like(found[:, :1])), 1).sort(dim=1).values

    def _found(self, rows: Tensor, count: int, importance: Tensor | None) -> Tensor:
        return uniform(rows, count) if self.init == "uniform" else kmeans(rows, count, importance)


def _importance(site: Site, record: Record, given: Tensor, scale: Tensor | None) -> Tensor | None:
    """What the loss feels of a squared error of each given weight, in units of ``scale``; None if nobody measured."""
    found = record.importance.get((site.name, 1))
    if found is None:
        return None
    raw = record.weights[site.name, 1].detach().float()
    # d/d(w f) = d/dw / f, of which the square counts; a weight folded to 0 is not felt
    slope = torch.where(given != 0, raw / given, torch.zeros_like(raw))
    slope = slope if scale is None else slope * scale
    importance: Tensor = found.to(raw) * slope.square()
    return importance


class _Palette(Weights):
    """``codebook``: (palettes, entries), ascending; in steps of ``scale`` where the weights are stored as integers."""

    def __init__(self, technique: Palette, codebook: Tensor, inner: Weights | None) -> None:
        super().__init__()
        self.inner = inner
        self.soft, self.temperature = technique.learn == "soft", technique.temperature
        self.codebook: Tensor
        self.register_buffer("codebook", codebook)

    def forward(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        values = weight if self.inner is None else self.inner(weight)
        rows = (values if scale is None else values / scale).reshape(len(self.codebook), -1)
        if self.soft and self.training:
            found, centres = soft(rows.float(), self.codebook.clone(), self.temperature)
            self.codebook.copy_(centres.detach().sort(dim=1).values)
        else:
            codebook = self.codebook if scale is None else self.codebook.round()
            found = straight_through(rows, looked_up(codebook, nearest(rows, codebook)).to(rows.dtype))
        found = found.reshape(values.shape).to(values.dtype)
        return found if scale is None else found * scale

    def step(self, done: int, total: int) -> None:
        if self.inner is not None:
            self.inner.step(done, total)
