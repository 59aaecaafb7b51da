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
    """Extremes and mean square of every tap and channel over all that was seen, in units of the tensor.

    ``count``: values seen of each; ``images``: how many. ``halves``: float64 [2, 2, P, C], least and greatest D (0
    among them) of the images of even number and of those of odd number. ``squares``: float64 [P, C], sum of D^2. C is 0
    before the first update.
    """

    def __init__(self, observer: TapObserver) -> None:
        self.observer = observer
        self.tiling = Tiling.of(observer.tile, observer.kernel, observer.pads)
        self.count = self.images = 0
        self._start(0)

    def _start(self, channels: int) -> None:
        taps = self.tiling.taps[0] * self.tiling.taps[1]
        self.halves = torch.zeros(2, 2, taps, channels, dtype=torch.float64)
        self.squares = torch.zeros(taps, channels, dtype=torch.float64)

    @property
    def extremes(self) -> Tensor:
        """Least and greatest D, float64 [2, P, C]."""
        return torch.stack((self.halves[:, 0].amin(0), self.halves[:, 1].amax(0)))

    @property
    def growth(self) -> float:
        """How much wider the range of all images is than that of half of them, all taps and channels together; 1 where
        less than two images were seen."""
        of_halves = float((self.halves[:, 1] - self.halves[:, 0]).sum()) / 2
        low, high = self.extremes
        return float((high - low).sum()) / of_halves if self.images > 1 and of_halves > 0 else 1.0

    @property
    def beyond(self) -> float:
        """What to widen :attr:`extremes` by for other images: the square of :attr:`growth`. Of a channel a few thousand
        values are seen, and others go beyond; measured (docs/winograd.md)."""
        return self.growth**2

    @property
    def power(self) -> Tensor:
        """Mean of D^2, float64 [P, C]."""
        return self.squares / max(self.count, 1)

    def update(self, x: Tensor) -> None:
        """Take in one batch: [N, C, H, W], or [N, C, L] of a one-dimensional convolution. Raises ``ValueError`` for
        another number of channels than before."""
        x = x.detach().float()
        if not bool(x.isfinite().all()):
            raise NonFiniteError(int(x.isnan().sum()), int(x.isinf().sum()), x.numel())
        x = x.unsqueeze(2) if x.dim() == 3 else x
        if self.count == 0:
            self._start(x.shape[1])
        if x.shape[1] != self.squares.shape[1]:
            raise ValueError(f"taps of {self.squares.shape[1]} channels were given {x.shape[1]}")
        matrix = input_matrix(self.observer.tile, self.observer.kernel).to(x)
        size = max(1, _BLOCK * len(x) // max(x.numel(), 1))
        for part in (x[start : start + size] for start in range(0, len(x), size)):
            found = transformed(matrix, self.tiling.cut(part))
            of_image = found.view(*found.shape[:2], len(part), -1)
            ends = torch.stack(of_image.aminmax(dim=3)).cpu().double()  # [2, P, C, N]
            for half in range(2):
                seen = ends[..., (self.images + half) % 2 :: 2]
                if seen.shape[3]:
                    self.halves[half, 0] = torch.minimum(self.halves[half, 0], seen[0].amin(2))
                    self.halves[half, 1] = torch.maximum(self.halves[half, 1], seen[1].amax(2))
            self.squares += found.square().sum(2).cpu().double()
            self.count += found.shape[2]
            self.images += len(part)
