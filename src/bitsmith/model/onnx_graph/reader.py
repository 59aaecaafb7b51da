"""From a file to a :class:`Graph`, and every reason why that cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidGraphError, OnnxFileError, QuantizedError, UnsupportedError, UnsupportedOperatorError, named
from .graph import Graph, Node, ValueType
from .table import FOLDED, OPERATORS, OPSETS
from .types import DTYPES, HALF, NAMES

if TYPE_CHECKING:
    import onnx

STANDARD = ("", "ai.onnx")
CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})
QUANTIZED = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
    }
)


def read_graph(path: Path) -> Graph:
    """The graph in the file, its local functions inlined. Raises an ``OnnxError`` that says what is wrong."""
    model = _parse(path)
    _check_float(model, path)
    _check_tensors(model, path)
    opset = _check_opset(model, path)
    model = _inlined(model, path)
    _check_operators(model, path)
    graph = model.graph
    constants = {tensor.name: _tensor(tensor, path) for tensor in graph.initializer}
    _check_inputs(graph, path)
    nodes = []
    for proto in graph.node:
        attributes = {a.name: _attribute(a, path) for a in proto.attribute}
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _constant(attributes)
            continue
        nodes.append(Node(proto.op_type, list(proto.input), list(proto.output), attributes, proto.name))
    found = Graph(
        [value.name for value in graph.input if value.name not in constants],
        [value.name for value in graph.output],
        nodes,
        constants,
        {},
        opset,
        path.name,
    )
    _check_values(found)
    found.types.update(_types(model, path))
    return found


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise OnnxFileError(f"{path} is not a file; give the path of an .onnx file")
    if not path.stat().st_size:
        raise OnnxFileError(f"{path} is empty; write or fetch it again")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise OnnxFileError(
            f"{path} cannot be read as ONNX ({str(error).strip() or type(error).__name__}): it is cut short, damaged "
            "or another kind of file; write or fetch it again"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise OnnxFileError(f"{path} holds no ONNX graph; it is damaged or another kind of file")
    if not model.graph.output:
        raise InvalidGraphError(f"the graph of {path} is empty: it gives no outputs; export the network again")
    return model


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _check_float(model: onnx.ModelProto, path: Path) -> None:
    """Before anything else: a file that is quantized can be run as it is, whatever else of it is not read."""
    found = [
        node.name or next(iter(node.output), node.op_type)
        for node in _nodes(model)
        if node.op_type in QUANTIZED
        or (node.domain not in STANDARD and "Quant" in node.op_type)
        or node.op_type.startswith("QLinear")
    ]
    if found:
        raise QuantizedError(
            f"{path} is already quantized: {named(found)}. Bitsmith starts from the float32 network; give the file "
            "from before its quantization"
        )


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Kinds of number, sizes, and external data; before anything is read."""
    half: list[str] = []
    for tensor in _tensors(model):
        if tensor.data_type in HALF:
            half.append(f"{tensor.name or 'a constant'} ({NAMES[tensor.data_type]})")
        elif tensor.data_type not in DTYPES:
            raise UnsupportedError(
                f"{path}: the tensor {tensor.name!r} holds {NAMES.get(tensor.data_type, tensor.data_type)} values, "
                "which are not read; export the network as float32"
            )
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) >= 2**63:
            raise InvalidGraphError(
                f"{path}: the tensor {tensor.name!r} says that its shape is {list(tensor.dims)}, which int64 cannot "
                "count; the file is damaged"
            )
        if tensor.data_location == tensor.EXTERNAL:
            _check_external(tensor, path)
    inputs = [
        f"{value.name} ({NAMES[value.type.tensor_type.elem_type]})"
        for value in model.graph.input
        if value.type.tensor_type.elem_type in HALF
    ]
    if half or inputs:
        raise UnsupportedError(
            f"{path} is a reduced-precision file: {named(inputs + half)}. Bitsmith starts from float32: export the "
            "network in float32 (its own precision is then chosen per layer)"
        )
    if model.graph.sparse_initializer:
        raise UnsupportedError(f"{path} holds sparse initializers, which are not read; export them dense")


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = path.parent / location
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise OnnxFileError(
            f"{path}: the tensor {tensor.name!r} lies in {location!r}, which is not below the folder of the file; "
            "save the model again with its external data beside it"
        )
    if not file.is_file():
        raise OnnxFileError(
            f"{path} keeps its weights in {location}, which is missing from {path.parent}: put it beside the .onnx "
            "file (both belong together), or save the model again in one file"
        )
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if file.stat().st_size < end:
        raise OnnxFileError(
            f"{file} is cut short: it has {file.stat().st_size} bytes, but {path.name} keeps {tensor.name!r} up to "
            f"byte {end}; fetch it again"
        )


