"""Roofline: a hardware model of a few peaks. It times nothing; every figure is modelled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..plan import Plan
from ..site import Record, Site
from ..technique import No, Technique
from ..techniques.float_ import Float
from ._formulas import FREE, costed, integer_bits, modelled, moved_bytes, parts, realised, recorded_batch, value_bytes
from .base import Array, Artifact, Realised, SiteTimes, Source, Target, TargetError, Timing
from .onnxruntime import OnnxRuntime

_INTEGERS = (2, 4, 8, 16)


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
        if site.kind in FREE:
            return 0.0
        peak = self._peak(self._precision(site, technique))
        compute = site.macs / (peak * 1e6)
        memory = site.calls * moved_bytes(site, technique) / (self.bandwidth_gb_s * 1e6)
        return max(compute, memory) + site.calls * self.overhead_us / 1e3

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        if produced == consumed:
            return 0.0
        return (
            numel * (value_bytes(produced) + value_bytes(consumed)) / (self.bandwidth_gb_s * 1e6)
            + self.overhead_us / 1e3
        )

    def _precision(self, site: Site, technique: Technique) -> str:
        """``float32``, ``bfloat16``, or the narrowest integer of this machine that holds the operands."""
        if isinstance(technique, Float) and technique.dtype == "bfloat16":
            return "bfloat16"
        bits = integer_bits(site, technique)
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

        def precision(site: Site, technique: Technique) -> str | No:
            verdict = self.supports(technique, site)
            return verdict if isinstance(verdict, No) else self._precision(site, technique)

        return realised(plan, record, precision)

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write ``net`` as the ONNX file that ONNX Runtime gets, so that its size is a real one; times are modelled."""
        artifact = OnnxRuntime(threads=self.threads).export(net, path, example, batch)
        found = modelled(self, net, artifact.inputs)
        versions = {**artifact.versions, "model": json.dumps(self.settings(), sort_keys=True)}
        artifact = dataclasses.replace(
            artifact, target=self.name, versions=versions, costs=found.costs, precisions=found.precisions
        )
        artifact.save()
        return artifact

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        """One modelled figure for each artifact; ``rounds`` would not change it."""
        return [Timing((self.site_times(a).whole,), a.batch, self.threads, self.source) for a in artifacts]

    def computed(self, plan: Plan, record: Record, batch: int) -> Timing | None:
        costs = costed(self, record.sites, plan, batch / recorded_batch(record, batch)).costs
        return Timing((sum(costs.values()),), batch, self.threads, self.source)

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """The numbers of the exported file, run by ONNX Runtime; only costs are modelled."""
        return OnnxRuntime(threads=self.threads).run(artifact, inputs, tensors)

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
