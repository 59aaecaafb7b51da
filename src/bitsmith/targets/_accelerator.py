"""What models of accelerators share: a site as a matrix product, its operands' bits, and the target around formulas."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..export.names import site_names
from ..export.onnx import to_onnx
from ..export.program import applied_program
from ..model.apply import is_applied, plan_of
from ..plan import Plan
from ..site import Record, Site
from ..technique import No, Technique
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from ._formulas import (
    costed,
    integer_bits,
    modelled,
    output_format,
    parts,
    reads,
    realised,
    recorded_batch,
    value_bytes,
)
from ._ordinary import ordinary
from .base import Array, Artifact, Realised, SiteTimes, Source, Target, TargetError, Timing
from .onnxruntime import OnnxRuntime
from .storage import density_of


@dataclass(frozen=True)
class Product:
    """One call of a site as matrix products: ``groups`` of [positions, depth] @ [depth, outputs]."""

    groups: int
    positions: int
    outputs: int
    depth: int

    @property
    def macs(self) -> int:
        return self.groups * self.positions * self.outputs * self.depth


def product_of(site: Site, technique: Technique | None = None) -> Product | None:
    """One call as matrix products, None where it multiplies nothing (additions, pooling, normalisation).

    A technique that has products of its own (:meth:`Technique.products`) is computed as these, batched.
    A convolution has an output position for each pixel and sample, and a depth of input channels x kernel by group.
    What is no layer (attention, an einsum) counts as one product of the same number of multiply-accumulates.
    """
    own = None if technique is None else technique.products(site)
    if own is not None:
        return Product(own.count, own.positions, own.outputs, own.depth)
    macs = site.macs // max(site.calls, 1)
    if macs <= 0:
        return None
    weight = site.weight
    if weight is None or len(weight.shape) < 2 or macs % weight.numel:
        first, second = (site.operands[k].shape if k < len(site.operands) else () for k in (0, 1))
        if site.kind in ("matmul", "bmm", "baddbmm") and len(first) > 1 and len(second) > 1:
            depth, outputs = first[-1], second[-1]
            positions = first[-2] if macs % (depth * outputs * first[-2]) == 0 else macs // (depth * outputs)
            return Product(max(1, macs // (depth * outputs * positions)), positions, outputs, depth)
        outputs = max(1, math.prod(site.out_shapes[0])) if site.out_shapes else 1
        return Product(1, 1, outputs, max(1, macs // outputs))
    groups = int(site.arguments.get("groups", 1)) if site.kind.startswith("conv") else 1
    channels = weight.shape[1] * groups if site.kind.startswith("conv_transpose") else weight.shape[0]
    if site.kind in ("matmul", "baddbmm", "einsum"):
        channels = weight.shape[-1]
    outputs = max(1, channels // groups)
    depth = weight.numel // (groups * outputs)
    return Product(groups, macs // weight.numel, outputs, depth)


@dataclass(frozen=True)
class Bits:
    """Widths of a site's operands: ``activation``, ``weight``, ``output``; ``floating``: it computes in floats."""

    activation: int
    weight: int
    output: int
    floating: bool


def bits_of(site: Site, technique: Technique) -> Bits:
    """The widths that a technique asks of the arithmetic: of integers where all operands are, else 32 or 16."""
    written = round(8 * value_bytes(output_format(site, technique), technique))
    own = technique.products(site)
    if own is not None:
        return Bits(own.bits, own.bits, written, own.bits == 32)
    integer = integer_bits(site, technique)
    if integer is None:
        width = 16 if isinstance(technique, Float) and technique.dtype == "bfloat16" else 32
        return Bits(width, width, written, True)
    formats = [fmt for fmt in technique.reads(site) if fmt is not None]
    activation = max(fmt.bits for fmt in formats)
    weight = activation
    if site.weight is not None:
        weight = technique.w if isinstance(technique, Int) else min(integer, stored_width(site, technique))
    return Bits(activation, weight, written, False)


@dataclass(frozen=True)
class Around:
    """What a technique with products of its own moves around them in one call. ``values``: those that are transformed
    into the first factors and back from the sums; ``bits``: through the buffer."""

    values: float
    bits: float


def around(site: Site, technique: Technique, accumulator: int, weights: bool) -> Around:
    """The inputs of the tiles read, the first factors written (the product reads them), the sums written and read;
    with ``weights`` the second factors, which are made of the site's weights, too."""
    own = technique.products(site)
    if own is None:
        return Around(0.0, 0.0)
    first, sums = (float(own.count * own.positions * size) for size in (own.depth, own.outputs))
    read = 8 * value_bytes(reads(site, technique)[0], technique)
    made = 2.0 * own.count * own.depth * own.outputs * own.bits if weights else 0.0
    return Around(first + sums, first * (read + own.bits) + 2 * sums * accumulator + made)


