"""What a sensitivity owes: one score per (site, technique), larger is worse; what it cost; how sites interact."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from ..plan import Plan
from ..task import Task
from ..technique import Technique

Pair = tuple[str, Technique]
"""A site's name and a technique for it."""


@dataclass(frozen=True)
class Spent:
    """What a sensitivity cost. ``forwards``, ``backwards``: samples sent through the whole network that way.

    >>> Spent(forwards=100, backwards=100).passes
    300
    """

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    @property
    def passes(self) -> int:
        """Samples forwarded, a backward counted as two forwards."""
        return self.forwards + 2 * self.backwards

    def __str__(self) -> str:
        return f"{self.forwards} samples forward, {self.backwards} backward, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Scores:
    """``losses``: what each pair loses alone. ``cross``: what two pairs lose together beyond the sum of both, so that
    a plan loses ``sum of losses + sum of cross``; empty where a sensitivity has no such terms. ``skipped``: the pairs
    that it does not apply to, each with the reason. ``notes``: what a report should say of the measurement.
    """

    losses: Mapping[Pair, float]
    cross: Mapping[tuple[Pair, Pair], float] = field(default_factory=dict)
    skipped: Mapping[Pair, str] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    notes: Mapping[str, str] = field(default_factory=dict)


class Sensitivity(Protocol):
    """Says what sites can lose. A function, or a frozen dataclass with ``__call__`` whose fields are its settings.

    ``model``: float. ``pairs``: the (site, technique) to score, in order. ``simulate``: the network under a plan.
    Reads calibration data only. Gives :class:`Scores`, or yields one score per pair in order: what was yielded is kept
    if the process is killed.
    """

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        pairs: Sequence[Pair],
        simulate: Callable[[Plan], nn.Module],
    ) -> Scores | Iterator[float]: ...


class Meter:
    """Counts what a sensitivity sends through the network, and the time since it was made."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0
        self._start = time.perf_counter()

    def spent(self) -> Spent:
        return Spent(self.forwards, self.backwards, time.perf_counter() - self._start)


def name_of(sensitivity: Sensitivity) -> str:
    """How reports call it: a function's name in words, a value as it is written."""
    plain = getattr(sensitivity, "__name__", None)
    return repr(sensitivity) if plain is None else str(plain).replace("_", " ")
