"""The greatest magnitude of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .statistics import TensorStatistics


@dataclass(frozen=True)
class Magnitude:
    """Watches how far from 0 an activation tensor goes."""

    def start(self) -> GreatestMagnitude:
        """One that has seen nothing."""
        return GreatestMagnitude()


class GreatestMagnitude:
    """``greatest``: of all values seen, 0 before the first. ``count``: how many were. Raises ``NonFiniteError``."""

    def __init__(self) -> None:
        self.count, self.greatest = 0, 0.0

    def update(self, x: Tensor) -> None:
        """Take in one batch."""
        seen = TensorStatistics()
        seen.update(x)
        if seen.count:
            self.count += seen.count
            self.greatest = max(self.greatest, -seen.minimum, seen.maximum)