def stored_width(site: Site, technique: Technique) -> int:
    """Bits of one weight as the file holds it, of those that are left."""
    if site.weight is None:
        return 32
    left = max(1.0, density_of(technique) * site.weight.numel)
    return max(1, min(32, round(technique.bits(site) / left))) if density_of(technique) == 1.0 else 32


def moved_bits(site: Site, technique: Technique) -> tuple[float, float]:
    """Bits of the activations that one call reads, and of what it writes."""
    read = sum(
        operand.numel * 8 * (value_bytes(fmt, technique) if operand.floating else 8.0)
        for operand, fmt in zip(site.operands, reads(site, technique), strict=True)
        if operand is not site.weight
    )
    written = sum(math.prod(shape) for shape in site.out_shapes)
    return read, written * 8 * value_bytes(output_format(site, technique), technique)


class Modelled(Target, ABC):
    """A target that is formulas only. Subclasses give ``cost``, ``site_energy`` and so on.

    The exported file is the ONNX file that ONNX Runtime gets: its size is a real one, and it can be run there to check
    its numbers.
    """

    source: ClassVar[Source] = "modelled"

    @abstractmethod
    def precision(self, site: Site, technique: Technique) -> str | No:
        """What the site computes in (``int8``, ``float32``), or why it cannot."""

    @abstractmethod
    def assumptions(self) -> tuple[str, ...]: ...

    @abstractmethod
    def references(self) -> tuple[str, ...]: ...

    def fixed_area(self) -> float | None:
        """mm2 that every plan has, or None: this model has no area."""
        return None

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        verdict = self.precision(site, technique)
        return verdict if isinstance(verdict, No) else True

    def adapt(self, plan: Plan, record: Record) -> Plan:
        """The plan itself: the model takes any format."""
        plan.check(record)
        return plan

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        """By rule: a site runs in the precision of its operands."""
        return realised(plan, record, self.precision)

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        program, _ = applied_program(net, example, batch)
        runtime, plan = OnnxRuntime(threads=1), plan_of(net) if is_applied(net) else Plan()
        artifact = runtime.write(to_onnx(ordinary(program)), path, site_names(net), plan)
        found = modelled(self, net, artifact.inputs)
        versions = {**artifact.versions, "model": self._digest()}
        artifact = dataclasses.replace(artifact, target=self.name, versions=versions, **found._asdict())
        artifact.save()
        return artifact

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        """One modelled figure for each artifact; ``rounds`` would not change it."""
        return [Timing((self.site_times(a).whole,), a.batch, 1, self.source) for a in artifacts]

    def computed(self, plan: Plan, record: Record, batch: int) -> Timing | None:
        costs = costed(self, record.sites, plan, batch / recorded_batch(record, batch)).costs
        return Timing((sum(costs.values()),), batch, 1, self.source)

    def figures(self, plan: Plan, record: Record, batch: int) -> Mapping[str, float] | None:
        found = costed(self, record.sites, plan, batch / recorded_batch(record, batch))
        figures = {"mj": math.fsum(found.energies.values())} if found.energies else {}
        fixed = self.fixed_area()
        return figures if fixed is None else {**figures, "mm2": fixed + math.fsum(found.areas.values())}

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """The numbers of the exported file, run by ONNX Runtime; only costs are modelled."""
        return OnnxRuntime(threads=1).run(artifact, inputs, tensors)

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """By rule, as noted at export: nothing ran."""
        self._check(artifact)
        return {site: Realised(precision, "modelled") for site, precision in artifact.precisions.items()}

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        self._check(artifact)
        return parts(artifact, self.source)

    def energy(self, artifact: Artifact) -> float | None:
        self._check(artifact)
        return math.fsum(artifact.energies.values()) if artifact.energies else None

    def area(self, artifact: Artifact) -> float | None:
        self._check(artifact)
        fixed = self.fixed_area()
        return None if fixed is None else fixed + math.fsum(artifact.areas.values())

    def settings(self) -> dict[str, Any]:
        return {"target": self.name, "source": self.source, **plain_settings(self)}

    def _digest(self) -> str:
        return json.dumps(self.settings(), sort_keys=True)

    def _check(self, artifact: Artifact) -> None:
        if artifact.versions.get("model") != self._digest():
            raise TargetError(
                f"{artifact.path} was modelled with other settings (or exported for {artifact.target!r}): "
                "export it with this target to model its costs"
            )


def plain_settings(target: Any) -> dict[str, Any]:
    """The fields of a target as JSON can hold them; a table by its entries."""
    return {field.name: _plain(getattr(target, field.name)) for field in dataclasses.fields(target)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def check_positive(name: str, target: Any, fields: Mapping[str, float]) -> None:
    """Raise ``ValueError`` for a field below its least value, or one that is no finite number."""
    for field, least in fields.items():
        value = getattr(target, field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
            raise ValueError(f"{name}({field}={value!r}): must be a finite number of at least {least:g}")
