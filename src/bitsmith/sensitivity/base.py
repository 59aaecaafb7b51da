"""What a sensitivity owes: one score per (site, technique), larger is worse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import nn

from ..plan import Plan
from ..task import Task
from ..technique import Technique


class Sensitivity(Protocol):
    """A function that says what sites can lose.

    ``model``: float. ``pairs``: the (site, technique) to score, in order. ``simulate``: the network under a plan.
    Yields one score per pair, in order. Reads calibration data only. ``__name__`` names it in reports.
    """

    __name__: str

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        pairs: Sequence[tuple[str, Technique]],
        simulate: Callable[[Plan], nn.Module],
    ) -> Iterator[float]: ...
