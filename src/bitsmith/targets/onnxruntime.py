"""ONNX Runtime on CPU: 8-bit kernels between QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from .._files import atomic_write
from ..export.forms import onnxruntime_form
from ..export.names import site_names
from ..export.onnx import site_map, to_onnx
from ..export.program import applied_program
from ..export.storage import packed
from ..export.translations import DOMAIN
from ..model.apply import is_applied, plan_of
from ..model.formats import place
from ..numerics.winograd_operation import FORM
from ..plan import Plan
from ..site import Format, Record, Site
from ..store import machine_key
from ..technique import No, Technique
from ..techniques.int_ import Int
from ..techniques.winograd import Winograd
from ._cpu import (
    batch_of,
    checked,
    described,
    direct,
    in_range,
    integer_refusal,
    promised,
    sample_inputs,
    shared_groups,
    timings,
    values_of,
)
from ._onnxruntime_graph import Owners, realised
from .base import Array, Artifact, ArtifactError, Realised, SiteTimes, Source, Target, TargetError, Timing

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

ALWAYS = frozenset({"linear", "matmul", "embedding"})
"""Run in int8 whatever their output is (QGemm, QLinearMatMul, MatMulIntegerToFloat, Gather of integers)."""

NEED_OUTPUT = frozenset(
    {"conv1d", "conv2d", "conv3d", "add", "mul", "cat", "avg_pool1d", "avg_pool2d", "avg_pool3d"}
    | {f"adaptive_avg_pool{n}d" for n in (1, 2, 3)}
    | {"mean"}
)
"""Run in int8 only if their output is quantized as well (QLinearConv, QLinearAdd, QLinearConcat, ...)."""


FUSING = frozenset({"conv1d", "conv2d", "conv3d"})
"""Absorb the normalisation and the activation behind them in float as well (FusedConv)."""


NO_WINOGRAD = No(
    "ONNX Runtime has no Winograd kernel, and its packages lack the C header that ours would need to be built for it; "
    "OpenVino(kernels=True) runs ours"
)


@dataclass(frozen=True)
class OnnxRuntime(Target):
    """ONNX Runtime's CPU execution provider (https://onnxruntime.ai), read back on 1.31.

    ``threads``: size of the intra-operator pool; one operator runs at a time. ``spinning``: idle threads spin, as by
    default, which is faster alone and slower beside other work; they stop when a run ends, or artifacts that are
    timed in turn would disturb each other. ``reduced_range``: keep 8-bit weights within 7 bits, so that sums of two
    products cannot saturate; None: where this processor has no VNNI. The optimizer ``WeightBiasQuantization`` is off:
    it would change numbers that the plan fixed.

    Activations become unsigned 8-bit affine, weights signed 8-bit symmetric. Times are ``measured``, in ms per batch.
    """

    name: ClassVar[str] = "onnxruntime"
    source: ClassVar[Source] = "measured"

    threads: int = 2
    spinning: bool = True
    reduced_range: bool | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"OnnxRuntime(threads={self.threads}): must be 1 or more")

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        form = technique.form(site)
        if form == "float":
            return True
        if form == FORM:
            return NO_WINOGRAD
        if form != "dialect":
            return No(f"ONNX Runtime has no operation {form!r}")
        refusal = integer_refusal(technique, site, "ONNX Runtime")
        if refusal is not None:
            return refusal
        if site.kind not in ALWAYS | NEED_OUTPUT:
            return No(f"ONNX Runtime has no integer kernel for {site.kind}")
        refusal = _shape_refusal(site)
        return True if refusal is None else refusal

    def adapt(self, plan: Plan, record: Record) -> Plan:
        """Activations unsigned affine; an output format where the kernel needs one and the readers do not give it.

        Additions and products that no integer site reads stay float: no kernel behind them gains from 8 bits, and a
        residual stream is what 8 bits hold worst. Winograd convolutions become direct ones, with a warning.
        """
        served = _served(plan, record, self.reduced_range)
        sites = {
            name: dataclasses.replace(in_range(technique, self.reduced_range), signed=False, symmetric=False)
            if isinstance(technique, Int) and technique.a is not None
            else technique
            for name, technique in served.items()
        }
        written = place(plan.replace(sites=sites, groups=()), record).writes
        for name, technique in sites.items():
            site = record.site(name)
            if not isinstance(technique, Int) or technique.a is None or not _needs_output(site):
                continue
            if technique.out is None and (tail := _tail(site, record)) is not None and tail not in written:
                sites[name] = dataclasses.replace(
                    technique, out=Format(technique.a, range=technique.range, learn=technique.learn)
                )
        return plan.replace(sites=sites, groups=shared_groups(plan.groups, sites))

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        written = place(plan, record).writes

        def kernel(technique: Technique, site: Site) -> Realised:
            if _needs_output(site) and _tail(site, record) not in written:
                return Realised("float32", "its output stays float, so no integer kernel is used")
            return Realised("int8")

        return promised(plan, record, self, "float32", FUSING, kernel)

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write ``net`` as ONNX in the form that ONNX Runtime fuses, and its map beside it."""
        program, _ = applied_program(net, example, batch)
        return self.write(to_onnx(program), path, site_names(net), plan_of(net) if is_applied(net) else Plan())

    def write(
        self, model: onnx.ModelProto, path: str | Path, sites: Sequence[str], plan: Plan, batch: int | None = None
    ) -> Artifact:
        """Bring a graph into the form that ONNX Runtime fuses, save it, and its map beside it."""
        import onnx

        model = packed(onnxruntime_form(model), plan)
        if any(node.domain == DOMAIN for node in model.graph.node):
            raise TargetError(f"{NO_WINOGRAD}; adapt the plan first, which puts direct convolutions in their place")
        nodes, values = site_map(model, sites)
        # shapes of inner values, which the runtime infers: files of one plan are equally long however they were made
        del model.graph.value_info[:]
        path = atomic_write(path, lambda temporary: onnx.save(model, str(temporary)))
        inputs = described(model)
        artifact = Artifact(
            path=path,
            format="onnx",
            nodes=nodes,
            values=values,
            inputs=inputs,
            outputs=tuple(value.name for value in model.graph.output),
            batch=batch or batch_of(inputs),
            target=self.name,
            plan=plan.to_json(),
            versions=_versions(),
        )
        artifact.save()
        return artifact

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """The outputs for one batch of the artifact's shape, or the named tensors' float values.

        A value that is asked for becomes a graph output, which keeps the runtime from fusing across it: values behind
        a quantizer leave the integer kernels as they are, others (``conv`` before its ReLU) can turn them to float.
        """
        values = values_of(artifact, tensors)
        session = _session(artifact.path, artifact.digest(), self, values)
        feed = _feed(artifact, checked(artifact, inputs))
        wanted = values or artifact.outputs
        found: dict[str, Array] = {}
        produced = [name for name in dict.fromkeys(wanted) if name not in feed]
        if produced:
            found = dict(zip(produced, session.run(produced, feed), strict=True))
        return [np.asarray(found[name] if name in found else feed[name]) for name in wanted]

    def opened(self, artifact: Artifact) -> Callable[[Sequence[Array]], list[Array]]:
        session = _session(artifact.path, artifact.digest(), self, ())
        wanted = list(artifact.outputs)

        def run(inputs: Sequence[Array]) -> list[Array]:
            return [np.asarray(found) for found in session.run(wanted, _feed(artifact, checked(artifact, inputs)))]

        return run

    # -- times -----------------------------------------------------------------------------------------------------

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        runs = []
        for artifact in artifacts:
            session = _session(artifact.path, artifact.digest(), self, ())
            feed = _feed(artifact, sample_inputs(artifact))
            runs.append(functools.partial(session.run, None, feed))
        return timings(runs, artifacts, rounds, self.threads)

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """From the graph that the runtime's optimizer saves."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._open(artifact.path, optimized=optimized)
            graph = onnx.load(str(optimized))
        return realised(Owners.of(onnx.load(str(artifact.path)), artifact.nodes), artifact.nodes, graph)

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        """From the runtime's profiler: median per node over the rounds, summed per site. ``whole`` without it."""
        import onnx

        owners = Owners.of(onnx.load(str(artifact.path)), artifact.nodes)
        (whole,) = self.measure([artifact], rounds)
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            session = self._open(artifact.path, optimized=optimized, profile=Path(folder) / "profile")
            feed = _feed(artifact, sample_inputs(artifact))
            for _ in range(rounds + 2):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            outputs = {node.name: tuple(node.output) for node in onnx.load(str(optimized)).graph.node}
        sites = dict.fromkeys(artifact.nodes, 0.0)
        converted: dict[str, float] = {}
        other = 0.0
        for (name, operation), ms in _node_times(events, rounds).items():
            site = owners.site(name, operation, outputs.get(name, ()))
            tensor = owners.tensor(name, operation, outputs.get(name, ()))
            if site:
                sites[site] += ms
            elif tensor:
                converted[tensor] = converted.get(tensor, 0.0) + ms
            else:
                other += ms
        return SiteTimes(sites, converted, other, whole.ms, self.source)

    def settings(self) -> dict[str, Any]:
        import onnxruntime as ort

        return {
            "target": self.name,
            **machine_key(),
            "threads": self.threads,
            "spinning": self.spinning,
            "onnxruntime": ort.__version__,
        }

    def _open(
        self, model: Path | bytes, optimized: Path | None = None, profile: Path | None = None
    ) -> ort.InferenceSession:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spinning)))
        # threads that spin on behind a run would take the cores from the next artifact's (0.66 against 0.55 ms here)
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # 1: float products, as simulated; the default rounds activations to 8 bits behind the plan's back
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            return ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["WeightBiasQuantization"],
            )
        except Exception as error:
            where = "the model" if isinstance(model, bytes) else model
            raise ArtifactError(f"ONNX Runtime cannot load {where}: {error}; export again") from error


