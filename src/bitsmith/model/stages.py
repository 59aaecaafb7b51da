"""In which pass over the calibration data each statistic is collected, and what runs as planned in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from ..site import Format, Record, Site
from ..technique import Observer
from .formats import Placement, Read, at_reads, place

Wanted = tuple[str, Format] | tuple[Read, Observer]


@dataclass(frozen=True)
class Stage:
    """One pass over the data: what is collected, and the sites that run under their techniques; others run in float."""

    wanted: tuple[Wanted, ...]
    active: frozenset[str] = frozenset()


def stages(plan: Plan, record: Record) -> list[Stage]:
    """The passes that the plan's statistics take, in order, with all that they collect.

    A statistic is that of the float network, with two exceptions. Behind sites whose techniques change the function
    (:meth:`~bitsmith.Technique.keeps_function`) it is that of the network with those in place. And what a technique
    with ``after_quantized`` asks for is seen behind all planned sites before it, as they will run. A tensor has one
    statistic: that of the most demanding of its readers. What lies before is read from the data flow; where that is
    not known (a loop, an operation that is no site), it is all that was executed earlier.

    A plan without such techniques takes one pass. Those that change the function and need no ranges themselves run in
    that pass too. Each link of a chain of ``after_quantized`` takes one pass more.
    """
    placement = place(plan, record)
    schedule = _scheduled(plan, record, placement)
    if schedule is None:
        return [Stage(tuple(placement.wanted))] if placement.wanted else []
    return schedule.stages()


def moved(plan: Plan, record: Record) -> frozenset[Any]:
    """What the plan has collected behind sites that are in place: names of tensors, and ((site, operand), observer)."""
    placement = place(plan, record)
    schedule = _scheduled(plan, record, placement)
    found = [wanted for wanted in placement.wanted if schedule is not None and schedule.moves(wanted)]
    return frozenset(where if isinstance(what, Format) else (where, what) for where, what in found)


def _scheduled(plan: Plan, record: Record, placement: Placement) -> _Schedule | None:
    """None where all is collected on the float network."""
    after = {name for name in plan.sites if plan[name].wants(record.sites[name]).after_quantized}
    changing = {name for name in plan.sites if not plan[name].keeps_function()}
    return _Schedule(plan, record, placement, after, changing) if after or changing else None


def running(plan: Plan, record: Record, active: Iterable[str], known: Set[Any]) -> tuple[Plan, Placement]:
    """The part of the plan that runs in a pass. Every reader quantizes for itself, so that tensors are seen as they
    were; a technique's own output format is applied where its range is ``known``."""
    part = Plan({name: plan[name] for name in plan.sites if name in set(active)})
    placement = at_reads(part, record)
    writes = {key: pair for key, pair in placement.writes.items() if pair[0] in known}
    return part, Placement(placement.reads, writes, placement.observers)


_Place = tuple[int, bool | None, bool]


class _Schedule:
    """The levels of statistics: one of level n has to wait for n passes."""

    def __init__(self, plan: Plan, record: Record, placement: Placement, after: set[str], changing: set[str]) -> None:
        self.record, self.placement, self.after, self.changing = record, placement, after, changing
        self.inside: dict[str, list[str]] = defaultdict(list)
        for site in record.sites.values():
            if site.parent is not None:
                self.inside[site.parent].append(site.name)
        self.read: dict[str, list[str]] = defaultdict(list)
        for (name, _), (tensor, _, _) in placement.reads.items():
            self.read[name].append(tensor)
        self.careful = {tensor for name in after for tensor in self.read[name]}
        own = [record.sites[name] for name in plan.sites if plan[name].writes(record.sites[name]) is not None]
        self.owners = {site.tail: site.name for site in own}
        self.before: dict[str, frozenset[str]] = {}  # by site, the planned ones before it
        self.unknown: dict[str, frozenset[str]] = {}  # by tensor of unknown origin, those that it may come from
        self.ready: dict[str, int] = {}  # by planned site, the passes until it can run
        self.done: dict[str, int] = {}  # and until it can with the format of its own output
        earlier: frozenset[str] = frozenset()
        for site in record.sites.values():
            self.unknown |= {o.tensor: earlier for o in site.operands if self._origin(o.tensor) == ""}
            self.before[site.name] = self._union(self._behind(o.tensor) for o in site.operands if not o.constant)
            if site.name in plan.sites:
                earlier |= {site.name}
                self._enter(site)

    def stages(self) -> list[Stage]:
        passes: dict[tuple[int, bool], list[Wanted]] = defaultdict(list)
        either: dict[int, list[Wanted]] = defaultdict(list)
        for wanted in self.placement.wanted:
            level, quantized, _ = self._placed(wanted)
            (either[level] if quantized is None else passes[level, quantized]).append(wanted)
        for level, found in either.items():
            passes[level, (level, True) in passes].extend(found)
        return [
            Stage(tuple(wanted), frozenset(s for s, n in self.ready.items() if n <= level and s in among))
            for (level, quantized), wanted in sorted(passes.items(), key=lambda entry: entry[0])
            for among in [self.ready if quantized else self.changing]
        ]

    def moves(self, wanted: Wanted) -> bool:
        """Whether it is another statistic than the float network's."""
        return self._placed(wanted)[2]

    def _enter(self, site: Site) -> None:
        """A planned site, all before it being known."""
        asked = [self._tensor(tensor)[0] for tensor in self.read[site.name]]
        asked += [self._placed(wanted)[0] for wanted in self.placement.observers.items() if wanted[0][0] == site.name]
        self.ready[site.name] = self.done[site.name] = 1 + max(asked, default=-1)
        if self.owners.get(site.tail) == site.name:
            self.done[site.name] = max(self.ready[site.name], 1 + self._tensor(site.tail)[0])

    def _placed(self, wanted: Wanted) -> _Place:
        """Its level, whether planned sites that keep their function run (None: there is none before it), and whether
        any site that runs lies before it."""
        where, _ = wanted
        if isinstance(where, str):
            return self._tensor(where)
        name, index = where
        return self._level(self._behind(self.record.sites[name].operands[index].tensor), name in self.after)

    def _tensor(self, tensor: str) -> _Place:
        behind, owner = self._behind(tensor), self.owners.get(tensor, "")
        if owner:  # what is fused behind it may not have been reached yet
            behind |= self.before[owner] | {owner}
        if tensor in self.careful:
            return self._level(behind, True, owner)
        if owner not in self.changing:
            behind -= {owner}
        return self._level(behind, owner in self.after, owner)

    def _level(self, behind: frozenset[str], after: bool, owner: str = "") -> _Place:
        needed = behind if after else behind & self.changing
        level = max((self.ready[s] if s == owner else self.done[s] for s in needed), default=0)
        return level, after if behind - self.changing else None, bool(needed)

    def _behind(self, tensor: str) -> frozenset[str]:
        """The planned sites that a tensor comes from."""
        origin = self._origin(tensor)
        if origin is None:
            return frozenset()
        if not origin:
            return self.unknown[tensor]
        return self._union(self.before[name] | ({name} & self.ready.keys()) for name in self._within(origin))

    def _within(self, name: str) -> Iterator[str]:
        """The sites so far that a site is, or is made of."""
        if name in self.before:
            yield name
        for inner in self.inside.get(name, ()):
            yield from self._within(inner)

    def _origin(self, tensor: str) -> str | None:
        """The site that writes it; "" where that is not known, None for inputs and constants."""
        info = self.record.tensors.get(tensor)
        if info is None or tensor.startswith("@"):
            return None
        return info.producer

    @staticmethod
    def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
        return frozenset().union(*sets)
