"""Multi-objective search: the whole frontier of drop, time, size and energy, as measured."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..plan import Budget
from ..profile import Profile
from .base import (
    NAMED,
    QUANTITIES,
    Ahead,
    BudgetError,
    Evaluate,
    Evaluation,
    Point,
    Progress,
    Result,
    Search,
    SearchInterrupted,
    Staged,
)
from .exact import Exact
from .hypervolume import non_dominated
from .predicted import predicted
from .program import Choice, Program
from .proposals import Proposals, Space, require
from .random_plans import drawn
from .study import Judge, Ledger, finished, stored
from .trials import Trials, key_of

SAMPLERS = ("nsga2", "tpe")


@dataclass(frozen=True)
class Pareto(Search):
    """The plans that no other betters in all of the ``objectives``, as measured, sought with Optuna.

    ``objectives``: two or more of ``drop``, ``ms``, ``mib``, ``mj``, ``mm2``. ``sampler``: ``nsga2`` (Deb et al. 2002,
    IEEE Trans. Evolutionary Computation 6:2) or ``tpe`` (Bergstra et al. 2011, NeurIPS 24; Ozaki et al. 2020, GECCO,
    doi:10.1145/3377930.3389817, for several objectives). ``trials``: plans measured in all, the float plan and those of
    ``seeds`` included; each once. ``seeds``: a search whose predicted frontier is measured first; None: the float plan
    and random plans; with few trials NSGA-II is then no better than these. Limits are constraints, and the drop of a
    plan that breaks another limit as measured is not measured.

    Trials are chosen in batches of ``population``, so what is tried does not depend on how many processes measure.
    ``storage``: where the trials are kept: None in memory; a file (SQLite); or an address that Optuna takes, such as
    ``postgresql://user:password@host/database``. ``study``: their name there. Several machines that give the same
    settings share the work (times of unlike machines do not compare), and a stopped search goes on. ``seconds``: after
    that nothing new is begun.

    The result's frontier begins with the plans that :func:`front` gives, least ``minimize`` first; then come the others
    that were measured. What is tried depends on what was seen, so ``candidates`` is None. Needs Optuna: raises
    ``ModuleNotFoundError`` with the line that installs it, and :class:`~bitsmith.search.storage.StudyError` for a
    storage that cannot be used. An interrupt carries the best so far; the study stays.
    """

    objectives: tuple[str, ...] = ("drop", "ms")
    sampler: Literal["nsga2", "tpe"] = "nsga2"
    trials: int = 60
    population: int = 12
    seed: int = 0
    storage: str | Path | None = None
    study: str = "bitsmith"
    seconds: float | None = None
    seeds: Search | None = field(default_factory=Exact)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple(self.objectives))
        if len(set(self.objectives)) != len(self.objectives) or len(self.objectives) < 2:
            raise ValueError(f"Pareto(objectives={self.objectives}): give two or more different ones")
        unknown = [name for name in self.objectives if name not in QUANTITIES]
        if unknown:
            raise ValueError(f"Pareto(objectives={self.objectives}): each must be one of {', '.join(QUANTITIES)}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"Pareto(sampler={self.sampler!r}): must be one of {', '.join(SAMPLERS)}")
        if self.trials < 1:
            raise ValueError(f"Pareto(trials={self.trials}): must be at least 1")
        if self.population < 2:
            raise ValueError(f"Pareto(population={self.population}): must be at least 2")

    def left(self) -> int:
        """How many trials are not done yet. Raises as a search does if the storage cannot be used."""
        done = 0 if self.storage is None else finished(self.storage, self.study)
        return max(self.trials - done, 0)

    def search(
        self,
        profile: Profile,
        budget: Budget,
        minimize: str,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
    ) -> Result:
        require()
        program = Program(profile)
        for name in self.objectives:
            if name in NAMED and name not in program.has:
                raise ValueError(
                    f"the profile has no {NAMED[name]}: profile on a target with {NAMED[name]}, or leave {name} out"
                )
        first = self._guided(program, budget, progress)
        try:
            if evaluate is None:
                tried = _Tried(program, None)
                self._walk(budget, first, None, tried)
                return self._sorted(predicted(list(tried.points.values()), budget, minimize))
            control = program.point(program.control)
            trials = Trials(evaluate, self.trials, budget, minimize, control, progress, seconds=self.seconds)
            trials.asks_drop |= "drop" in self.objectives
            with trials.interruptible():
                trials.promise(None)
                self._walk(budget, first, self.storage, _Tried(program, trials))
            return self._sorted(trials.result(()))
        except BudgetError as error:
            raise BudgetError(self._sorted(error.best)) from None
        except SearchInterrupted as stop:
            raise SearchInterrupted(self._sorted(stop.best)) from stop

    def _walk(self, budget: Budget, first: Sequence[Choice], storage: str | Path | None, tried: _Tried) -> None:
        """Try batch after batch, each chosen by what all before it gave."""
        space = Space.of(tried.program)
        proposals = Proposals(space, len(self.objectives), self.sampler, self.population, self.seed)

        def judge(point: Point) -> tuple[list[float], list[float]]:
            missed = point.missed(budget)
            excesses = [missed.get(name, 0.0) / max(abs(limit), 1e-3) for name, limit in budget.limits.items()]
            return [point.value(name) for name in self.objectives], excesses

        with self._listed(budget, storage, space, tried, judge) as ledger:
            given = dict(enumerate(first[: self.trials]))
            if ledger is not None:
                ledger.offer(given)
                given = {index: row.choice for index, row in ledger.known().items()}
            for start in range(0, self.trials, self.population):
                wanted = self._wanted(proposals, start, given, ledger)
                if ledger is None:
                    tried.ahead(wanted.values())
                    done = all(tried(choice) is not None for choice in wanted.values())
                else:
                    done = ledger.run(wanted)
                if not done or len(wanted) < self.population:
                    return
                proposals.told({index: judge(tried.points[choice]) for index, choice in wanted.items()})

    def _wanted(
        self, proposals: Proposals, start: int, given: dict[int, Choice], ledger: Ledger | None
    ) -> dict[int, Choice]:
        """The choices of the batch that begins there, as many as there are trials; on the list, where there is one."""
        wanted = proposals.batch(start, given)
        mine = {index: choice for index, choice in wanted.items() if index < self.trials}
        if ledger is None:
            return mine
        offered = ledger.offer(mine)
        if offered != mine:
            # another machine, whose profile differs, was first; its choices count
            given |= offered
            proposals.dropped()
            proposals.batch(start, given)
        return offered

    def _listed(
        self, budget: Budget, storage: str | Path | None, space: Space, tried: _Tried, judge: Judge
    ) -> AbstractContextManager[Ledger | None]:
        if storage is None or tried.trials is None:
            return nullcontext()
        settings = {
            "objectives": list(self.objectives),
            "sampler": self.sampler,
            "population": self.population,
            "seed": self.seed,
            "limits": budget.limits,
            "drop measured": tried.trials.asks_drop,
            "target": tried.program.profile.target,
        }
        classes = {type(technique) for unit in tried.program.units for technique in unit.techniques}
        return stored(storage, self.study, settings, space, tuple(classes), tried, judge)

    def _guided(self, program: Program, budget: Budget, progress: Progress | None) -> list[Choice]:
        """The float plan, then the predicted frontiers of loss and each cost, spread so that any beginning covers them.

        At most two populations of them. Without seeds a population that is drawn as random plans are: of Optuna's own
        draws all change about the same share of the decisions.
        """
        if self.seeds is None:
            generator = random.Random(self.seed)
            spread = [drawn(program, generator) for _ in range(self.population - 1)]
            return list(dict.fromkeys([program.control, *spread]))
        ladders: list[list[Choice]] = []
        for cost in self.objectives:
            if cost == "drop":
                continue
            try:
                found = self.seeds.search(program.profile, budget, cost, None, progress)
            except BudgetError as error:
                found = error.best
            points = sorted(found.frontier, key=lambda point: (point.loss, point.predicted(cost)))
            ladders.append([_choice(program, points[k]) for k in _spread(len(points))])
        mixed = [choice for row in itertools.zip_longest(*ladders) for choice in row if choice is not None]
        return list(dict.fromkeys([program.control, *mixed]))[: 2 * self.population + 1]

    def _sorted(self, result: Result) -> Result:
        """The result with the frontier first, then all others."""
        best = front(result.frontier, self.objectives)
        rest = [point for point in result.frontier if not any(point is other for other in best)]

        def order(points: Iterable[Point]) -> list[Point]:
            return sorted(points, key=lambda p: (p.value(result.minimize), p.loss))

        return dataclasses.replace(result, frontier=(*order(best), *order(rest)))


def front(points: Iterable[Point], objectives: Sequence[str]) -> list[Point]:
    """The points that no other betters in all objectives, in order: among those measured in all of them, or, if none
    was measured, as predicted. Of points with the same measured plan the first.
    """
    every = list(points)
    known = [point for point in every if point.evaluation is not None] or every
    once: dict[object, Point] = {}
    for point in known:
        got = point.evaluation
        once.setdefault(key_of(point.plan if got is None else got.plan), point)
    kept = list(once.values())
    return [kept[k] for k in non_dominated([[point.value(name) for name in objectives] for point in kept])]


class _Tried:
    """The points of the choices that were tried: measured as far as it may still matter, or without ``trials`` only
    predicted."""

    def __init__(self, program: Program, trials: Trials | None) -> None:
        self.program, self.trials = program, trials
        self.points: dict[Choice, Point] = {}

    def __call__(self, choice: Choice) -> Point | None:
        """The point of a choice; None once the time is over."""
        point = self.program.point(choice)
        if self.trials is not None:
            if self.trials.late:
                return None
            point = self.trials.costs(point)
            if self.trials.asks_drop and not set(point.missed(self.trials.budget)) - {"drop"}:
                point = self.trials.whole(point)
        self.points[choice] = point
        return point

    def ahead(self, choices: Iterable[Choice]) -> None:
        """An evaluator that is a plain function may begin all of a batch at once, where it can."""
        evaluate: object = None if self.trials is None else self.trials.evaluate
        if isinstance(evaluate, Ahead) and not isinstance(evaluate, Staged):
            evaluate.ahead([self.program.point(choice).plan for choice in choices], math.inf)

    def learned(self, choice: Choice, evaluation: Evaluation) -> None:
        """Another process, or an earlier one, measured it."""
        assert self.trials is not None
        point = dataclasses.replace(self.program.point(choice), evaluation=evaluation)
        self.points[choice] = self.trials.seen[key_of(point.plan)] = point


def _choice(program: Program, point: Point) -> Choice:
    return tuple(unit.techniques.index(point.plan[unit.sites[0]]) for unit in program.units)


def _spread(count: int) -> list[int]:
    """0 to ``count`` - 1, the two ends first, then what halves the gaps.

    >>> _spread(5)
    [0, 4, 2, 1, 3]
    """
    found = list(dict.fromkeys([0, count - 1]))
    gaps = [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            found.append(middle)
            gaps += [(low, middle), (middle, high)]
    return found
