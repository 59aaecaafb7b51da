"""The report verb: what a profile, a plan and a check say, as one :class:`Report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..compare import Drop, Score
from ..learn.history import History
from ..plan import Budget, Plan
from ..profile import Profile, Row
from ..search.base import Evaluation, Point, Result
from ..site import Site
from ..targets.base import SiteTimes, Timing
from ..techniques.float_ import Float
from ..verify import Check, SiteCheck
from .data import FrontierPoint, Measure, Report, SiteRow, TrainingPoint


def report(
    profile: Profile,
    plan: Plan,
    check: Check | None = None,
    *,
    result: Result | None = None,
    budget: Budget | None = None,
    title: str = "Bitsmith report",
    metric: str = "",
    float_score: Score | None = None,
    plan_score: Score | None = None,
    drop: Drop | None = None,
    split: str = "selected on these samples",
    float_time: Timing | None = None,
    plan_time: Timing | None = None,
    float_bytes: int | None = None,
    plan_bytes: int | None = None,
    float_mj: float | None = None,
    plan_mj: float | None = None,
    float_mm2: float | None = None,
    plan_mm2: float | None = None,
    float_sites: SiteTimes | None = None,
    plan_sites: SiteTimes | None = None,
    float_energies: Mapping[str, float] | None = None,
    plan_energies: Mapping[str, float] | None = None,
    sites: Mapping[str, Site] | None = None,
    history: History | None = None,
    **details: Any,
) -> Report:
    """What was asked, what was got, and why they differ; what was not measured is left open.

    ``profile``, ``plan`` (adapted), ``check``: from the verbs of that name. ``result``: the search's, for the frontier.
    Scores, timings and sizes of the float model and the plan as far as they were measured; ``float_energies``,
    ``plan_energies``: mJ by site, as the artifact of a modelled target has them. ``history``: of a training
    under the plan (:func:`~bitsmith.finetune`), drawn as curves. ``details``: further fields
    of :class:`Report` (``settings``, ``versions``, ``machine``, ``notes``, ``seed``, ``store``).
    """
    evaluation = result.best.evaluation if result is not None else None
    notes = [*details.pop("notes", ()), *_notes(profile, plan, check, float_sites, plan_sites)]
    return Report(
        title=title,
        target=profile.target,
        metric=metric,
        budget=budget.limits if budget is not None else {},
        missed=dict(result.missed) if result is not None else {},
        minimize=result.minimize if result is not None else "ms",
        split=split,
        float_metric=_score(float_score),
        plan_metric=_score(plan_score) or _evaluated(evaluation),
        drop=_drop(drop, evaluation),
        float_ms=_timing(float_time),
        plan_ms=_timing(plan_time),
        float_mj=_energy(float_mj, profile.source),
        plan_mj=_energy(plan_mj, profile.source),
        float_mm2=_area(float_mm2, profile.source),
        plan_mm2=_area(plan_mm2, profile.source),
        float_bytes=float_bytes,
        plan_bytes=plan_bytes,
        loss_name=profile.loss_name,
        frontier=_frontier(result, profile.source),
        sites=_energies(_rows(profile, plan, check, float_sites, plan_sites, sites), float_energies, plan_energies),
        verify=check.to_json() if check is not None else {},
        time_parts=_parts(plan_sites),
        time_whole=plan_sites.whole if plan_sites is not None else None,
        notes=tuple(notes),
        predicted=profile.predict(result.plan) if result is not None else {},
        citations=(*plan.cite(), *profile.references),
        training=_training(history),
        training_metric=history.metric if history is not None else "",
        **details,
    )


def _training(history: History | None) -> tuple[TrainingPoint, ...]:
    return (
        tuple(
            TrainingPoint(number, step.loss, step.lr, step.validation, kept=number == (history.best or len(history)))
            for number, step in enumerate(history, 1)
        )
        if history is not None
        else ()
    )


def _score(score: Score | None) -> Measure | None:
    if score is None:
        return None
    return Measure(score.mean, score.spread or None, score.low, score.high, score.n, "fraction", "measured")


def _evaluated(evaluation: Evaluation | None) -> Measure | None:
    if evaluation is None or evaluation.metric is None:
        return None
    return Measure(evaluation.metric, n=evaluation.samples, unit="fraction")


def _drop(drop: Drop | None, evaluation: Evaluation | None) -> Measure | None:
    if drop is not None:
        return Measure(drop.mean, low=drop.low, high=drop.high, n=drop.n, unit="fraction")
    if evaluation is None or evaluation.drop is None:
        return None
    low, high = evaluation.drop_interval or (None, None)
    return Measure(evaluation.drop, low=low, high=high, n=evaluation.samples, unit="fraction")


def _timing(timing: Timing | None) -> Measure | None:
    if timing is None:
        return None
    return Measure(timing.ms, timing.spread, n=len(timing.samples), unit="ms", source=timing.source)


def _energy(mj: float | None, source: str) -> Measure | None:
    return None if mj is None else Measure(mj, unit="mJ", source=source)


def _area(mm2: float | None, source: str) -> Measure | None:
    return None if mm2 is None else Measure(mm2, unit="mm2", source=source)


def _frontier(result: Result | None, source: str) -> tuple[FrontierPoint, ...]:
    if result is None:
        return ()

    def point(p: Point) -> FrontierPoint:
        got = p.evaluation
        return FrontierPoint(
            label=f"{sum(t != Float() for t in p.plan.sites.values())} sites changed",
            ms=p.value("ms"),
            drop=got.drop if got is not None else None,
            mib=p.value("mib"),
            loss=p.loss,
            evaluated=got is not None,
            chosen=p.plan == result.best.plan,
            mj=_known(p, "mj"),
            mm2=_known(p, "mm2"),
            source=source if got is None else got.source,
        )

    return tuple(point(p) for p in result.frontier)


def _known(point: Point, quantity: str) -> float | None:
    """As evaluated, else as predicted, None where neither is known."""
    got = None if point.evaluation is None else getattr(point.evaluation, quantity)
    value: float | None = getattr(point, quantity) if got is None else got
    return value


def _parts(times: SiteTimes | None) -> dict[str, float]:
    if times is None:
        return {}
    return {"sites": sum(times.sites.values()), "conversions": sum(times.conversions.values()), "other": times.other}


def _rows(
    profile: Profile,
    plan: Plan,
    check: Check | None,
    float_sites: SiteTimes | None,
    plan_sites: SiteTimes | None,
    sites: Mapping[str, Site] | None,
) -> tuple[SiteRow, ...]:
    checks = {row.site: row for row in check.sites} if check is not None else {}
    profiled: dict[str, list[Row]] = {}
    for row in profile.rows:
        profiled.setdefault(row.site, []).append(row)
    names = list(sites) if sites is not None else list(dict.fromkeys([*checks, *profiled]))
    rows = []
    for name in names:
        site = sites[name] if sites is not None else None
        got = checks.get(name)
        rows.append(_row(name, site, plan, profiled.get(name, []), got, float_sites, plan_sites))
    return tuple(rows)


def _energies(
    rows: tuple[SiteRow, ...], float_mj: Mapping[str, float] | None, plan_mj: Mapping[str, float] | None
) -> tuple[SiteRow, ...]:
    if not float_mj or not plan_mj:
        return rows
    return tuple(dataclasses.replace(row, mj=plan_mj.get(row.site), float_mj=float_mj.get(row.site)) for row in rows)


def _row(
    name: str,
    site: Site | None,
    plan: Plan,
    rows: list[Row],
    got: SiteCheck | None,
    float_sites: SiteTimes | None,
    plan_sites: SiteTimes | None,
) -> SiteRow:
    technique = plan.get(name) or Float()
    offered = [row for row in rows if not row.refused and row.technique != Float()]
    same = next((row for row in offered if type(row.technique) is type(technique)), None)
    # what a float site would have lost is worth as much as what a changed one loses
    loss = same or min(offered, key=lambda r: r.loss, default=None)
    refused = next((row.refused for row in rows if row.refused), "") if not offered else ""
    return SiteRow(
        site=name,
        kind=site.kind if site is not None else "",
        asked=technique.label() if technique != Float() else "float",
        realised=got.realised if got is not None else "",
        why=(got.why if got is not None else "") or (refused if technique != Float() else ""),
        sqnr_db=got.sqnr_db if got is not None else None,
        gap_db=got.gap_db if got is not None else None,
        agree=got.agree if got is not None else None,
        loss=loss.loss if loss is not None else None,
        ms=plan_sites.sites.get(name) if plan_sites is not None else None,
        float_ms=float_sites.sites.get(name) if float_sites is not None else None,
        bytes=technique.bits(site) / 8 if site is not None and site.weight is not None else None,
        macs=site.macs if site is not None else 0,
    )


def _notes(
    profile: Profile, plan: Plan, check: Check | None, float_sites: SiteTimes | None, plan_sites: SiteTimes | None
) -> list[str]:
    notes = [f"{profile.target}: {said}" for said in profile.assumptions]
    if not any(technique != Float() for technique in plan.sites.values()):
        notes.append("no site was changed: within the budget, nothing measured better than float")
    if check is not None and check.failing:
        names = [site.site for site in check.failing]
        notes.append(f"run and simulation differ at {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}")
    if check is not None and check.unrealised:
        notes.append(f"sites that did not run as asked: {len(check.unrealised)}; the table gives the reason of each")
    for label, times in (("float", float_sites), ("plan", plan_sites)):
        if times is not None and times.source != "modelled":
            notes.append(
                f"{label}: the profiler's parts sum to {times.total:.3f} ms, the whole takes {times.whole:.3f} ms "
                f"({times.source}); they differ because the profiler costs time and threads overlap"
            )
    if "fit error" in profile.notes and profile.notes.get("probes") != "0":
        notes.append(
            f"predicted times: fitted on {profile.notes['probes']} timed plans, "
            f"median error {float(profile.notes['fit error']):.1%} on those"
        )
    return notes
