"""Any ONNX or IR file on both runtimes, whoever made it: run under one set of settings, and what it multiplied in int8.

The settings are those of ``bitsmith.targets``: one stream, idle ONNX Runtime threads stop, OpenVINO computes floats in
f32 unless bf16 is asked for. ``products`` reads from the runtime itself in which precision every multiply-accumulate of
convolutions and matrix products ran, so it says the same thing about every tool's file.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.targets import _openvino_kernels

Array = NDArray[Any]
Run = Callable[[Sequence[Array]], list[Array]]

RUNTIMES = ("onnxruntime", "openvino")
OFF = ("WeightBiasQuantization",)
"""The optimizer of ONNX Runtime that ``bitsmith.targets.OnnxRuntime`` switches off for its own files."""

_EIGHT_BITS = ("uint8", "int8", "tensor(uint8)", "tensor(int8)")
_ATTENTION = ("Attention", "QAttention", "MultiHeadAttention")
_MATRIX = (
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
)


@dataclass
class Products:
    """Multiply-accumulates by the precision they ran in: ``int8`` or the runtime's own name for another."""

    macs: dict[str, int] = field(default_factory=dict)

    def add(self, precision: str, macs: int) -> None:
        self.macs[precision] = self.macs.get(precision, 0) + macs

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    @property
    def int8(self) -> float:
        """The part that ran in int8; not a number where nothing was multiplied."""
        return self.macs.get("int8", 0) / self.total if self.total else math.nan


def opened(runtime: str, path: Path, threads: int, *, bfloat16: bool = False, disabled: Sequence[str] = ()) -> Run:
    """The file as a function of its inputs in order. ``disabled``: optimizers of ONNX Runtime to switch off."""
    if runtime == "onnxruntime":
        session = _session(path, threads, disabled)
        names = [entry.name for entry in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))
    request = _compiled(path, threads, bfloat16).create_infer_request()
    return lambda arrays: list(request.infer(list(arrays), share_inputs=True).to_tuple())


def opens(runtime: str, path: Path) -> bool:
    """Whether that runtime reads such a file: ONNX Runtime no OpenVINO IR."""
    return runtime == "openvino" or path.suffix == ".onnx"


def products(
    runtime: str, path: Path, inputs: Sequence[Array], *, bfloat16: bool = False, disabled: Sequence[str] = ()
) -> Products:
    """What the runtime multiplies for these inputs, and in which precision."""
    if runtime == "onnxruntime":
        return _onnxruntime_products(path, inputs, disabled)
    return _openvino_products(path, bfloat16)


def sqnr(reference: Sequence[Array], found: Sequence[Array]) -> float:
    """Signal to noise over all samples together, in dB."""
    signal = sum(float(np.square(r, dtype=np.float64).sum()) for r in reference)
    noise = sum(
        float(np.square(r.astype(np.float64) - f.reshape(r.shape)).sum()) for r, f in zip(reference, found, strict=True)
    )
    return 10 * math.log10(signal / noise) if noise else math.inf


# -- ONNX Runtime ----------------------------------------------------------------------------------------------------