@functools.lru_cache(maxsize=2)
def _session(path: Path, digest: str, target: OnnxRuntime, values: tuple[str, ...]) -> ort.InferenceSession:
    """A session whose outputs include ``values``. Kept, because a set is run batch by batch, and the float network is
    timed beside every other."""
    import onnx

    if not values:
        return target._open(path)
    model = onnx.load(str(path))
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    for name in dict.fromkeys(values):
        if name not in known:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return target._open(model.SerializeToString())


def _feed(artifact: Artifact, arrays: Sequence[Array]) -> dict[str, Array]:
    return {name: array for (name, _, _), array in zip(artifact.inputs, arrays, strict=True)}


def _served(plan: Plan, record: Record, reduced: bool | None) -> dict[str, Technique]:
    """The plan's sites, each under a technique that has a kernel, without elementwise operations whose result is read
    as float only, chains of them included."""
    kept = {
        name: direct(technique, name, NO_WINOGRAD, reduced) if isinstance(technique, Winograd) else technique
        for name, technique in plan.sites.items()
    }
    for name in reversed(list(record.sites)):  # readers come before what they read
        site, technique = record.sites[name], kept.get(name)
        if site.kind not in ("add", "mul") or not isinstance(technique, Int) or technique.out is not None:
            continue
        readers = record.tensors[site.tail].readers if site.tail in record.tensors else ()
        if not any(isinstance(reader := kept.get(other), Int) and reader.a is not None for other in readers):
            del kept[name]
    return kept


