"""Roofline: a hardware model of a few peaks. It times nothing; every figure is modelled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..model.apply import computer_of
from ..operations import ACTIVATIONS
from ..plan import Plan
from ..site import Record, Site, TensorInfo
from ..technique import No, Technique
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from .base import Array, Artifact, Realised, SiteTimes, Source, Target, TargetError, Timing
from .onnxruntime import OnnxRuntime

_INTEGERS = (2, 4, 8, 16)
_FREE = ACTIVATIONS | {"batch_norm"}


@dataclass(frozen=True)
class Roofline(Target):
    """A roofline model of a machine (Williams, Waterman and Patterson 2009, CACM 52:4, doi:10.1145/1498765.1498785).

    Latency of a site, ms per batch: ``max(MACs / peak, bytes moved / bandwidth) + overhead`` for each of its calls.

    ``float32``, ``bfloat16``, ``int16``, ``int8``, ``int4``, ``int2``: peaks in GMAC/s of all threads together; None:
    the machine lacks that precision, and narrower integers use the next wider one. ``bandwidth_gb_s``: GB/s (10^9
    bytes). ``overhead_us``: per call, in us. ``threads``: what the peaks belong to.

    Bytes moved are operands and outputs in their formats and weights as stored, each once per call: no caches. A site
    that reads integers writes integers of the same format. Normalisation and ReLU-like functions are free, because they
    are fused. Composites (attention, LSTM) count as far as ``Site.macs`` does.

    >>> Roofline(float32=50.0, int8=200.0, bandwidth_gb_s=20.0).conversion_cost(4_000_000, "float", "u8")
    1.0
    """

    name: ClassVar[str] = "roofline"
    source: ClassVar[Source] = "modelled"

    float32: float
    bandwidth_gb_s: float
    int8: float | None = None
    overhead_us: float = 0.0
    bfloat16: float | None = None
    int16: float | None = None
    int4: float | None = None
    int2: float | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            least = 0 if field.name == "overhead_us" else math.ulp(0)
            if not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise ValueError(
                    f"Roofline({field.name}={value!r}): must be a finite number above 0 (overhead_us: 0 or more)"
                )

    @classmethod
    def calibrated(cls, threads: int = 2) -> Roofline:
        """Peaks of this machine as torch reaches them: medians of a few matrix products and copies, in under 3 s.

        float32 and int8 (where torch has ``_int_mm``) products of size 512, a copy of 64 MiB, and a product of size 1
        for the overhead. The peaks are measured; what the model says with them stays ``modelled``.
        """
        if threads < 1:
            raise ValueError(f"Roofline.calibrated(threads={threads}): must be 1 or more")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                return cls(**_peaks(), threads=threads)
        finally:
            torch.set_num_threads(before)

    # -- costs -----------------------------------------------------------------------------------------------------

    def cost(self, site: Site, technique: Technique) -> float | None:
        if site.kind in _FREE:
            return 0.0
        peak = self._peak(self._precision(site, technique))
        compute = site.macs / (peak * 1e6)
        memory = site.calls * moved_bytes(site, technique) / (self.bandwidth_gb_s * 1e6)
        return max(compute, memory) + site.calls * self.overhead_us / 1e3

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        if produced == consumed:
            return 0.0
        return numel * (_bytes(produced) + _bytes(consumed)) / (self.bandwidth_gb_s * 1e6) + self.overhead_us / 1e3

    def _precision(self, site: Site, technique: Technique) -> str:
        """``float32``, ``bfloat16``, or the narrowest integer of this machine that holds the operands."""
        if isinstance(technique, Float) and technique.dtype == "bfloat16":
            return "bfloat16"
        bits = _integer_bits(site, technique)
        if bits is None:
            return "float32"
        return next((f"int{n}" for n in _INTEGERS if n >= bits and getattr(self, f"int{n}") is not None), f"int{bits}")

    def _peak(self, precision: str) -> float:
        peak = getattr(self, precision, None)
        if peak is None:
            raise TargetError(f"this roofline has no peak for {precision}: give Roofline({precision}=...) in GMAC/s")
        return float(peak)

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        form = technique.form(site)
        if form not in ("float", "dialect"):
            return No(f"the roofline model has no peak for the operation {form!r}")
        precision = self._precision(site, technique)
        if getattr(self, precision, None) is None:
            return No(f"this roofline has no peak for {precision}: give it in GMAC/s")
        return True

    def adapt(self, plan: Plan, record: Record) -> Plan:
        """The plan itself: the model takes any format."""
        plan.check(record)
        return plan

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        """By rule: a site runs in the precision of its operands."""
        fused = {member for site in record.sites.values() for member in site.epilogue}
        verdicts: dict[str, Realised | No] = {}
        for name, site in record.sites.items():
            technique = plan.get(name) or Float()
            verdict = self.supports(technique, site)
            if isinstance(verdict, No):
                verdicts[name] = verdict
            elif name in fused and name not in plan:
                verdicts[name] = Realised("folded", "modelled as fused into the operation before it")
            elif technique.form(site) == "dialect" and _integer_bits(site, technique) is None:
                verdicts[name] = Realised("size only", "modelled: stored small, computed in float32")
            else:
                verdicts[name] = Realised(self._precision(site, technique), "modelled")
        return verdicts

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write ``net`` as the ONNX file that ONNX Runtime gets, so that its size is a real one; times are modelled."""
        artifact = OnnxRuntime(threads=self.threads).export(net, path, example, batch)
        costs, precisions = modelled(self, net, artifact.inputs)
        versions = {**artifact.versions, "model": json.dumps(self.settings(), sort_keys=True)}
        artifact = dataclasses.replace(
            artifact, target=self.name, versions=versions, costs=costs, precisions=precisions
        )
        artifact.save()
        return artifact

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        """One modelled figure for each artifact; ``rounds`` would not change it."""
        return [Timing((self.site_times(a).whole,), a.batch, self.threads, self.source) for a in artifacts]

    def computed(self, plan: Plan, record: Record, batch: int) -> Timing | None:
        shapes = (o.shape for site in record.sites.values() for o in site.operands if o.tensor.startswith("@"))
        recorded = next((shape[0] for shape in shapes if shape), batch)
        costs, _ = _costed(self, record.sites, plan, batch / recorded)
        return Timing((sum(costs.values()),), batch, self.threads, self.source)

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        raise TargetError("a modelled target runs nothing; use targets.OnnxRuntime to run an exported file")

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """By rule, as noted at export: nothing ran."""
        self._check(artifact)
        return {site: Realised(precision, "modelled") for site, precision in artifact.precisions.items()}

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        self._check(artifact)
        return parts(artifact, self.source)

    def settings(self) -> dict[str, Any]:
        return {"target": self.name, "source": self.source, **dataclasses.asdict(self)}

    def _check(self, artifact: Artifact) -> None:
        if artifact.versions.get("model") != json.dumps(self.settings(), sort_keys=True):
            raise TargetError(
                f"{artifact.path} was modelled with another roofline (or exported for {artifact.target!r}): "
                "export it with this target to model its times"
            )


