"""The report of an exploration: the frontier first, and both sides from what the search measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..plan import Budget
from ..profile import Profile
from ..search.base import Point, Result
from ..search.hypervolume import hypervolume
from ..techniques.float_ import Float
from .compose import report
from .considered import Costs, alternatives, considered, costs_of_sites
from .data import Measure, Report


def explored(
    profile: Profile,
    result: Result,
    front: Sequence[Point],
    objectives: Sequence[str],
    budget: Budget,
    *,
    notes: Sequence[str] = (),
    **details: Any,
) -> Report:
    """The report of what a search over ``objectives`` found; nothing is measured for it.

    ``front``: the plans that no other betters. Times, sizes and scores are those of the search's own evaluations; by
    site they are those of a modelled target's formulas. What became of each technique stands in ``techniques``.
    ``details``: further fields of :func:`~bitsmith.report.compose.report`, such as ``title`` and ``metric``.
    """
    said = [
        f"{len(front)} of {result.evaluations} measured plans are on the frontier of {' and '.join(objectives)}: no "
        "other is as good in all of them and better in one",
        *notes,
    ]
    box = volume(result, front, objectives, budget)
    if box is not None:
        reference = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives, box[0], strict=True))
        said.append(f"hypervolume: {box[1] / math.prod(box[0]):.1%} of the box up to {reference}")
    said += [f"{name}: {profile.notes[name]}" for name in ("trained shortly", "not scored") if name in profile.notes]
    best = result.best
    plan = best.plan if best.evaluation is None else best.evaluation.plan
    found = report(profile, plan, result=result, budget=budget, notes=said, **details)
    rejected, taken = alternatives(profile, result), costs_of_sites(profile, result.plan)
    return dataclasses.replace(
        found,
        techniques=considered(profile, result),
        sites=tuple(
            dataclasses.replace(taken.get(row.site, Costs()).of(row), rejected=rejected.get(row.site, ""))
            for row in found.sites
        ),
        plan_ms=_time(best),
        plan_mj=_energy(best),
        plan_mm2=_area(best),
        plan_bytes=None if best.evaluation is None else best.evaluation.bytes,
        **_control(control_of(result)),
    )


def volume(
    result: Result, front: Sequence[Point], objectives: Sequence[str], budget: Budget
) -> tuple[list[float], float] | None:
    """A reference and the front's hypervolume up to it: the costs of the float plan as measured, and the limit of the
    drop (without one, 1). None where the float plan was not measured, or something of it is 0."""
    control = control_of(result)
    if control is None or control.evaluation is None:
        return None
    drop = 1.0 if budget.drop is None else budget.drop
    reference = [drop if name == "drop" else control.value(name) for name in objectives]
    if not all(0.0 < value < math.inf for value in reference):
        return None
    return reference, hypervolume([[point.value(name) for name in objectives] for point in front], reference)


def control_of(result: Result) -> Point | None:
    """The float plan, if it was measured or predicted."""
    return next((p for p in result.frontier if all(t == Float() for t in p.plan.sites.values())), None)


def _control(point: Point | None) -> dict[str, Any]:
    got = point.evaluation if point is not None else None
    if point is None or got is None:
        return {}
    metric = None if got.metric is None else Measure(got.metric, n=got.samples, unit="fraction")
    return {"float_ms": _time(point), "float_mj": _energy(point), "float_mm2": _area(point)} | {
        "float_bytes": got.bytes,
        "float_metric": metric,
    }


def _time(point: Point) -> Measure | None:
    got = point.evaluation
    if got is None or got.ms is None:
        return None
    return Measure(got.ms, spread=got.ms_spread, unit="ms", source=got.source)


def _energy(point: Point) -> Measure | None:
    got = point.evaluation
    return None if got is None or got.mj is None else Measure(got.mj, unit="mJ", source=got.source)


def _area(point: Point) -> Measure | None:
    got = point.evaluation
    return None if got is None or got.mm2 is None else Measure(got.mm2, unit="mm2", source=got.source)