def _check_opset(model: onnx.ModelProto, path: Path) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in STANDARD]
    if not versions:
        domains = named(entry.domain for entry in model.opset_import)
        raise UnsupportedError(f"{path} imports no standard operators, only those of {domains}; export plain ONNX")
    version: int = versions[0]
    if version not in OPSETS:
        raise UnsupportedError(
            f"{path} is written in opset {version}; {OPSETS.start} to {OPSETS.stop - 1} are read. Export it so, or "
            f"convert it: onnx.version_converter.convert_version(model, {17 if version < OPSETS.start else 22})"
        )
    return version


def _inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    if not model.functions:
        return model
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # a C++ exception without a type of its own
        raise InvalidGraphError(f"{path}: its local functions cannot be inlined ({error}); export it again") from error


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    control: list[str] = []
    unknown: dict[str, list[str]] = {}
    for node in model.graph.node:
        label = node.name or next(iter(node.output), node.op_type)
        standard = node.domain in STANDARD
        if standard and node.op_type in CONTROL:
            control.append(f"{label} ({node.op_type})")
        elif not standard or (node.op_type not in OPERATORS and node.op_type not in FOLDED):
            unknown.setdefault(node.op_type if standard else f"{node.domain}::{node.op_type}", []).append(label)
    if control:
        raise UnsupportedError(
            f"{path} has control flow, which no runtime quantizes across: {named(control)}. Export the network for "
            "one fixed path (constant conditions folded, loops unrolled: onnxsim, or torch.onnx.export(dynamo=True))"
        )
    if unknown:
        raise UnsupportedOperatorError(unknown, str(path))


def _check_inputs(graph: onnx.GraphProto, path: Path) -> None:
    for value in graph.input:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise UnsupportedError(
                f"{path}: the input {value.name!r} is a {str(kind).removesuffix('_type')}; only tensors are read"
            )
        number = value.type.tensor_type.elem_type
        if number not in DTYPES:
            raise UnsupportedError(f"{path}: the input {value.name!r} holds {NAMES.get(number, number)}, not numbers")


def _check_values(graph: Graph) -> None:
    """Every value is computed once, before it is read."""
    known = {*graph.inputs, *graph.constants}
    for node in graph.nodes:
        missing = [name for name in node.inputs if name and name not in known]
        if missing:
            raise InvalidGraphError(
                f"{graph.source}: node {node.label!r} ({node.op}) reads {named(missing)}, which nothing before it "
                "computes; the file is damaged or its nodes are out of order (onnx.checker.check_model says more)"
            )
        repeated = [name for name in node.outputs if name and name in known]
        if repeated:
            raise InvalidGraphError(f"{graph.source}: {named(repeated)} is computed twice, at {node.label!r}")
        known.update(node.outputs)
    missing = [name for name in graph.outputs if name not in known]
    if missing:
        raise InvalidGraphError(f"{graph.source}: nothing computes its outputs {named(missing)}; export it again")


def _tensor(proto: onnx.TensorProto, path: Path) -> Tensor:
    from onnx import numpy_helper

    try:
        array = np.array(numpy_helper.to_array(proto, str(path.parent)))  # a copy: what is read may be read-only
    except (ValueError, TypeError, OSError) as error:
        raise InvalidGraphError(
            f"{path}: the tensor {proto.name!r} of shape {list(proto.dims)} cannot be read ({error}): a damaged file"
        ) from error
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _attribute(attribute: onnx.AttributeProto, path: Path) -> Any:
    from onnx import helper

    if attribute.HasField("t"):
        return _tensor(attribute.t, path)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if not isinstance(value, (int, float, str)) and hasattr(value, "__iter__") else value


def _constant(attributes: dict[str, Any]) -> Tensor:
    name, value = next(iter(attributes.items()))
    if isinstance(value, Tensor):
        return value
    if name not in ("value_float", "value_floats", "value_int", "value_ints"):
        raise UnsupportedError(f"a Constant with {name} is not read; only numbers are")
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


def _types(model: onnx.ModelProto, path: Path) -> dict[str, ValueType]:
    """What shape inference says. A contradiction in the file is an error."""
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(
            _skeleton(model), check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as error:  # onnx.shape_inference.InferenceError, and what its C++ throws besides
        raise InvalidGraphError(
            f"{path} contradicts itself: {' '.join(str(error).split())}. Its shapes do not fit together, so no runtime "
            "can be trusted with it; export it again"
        ) from error
    graph = inferred.graph
    return {value.name: _type(value) for value in (*graph.input, *graph.value_info, *graph.output)}


def _type(value: onnx.ValueInfoProto) -> ValueType:
    tensor = value.type.tensor_type
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return ValueType(shape, tensor.elem_type or None)


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its weights: shape inference needs their shapes only, and copies what it is given."""
    import onnx

    found = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = found.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL or tensor.ByteSize() > 4096:
            entry = onnx.StringStringEntryProto(key="location", value="weights")
            graph.initializer.add(
                name=tensor.name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=tensor.EXTERNAL,
                external_data=[entry],
            )
        else:
            graph.initializer.append(tensor)
    return found
