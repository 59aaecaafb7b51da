"""What was asked against what ran, site by site."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import batch_size, call, items, tensors_in
from .model.apply import computer_of
from .model.network import duplicate
from .numerics.quantizer import Quantizer
from .site import Site
from .targets.base import Artifact, Realised, Target, TargetError, example_arrays
from .techniques.binary import Binary
from .techniques.float_ import Float

TOLERANCE_DB: Mapping[str, float] = {"onnxruntime": 40.0, "openvino": 35.0}
"""Least agreement of run and simulation at outputs in float, in dB, by target; 35 elsewhere."""

MARGIN_DB = 3.0
"""By so much at least a file that runs as simulated is nearer to the simulation than float is, in dB."""


@dataclass(frozen=True)
class SiteCheck:
    """One site: asked and realised precision; run against simulation when both are fed the same input.

    ``agree``: fraction of the output's integers within one step (None: its output is float). ``gap_db``: run against
    simulation at its output, which must be quantized or an output of the network (else None). ``sqnr_db``: simulation
    against the float network there.
    """

    site: str
    asked: str
    realised: str
    why: str = ""
    agree: float | None = None
    gap_db: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Check:
    """The proof that the artifact runs as simulated.

    ``whole_db``: run against simulation at the network's outputs; ``float_db``: simulation against float there.
    ``same_class``: fraction of samples with the same largest output, run against simulation; ``float_same_class``:
    simulation against float. ``passed``: no site is among ``failing``, ``whole_db`` is at least ``tolerance_db``, and
    the run agrees with the simulation at least as often as float does.
    """

    sites: tuple[SiteCheck, ...]
    whole_db: float
    float_db: float
    same_class: float | None
    float_same_class: float | None
    samples: int
    tolerance_db: float
    target: str

    @property
    def worst_agree(self) -> float:
        """Least fraction of integers within one step over all sites."""
        return min((s.agree for s in self.sites if s.agree is not None), default=1.0)

    @property
    def failing(self) -> tuple[SiteCheck, ...]:
        """Sites that do not compute what is simulated: integers agree to less than 99.9 %, or, where the output is
        float, ``gap_db`` is below 40 in ONNX Runtime, 35 elsewhere, whatever is asked of the whole network."""
        return tuple(site for site in self.sites if not self._holds(site))

    def _holds(self, site: SiteCheck) -> bool:
        if site.agree is not None:
            return site.agree >= 0.999
        return site.gap_db is None or site.gap_db >= _tolerance(self.target)

    @property
    def passed(self) -> bool:
        return not self.failing and self.whole_db >= self.tolerance_db and self._classes_hold

    @property
    def _classes_hold(self) -> bool:
        return self.same_class is None or self.float_same_class is None or self.same_class >= self.float_same_class

    @property
    def verdict(self) -> str:
        """One line: passed, FAILED and where, or, with every site right, what keeps the whole from passing."""
        if self.passed:
            return "passed: it runs as simulated"
        if self.failing:
            names = ", ".join(site.site for site in self.failing[:5])
            return f"FAILED: {len(self.failing)} sites do not compute what is simulated, first {names}"
        if not self._classes_hold:
            return "FAILED: every site computes what is simulated, but float has the simulation's class more often"
        if not self.whole_db >= self.float_db + MARGIN_DB:  # not a number comes here too
            return (
                f"FAILED: run against simulation {self.whole_db:.1f} dB, hardly nearer than simulation against float "
                f"({self.float_db:.1f} dB), though every site by itself computes what is simulated"
            )
        return (
            f"not within the tolerance ({self.whole_db:.1f} dB, {self.tolerance_db:g} asked for; simulation to float "
            f"{self.float_db:.1f}): every site computes what is simulated, single roundings that go the other way grow "
            "through the network; tolerance_db (--tolerance-db) says what to ask for"
        )

    @property
    def unrealised(self) -> tuple[SiteCheck, ...]:
        """Sites that did not run as asked, each with its reason."""
        return tuple(site for site in self.sites if site.why)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "whole_db": self.whole_db,
            "tolerance_db": self.tolerance_db,
            "float_db": self.float_db,
            "same_class": self.same_class,
            "float_same_class": self.float_same_class,
            "worst_agree": self.worst_agree,
            "failing": [site.site for site in self.failing],
            "samples": self.samples,
            "unrealised": len(self.unrealised),
        }


def verify(
    net: nn.Module,
    artifact: Artifact,
    data: Any,
    *,
    target: Target | None = None,
    samples: int = 256,
    site_samples: int = 32,
    tolerance_db: float | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Check:
    """Run the artifact and the simulation on the same inputs and compare them site by site and whole.

    ``net``: the applied network that was exported. ``data``: a loader; its first ``samples`` samples are compared at
    the outputs, the first ``site_samples`` at every site. ``tolerance_db``: least agreement of the outputs, in dB;
    None: 40 in ONNX Runtime, 35 elsewhere. Deep networks may lie below with every site exact: compare it with
    ``float_db``. ``target``: the one that exported it; a built-in target is found by name. Every tensor of inputs and
    outputs has the samples along dimension 0.
    """
    target = target or built_in(artifact.target)
    comparison = _Comparison(net, artifact, target, forward)
    done = 0
    for inputs in _chunks(data, artifact.batch, samples):
        comparison.whole(inputs)
        if done < site_samples:
            keep = min(site_samples - done, batch_size(inputs))
            comparison.sites(slice_inputs(inputs, 0, max(keep // artifact.batch, 1) * artifact.batch))
        done += batch_size(inputs)
    if not done:
        raise ValueError(f"verify needs at least {artifact.batch} samples, the artifact's batch size")
    plan = computer_of(net).plan
    realised = target.inspect(artifact)
    rows = []
    for name, site in computer_of(net).record_sites.items():
        got = realised.get(name, Realised("removed", "the runtime left no node of it"))
        technique = plan.get(name) or Float()
        why = "" if plan.get(name) is None else _why(technique, got)
        rows.append(SiteCheck(name, str(technique), got.precision, why, *comparison.figures(site)))
    return Check(
        tuple(rows),
        comparison.run.db,
        comparison.simulation.db,
        comparison.run.share,
        comparison.simulation.share,
        done,
        _tolerance(artifact.target) if tolerance_db is None else tolerance_db,
        artifact.target,
    )


def _tolerance(target: str) -> float:
    return TOLERANCE_DB.get(target, 35.0)


def built_in(name: str) -> Target:
    """The built-in measured target of that name, with its default settings."""
    if name == "onnxruntime":
        from .targets.onnxruntime import OnnxRuntime

        return OnnxRuntime()
    if name == "openvino":
        from .targets.openvino import OpenVino

        return OpenVino()
    raise TargetError(f"the artifact was made for {name!r}; give that target: verify(net, artifact, data, target=...)")


@dataclass
class _Errors:
    """Running sums of one comparison: signal and error power, and samples with the same largest output."""

    signal: float = 0.0
    error: float = 0.0
    same: int = 0
    seen: int = 0

    def add(self, reference: Tensor, test: Tensor) -> None:
        reference, test = reference.double(), test.double()
        self.signal += float(reference.square().sum())
        self.error += float((reference - test).square().sum())

    def classes(self, reference: Tensor, test: Tensor) -> None:
        if reference.dim() == 2 and reference.shape[1] > 1:
            self.same += int((reference.argmax(1) == test.argmax(1)).sum())
            self.seen += len(reference)

    @property
    def db(self) -> float:
        if self.error == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.error) if self.signal else -math.inf

    @property
    def share(self) -> float | None:
        return self.same / self.seen if self.seen else None


class _Comparison:
    """Feeds every site of the simulation what the run fed it, and compares what comes out."""

    def __init__(self, net: nn.Module, artifact: Artifact, target: Target, forward: Any) -> None:
        self.net = duplicate(net).eval()
        self.floating = duplicate(net).eval()
        computer_of(self.floating).bypass()
        self.artifact, self.target, self.forward = artifact, target, forward
        self.quantizers: dict[str, Quantizer] = {
            tensor: quantizer for tensor, quantizer in computer_of(net).written.items() if tensor in artifact.values
        }
        # what readers quantize themselves: inputs of the network, and what is read as float too
        given = {name for name, _, _ in artifact.inputs}
        self.reading = {
            tensor: quantizer
            for tensor, quantizer in computer_of(self.net).read.items()
            if artifact.values.get(tensor, "") not in {"", *given}
        }
        self.run, self.simulation = _Errors(), _Errors()
        self.gaps: dict[str, _Errors] = defaultdict(_Errors)
        self.noise: dict[str, _Errors] = defaultdict(_Errors)
        self.ends: dict[str, _Errors] = defaultdict(_Errors)
        self.steps: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def whole(self, inputs: Any) -> None:
        """Compare the outputs of run, simulation and float."""
        ran = self._ran(inputs, ())
        simulated, floating = self._outputs(self.net, inputs), self._outputs(self.floating, inputs)
        for got, sim, flt in zip(ran, simulated, floating, strict=True):
            self.run.add(sim, got)
            self.simulation.add(flt, sim)
        self.run.classes(simulated[0], ran[0])
        self.simulation.classes(floating[0], simulated[0])

    def sites(self, inputs: Any) -> None:
        """Compare every quantized tensor and the outputs: run against simulation fed the same input, and what is
        quantized where it is written against float."""
        quantizers = {**self.quantizers, **self.reading}
        names = list(quantizers)
        ran = dict(zip(names, self._ran(inputs, names), strict=True)) if names else {}

        def force(tensor: str, simulated: Tensor) -> Tensor:
            found = ran.get(tensor)
            # the runtime may pad behind the quantizer, the simulation before it
            if found is None or (tensor in self.reading and found.numel() < simulated.numel()):
                return simulated
            # a tensor without the batch, such as embedded positions, comes whole from every run
            value = found.flatten()[: simulated.numel()].reshape(simulated.shape)
            apart = (value - simulated).abs() / quantizers[tensor].scale
            self.steps[tensor][0] += int((apart < 1.5).sum())
            self.steps[tensor][1] += apart.numel()
            self.gaps[tensor].add(simulated, value)
            return value

        kept: dict[str, Tensor] = {}

        def keep(tensor: str, value: Tensor) -> Tensor:
            kept[tensor] = value.clone()
            return value

        def against_float(tensor: str, value: Tensor) -> Tensor:
            self.noise[tensor].add(kept[tensor], value)
            return value

        hooks = [
            quantizer.register_forward_hook(lambda _, given, read, tensor=tensor: force(tensor, read))
            for tensor, quantizer in self.reading.items()
        ]
        try:
            outputs = self._probed(self.net, force, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for name, simulated, got in zip(self.artifact.outputs, outputs, self._ran(inputs, ()), strict=True):
            self.ends[name].add(simulated, got)
        self._probed(self.floating, keep, inputs)
        self._probed(self.net, against_float, inputs)

    def figures(self, site: Site) -> tuple[float | None, float | None, float | None]:
        """Fraction of integers within one step, gap and SQNR in dB at a site's output; None where there is none."""
        tensor = site.tail if site.tail in self.steps else site.name
        if tensor not in self.steps:
            end = self.ends.get(self.artifact.values.get(site.tail, ""))
            return None, end.db if end is not None else None, None
        within, count = self.steps[tensor]
        return within / count, self.gaps[tensor].db, self.noise[tensor].db if tensor in self.noise else None

    def _probed(self, net: nn.Module, probe: Callable[[str, Tensor], Tensor], inputs: Any) -> list[Tensor]:
        computer_of(net).probe = probe
        try:
            return self._outputs(net, inputs)
        finally:
            computer_of(net).probe = None

    def _outputs(self, net: nn.Module, inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors_in(call(net, inputs, self.forward)))

    def _ran(self, inputs: Any, tensors: Sequence[str]) -> list[Tensor]:
        """What the artifact gives for all samples of ``inputs``, run in batches of its size."""
        size, batch = batch_size(inputs), self.artifact.batch
        parts = [
            self.target.run(self.artifact, example_arrays(slice_inputs(inputs, start, start + batch)), tensors)
            for start in range(0, size, batch)
        ]
        return [
            torch.from_numpy(np.concatenate([np.atleast_1d(part[i]) for part in parts])) for i in range(len(parts[0]))
        ]


def _why(technique: Any, got: Realised) -> str:
    if isinstance(technique, Float):
        wanted: str = technique.dtype
    elif isinstance(technique, Binary):
        wanted = "binary"
    else:
        wanted = f"int{getattr(technique, 'a', None) or getattr(technique, 'w', '')}"
    if got.precision in (wanted, "folded", "removed"):
        return ""
    return got.reason or f"asked for {wanted}, the runtime ran {got.precision}"


def _chunks(data: Any, batch: int, samples: int) -> Iterator[Any]:
    """Inputs of the first ``samples`` samples, each item cut to whole batches of the artifact's size."""
    left = samples
    for inputs, _ in items(data, "verification"):
        take = min(batch_size(inputs), left) // batch * batch
        if take:
            yield slice_inputs(inputs, 0, take)
            left -= take
        if left < batch:
            return


def slice_inputs(value: Any, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of every tensor that has the batch along dimension 0."""
    size = batch_size(value)

    def cut(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item[start:stop] if item.dim() and item.shape[0] == size else item
        if isinstance(item, (tuple, list)):
            return type(item)(cut(part) for part in item)
        if isinstance(item, Mapping):
            return {name: cut(part) for name, part in item.items()}
        return item

    return cut(value)
