"""What a search owes and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..plan import Budget, Plan
from ..profile import Profile

Label = Literal["predicted", "evaluated"]
Progress = Callable[[str, int, int], None]
"""Told ``(what is being done, done, total)``."""

QUANTITIES = ("ms", "mib", "mj", "drop")
"""What can be minimized or limited."""

MIB = 2**20


@dataclass(frozen=True)
class Evaluation:
    """What measuring one whole plan gave.

    ``metric`` over ``samples``; ``drop`` against the float model (absolute) with its confidence interval. ``ms`` per
    batch with ``ms_spread``; ``float_ms``: the float plan timed interleaved with it. ``bytes`` of the exported file,
    ``mj`` per batch. None: not measured. ``source``: of the times (``measured``, ``simulated`` or ``modelled``).
    """

    plan: Plan
    metric: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    ms: float | None = None
    ms_spread: float | None = None
    bytes: int | None = None
    mj: float | None = None
    samples: int = 0
    float_ms: float | None = None
    source: str = "measured"


class Evaluate(Protocol):
    """Measures a whole plan. Keeps what it measured itself (the store does), so an interrupted search loses nothing."""

    def __call__(self, plan: Plan) -> Evaluation: ...


@dataclass(frozen=True)
class Point:
    """One plan of a frontier: its predicted ``ms`` per batch, ``bytes``, ``loss`` and ``mj``, and its evaluation."""

    plan: Plan
    ms: float
    bytes: float
    loss: float
    mj: float | None = None
    evaluation: Evaluation | None = None

    @property
    def label(self) -> Label:
        return "predicted" if self.evaluation is None else "evaluated"

    def predicted(self, quantity: str) -> float:
        """The predicted ``ms``, ``mib`` (2^20 bytes), ``mj``, or, for ``drop``, the loss.

        >>> Point(Plan(), ms=1.0, bytes=2**21, loss=0.0).predicted("mib")
        2.0
        """
        if quantity == "mj":
            if self.mj is None:
                raise ValueError("this profile has no energy: no row has mj")
            return self.mj
        return {"ms": self.ms, "mib": self.bytes / MIB, "drop": self.loss}[quantity]

    def value(self, quantity: str) -> float:
        """The measured quantity, or the predicted one where it was not measured (``drop``: infinity then)."""
        got = self.evaluation
        if got is None:
            return self.predicted(quantity)
        measured = {
            "ms": got.ms,
            "mib": None if got.bytes is None else got.bytes / MIB,
            "mj": got.mj,
            "drop": float("inf") if got.drop is None else got.drop,
        }[quantity]
        if measured is None:
            return self.predicted(quantity)
        return measured if measured == measured else float("inf")  # a NaN meets no limit

    def missed(self, budget: Budget) -> dict[str, float]:
        """By how much each limit is missed. A predicted point has no drop, so it misses no ``drop``."""
        known = [name for name in budget.limits if name != "drop" or self.evaluation is not None]
        return budget.missed(**{name: self.value(name) for name in known})


@dataclass(frozen=True)
class Result:
    """What a search found: ``best``, and the whole ``frontier``, least predicted ``minimize`` first.

    ``evaluations``: plans that were measured whole. ``missed``: by how much ``best`` misses each limit, in its unit.
    """

    best: Point
    frontier: tuple[Point, ...]
    minimize: str
    budget: Budget
    evaluations: int = 0
    missed: dict[str, float] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.best.plan

    @property
    def label(self) -> Label:
        """``predicted`` when no plan was measured."""
        return self.best.label


class BudgetError(ValueError):
    """No plan meets the budget. ``best`` is the result whose plan misses it by least."""

    def __init__(self, best: Result) -> None:
        self.best = best
        units = {"ms": " ms", "mib": " MiB", "mj": " mJ", "drop": ""}
        limits = best.budget.limits
        parts = [
            f"{name} {limits[name] + excess:.4g}{units[name]}, over the limit of {limits[name]:.4g} by {excess:.3g}"
            for name, excess in best.missed.items()
        ]
        super().__init__(
            f"no plan meets the budget; the closest ({best.label}) has {'; '.join(parts)}. "
            "It is in this error's .best (optimize saves it first); raise the limit, or offer more techniques"
        )


class Search(ABC):
    """A way to choose a plan. Subclasses are final frozen dataclasses whose fields are its settings; one file each."""

    @abstractmethod
    def search(
        self,
        profile: Profile,
        budget: Budget,
        minimize: str,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """The plan that minimizes ``ms``, ``mib``, ``mj`` or ``drop`` within the budget, and the frontier.

        With ``evaluate`` the plan was measured whole and meets every limit as measured; without, all is predicted.
        Raises :class:`BudgetError` if no plan does.
        """
