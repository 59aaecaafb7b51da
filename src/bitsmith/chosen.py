"""The range methods that a search's plans take: chosen once for each technique, with it at every site that it can have.

So a site is quantized alike wherever it is quantized, in every plan, and files of plans stay parts of one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .model.formats import place
from .model.network import Network
from .plan import Plan
from .prepare.ranges import choose_ranges
from .site import Format, Range
from .store import Store
from .targets.base import Target
from .technique import Technique

_RANGES = ("range", "weight_range")
_SAMPLES = 16
"""So many calibration samples are forwarded for each candidate, at least one batch."""


class ChosenRanges:
    """The choices for one network on one target, from the store or made on the calibration data when first needed.

    ``key``: what they depend on besides technique and code. ``observed``: gives the network with statistics of these
    tensors, for whoever keeps them. A technique that names a range method keeps it.
    """

    def __init__(
        self,
        net: Network,
        target: Target,
        calibration: Any,
        store: Store,
        key: dict[str, Any],
        observed: Callable[[Sequence[tuple[str, Format]]], Network] | None = None,
    ) -> None:
        self.net, self.target, self.calibration = net, target, calibration
        self.store, self.key, self.observed = store, key, observed
        self._plans: dict[Technique, Plan] = {}

    def known(self, techniques: Iterable[Technique]) -> dict[Technique, Plan]:
        """The choices for these techniques, by technique: what a worker is sent."""
        for technique in techniques:
            self.refined(Plan(dict.fromkeys(self.net.record.sites, technique)))
        return dict(self._plans)

    def take(self, plans: Mapping[Technique, Plan]) -> None:
        """Choices that were made elsewhere."""
        self._plans.update(plans)

    def refined(self, plan: Plan, note: Callable[[Technique], None] = lambda _: None) -> Plan:
        """An adapted plan (or one that is not) with the chosen methods in the place of min/max."""
        sites: dict[str, Technique] = {}
        behind: dict[str, Plan] = {}
        for name, technique in plan.sites.items():
            sites[name] = technique
            plain = _plain(technique)
            if plain is None or not _open(technique):
                continue
            if plain not in self._plans:
                note(plain)
                self._plans[plain] = self._choose(plain)
            behind[name] = self._plans[plain]
            sites[name] = _with(technique, behind[name].get(name))
        read = self._read(sites)
        sites |= {name: self._stored(name, sites[name], read, chosen) for name, chosen in behind.items()}
        return plan.replace(sites=sites, groups=_alike(plan, sites))

    def _read(self, sites: Mapping[str, Technique]) -> dict[str, Range]:
        """By tensor, the method that its integer readers take."""
        return {
            operand.tensor: fmt.range
            for name, technique in sites.items()
            for operand, fmt in zip(
                self.net.record.sites[name].operands, technique.reads(self.net.record.sites[name]), strict=True
            )
            if fmt is not None and not operand.constant
        }

    def _stored(self, name: str, technique: Technique, read: Mapping[str, Range], chosen: Plan) -> Technique:
        """The technique with the method of the tensor that it stores, where an adaptation gave that a format: the
        readers' in the plan; where it has none, what was chosen with the technique everywhere."""
        out, own = getattr(technique, "out", None), getattr(chosen.get(name), "out", None)
        if not isinstance(out, Format):
            return technique
        tensor = self.net.record.sites[name].tail
        method = read.get(tensor) or self._read(chosen.sites).get(tensor) or (own.range if own else out.range)
        return _changed(technique, {"out": dataclasses.replace(out, range=method)})

    def _choose(self, technique: Technique) -> Plan:
        record = self.net.record
        everywhere = Plan(
            {
                name: technique
                for name, site in record.sites.items()
                if site.role == "integer" and technique.fits(site) and self.target.supports(technique, site)
            }
        )
        adapted = self.target.adapt(everywhere, record)
        key = {**self.key, "plan": adapted.to_json(), "target": self.target.settings()}
        classes = list({type(found) for found in adapted.sites.values()})
        kept = self.store.get("ranges chosen", key)
        if kept is not None:
            return Plan.from_json(kept, classes)
        net = self.net
        if self.observed is not None:  # histograms and all: the passes of those who ask later are spared
            formats = [(t, dataclasses.replace(f, range=Range("mse"))) for t, f in place(adapted, record).tensors]
            net = self.observed(formats)
        found = choose_ranges(net, adapted, self.calibration, samples=_SAMPLES)
        self.store.put("ranges chosen", key, found.to_json())
        return found


def _plain(technique: Technique) -> Technique | None:
    """The technique as it is offered, without what an adaptation put in; None where it has no range methods."""
    fields: dict[str, Any] = getattr(technique, "__dataclass_fields__", {})
    if not set(fields) >= set(_RANGES):
        return None
    changes: dict[str, Any] = {name: Range() for name in _RANGES}
    changes |= {name: fields[name].default for name in ("out", "unsigned") if name in fields}
    return _changed(technique, changes)


def _open(technique: Technique) -> bool:
    """Whether its range methods are the default ones."""
    return all(getattr(technique, name) == Range() for name in _RANGES)


def _with(technique: Technique, chosen: Technique | None) -> Technique:
    if chosen is None:
        return technique
    return _changed(technique, {name: getattr(chosen, name) for name in _RANGES if hasattr(chosen, name)})


def _changed(technique: Technique, changes: dict[str, Any]) -> Technique:
    found: Technique = dataclasses.replace(technique, **changes)  # type: ignore[type-var]
    return found


def _alike(plan: Plan, sites: dict[str, Technique]) -> tuple[tuple[str, ...], ...]:
    """The groups whose members still have one technique."""
    return tuple(group for group in plan.groups if len({sites.get(name) for name in group}) == 1)
