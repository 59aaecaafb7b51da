"""The additive cost model of a profile as an integer linear program.

One binary variable per decision and technique. An edge between two decisions gets one continuous variable per pair of
formats, whose marginals equal the decisions' (the local consistency polytope of pairwise Markov random fields;
Wainwright and Jordan 2008): exact for integral decisions whatever the sign of the costs, and tighter than one product
constraint per edge row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..plan import Plan
from ..profile import Profile, Row
from ..technique import Technique
from .base import MIB, NAMED, Point

Vector = NDArray[np.float64]

# HiGHS compares objectives to 1e-6 absolutely: the objective spans about this much, the tie-breaker a millionth of it.
_SPAN = 1e4
_TIE = 1e-2


@dataclass(frozen=True)
class Unit:
    """Sites that share one decision, and the techniques that all of them may have."""

    sites: tuple[str, ...]
    techniques: tuple[Technique, ...]


@dataclass(frozen=True)
class _Pair:
    """An edge between two decisions: the format class of each option at either end, ms and mj by pair of classes."""

    producer: int
    consumer: int
    writes: tuple[int, ...]
    reads: tuple[int, ...]
    ms: Vector
    mj: Vector


Choice = tuple[int, ...]


class Program:
    """Plans of a profile, their predicted costs, and the best of them under linear limits.

    Variables are in order of site and technique names, so rows in another order give the same plan.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.rows: dict[str, dict[Technique, Row]] = {}
        for site, rows in profile.options().items():
            for row in rows:
                self.rows.setdefault(site, {}).setdefault(row.technique, row)
        every = [row for options in self.rows.values() for row in options.values()]
        self.has = {name for name in NAMED if all(getattr(row, name) is not None for row in every)}
        self.units = _units(self.rows, profile.groups)
        self.groups = tuple(group for group in profile.groups if len(group) > 1)
        self._unit_of = {site: index for index, unit in enumerate(self.units) for site in unit.sites}
        sizes = [len(unit.techniques) for unit in self.units]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._edges, self._edges_constant, self._pairs = self._place_edges()
        self._costs, self._constants = self._place_costs()
        ends = [*self._offsets, *(self._offsets[-1] + np.cumsum([pair.ms.size for pair in self._pairs], dtype=int))]
        # The variables of each decision, then of each pair: in every block they sum to 1.
        self._blocks = [slice(int(low), int(high)) for low, high in itertools.pairwise(ends)]
        self._assemble()

    @property
    def control(self) -> Choice:
        """Everything float: the float-reading and float-writing technique of least loss at each decision."""
        return tuple(
            min(
                range(len(unit.techniques)),
                key=lambda k, unit=unit: (  # type: ignore[misc]
                    not all(_is_float(self.rows[site][unit.techniques[k]]) for site in unit.sites),
                    sum(self.rows[site][unit.techniques[k]].loss for site in unit.sites),
                ),
            )
            for unit in self.units
        )

    def together(self, unit: int, technique: Technique, choice: Choice) -> float:
        """What that technique at a decision loses together with the others of a choice, and among its own sites."""
        total = 0.0
        for site in self.units[unit].sites:
            for (other, its), loss in self.profile.interactions.get((site, technique), {}).items():
                at = self._unit_of.get(other)
                if at == unit:
                    total += 0.5 * loss if its == technique else 0.0  # met from both ends
                elif at is not None and self.units[at].techniques[choice[at]] == its:
                    total += loss
        return total

    def point(self, choice: Choice) -> Point:
        """The plan of a choice (the option's index for each decision) with its predicted costs."""
        chosen = {site: unit.techniques[k] for unit, k in zip(self.units, choice, strict=True) for site in unit.sites}
        plan = Plan({site: chosen[site] for site in self.rows}, groups=self.groups)
        predicted = self.profile.predict(plan)
        costs = predicted["ms"], predicted["bytes"], predicted["loss"]
        return Point(plan, *costs, predicted.get("mj"), mm2=predicted.get("mm2"))

    def solve(self, minimize: str, then: str, limits: Mapping[str, float]) -> Point | None:
        """The plan of least predicted ``minimize``, and among equals of least ``then``, within limits; None if none.

        Quantities are ``ms``, ``mib``, ``mj``, ``mm2`` and ``drop`` (the loss).
        """
        objective = self._costs[minimize] * (_SPAN / self._span(minimize)) + self._costs[then] * (
            _TIE / self._span(then)
        )
        tight = dict(limits)
        for _ in range(20):
            choice = self._within(objective, tight)
            if choice is None:
                return None
            point = self.point(choice)
            # The solver allows limits to be missed by 1e-6: ask again with what it took.
            over = {name: point.predicted(name) - limit for name, limit in limits.items()}
            over = {name: excess for name, excess in over.items() if excess > 1e-12}
            if not over:
                return point
            for name, excess in over.items():
                tight[name] -= excess + 1e-9 * self._span(name)
        return None

    def nearest(self, limits: Mapping[str, float]) -> Point:
        """The plan that misses the limits by the least sum of relative excesses."""
        loss = self._costs["drop"] * (_TIE / self._span("drop"))
        objective = np.concatenate([loss, np.full(len(limits), _SPAN)])  # one excess per limit, as a fraction of it
        upper = np.concatenate([np.ones(len(loss)), np.full(len(limits), np.inf)])
        costs = np.stack([self._costs[name] / limit for name, limit in limits.items()])
        bound = np.array([1.0 - self._constants.get(name, 0.0) / limit for name, limit in limits.items()])
        choice = self._milp(objective, upper, np.hstack([costs, -np.eye(len(limits))]), bound)
        if choice is None:
            raise RuntimeError("the solver found no plan although every limit was soft")
        return self.point(choice)

    def _span(self, quantity: str) -> float:
        """The greatest difference that decisions can make, for scaling; 1 if there is none."""
        costs = self._costs[quantity]
        span = sum(float(np.ptp(costs[block])) for block in self._blocks)
        return span if span > 1e-12 else 1.0

    def _place_edges(self) -> tuple[Vector, Vector, list[_Pair]]:
        """Edge costs (ms, mj) that one decision settles go to its options; the rest become pairs."""
        settled = np.zeros((2, self._offsets[-1]))
        constant = np.zeros(2)
        pairs: list[_Pair] = []
        nothing = np.zeros(2)
        table: dict[tuple[str, str, int], dict[tuple[str, str], Vector]] = {}
        for edge in sorted(
            self.profile.edges, key=lambda e: (e.producer, e.consumer, e.operand, e.produced, e.consumed)
        ):
            costs = table.setdefault((edge.producer, edge.consumer, edge.operand), {})
            key = edge.produced, edge.consumed
            costs[key] = costs.get(key, nothing) + np.array([edge.ms, edge.mj or 0.0])
        for (producer, consumer, operand), costs in table.items():
            p, c = self._unit_of.get(producer), self._unit_of.get(consumer)
            writes = [row.writes for row in self._unit_rows(producer)] if p is not None else ["float"]
            reads = [_reads(row, operand) for row in self._unit_rows(consumer)] if c is not None else ["float"]
            if p is not None and p == c:
                for k, formats in enumerate(zip(writes, reads, strict=True)):
                    settled[:, self._offsets[p] + k] += costs.get(formats, nothing)
            elif len(set(writes)) == 1 and len(set(reads)) == 1:
                constant += costs.get((writes[0], reads[0]), nothing)
            elif len(set(writes)) == 1 and c is not None:
                for k, read in enumerate(reads):
                    settled[:, self._offsets[c] + k] += costs.get((writes[0], read), nothing)
            elif len(set(reads)) == 1 and p is not None:
                for k, written in enumerate(writes):
                    settled[:, self._offsets[p] + k] += costs.get((written, reads[0]), nothing)
            elif p is not None and c is not None:
                rows, columns = sorted(set(writes)), sorted(set(reads))
                block = np.array([[costs.get((w, r), nothing) for r in columns] for w in rows])
                if block.any():
                    ends = tuple(map(rows.index, writes)), tuple(map(columns.index, reads))
                    pairs.append(_Pair(p, c, *ends, block[..., 0], block[..., 1]))
        return settled, constant, pairs

    def _unit_rows(self, site: str) -> list[Row]:
        return [self.rows[site][technique] for technique in self.units[self._unit_of[site]].techniques]

    def _place_costs(self) -> tuple[dict[str, Vector], dict[str, float]]:
        """Cost of every variable, and what is fixed, by quantity."""

        def options(value: str) -> Vector:
            return np.array(
                [
                    sum(getattr(self.rows[site][technique], value) or 0.0 for site in unit.sites)
                    for unit in self.units
                    for technique in unit.techniques
                ]
            )

        pairs = {name: [getattr(pair, name).ravel() for pair in self._pairs] for name in ("ms", "mj")}
        zeros = np.zeros(sum(block.size for block in pairs["ms"]))
        costs = {
            "ms": np.concatenate([options("ms") + self._edges[0], *pairs["ms"]]),
            "mib": np.concatenate([options("bytes") / MIB, zeros]),
            "drop": np.concatenate([options("loss"), zeros]),
        }
        constants = {"ms": self.profile.fixed_ms + self._edges_constant[0], "mib": self.profile.fixed_bytes / MIB}
        if "mj" in self.has:
            costs["mj"] = np.concatenate([options("mj") + self._edges[1], *pairs["mj"]])
            constants["mj"] = self.profile.fixed_mj + self._edges_constant[1]
        if "mm2" in self.has:
            costs["mm2"] = np.concatenate([options("mm2"), zeros])
            constants["mm2"] = self.profile.fixed_mm2
        return costs, constants

    def _assemble(self) -> None:
        """The equalities: one option per decision, and the marginals of the pairs."""
        from scipy.sparse import coo_array

        entries: list[tuple[int, int, float]] = []
        right: list[float] = []
        for block in self._blocks[: len(self.units)]:
            entries += [(len(right), column, 1.0) for column in range(block.start, block.stop)]
            right.append(1.0)
        start = int(self._offsets[-1])
        for pair in self._pairs:
            columns = start + np.arange(pair.ms.size).reshape(pair.ms.shape)
            for unit, classes, table in (
                (pair.producer, pair.writes, columns),
                (pair.consumer, pair.reads, columns.T),
            ):
                for index, members in enumerate(table):
                    entries += [(len(right), int(column), 1.0) for column in members]
                    entries += [
                        (len(right), int(self._offsets[unit]) + k, -1.0)
                        for k, kind in enumerate(classes)
                        if kind == index
                    ]
                    right.append(0.0)
            start += pair.ms.size
        row, column, value = zip(*entries, strict=True)
        self._equalities = coo_array((value, (row, column)), shape=(len(right), start)).tocsr()
        self._right = np.array(right)

    def _within(self, objective: Vector, limits: Mapping[str, float]) -> Choice | None:
        """The best choice within hard limits.

        Each limit is put as the room above the cheapest plan, in units of that room, and what alone takes more than the
        room is ruled out: so the solver's absolute tolerance is small against every limit.
        """
        upper = np.ones(len(objective))
        rows = []
        for name, limit in limits.items():
            cost = self._costs[name].copy()
            room = limit - self._constants.get(name, 0.0)
            for block in self._blocks:
                least = cost[block].min()
                cost[block] -= least
                room -= least
            rounding = 1e-12 * max(1.0, abs(limit))
            if room < -rounding:
                return None
            upper[cost > room * (1 + 1e-9) + rounding] = 0.0
            if room > rounding:
                rows.append(np.where(upper > 0, cost, 0.0) / room)
        return self._milp(objective, upper, np.array(rows), np.ones(len(rows)))

    def _milp(self, objective: Vector, upper: Vector, rows: Vector, bound: Vector) -> Choice | None:
        """Minimize over choices (and further continuous variables behind them) with ``rows @ v <= bound``."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, hstack

        extra = len(objective) - self._equalities.shape[1]
        matrix = hstack([self._equalities, csr_array((len(self._right), extra))], format="csr") if extra else None
        constraints = [LinearConstraint(self._equalities if matrix is None else matrix, self._right, self._right)]
        if len(rows):
            constraints.append(LinearConstraint(csr_array(rows), -np.inf, bound))
        integral = np.zeros(len(objective), dtype=np.int64)
        integral[: self._offsets[-1]] = 1
        found = milp(
            objective,
            integrality=integral,
            bounds=Bounds(0.0, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:
            return None
        if found.x is None:
            raise RuntimeError(f"scipy.optimize.milp failed on {len(self.units)} decisions: {found.message}")
        return tuple(int(np.argmax(found.x[block])) for block in self._blocks[: len(self.units)])


def additive(profile: Profile) -> Profile:
    """The profile with what pairs lose together shared between both, as if every other site had the same technique.

    The loss of the plan that has one technique everywhere stays what it was; no loss falls below 0.
    """
    if not profile.cross:
        return profile
    rows = []
    for row in profile.rows:
        shared = profile.interactions.get((row.site, row.technique), {})
        loss = row.loss + 0.5 * sum(loss for (_, other), loss in shared.items() if other == row.technique)
        rows.append(dataclasses.replace(row, loss=max(loss, 0.0)))
    return dataclasses.replace(profile, rows=tuple(rows), cross=())


def _is_float(row: Row) -> bool:
    return row.writes == "float" and all(read == "float" for read in row.reads)


def _reads(row: Row, operand: int) -> str:
    return row.reads[operand] if operand < len(row.reads) else "float"


def _units(rows: Mapping[str, Mapping[Technique, Row]], groups: Iterable[Sequence[str]]) -> tuple[Unit, ...]:
    """Decisions in order of their first site's name, techniques in order of their names."""
    for options in rows.values():
        for row in options.values():
            for name in ("loss", "ms", "bytes", *NAMED):
                value = getattr(row, name)
                if value is not None and (value != value or value == -math.inf):
                    raise ValueError(
                        f"the profile's row ({row.site!r}, {row.technique}) has {name}={value}: "
                        "measure it again, or refuse the row with a reason"
                    )
    taken: dict[str, tuple[str, ...]] = {}
    for group in groups:
        taken.update(dict.fromkeys(group, tuple(group)))
    units: dict[tuple[str, ...], Unit] = {}
    for site in sorted(rows):
        sites = taken.get(site, (site,))
        if sites in units:
            continue
        # An infinite cost (a technique that diverged) can never be chosen.
        shared = [t for t in rows[site] if all(_finite(rows.get(member, {}).get(t)) for member in sites)]
        if not shared:
            have = "; ".join(f"{m}: {', '.join(map(str, rows.get(m, {}))) or 'none'}" for m in sites)
            raise ValueError(
                f"no technique can be chosen at {', '.join(sites)} ({have}); "
                "profile one technique, such as Float(), that every one of these sites may have, or dissolve the group"
            )
        units[sites] = Unit(sites, tuple(sorted(shared, key=str)))
    return tuple(units.values())


def _finite(row: Row | None) -> bool:
    if row is None:
        return False
    return all(math.isfinite(value) for value in (row.loss, row.ms, row.bytes, row.mj or 0.0, row.mm2 or 0.0))
