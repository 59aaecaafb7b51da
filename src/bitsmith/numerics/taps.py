"""Statistics of a tensor behind Winograd's input transform: what each tap must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..site import Range
from .statistics import NonFiniteError, strided
from .winograd import Pads, Tiling, input_matrix, transformed

_BLOCK = 2**22  # values transformed at a time
_BINS = 512
_SUBSAMPLE = 2**15  # values of each tap that a histogram takes from one batch
_FRACTIONS = torch.linspace(1.0, 0.2, 33, dtype=torch.float64)  # widest first, so that ties keep the wider range


@dataclass(frozen=True)
class TapObserver:
    """Watches ``D = B^T d B`` of an activation tensor, by tap: what to transform, as :class:`~.winograd.Tiling` has it.

    ``tile``, ``kernel`` (3 or 1 weights by axis) and ``pads`` say how the map is cut.
    """

    tile: int
    kernel: tuple[int, int]
    pads: Pads

    def start(self) -> TapStatistics:
        """Statistics that have seen nothing."""
        return TapStatistics(self)


class TapStatistics:
    """Greatest magnitude, mean square and distribution of every tap, over all that was seen, in units of the tensor.

    ``count``: values seen at each tap. ``peaks``, ``squares``: float64 [P], greatest \\|D\\| and the sum of D^2.
    ``histograms``: float64 counts [P, bins] of \\|D\\| from 0 to ``tops`` [P]; where a batch goes beyond, the range
    doubles and bins merge in pairs, as in :class:`~.statistics.TensorStatistics`.
    """

    def __init__(self, observer: TapObserver) -> None:
        self.observer = observer
        self.tiling = Tiling.of(observer.tile, observer.kernel, observer.pads)
        taps = self.tiling.taps[0] * self.tiling.taps[1]
        self.count = 0
        self.peaks = torch.zeros(taps, dtype=torch.float64)
        self.squares = torch.zeros(taps, dtype=torch.float64)
        self.tops = torch.zeros(taps, dtype=torch.float64)
        self.histograms = torch.zeros(taps, _BINS, dtype=torch.float64)

    @property
    def power(self) -> Tensor:
        """Mean of D^2 by tap, float64 [P]; 0 before the first update."""
        return self.squares / max(self.count, 1)

    def update(self, x: Tensor) -> None:
        """Take in one batch: [N, C, H, W], or [N, C, L] of a one-dimensional convolution."""
        x = x.detach().float()
        if not bool(x.isfinite().all()):
            raise NonFiniteError(int(x.isnan().sum()), int(x.isinf().sum()), x.numel())
        x = x.unsqueeze(2) if x.dim() == 3 else x
        matrix = input_matrix(self.observer.tile, self.observer.kernel).to(x)
        size = max(1, _BLOCK * len(x) // max(x.numel(), 1))
        for part in (x[start : start + size] for start in range(0, len(x), size)):
            found = transformed(matrix, self.tiling.cut(part)).flatten(1).abs()
            self.peaks = torch.maximum(self.peaks, found.amax(1).cpu().double())
            self.squares += found.square().sum(1).cpu().double()
            self._count(found[:, strided(torch.arange(found.shape[1], device=x.device), _SUBSAMPLE, self.count)])
            self.count += found.shape[1]

    def _count(self, sample: Tensor) -> None:
        values = sample.cpu().double()
        self.tops = torch.where(self.tops > 0, self.tops, self.peaks)
        while bool((wide := self.peaks > self.tops).any()):
            merged = self.histograms[wide].view(-1, _BINS // 2, 2).sum(2)
            self.histograms[wide] = torch.cat((merged, torch.zeros_like(merged)), 1)
            self.tops = torch.where(wide, 2 * self.tops, self.tops)
        bins = (values / self.tops.clamp_min(2.0**-120)[:, None] * _BINS).long().clamp_(0, _BINS - 1)
        self.histograms.scatter_add_(1, bins, torch.ones_like(values))

    def limits(self, method: Range, levels: int = 127) -> Tensor:
        """The magnitude that shall become the greatest level of each tap, float64 [P].

        ``minmax``: the greatest seen. ``mse``: of 33 parts of it, from all to a fifth, that with the least squared
        error of clipping and rounding. Raises ``ValueError`` for another method.
        """
        if method.method == "minmax":
            return self.peaks
        if method.method != "mse":
            raise ValueError(f"taps have no {method}: use Range('minmax') or Range('mse')")
        centres = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS * self.tops[:, None]
        errors = []
        for fraction in _FRACTIONS:
            limit = fraction * self.peaks[:, None]
            clipped = ((centres - limit).clamp_min(0).square() * self.histograms).sum(1)
            errors.append(clipped + (limit[:, 0] / levels).square() / 12 * self.histograms.sum(1))
        return self.peaks * _FRACTIONS[torch.stack(errors).argmin(0)]
