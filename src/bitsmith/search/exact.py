"""Exact search: the additive model solved to optimality, then checked by measuring whole plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..plan import Budget
from ..profile import Profile
from .base import Evaluate, Point, Progress, Result, Search
from .ladder import climb
from .order import levels
from .predicted import predicted
from .program import Program, additive
from .trials import Trials, key_of

_TIGHTENINGS = 2


@dataclass(frozen=True)
class Exact(Search):
    """Integer linear programming over site and edge costs with HiGHS, along a ladder of loss limits.

    As in Yao et al. 2021 (HAWQ-V3, arXiv:2011.10680), with costs of edges, and with whole plans measured. What two
    sites lose together is shared between them, as if every other site had the same technique. The cheapest technique
    everywhere is asked first: it need not lie on the ladder, and is the plan to beat.
    ``points``: loss limits on the ladder. ``max_evaluations``: plans measured at most, the float plan included.
    ``margin``: a plan predicted worse than the best measured one by more than this fraction is not measured.
    ``chance``: a plan that is still undecided is left once its chance to keep the drop is below. ``passes``: full
    evaluation sets that may be forwarded in all, the whole evaluation of what is returned included; more only until one
    keeps the drop. ``seconds``: after that nothing new is begun.
    """

    points: int = 24
    margin: float = 0.05
    max_evaluations: int = 12
    chance: float = 0.1
    passes: float = 2.0
    seconds: float | None = None

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
        program = Program(additive(profile))
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
            return predicted(points, budget, minimize)

        control = program.point(program.control)
        trials = Trials(evaluate, self.max_evaluations, budget, minimize, control, progress, self.chance, self.seconds)
        candidates = {key_of(control.plan)}
        with trials.interruptible():
            trials.whole(control)
            candidates |= {key_of(point.plan) for point in points}
            for _ in range(_TIGHTENINGS):
                tighter = _tighten(trials, points, limits, resource)
                if tighter is None:
                    break
                limits = tighter
                points = frontier(limits)
                candidates |= {key_of(point.plan) for point in points}
            everywhere = _everywhere(program, minimize) if minimize != "drop" else None
            if everywhere is not None:
                candidates.add(key_of(everywhere.plan))
            trials.promise(len(candidates))
            climb(trials, points, self.margin, self.passes, everywhere)
        return trials.result(points)


def _everywhere(program: Program, minimize: str) -> Point | None:
    """The cheapest technique wherever it is offered, the control elsewhere."""
    offered = levels(program, minimize)
    if not offered:
        return None
    control = program.control
    return program.point(
        tuple(
            unit.techniques.index(offered[-1]) if offered[-1] in unit.techniques else k
            for unit, k in zip(program.units, control, strict=True)
        )
    )


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


def _tighten(trials: Trials, points: list[Point], limits: dict[str, float], resource: str) -> dict[str, float] | None:
    """Limits on predictions scaled by how far measurements exceed the budget at the best predicted point.

    Only where the frontier does not trade that cost itself. None: nothing to tighten.
    """
    others = [name for name in limits if name != resource]
    if not others or trials.spent:
        return None
    end = trials.costs(points[0 if trials.minimize == "drop" else -1])
    missed = end.missed(trials.budget)
    tighter = {
        name: min(limits[name], end.predicted(name)) * trials.budget.limits[name] / end.value(name)
        for name in others
        if name in missed
    }
    return {**limits, **tighter} if tighter else None
