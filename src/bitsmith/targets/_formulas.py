"""What modelled targets share: formats, bytes and batch sizes of sites, and plans costed site by site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ..model.apply import computer_of
from ..operations import ACTIVATIONS
from ..plan import Plan
from ..site import Record, Site, TensorInfo
from ..technique import No, Technique
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from .base import Artifact, Realised, SiteTimes, Source, Target, TargetError

FREE = ACTIVATIONS | {"batch_norm"}
"""Fused into what computes before them, so that they cost nothing."""


class Costed(NamedTuple):
    """An applied network by the formulas of a target, as an artifact holds it: ``costs`` in ms per batch, ``energies``
    in mJ per batch and ``areas`` in mm2, by site, and by ``tensor|format`` for a conversion; ``precisions`` by site."""

    costs: dict[str, float]
    precisions: dict[str, str]
    energies: dict[str, float]
    areas: dict[str, float]


def realised(plan: Plan, record: Record, precision: Callable[[Site, Technique], str | No]) -> dict[str, Realised | No]:
    """What a modelled target makes of each site: computed in the ``precision`` of its operands, or why not."""
    fused = {member for site in record.sites.values() for member in site.epilogue}
    verdicts: dict[str, Realised | No] = {}
    for name, site in record.sites.items():
        technique = plan.get(name) or Float()
        found = precision(site, technique)
        if isinstance(found, No):
            verdicts[name] = found
        elif name in fused and name not in plan:
            verdicts[name] = Realised("folded", "modelled as fused into the operation before it")
        elif technique.form(site) == "dialect" and integer_bits(site, technique) is None:
            verdicts[name] = Realised("size only", f"modelled: stored small, computed in {found}")
        else:
            verdicts[name] = Realised(found, "modelled")
    return verdicts


def modelled(target: Target, net: nn.Module, inputs: Iterable[tuple[str, tuple[int, ...], str]]) -> Costed:
    """What an applied network costs by the formulas of ``target``.

    ``inputs``: names, shapes and dtypes of the exported file's inputs; they scale what was recorded to its batch.
    Raises :class:`TargetError` for a site that the target cannot compute.
    """
    computer = computer_of(net)
    sites = computer.record_sites
    return costed(target, sites, computer.plan, batch_factor(sites, inputs))


def costed(target: Target, sites: Mapping[str, Site], plan: Plan, factor: float) -> Costed:
    """:func:`modelled` of an adapted plan, the recorded batch grown by ``factor``."""
    record = record_of({name: scaled(site, factor) for name, site in sites.items()})
    found = Costed({}, {}, {}, {})
    for name, verdict in target.realise(plan, record).items():
        if isinstance(verdict, No):
            raise TargetError(f"{target.name} cannot compute {name!r} under {plan.get(name) or 'float'}: {verdict}")
        found.precisions[name] = verdict.precision
    parents = {site.parent for site in record.sites.values()}
    for name, site in record.sites.items():
        technique = plan.get(name) or Float()
        inside = name in parents
        found.costs[name] = 0.0 if inside else target.cost(site, technique) or 0.0
        for table, formula in ((found.energies, target.site_energy), (found.areas, target.site_area)):
            value = 0.0 if inside else formula(site, technique)
            if value is not None:
                table[name] = value
    for edge in record.edges():
        produced = handed(record.sites[edge.producer], plan) if edge.producer in record.sites else "float"
        consumer = record.sites[edge.consumer]
        consumed = reads(consumer, plan.get(edge.consumer))[edge.operand]
        operand = consumer.operands[edge.operand]
        key = f"{edge.tensor}|{produced}>{consumed}"
        for table, change in ((found.costs, target.conversion_cost), (found.energies, target.conversion_energy)):
            value = change(operand.numel, produced, consumed)
            if value:
                table[key] = table.get(key, 0.0) + value
    return found


def recorded_batch(record: Record, otherwise: int) -> int:
    """The batch size of what was recorded: the first size of the model's first input."""
    shapes = (o.shape for site in record.sites.values() for o in site.operands if o.tensor.startswith("@"))
    return next((shape[0] for shape in shapes if shape), otherwise)


