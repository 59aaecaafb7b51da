"""Exact search: the additive model solved to optimality, then checked by measuring whole plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..plan import Budget, Plan
from ..profile import Profile
from .base import BudgetError, Evaluate, Point, Progress, Result, Search
from .program import Program

_TIGHTENINGS = 2


@dataclass(frozen=True)
class Exact(Search):
    """Integer linear programming over site and edge costs with HiGHS, along a ladder of loss limits.

    As in Yao et al. 2021 (HAWQ-V3, arXiv:2011.10680), with costs of edges, and with whole plans measured.
    ``points``: loss limits on the ladder. ``max_evaluations``: plans measured at most, the float plan included.
    ``margin``: a plan predicted worse than the best measured one by more than this fraction is not measured.
    """

    points: int = 24
    margin: float = 0.1
    max_evaluations: int = 12

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"Exact(points={self.points}): must be at least 2, the two ends of the frontier")
        if not self.margin >= 0:
            raise ValueError(f"Exact(margin={self.margin}): must be a fraction of 0 or more")
        if self.max_evaluations < 2:
            raise ValueError(
                f"Exact(max_evaluations={self.max_evaluations}): must be at least 2, the float plan and another"
            )

    def search(
        self,
        profile: Profile,
        budget: Budget,
        minimize: str,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
    ) -> Result:
        program = Program(profile)
        limits = {name: limit for name, limit in budget.limits.items() if name != "drop"}
        # The frontier is one of loss against this resource, whichever of the two is minimized.
        resource = minimize if minimize != "drop" else next(iter(limits), "ms")

        def frontier(within: Mapping[str, float]) -> list[Point]:
            found = _frontier(program, resource, within, self.points, progress)
            if found:
                return found
            near = program.nearest(within)
            slack = {name: max(limit, near.predicted(name) * (1 + 1e-9)) for name, limit in within.items()}
            return _frontier(program, resource, slack, self.points, progress) or [near]

        points = frontier(limits)
        if evaluate is None:
            return _finish(points, min(points, key=lambda p: _rank(p, budget, minimize)), budget, minimize)

        control = program.point(program.control)
        bench = _Bench(evaluate, self.max_evaluations, budget, minimize, control, progress)
        bench.measure(control)
        for _ in range(_TIGHTENINGS):
            tighter = _tighten(bench, points, limits, resource)
            if tighter is None:
                break
            limits = tighter
            points = frontier(limits)
        self._explore(bench, points)
        every = {_key(point.plan): point for point in (*points, *bench.seen.values())}
        return _finish([bench.seen.get(key, point) for key, point in every.items()], bench.best(), budget, minimize)

    def _explore(self, bench: _Bench, points: list[Point]) -> None:
        """Bisect for where the limits begin to hold, then measure that point's neighbours while any could be better."""
        budget, minimize, last = bench.budget, bench.minimize, len(points) - 1
        if minimize == "drop":
            pivot = _bisect(bench, points, fails_first=True) if set(budget.limits) != {"drop"} else 0
        else:
            pivot = _bisect(bench, points, fails_first=False) if budget.drop is not None else last
        for distance in range(len(points) + 1):
            for index in (pivot + distance, pivot - distance):
                if not 0 <= index <= last or bench.spent:
                    continue
                best = bench.best()
                ceiling = best.predicted(minimize) + self.margin * abs(best.predicted(minimize))
                if best.missed(budget) or points[index].predicted(minimize) <= ceiling:
                    bench.measure(points[index])


class _Bench:
    """Whole plans measured so far, and the best of them. ``seen`` maps a plan's key to its evaluated point."""

    def __init__(
        self,
        evaluate: Evaluate,
        most: int,
        budget: Budget,
        minimize: str,
        control: Point,
        progress: Progress | None,
    ) -> None:
        self.evaluate, self.most, self.budget, self.minimize = evaluate, most, budget, minimize
        self.control_key = _key(control.plan)
        self.progress = progress
        self.seen: dict[tuple[object, ...], Point] = {}

    @property
    def spent(self) -> bool:
        return len(self.seen) >= self.most

    def measure(self, point: Point) -> Point:
        """The point with its evaluation; each plan is measured once."""
        key = _key(point.plan)
        if key not in self.seen:
            if self.progress is not None:
                self.progress("measuring whole plans", len(self.seen), self.most)
            evaluation = self.evaluate(point.plan)
            if evaluation.drop is None and (self.budget.drop is not None or self.minimize == "drop"):
                raise ValueError(
                    "evaluate() gave no drop, but the search was asked to keep or minimize it: "
                    "give the evaluator a task with a metric and validation data"
                )
            self.seen[key] = dataclasses.replace(point, evaluation=evaluation)
        return self.seen[key]

    def best(self) -> Point:
        """Of those that meet the budget as measured the best as measured, else the one that misses it by least.

        The float plan is the control: a plan measured slower than it is not a gain in time.
        """
        found = sorted(self.seen.values(), key=lambda p: (p.loss, p.predicted(self.minimize)))
        control = self.seen[self.control_key]
        if self.minimize == "ms" and not control.missed(self.budget):
            found = [p for p in found if p is control or _speed_ratio(p) <= 1.0]
        # Times of different moments compare through the float plan, timed interleaved with each.
        relative = self.minimize == "ms" and all(p is control or _speed_ratio(p) > 0.0 for p in found)

        def rank(point: Point) -> tuple[float, float]:
            value = point.value(self.minimize)
            if relative:
                value = 1.0 if point is control else _speed_ratio(point)
            return _excess(point, self.budget), value

        return min(found, key=rank)


