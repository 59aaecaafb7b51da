"""Which quantizer stands where: one per (tensor, format), at the write if all readers agree, else at each read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..plan import Plan
from ..site import Format, Record
from ..technique import Observer

Read = tuple[str, int]
"""Site and operand."""


@dataclass(frozen=True)
class Placement:
    """``reads``: (site, operand) -> (tensor, format, whether the reader applies it). ``writes``: (site, output) ->
    (tensor, format) applied where the tensor is made. ``observers``: (site, operand) -> what else to collect there."""

    reads: Mapping[Read, tuple[str, Format, bool]]
    writes: Mapping[tuple[str, int], tuple[str, Format]]
    observers: Mapping[Read, Observer] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[tuple[str, Format], None]:
        """Every (tensor, format) that needs a quantizer, in order."""
        found: dict[tuple[str, Format], None] = {}
        for tensor, fmt, _ in self.reads.values():
            found[tensor, fmt] = None
        for tensor, fmt in self.writes.values():
            found[tensor, fmt] = None
        return found

    @property
    def wanted(self) -> list[tuple[str, Format] | tuple[Read, Observer]]:
        """What calibration has to collect: a range for every quantizer, and what the techniques ask for besides."""
        return [*self.tensors, *self.observers.items()]


def place(plan: Plan, record: Record) -> Placement:
    """Decide for every tensor of an (adapted) plan where its quantizers stand."""
    asked: dict[str, dict[Read, Format]] = {}
    observers: dict[Read, Observer] = {}
    for name, technique in plan.sites.items():
        site = record.sites[name]
        formats = technique.reads(site)
        for index, (operand, fmt) in enumerate(zip(site.operands, formats, strict=True)):
            if fmt is not None and not operand.constant and operand.floating:
                asked.setdefault(operand.tensor, {})[name, index] = fmt
        for index, observer in enumerate(technique.wants(site).observers):
            if observer is not None:
                observers[name, index] = observer
    written: dict[str, Format] = {}
    for name, technique in plan.sites.items():
        output = technique.writes(record.sites[name])
        if output is not None:
            written[record.sites[name].tail] = output
    for tensor, readers in asked.items():
        info = record.tensors[tensor]
        agreed = set(readers.values())
        all_read = len(agreed) == 1 and not info.is_output and {site for site, _ in readers} >= set(info.readers)
        if info.producer and all_read and tensor not in written:
            written[tensor] = next(iter(agreed))
    writes = {}
    for tensor, fmt in written.items():
        producer = record.sites[record.tensors[tensor].producer]
        writes[producer.name, producer.writes.index(tensor)] = (tensor, fmt)
    reads = {
        key: (tensor, fmt, written.get(tensor) != fmt)
        for tensor, readers in asked.items()
        for key, fmt in readers.items()
    }
    return Placement(reads, writes, observers)


def at_reads(plan: Plan, record: Record) -> Placement:
    """Every reader quantizes for itself, so that others see the tensor as it was; the values are those of
    :func:`place`, as rounding twice is rounding once. A technique's own output format stays at the write."""
    found = place(plan, record)
    sites = [record.sites[name] for name, technique in plan.sites.items() if technique.writes(record.sites[name])]
    own = {site.tail for site in sites}
    return Placement(
        {key: (tensor, fmt, True) for key, (tensor, fmt, _) in found.reads.items()},
        {key: pair for key, pair in found.writes.items() if pair[0] in own},
        found.observers,
    )
