"""What a search owes and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from ..plan import Budget, Plan
from ..profile import Profile

Label = Literal["predicted", "evaluated"]
Progress = Callable[[str, int, int], None]
"""Told ``(what is being done, done, total)``."""

QUANTITIES = ("ms", "mib", "mj", "mm2", "drop")
"""What can be minimized or limited."""

NAMED = {"mj": "energy", "mm2": "area"}
"""Those that only some targets have."""

MIB = 2**20


@dataclass(frozen=True)
class Evaluation:
    """What measuring one plan gave.

    ``metric`` over ``samples``; ``drop`` against the float model (absolute) with its confidence interval. ``ms`` per
    batch with ``ms_spread``; ``float_ms``: the float plan timed interleaved with it. ``bytes`` of the exported file,
    ``mj`` per batch, ``mm2`` of the chip. None: not measured. ``source``: of the times (``measured``, ``simulated`` or
    ``modelled``).

    ``within``: whether the drop is inside the limit that was asked about, where that was decided before the whole set
    was seen (``complete`` is False then, and ``samples`` is how many were); not ``certain``, where it only looks like
    it. ``drop_bound``: what the drop of the
    population stays below at the level that was asked, after the selection among candidates; None: not known. With
    ``population`` it, not ``drop``, is held against the limit.
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
    within: bool | None = None
    certain: bool = True
    complete: bool = True
    drop_bound: float | None = None
    population: bool = False
    mm2: float | None = None

    @property
    def judged(self) -> float | None:
        """The drop that is held against the limit."""
        return self.drop_bound if self.population and self.complete and self.drop is not None else self.drop


class Evaluate(Protocol):
    """Measures a whole plan. Keeps what it measured itself (the store does), so an interrupted search loses nothing.

    A plain function will do. What :func:`bitsmith.evaluator` gives is a :class:`Staged` one, and costs less.
    """

    def __call__(self, plan: Plan) -> Evaluation: ...


@runtime_checkable
class Staged(Protocol):
    """An evaluator that can measure a part, so that accuracy is spent only on plans that are worth it."""

    def __call__(self, plan: Plan) -> Evaluation: ...

    def costs(self, plan: Plan) -> Evaluation:
        """Time, size and energy only; ``drop`` is None."""
        ...

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        """The drop on as many samples as it takes to be certain that it is within ``limit`` or not, or until its chance
        to be is below ``chance`` or that not to be: ``within`` is then what is likelier."""
        ...

    def bound(self, plan: Plan, candidates: int) -> float | None:
        """What the population's drop stays below, the plan being chosen among so many that were fixed beforehand."""
        ...

    def check(self, limit: float, candidates: int | None) -> str:
        """What the set cannot tell of such a limit, "" if nothing. Raises ``ValueError`` if what was asked for can
        never be shown on it, saying what it would take; ``candidates`` as in :meth:`bound`, None: not fixed."""
        ...


@runtime_checkable
class Ahead(Protocol):
    """An evaluator that can begin to measure plans, elsewhere, before it is asked about them. Optional."""

    def ahead(self, plans: Sequence[Plan], limit: float, chance: float = 0.0) -> None:
        """These may be asked about next with that limit and chance, the first one at once. What was announced before
        and is not among them may be forgotten."""
        ...


@runtime_checkable
class Shared(Protocol):
    """An evaluator whose work can be shared with an executor. Optional."""

    def helped(self, executor: Executor) -> AbstractContextManager[Evaluate]:
        """One like it, that works :class:`Ahead` on the executor while the context is open."""
        ...


@dataclass(frozen=True)
class Point:
    """One plan of a frontier: predicted ``ms`` per batch, ``bytes``, ``loss``, ``mj``, ``mm2``, and its evaluation."""

    plan: Plan
    ms: float
    bytes: float
    loss: float
    mj: float | None = None
    evaluation: Evaluation | None = None
    mm2: float | None = None

    @property
    def label(self) -> Label:
        return "predicted" if self.evaluation is None else "evaluated"

    def predicted(self, quantity: str) -> float:
        """The predicted ``ms``, ``mib`` (2^20 bytes), ``mj``, ``mm2``, or, for ``drop``, the loss.

        >>> Point(Plan(), ms=1.0, bytes=2**21, loss=0.0).predicted("mib")
        2.0
        """
        if quantity in NAMED:
            value: float | None = getattr(self, quantity)
            if value is None:
                raise ValueError(f"this profile has no {NAMED[quantity]}: no row has {quantity}")
            return value
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
            "mm2": got.mm2,
            "drop": float("inf") if got.judged is None else got.judged,
        }[quantity]
        if measured is None:
            return self.predicted(quantity)
        return measured if measured == measured else float("inf")  # a NaN meets no limit

    def missed(self, budget: Budget) -> dict[str, float]:
        """By how much each limit is missed. A point whose drop is not known misses no ``drop``."""
        got = self.evaluation
        certified = got is not None and got.within is True and not (got.population and got.complete)
        open_ = got is None or got.drop is None or certified
        known = [name for name in budget.limits if name != "drop" or not open_]
        missed = budget.missed(**{name: self.value(name) for name in known})
        if got is not None and got.within is False and budget.drop is not None:
            missed.setdefault("drop", 1e-9)  # certain, though the samples so far do not show it
        return missed


@dataclass(frozen=True)
class Result:
    """What a search found: ``best``, and the whole ``frontier``, least predicted ``minimize`` first.

    ``evaluations``: plans that were measured, whole or in part (some only timed). ``samples``: how
    many were scored for it. ``missed``: by how much ``best`` misses each limit, in its unit.
    ``candidates``: plans that could have been returned, fixed before validation data were read; None: not fixed.
    """

    best: Point
    frontier: tuple[Point, ...]
    minimize: str
    budget: Budget
    evaluations: int = 0
    missed: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    candidates: int | None = None

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
        units = {"ms": " ms", "mib": " MiB", "mj": " mJ", "mm2": " mm2", "drop": ""}
        limits = best.budget.limits
        parts = [
            f"{name} {limits[name] + excess:.4g}{units[name]}, over the limit of {limits[name]:.4g} by {excess:.3g}"
            for name, excess in best.missed.items()
        ]
        super().__init__(
            f"no plan meets the budget; the closest ({best.label}) has {'; '.join(parts)}. "
            "It is in this error's .best (optimize saves it first); raise the limit, or offer more techniques"
        )


class SearchInterrupted(KeyboardInterrupt):
    """The search was interrupted. ``best`` is the result so far; run again with the same store to go on."""

    def __init__(self, best: Result) -> None:
        self.best = best
        super().__init__(
            f"interrupted after {best.evaluations} evaluations; the best plan so far is in this error's .best"
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
        """The plan that minimizes ``ms``, ``mib``, ``mj``, ``mm2`` or ``drop`` within the budget, and the frontier.

        With ``evaluate`` the plan was measured whole and meets every limit as measured; without, all is predicted.
        Raises :class:`BudgetError` if no plan does.
        """


def excess(point: Point, budget: Budget) -> float:
    """Sum of relative excesses over the limits."""
    return sum(over / max(abs(budget.limits[name]), 1e-3) for name, over in point.missed(budget).items())
