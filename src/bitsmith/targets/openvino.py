"""OpenVINO on CPU: 8-bit kernels, residual additions and activations fused behind them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from .._files import check_writable
from ..export.names import site_names
from ..export.onnx import site_map, to_onnx
from ..export.program import applied_program
from ..plan import Plan
from ..site import Record, Site
from ..store import machine_key
from ..technique import No, Technique
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from ._openvino_graph import Node, Owners, check_precision, compressed_sites, executed, realised
from .base import Array, Artifact, ArtifactError, Realised, SiteTimes, Source, Target, TargetError, Timing

if TYPE_CHECKING:
    import onnx
    import openvino as ov

KERNELS = frozenset({"conv1d", "conv2d", "conv3d", "linear", "matmul"})

ADDITIONS = frozenset({"add", "sub", "mul"})


@dataclass(frozen=True)
class OpenVino(Target):
    name: ClassVar[str] = "openvino"
    source: ClassVar[Source] = "measured"

    threads: int = 2
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"OpenVino(threads={self.threads}): must be 1 or more")

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        return True

    def adapt(self, plan: Plan, record: Record) -> Plan:
        return plan

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        return {}

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write ``net`` as OpenVINO's ``.xml`` and, beside it, its weights (``.bin``) and its map."""
        openvino = _openvino()
        path = Path(path)
        if path.suffix != ".xml":
            raise ValueError(f"{path}: OpenVINO reads a network from an .xml file and its weights from the .bin beside it")
        program, _ = applied_program(net, example, batch)
        exported = to_onnx(program)
        nodes, values = site_map(exported, site_names(net))
        model = openvino.Core().read_model(exported.SerializeToString())
        _name_operations(model)
        check_writable(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            openvino.save_model(model, str(Path(folder) / path.name), compress_to_fp16=False)
            for suffix in (".bin", ".xml"):
                os.replace((Path(folder) / path.name).with_suffix(suffix), path.with_suffix(suffix))
        inputs = tuple(_described(value) for value in exported.graph.input)
        artifact = Artifact(
            path=path,
            format="openvino",
            nodes=_layers(model, nodes),
            values=values,
            inputs=inputs,
            outputs=tuple(value.name for value in exported.graph.output),
            batch=next((shape[0] for _, shape, _ in inputs if shape), 1),
            target=self.name,
            versions=_versions(),
        )
        artifact.save()
        return artifact

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """The outputs for one batch of the artifact's shape, or the named tensors' float values.

        A value that is asked for becomes a result, which keeps the runtime from fusing across it: values behind a
        quantizer leave the integer kernels as they are, others (``conv`` before its ReLU) can turn them to float.
        """
        unknown = [name for name in tensors if name not in artifact.values]
        if unknown:
            raise ArtifactError(f"{artifact.path} has no value for the tensors {', '.join(unknown)}")
        wanted = [artifact.values[name] for name in tensors] or list(artifact.outputs)
        fed = [name for name, _, _ in artifact.inputs]
        compiled = _compiled(artifact.path, artifact.digest(), self, tuple(artifact.values[name] for name in tensors))
        arrays = self._arrays(artifact, inputs)
        found = compiled.create_infer_request().infer(arrays)
        return [
            np.array(arrays[fed.index(name)] if name in fed else found[compiled.output(name)]) for name in wanted
        ]

    def _arrays(self, artifact: Artifact, inputs: Sequence[Array]) -> list[Array]:
        if len(inputs) != len(artifact.inputs):
            raise ValueError(f"{artifact.path} takes {len(artifact.inputs)} inputs, got {len(inputs)}")
        arrays = []
        for (name, shape, dtype), array in zip(artifact.inputs, inputs, strict=True):
            if tuple(array.shape) != shape:
                raise ValueError(f"input {name!r} of {artifact.path} has shape {shape}, got {tuple(array.shape)}")
            arrays.append(np.ascontiguousarray(array, dtype=np.dtype(dtype)))
        return arrays

    # -- times -----------------------------------------------------------------------------------------------------

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        """Each round runs every artifact twice in turn and times the second run: the first refills its caches."""
        if rounds < 1:
            raise ValueError(f"measure(rounds={rounds}): must be 1 or more")
        requests = [_request(self._open(artifact.path), artifact) for artifact in artifacts]
        samples: list[list[float]] = [[] for _ in artifacts]
        for index in range(rounds + 2):
            for request, times in zip(requests, samples, strict=True):
                request.infer(share_outputs=True)
                start = time.perf_counter()
                request.infer(share_outputs=True)
                if index >= 2:
                    times.append((time.perf_counter() - start) * 1e3)
        return [
            Timing(tuple(times), artifact.batch, self.threads, self.source)
            for times, artifact in zip(samples, artifacts, strict=True)
        ]

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """From the graph that the plugin compiled."""
        owners = Owners.of(artifact.nodes, artifact.values)
        compressed = compressed_sites(self._read(artifact.path), owners.by_layer)
        return realised(owners, artifact.nodes, executed(self._open(artifact.path)), compressed)

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        """From the plugin's counters: median per node over the rounds, summed per site. ``whole`` without them."""
        owners = Owners.of(artifact.nodes, artifact.values)
        (whole,) = self.measure([artifact], rounds)
        compiled = self._open(artifact.path, counters=True)
        graph = {node.name: node for node in executed(compiled)}
        request = _request(compiled, artifact)
        samples: dict[str, list[float]] = {}
        for index in range(rounds + 2):
            request.infer(share_outputs=True)
            for entry in request.profiling_info if index >= 2 else ():
                samples.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
        sites = dict.fromkeys(artifact.nodes, 0.0)
        converted: dict[str, float] = {}
        other = 0.0
        for name, times in samples.items():
            ms = statistics.median(times)
            node = graph.get(name)
            owner = owners.sites(node) if node is not None else []
            tensor = owners.tensor(node, graph) if node is not None and not owner else ""
            if owner:
                sites[owner[0]] += ms
            elif tensor:
                converted[tensor] = converted.get(tensor, 0.0) + ms
            else:
                other += ms
        return SiteTimes(sites, converted, other, whole.ms, self.source)

    def settings(self) -> dict[str, Any]:
        return {
            "target": self.name,
            **machine_key(),
            "threads": self.threads,
            "bfloat16": self.bfloat16,
            "openvino": _openvino().get_version(),
        }

    def _read(self, path: Path) -> ov.Model:
        openvino = _openvino()
        try:
            return openvino.Core().read_model(str(path))
        except Exception as error:
            raise ArtifactError(f"OpenVINO cannot read {path}: {error}; export again") from error

    def _open(self, path: Path, values: Sequence[str] = (), counters: bool = False) -> ov.CompiledModel:
        openvino = _openvino()
        model = self._read(path)
        known = {name for value in (*model.outputs, *model.inputs) for name in value.get_names()}
        extra = [name for name in dict.fromkeys(values) if name not in known]
        if extra:
            model.add_outputs(extra)
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # the plugin's default is bfloat16 wherever the processor has it
            "INFERENCE_PRECISION_HINT": "bf16" if self.bfloat16 else "f32",
            "PERF_COUNT": counters,
        }
        try:
            compiled = openvino.Core().compile_model(model, "CPU", settings)
        except Exception as error:
            raise ArtifactError(f"OpenVINO cannot load {path}: {error}; export again") from error
        check_precision(executed(compiled), self.bfloat16)
        return compiled