def _needs_output(site: Site) -> bool:
    return site.kind in NEED_OUTPUT


def _tail(site: Site, record: Record) -> tuple[str, int] | None:
    """The (site, output) that writes the tensor behind the site's epilogue."""
    info = record.tensors.get(site.tail)
    if info is None or not info.producer:
        return None
    return info.producer, record.sites[info.producer].writes.index(site.tail)


def _shape_refusal(site: Site) -> No | None:
    """Operations whose arguments leave the form that has a kernel."""
    if site.kind == "mean":
        axes = site.arguments.get("dim")
        rank = len(site.operands[0].shape)
        given = (axes,) if isinstance(axes, int) else tuple(axes or range(rank))
        if sorted(axis % rank for axis in given) != list(range(2, rank)) or rank < 3:
            return No("only a mean over all spatial axes has an integer kernel (QLinearGlobalAveragePool)")
    if site.kind in ("add", "mul", "matmul") and len(site.activations) < 2:
        return No(f"{site.kind} with a constant operand is computed in float")
    return None


def _node_times(events: Sequence[Mapping[str, Any]], rounds: int) -> dict[tuple[str, str], float]:
    """(node name, operation) -> ms per run: median over the last ``rounds`` runs, times its calls in one run."""
    samples: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = name.removesuffix("_kernel_time"), str(event["args"].get("op_name", ""))
            samples.setdefault(key, []).append(float(event["dur"]) / 1e3)
    times = {}
    for key, values in samples.items():
        calls = max(1, round(len(values) / (rounds + 2)))
        times[key] = statistics.median(values[-rounds * calls :]) * calls
    return times


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime as ort
    import torch

    return {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__}