def _frontier(
    program: Program, resource: str, limits: Mapping[str, float], points: int, progress: Progress | None
) -> list[Point]:
    """Predicted plans that no other betters in both loss and resource, least loss first; empty if none is in limits."""
    fastest = program.solve(resource, "drop", limits)
    safest = program.solve("drop", resource, limits)
    if fastest is None or safest is None:
        return []
    found = [fastest]
    for done, ceiling in enumerate(_ladder(program, safest.loss, fastest.loss, points)):
        if progress is not None:
            progress("solving for loss limits", done, points)
        # The last plan is optimal for every limit between its own loss and the limit that it was found under.
        if safest.loss < ceiling < found[-1].loss:
            point = program.solve(resource, "drop", {**limits, "drop": ceiling})
            if point is not None:
                found.append(point)
    found.append(safest)
    control = program.point(program.control)
    if all(control.predicted(name) <= limit for name, limit in limits.items()):
        found.append(control)
    front: list[Point] = []
    for point in sorted(found, key=lambda p: (p.loss, p.predicted(resource))):
        if not front or point.predicted(resource) < front[-1].predicted(resource):
            front.append(point)
    return front


def _ladder(program: Program, low: float, high: float, points: int) -> list[float]:
    """Loss limits between the two ends, greatest first, spaced geometrically from the smallest step of any site."""
    losses = [[row.loss for row in options.values()] for options in program.rows.values()]
    steps = [loss - min(options) for options in losses for loss in options if min(options) < loss < float("inf")]
    if not steps or high <= low:
        return []
    least = min(max(min(steps), 1e-6 * (high - low)), high - low)
    # every limit is a little above its step, so that a plan of exactly that loss is inside
    ladder = low + np.geomspace(least, high - low, points)[:-1] * (1 + 1e-9)
    control = program.point(program.control).loss
    return sorted({*map(float, ladder), control}, reverse=True)


def _bisect(bench: _Bench, points: list[Point], fails_first: bool) -> int:
    """The last point whose drop holds; if points of little loss fail a cost limit, the first that holds it."""
    budget = bench.budget

    def holds(point: Point) -> bool:
        missed = point.missed(budget)
        return not set(missed) - {"drop"} if fails_first else "drop" not in missed

    low, high = -1, len(points)
    while high - low > 1 and not bench.spent:
        middle = (low + high) // 2
        if holds(bench.measure(points[middle])) is fails_first:
            high = middle
        else:
            low = middle
    return high if fails_first else low


def _tighten(bench: _Bench, points: list[Point], limits: dict[str, float], resource: str) -> dict[str, float] | None:
    """Limits on predictions scaled by how far measurements exceed the budget at the best predicted point.

    Only where the frontier does not trade that cost itself. None: nothing to tighten.
    """
    others = [name for name in limits if name != resource]
    if not others or bench.spent:
        return None
    end = bench.measure(points[0 if bench.minimize == "drop" else -1])
    missed = end.missed(bench.budget)
    tighter = {
        name: min(limits[name], end.predicted(name)) * bench.budget.limits[name] / end.value(name)
        for name in others
        if name in missed
    }
    return {**limits, **tighter} if tighter else None


def _speed_ratio(point: Point) -> float:
    """Measured time over the float plan's in the same run; 0 where that was not timed: nothing held against it."""
    got = point.evaluation
    return got.ms / got.float_ms if got is not None and got.ms is not None and got.float_ms else 0.0


def _excess(point: Point, budget: Budget) -> float:
    """Sum of relative excesses over the limits."""
    return sum(excess / max(abs(budget.limits[name]), 1e-3) for name, excess in point.missed(budget).items())


def _rank(point: Point, budget: Budget, minimize: str) -> tuple[float, float]:
    return _excess(point, budget), point.predicted(minimize)


def _finish(points: list[Point], best: Point, budget: Budget, minimize: str) -> Result:
    measured = sum(point.evaluation is not None for point in points)
    frontier = tuple(sorted(points, key=lambda p: (p.predicted(minimize), p.loss)))
    result = Result(best, frontier, minimize, budget, measured, best.missed(budget))
    if result.missed:
        raise BudgetError(result)
    return result


def _key(plan: Plan) -> tuple[object, ...]:
    return tuple(sorted(((site, technique) for site, technique in plan.sites.items()), key=lambda item: item[0]))
