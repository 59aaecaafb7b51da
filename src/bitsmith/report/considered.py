"""Why each technique was chosen or not: what one change of the plan would give, and what measured plans with it gave.

A change is predicted as the search predicts plans: rows of sites and edges, summed. Sites that share a decision change
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..plan import Budget, Plan
from ..profile import Profile, Row
from ..search.base import MIB, Point, Result
from ..technique import Technique
from ..techniques.float_ import Float
from .data import SiteRow, TechniqueRow
from .text import number

UNITS: Mapping[str, str] = {"ms": " ms", "mib": " MiB", "mj": " mJ", "mm2": " mm2", "drop": ""}
_TINY = 1e-9
_REASONS = 2
"""Reasons of refusals that are written out."""


@dataclass(frozen=True)
class Change:
    """``technique`` at ``site`` instead of what was chosen: ``cost``, how much more of what is minimized that is,
    ``loss``, how much more is lost, both as predicted; ``whole``: what the chosen plan costs."""

    site: str
    technique: Technique
    cost: float
    loss: float
    whole: float
    minimize: str

    @property
    def lost_by(self) -> str:
        """``accuracy``, ``cost``, ``accuracy and cost``, or ``nothing predicted`` where it is no worse in either."""
        dearer, worse = self._beyond(self.cost, self.whole), self._beyond(self.loss, 1.0)
        if self.minimize == "drop":
            return "accuracy" if worse else "nothing predicted"
        if dearer:
            return "accuracy and cost" if worse else "cost"
        return "accuracy" if worse else "nothing predicted"

    @property
    def rank(self) -> tuple[int, float]:
        """The most promising first: no worse in either, then the least loss for what is saved, then the least cost."""
        if self.lost_by == "nothing predicted":
            return 0, self.cost
        if self.lost_by == "accuracy":
            return (1, self.loss / -self.cost) if self._beyond(-self.cost, self.whole) else (2, self.loss)
        return (3 if self.lost_by == "cost" else 4), self.cost

    @property
    def said(self) -> str:
        """Such as ``0.0021 mJ less (1.5 %), loss +0.034``."""
        loss = f"loss {'-' if self.loss < 0 else '+'}{number(abs(self.loss))}"
        if self.minimize == "drop":
            return loss
        if not self._beyond(abs(self.cost), self.whole):
            return f"the same{UNITS[self.minimize]}, {loss}"
        share = f" ({number(100 * abs(self.cost) / self.whole, 2)} %)" if self.whole > 0 else ""
        return f"{number(abs(self.cost))}{UNITS[self.minimize]} {'less' if self.cost < 0 else 'more'}{share}, {loss}"

    @staticmethod
    def _beyond(value: float, scale: float) -> bool:
        return value > _TINY * max(abs(scale), _TINY)


def considered(profile: Profile, result: Result) -> tuple[TechniqueRow, ...]:
    """A row for each technique that was offered or refused, in the order of the profile, float first."""
    judged = _Judge(profile, result)
    found: dict[Technique, list[Row]] = {}
    for row in profile.rows:
        found.setdefault(row.technique, []).append(row)
    return tuple(judged.row(technique, rows) for technique, rows in found.items())


def alternatives(profile: Profile, result: Result) -> dict[str, str]:
    """By site, the most promising technique that was not chosen there, and what it lost by."""
    judged = _Judge(profile, result)
    found = {}
    for site, changes in judged.by_site().items():
        best = min(changes, key=lambda change: change.rank)
        found[site] = f"{best.technique.label()}: {best.lost_by}: {best.said}"
    return found


class _Judge:
    """The chosen plan, and every plan that differs from it by one decision."""

    def __init__(self, profile: Profile, result: Result) -> None:
        self.profile, self.result = profile, result
        self.options = profile.options()
        self.chosen = {row.site: row.technique for row in profile.chosen(result.plan)}
        self.base = self._predicted({})
        self.groups = {site: group for group in profile.groups for site in group}

    def _predicted(self, changed: Mapping[str, Technique]) -> tuple[float, float]:
        """Cost and loss of the chosen plan with some sites changed."""
        found = self.profile.predict(Plan({**self.chosen, **changed}))
        minimize = self.result.minimize
        cost = {"mib": found["bytes"] / MIB, "drop": found["loss"]}.get(minimize)
        return (found[minimize] if cost is None else cost), found["loss"]

    def change(self, site: str, technique: Technique, sites: Iterable[str]) -> Change:
        """``technique`` at all of ``sites``, as a change of ``site``."""
        cost, loss = self._predicted(dict.fromkeys(sites, technique))
        whole, before = self.base
        return Change(site, technique, cost - whole, loss - before, whole, self.result.minimize)

    def changes(self, technique: Technique) -> list[Change]:
        """At each site where it was offered and not chosen, once for sites that share the decision."""
        found: dict[tuple[str, ...], Change] = {}
        for site, rows in self.options.items():
            if self.chosen[site] == technique or all(row.technique != technique for row in rows):
                continue
            group = self.groups.get(site, (site,))
            if group not in found:
                found[group] = self.change(site, technique, group)
        return list(found.values())

    def by_site(self) -> dict[str, list[Change]]:
        found: dict[str, list[Change]] = {}
        for technique in dict.fromkeys(row.technique for row in self.profile.rows if not row.refused):
            for change in self.changes(technique):
                for site in self.groups.get(change.site, (change.site,)):
                    found.setdefault(site, []).append(change)
        return found

    def row(self, technique: Technique, rows: Sequence[Row]) -> TechniqueRow:
        refused = [row for row in rows if row.refused]
        there = [site for site, chosen in self.chosen.items() if chosen == technique]
        changes = self.changes(technique)
        best = min(changes, key=lambda change: change.rank, default=None)
        said = []
        if there and technique != Float():
            back = self.change(there[0], Float(), there)
            said.append(f"in float these sites would take {back.said}")
        if best is not None:
            said.append(f"{'elsewhere the' if there else 'the'} best at {best.site}: {best.said}")
        if technique != Float() and len(refused) < len(rows):
            said.append(self._measured(technique))
        if refused:
            said.append(_refusals(refused))
        lost_by = "not supported" if len(refused) == len(rows) else best.lost_by if best is not None else ""
        return TechniqueRow(
            technique=technique.label() if technique != Float() else "float",
            chosen=len(there),
            offered=len(rows) - len(refused),
            refused=len(refused),
            sites=", ".join(there),
            lost_by="" if there else lost_by,
            candidate="" if best is None else best.site,
            why="; ".join(said),
        )

    def _measured(self, technique: Technique) -> str:
        """The measured plan with the technique that comes nearest to being chosen."""
        minimize, budget = self.result.minimize, self.result.budget
        having = [
            point
            for point in self.result.frontier
            if point.evaluation is not None and technique in point.plan.sites.values()
        ]
        if not having:
            return "in no measured plan"
        best = min(having, key=lambda point: (bool(point.missed(budget)), point.value(minimize)))
        plans = f"in {len(having)} measured plan{'s' if len(having) > 1 else ''}"
        if best.plan == self.result.best.plan:
            return f"{plans}, the chosen one among them"
        return f"{plans}, of which the best has {_numbers(best, minimize, budget)}"


def _numbers(point: Point, minimize: str, budget: Budget) -> str:
    """What a measured plan costs and loses, and which limit it misses."""
    parts = [] if minimize == "drop" else [f"{number(point.value(minimize))}{UNITS[minimize]}"]
    drop = point.value("drop")
    if math.isfinite(drop):
        parts.append(f"a drop of {number(drop)}" if drop else "no drop")
    over = [f"{name} over the limit by {number(excess)}{UNITS[name]}" for name, excess in point.missed(budget).items()]
    return ", ".join([*parts, *over])


def _refusals(rows: Sequence[Row]) -> str:
    """The commonest reasons, each with its number of sites."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.refused] = counts.get(row.refused, 0) + 1
    common = sorted(counts, key=lambda reason: -counts[reason])
    said = [f"not at {counts[reason]} site{'s' if counts[reason] > 1 else ''}: {reason}" for reason in common]
    more = len(said) - _REASONS
    return "; ".join(said[:_REASONS]) + (f"; and {more} more reason{'s' if more > 1 else ''}" if more > 0 else "")


@dataclass(frozen=True)
class Costs:
    """Of one site, per batch."""

    ms: float | None = None
    float_ms: float | None = None
    mj: float | None = None
    float_mj: float | None = None

    def of(self, row: SiteRow) -> SiteRow:
        """The row with these costs."""
        return replace(row, ms=self.ms, float_ms=self.float_ms, mj=self.mj, float_mj=self.float_mj)


def costs_of_sites(profile: Profile, plan: Plan) -> dict[str, Costs]:
    """By site what the formulas of a modelled target say; nothing of another one."""
    if profile.source != "modelled":
        return {}
    floats = {row.site: row for row in profile.rows if row.technique == Float()}
    chosen = {row.site: row for row in profile.chosen(plan)}
    return {
        site: Costs(row.ms, floats[site].ms, row.mj, floats[site].mj) for site, row in chosen.items() if site in floats
    }