def parts(artifact: Artifact, source: Source) -> SiteTimes:
    """The costs of an artifact, sites and conversions apart."""
    sites = {key: ms for key, ms in artifact.costs.items() if "|" not in key}
    conversions: dict[str, float] = {}
    for key, ms in artifact.costs.items():
        if "|" in key:
            tensor = key.rpartition("|")[0]
            conversions[tensor] = conversions.get(tensor, 0.0) + ms
    return SiteTimes(sites, conversions, 0.0, sum(artifact.costs.values()), source)


def handed(site: Site, plan: Plan) -> str:
    """The format in which a site hands on its output: as told, else as it reads, "float" if it reads no integers."""
    technique = plan.get(site.name)
    if technique is None:
        return "float"
    return output_format(site, technique)


def moved_bytes(site: Site, technique: Technique) -> float:
    """Bytes that one call reads and writes: activations in their formats, the weight as stored, every output."""
    total = sum(math.prod(shape) for shape in site.out_shapes) * value_bytes(output_format(site, technique), technique)
    for operand, read in zip(site.operands, reads(site, technique), strict=True):
        if operand is site.weight:
            stored = technique.bits(site) / 8
            # a look-up touches the rows that it returns
            rows = math.prod(site.out_shapes[0]) / operand.numel if site.kind == "embedding" else 1.0
            total += stored * min(rows, 1.0)
        else:
            total += operand.numel * (value_bytes(read, technique) if operand.floating else 8.0)
    return total


def scaled(site: Site, factor: float) -> Site:
    """The site with the batch multiplied: MACs and the first size of every activation. Calls and weights stay."""
    if factor == 1.0:
        return site

    def grown(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (max(1, round(shape[0] * factor)), *shape[1:]) if shape else shape

    operands = tuple(o if o.constant else dataclasses.replace(o, shape=grown(o.shape)) for o in site.operands)
    shapes = tuple(grown(shape) for shape in site.out_shapes)
    return dataclasses.replace(site, macs=round(site.macs * factor), operands=operands, out_shapes=shapes)


def output_format(site: Site, technique: Technique) -> str:
    written = technique.writes(site)
    if written is not None:
        return str(written)
    return next((read for read in reads(site, technique) if read != "float"), "float")


def reads(site: Site, technique: Technique | None) -> tuple[str, ...]:
    formats = technique.reads(site) if technique is not None else (None,) * len(site.operands)
    return tuple("float" if fmt is None else str(fmt) for fmt in formats)


def value_bytes(fmt: str, technique: Technique | None = None) -> float:
    """Bytes of one value: "float" 4 (2 in bfloat16), "u8" 1, "i4s" 0.5."""
    if fmt == "float":
        return 2.0 if isinstance(technique, Float) and technique.dtype == "bfloat16" else 4.0
    return int(fmt.strip("uis")) / 8


def integer_bits(site: Site, technique: Technique) -> int | None:
    """Bits of the widest operand if all are integers, else None: it computes in float."""
    if technique.form(site) != "dialect":
        return None
    formats = technique.reads(site)
    read = [formats[index] for index, operand in enumerate(site.operands) if operand.floating and not operand.constant]
    if any(fmt is None for fmt in read):
        return None
    widths = [fmt.bits for fmt in read if fmt is not None]
    if site.weight is not None:
        stored = technique.bits(site) / site.weight.numel  # with the scales, so at least the bits of one weight
        widths.append(technique.w if isinstance(technique, Int) else max(2, min(8, math.ceil(stored))))
    return max(widths) if read else None


def batch_factor(sites: Mapping[str, Site], inputs: Iterable[tuple[str, tuple[int, ...], str]]) -> float:
    recorded = {operand.tensor: operand.shape for site in sites.values() for operand in site.operands}
    for name, shape, _ in inputs:
        seen = recorded.get(f"@{name}")
        if seen and shape:
            return shape[0] / seen[0]
    return 1.0


def record_of(sites: Mapping[str, Site]) -> Record:
    """What edges and verdicts need of a record, from the sites alone."""
    tensors: dict[str, TensorInfo] = {}
    for site in sites.values():
        for tensor, shape in zip(site.writes, site.out_shapes, strict=True):
            tensors[tensor] = TensorInfo(tensor, shape, "float32", site.name)
    return Record(sites, tensors)