def _session(
    path: Path, threads: int, disabled: Sequence[str], optimized: Path | None = None, profile: Path | None = None
) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # threads that spin on behind a run would take the cores from the next file's
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def _onnxruntime_products(path: Path, inputs: Sequence[Array], disabled: Sequence[str]) -> Products:
    """From the profiler, which notes the types and shapes of every node that ran, and from the optimized graph."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = _session(path, 1, disabled, optimized, Path(folder) / "profile")
        session.run(None, {entry.name: array for entry, array in zip(session.get_inputs(), inputs, strict=True)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        graph = onnx.load(str(optimized), load_external_data=False).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    found = Products()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        operation, name = event["args"]["op_name"], event["name"].removesuffix("_kernel_time")
        given = [_typed(entry) for entry in event["args"]["input_type_shape"]]
        out = [_typed(entry) for entry in event["args"]["output_type_shape"]]
        if operation.endswith("Conv") or operation in ("ConvInteger", *_MATRIX, *_ATTENTION):
            # constants that a kernel has repacked are missing among the shapes that ran
            constant = [stored[value] for value in nodes[name].input if value in stored] if name in nodes else []
            shapes = [shape for _, shape in given]
            integer = given[0][0] in _EIGHT_BITS or operation == "DynamicQuantizeMatMul"
            found.add("int8" if integer else given[0][0], _macs(operation, shapes, constant, out[0][1]))
    return found


def _typed(entry: Mapping[str, Sequence[int]]) -> tuple[str, tuple[int, ...]]:
    ((dtype, shape),) = entry.items()
    return dtype, tuple(shape)


def _macs(
    operation: str, given: Sequence[tuple[int, ...]], constant: Sequence[tuple[int, ...]], out: tuple[int, ...]
) -> int:
    """Of one node: shapes of what it read (``given``), of what the file stores for it (``constant``), of its output."""
    if operation in _MATRIX:
        return math.prod(out) * given[0][-1]
    if operation in _ATTENTION:
        batch, sequence, width = out
        inner = 2 * batch * sequence * sequence * width
        return inner if operation == "MultiHeadAttention" else inner + 3 * batch * sequence * given[0][-1] * width
    weight = next(shape for shape in (*constant, *given[1:]) if len(shape) == len(given[0]))
    return math.prod(out) * math.prod(weight[1:])


# -- OpenVINO --------------------------------------------------------------------------------------------------------


def _compiled(path: Path, threads: int, bfloat16: bool) -> Any:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
    }
    core = _openvino_kernels.core(openvino, _openvino_kernels.needed_by(path))
    return core.compile_model(core.read_model(str(path)), "CPU", settings)


def _openvino_products(path: Path, bfloat16: bool) -> Products:
    """From the compiled graph, which gives shape, precision and kernel of everything that runs."""
    import openvino

    found, matrices, fused = Products(), 0, ""
    names: dict[str, int] | None = None
    for op in _compiled(path, 1, bfloat16).get_runtime_model().get_ordered_ops():
        notes = {key: str(value.astype(str)) for key, value in op.get_rt_info().items()}
        kind = notes.get("layerType")
        given = [tuple(port.get_shape()) for port in op.inputs()]
        if kind not in ("Convolution", "FullyConnected", "MatMul", "Subgraph"):
            continue
        precision = "int8" if notes["primitiveType"].endswith(("_I8", "_i8", "_u8")) else notes["runtimePrecision"]
        if kind == "Convolution":  # weights (out, in, ...) or (groups, out, in, ...)
            weight = given[1][1 + len(given[1]) - len(given[0]) :]
            found.add(precision, math.prod(op.output(0).get_shape()) * math.prod(weight))
        elif kind == "Subgraph":  # one that fuses attention holds its two products, and does not name both
            if names is None:
                names = dict(_matrix_macs(openvino.Core().read_model(str(path))))
            if not names.keys().isdisjoint(notes["originalLayersNames"].split(",")):
                fused = precision
        else:
            macs = math.prod(op.output(0).get_shape()) * given[0][-1]
            matrices += macs
            found.add(precision, macs)
    if fused and names is not None:
        found.add(fused, max(0, sum(names.values()) - matrices))
    return found


def _matrix_macs(model: Any) -> Iterator[tuple[str, int]]:
    """Name and multiply-accumulates of every matrix product of a file."""
    for op in model.get_ordered_ops():
        if op.get_type_name() == "MatMul":
            shape, transposed = op.input(0).get_partial_shape(), op.get_attributes()["transpose_a"]
            yield (
                op.get_friendly_name(),
                math.prod(op.output(0).get_shape()) * shape[-2 if transposed else -1].get_length(),
            )