def modelled(
    target: Target, net: nn.Module, inputs: Iterable[tuple[str, tuple[int, ...], str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """``(costs, precisions)`` of an applied network by the formulas of ``target``, as an artifact holds them.

    ``inputs``: names, shapes and dtypes of the exported file's inputs; they scale what was recorded to its batch.
    Raises :class:`TargetError` for a site that the target cannot compute.
    """
    computer = computer_of(net)
    sites = computer.record_sites
    return _costed(target, sites, computer.plan, _factor(sites, inputs))


def _costed(
    target: Target, sites: Mapping[str, Site], plan: Plan, factor: float
) -> tuple[dict[str, float], dict[str, str]]:
    """:func:`modelled` of an adapted plan, the recorded batch grown by ``factor``."""
    record = _record({name: scaled(site, factor) for name, site in sites.items()})
    precisions = {}
    for name, verdict in target.realise(plan, record).items():
        if isinstance(verdict, No):
            raise TargetError(f"{target.name} cannot compute {name!r} under {plan.get(name) or 'float'}: {verdict}")
        precisions[name] = verdict.precision
    parents = {site.parent for site in record.sites.values()}
    costs = {
        name: 0.0 if name in parents else target.cost(site, plan.get(name) or Float()) or 0.0
        for name, site in record.sites.items()
    }
    for edge in record.edges():
        produced = handed(record.sites[edge.producer], plan) if edge.producer in record.sites else "float"
        consumer = record.sites[edge.consumer]
        reads = _reads(consumer, plan.get(edge.consumer))
        operand = consumer.operands[edge.operand]
        ms = target.conversion_cost(operand.numel, produced, reads[edge.operand])
        if ms:
            key = f"{edge.tensor}|{produced}>{reads[edge.operand]}"
            costs[key] = costs.get(key, 0.0) + ms
    return costs, precisions


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
    return _output_format(site, technique)


def moved_bytes(site: Site, technique: Technique) -> float:
    """Bytes that one call reads and writes: activations in their formats, the weight as stored, every output."""
    total = sum(math.prod(shape) for shape in site.out_shapes) * _bytes(_output_format(site, technique), technique)
    for operand, read in zip(site.operands, _reads(site, technique), strict=True):
        if operand is site.weight:
            stored = technique.bits(site) / 8
            # a look-up touches the rows that it returns
            rows = math.prod(site.out_shapes[0]) / operand.numel if site.kind == "embedding" else 1.0
            total += stored * min(rows, 1.0)
        else:
            total += operand.numel * (_bytes(read, technique) if operand.floating else 8.0)
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


def _output_format(site: Site, technique: Technique) -> str:
    written = technique.writes(site)
    if written is not None:
        return str(written)
    return next((read for read in _reads(site, technique) if read != "float"), "float")


def _reads(site: Site, technique: Technique | None) -> tuple[str, ...]:
    formats = technique.reads(site) if technique is not None else (None,) * len(site.operands)
    return tuple("float" if fmt is None else str(fmt) for fmt in formats)


def _bytes(fmt: str, technique: Technique | None = None) -> float:
    """Bytes of one value: "float" 4 (2 in bfloat16), "u8" 1, "i4s" 0.5."""
    if fmt == "float":
        return 2.0 if isinstance(technique, Float) and technique.dtype == "bfloat16" else 4.0
    return int(fmt.strip("uis")) / 8


def _integer_bits(site: Site, technique: Technique) -> int | None:
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


def _factor(sites: Mapping[str, Site], inputs: Iterable[tuple[str, tuple[int, ...], str]]) -> float:
    recorded = {operand.tensor: operand.shape for site in sites.values() for operand in site.operands}
    for name, shape, _ in inputs:
        seen = recorded.get(f"@{name}")
        if seen and shape:
            return shape[0] / seen[0]
    return 1.0


def _record(sites: Mapping[str, Site]) -> Record:
    """What edges and verdicts need of a record, from the sites alone."""
    tensors: dict[str, TensorInfo] = {}
    for site in sites.values():
        for tensor, shape in zip(site.writes, site.out_shapes, strict=True):
            tensors[tensor] = TensorInfo(tensor, shape, "float32", site.name)
    return Record(sites, tensors)


def _peaks() -> dict[str, float]:
    """Peaks of this machine, with the threads that torch has now."""
    size = 512
    left, right = torch.randn(size, size), torch.randn(size, size)
    peaks = {"float32": size**3 / (_median(lambda: torch.mm(left, right)) * 1e9)}
    narrow, other = left.mul(30).clamp(-127, 127).to(torch.int8), right.mul(30).clamp(-127, 127).to(torch.int8)
    # a build of torch without an integer product leaves int8 without a peak
    with contextlib.suppress(AttributeError, RuntimeError):
        peaks["int8"] = size**3 / (_median(lambda: torch._int_mm(narrow, other)) * 1e9)
    source = torch.ones(16 * 2**20)
    copy = torch.empty_like(source)
    peaks["bandwidth_gb_s"] = 2 * source.nbytes / (_median(lambda: copy.copy_(source)) * 1e9)
    one = torch.ones(1, 1)
    peaks["overhead_us"] = _median(lambda: torch.mm(one, one)) * 1e6
    return peaks


def _median(work: Callable[[], Any], seconds: float = 0.5) -> float:
    """Median seconds of one call, over at most ``seconds`` and 200 calls, the first two left out."""
    for _ in range(2):
        work()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 200):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