@functools.lru_cache(maxsize=2)
def _compiled(path: Path, digest: str, target: OpenVino, values: tuple[str, ...]) -> ov.CompiledModel:
    """A compiled model whose results include ``values``. Kept, because a set is run batch by batch."""
    return target._open(path, values)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise TargetError(
            f'the target "openvino" needs OpenVINO ({error}); install it with: pip install "bitsmith[openvino]"'
        ) from None
    return openvino


def _request(compiled: ov.CompiledModel, artifact: Artifact) -> ov.InferRequest:
    """A request with inputs to time with: normal numbers, zeros for integers (valid as indices)."""
    generator = np.random.default_rng(0)
    request = compiled.create_infer_request()
    for index, (_, shape, dtype) in enumerate(artifact.inputs):
        floating = np.issubdtype(np.dtype(dtype), np.floating)
        array = generator.standard_normal(shape).astype(dtype) if floating else np.zeros(shape, dtype)
        request.set_input_tensor(index, _openvino().Tensor(array))
    return request


def _name_operations(model: ov.Model) -> None:
    """Replace the numbers that OpenVINO counts through a process: equal networks become equal files."""
    counts: dict[str, int] = {}
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", op.get_friendly_name()):
            counts[kind] = counts.get(kind, 0) + 1
            op.set_friendly_name(f"{kind}.{counts[kind]}")


def _layers(model: ov.Model, nodes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Site -> its operations in OpenVINO's file; those made of one ONNX node bear its name, with more behind a slash."""
    owner = {name: site for site, names in nodes.items() for name in names}
    found: dict[str, list[str]] = {site: [] for site in nodes}
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        parts = name.split("/")
        known = next((p for k in range(len(parts), 0, -1) if (p := "/".join(parts[:k])) in owner), "")
        if known:
            found[owner[known]].append(name)
    return {site: tuple(names) for site, names in found.items()}


def _described(value: onnx.ValueInfoProto) -> tuple[str, tuple[int, ...], str]:
    import onnx

    kind = value.type.tensor_type
    shape = tuple(int(axis.dim_value) for axis in kind.shape.dim)
    return value.name, shape, str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def _versions() -> dict[str, str]:
    import onnx
    import torch

    return {"torch": torch.__version__, "onnx": onnx.__version__, "openvino": _openvino().__version__}
