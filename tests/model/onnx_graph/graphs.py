"""Small ONNX files for tests, and what ONNX Runtime says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bitsmith.model.read import read

Array = NDArray[Any]
KINDS = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
}


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> onnx.ModelProto:
    """A model of those nodes. ``shapes``: declared input shapes, where they are not those of the arrays."""
    shapes = shapes or {}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [
            helper.make_tensor_value_info(name, KINDS[str(a.dtype)], shapes.get(name, a.shape))
            for name, a in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    for value in inferred.graph.output:  # where onnx infers none: a type has to be declared
        if not value.type.tensor_type.elem_type:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return inferred


def saved(model: onnx.ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    onnx.save(model, folder / name)
    return folder / name


def runtime(path: Path | str, inputs: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime computes, on one thread, as the graph is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs.values(), strict=True))))


def compare(path: Path, inputs: Mapping[str, Array], rtol: float = 1e-4) -> nn.Module:
    """The loaded network gives what ONNX Runtime gives: values (relative to the largest), shapes and types."""
    net = read(path)
    with torch.no_grad():
        made = net(*(torch.from_numpy(np.asarray(a)) for a in inputs.values()))
    made = made if isinstance(made, tuple) else (made,)
    wanted = runtime(path, inputs)
    assert len(made) == len(wanted)
    for ours, theirs in zip(made, wanted, strict=True):
        same(ours, theirs, rtol)
    return net


def same(ours: Tensor, theirs: Array, rtol: float = 1e-4) -> None:
    assert tuple(ours.shape) == theirs.shape
    assert ours.numpy().dtype == theirs.dtype
    if theirs.dtype.kind != "f":
        np.testing.assert_array_equal(ours.numpy(), theirs)
        return
    finite = np.isfinite(theirs)
    scale = float(np.abs(theirs[finite]).max(initial=1e-3))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=rtol, atol=rtol * scale)
