"""Statistics of a tensor behind Winograd's input transform: what each tap must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import NonFiniteError
from .winograd import Pads, Tiling, input_matrix, transformed

_BLOCK = 2**22  # values transformed at a time


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
    """Greatest magnitude and mean square of every tap, over all that was seen, in units of the tensor.

    ``count``: values seen at each tap. ``peaks``, ``squares``: float64 [P], greatest \\|D\\| and the sum of D^2.
    """

    def __init__(self, observer: TapObserver) -> None:
        self.observer = observer
        self.tiling = Tiling.of(observer.tile, observer.kernel, observer.pads)
        taps = self.tiling.taps[0] * self.tiling.taps[1]
        self.count = 0
        self.peaks = torch.zeros(taps, dtype=torch.float64)
        self.squares = torch.zeros(taps, dtype=torch.float64)

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
            found = transformed(matrix, self.tiling.cut(part)).flatten(1)
            self.count += found.shape[1]
            self.peaks = torch.maximum(self.peaks, found.abs().amax(1).cpu().double())
            self.squares += found.square().sum(1).cpu().double()
