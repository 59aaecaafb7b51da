"""Files and inputs that cannot be used: each says what, where and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitsmith.model.onnx_graph.errors import (
    InputError,
    InvalidGraphError,
    OnnxError,
    OnnxFileError,
    UnsupportedError,
    UnsupportedOperatorError,
)
from bitsmith.model.read import read
from model.onnx_graph.graphs import Array, compare, model_of, saved

X = np.ones((2, 4), np.float32)
W = np.ones((4, 3), np.float32)


def small(nodes: Sequence[onnx.NodeProto] | None = None, **more: Any) -> onnx.ModelProto:
    found = list(nodes) if nodes is not None else [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]
    return model_of(found, {"x": X}, {"w": W}, **more)


def refused(model: onnx.ModelProto, folder: Path, kind: type[OnnxError], match: str) -> OnnxError:
    with pytest.raises(kind, match=match) as caught:
        read(saved(model, folder))
    assert isinstance(caught.value, ValueError)
    return caught.value


def unchecked(nodes: Sequence[onnx.NodeProto], **more: Any) -> onnx.ModelProto:
    """A model that onnx itself does not look at."""
    model = small()
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_unsupported_operators_are_all_listed_with_their_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="first"),
        helper.make_node("Bernoulli", ["x"], ["b"], name="second"),
        helper.make_node("Det", ["x"], ["y"]),
    ]
    error = refused(unchecked(nodes), tmp_path, UnsupportedOperatorError, "uses 2 operators that are not supported")
    assert isinstance(error, UnsupportedOperatorError)
    assert error.operators == {"Det": ("first", "y"), "Bernoulli": ("second",)}
    assert "Det at 'first', 'y'; Bernoulli at 'second'" in str(error)
    assert "docs/onnx_operators.md" in str(error)


def test_a_custom_domain_is_named(tmp_path: Path) -> None:
    model = unchecked([helper.make_node("FusedGelu", ["x"], ["y"], name="act", domain="com.acme")])
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    refused(model, tmp_path, UnsupportedOperatorError, r"com\.acme::FusedGelu at 'act'.*without custom domains")


@pytest.mark.parametrize("op", ["If", "Loop", "Scan"])
def test_control_flow_is_named(op: str, tmp_path: Path) -> None:
    refused(
        unchecked([helper.make_node(op, ["x"], ["y"], name="branch")]),
        tmp_path,
        UnsupportedError,
        rf"control flow.*branch \({op}\).*fixed path",
    )


@pytest.mark.parametrize("op", ["QuantizeLinear", "QLinearConv", "MatMulInteger", "DynamicQuantizeLinear"])
def test_an_already_quantized_file(op: str, tmp_path: Path) -> None:
    nodes = [helper.make_node(op, ["x"], ["y"], name="q")]
    refused(unchecked(nodes), tmp_path, UnsupportedError, "already quantized: 'q'.*from before")


def test_a_float16_file(tmp_path: Path) -> None:
    model = small()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(W.astype(np.float16), "w"))
    refused(
        model, tmp_path, UnsupportedError, r"reduced-precision file: 'w \(float16\)'.*export the network in float32"
    )
    model = small()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    refused(model, tmp_path, UnsupportedError, r"'x \(bfloat16\)'")


def test_other_kinds_of_values(tmp_path: Path) -> None:
    model = small()
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.STRING, [1], [b"word"]))
    refused(model, tmp_path, UnsupportedError, "'w' holds string values")
    model = small()
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [2, 4]))
    refused(model, tmp_path, UnsupportedError, "the input 'x' is a sequence; only tensors")


@pytest.mark.parametrize(("opset", "target"), [(12, 17), (9, 17), (23, 22)])
def test_another_operator_set(opset: int, target: int, tmp_path: Path) -> None:
    model = small()
    model.opset_import[0].version = opset
    refused(model, tmp_path, UnsupportedError, rf"opset {opset}; 13 to 22 are read.*convert_version\(model, {target}\)")


def test_missing_and_cut_external_data(tmp_path: Path) -> None:
    weights = np.ones((4, 300), np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": X}, {"w": weights})
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    compare(path, {"x": X})
    data = tmp_path / "net.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(OnnxFileError, match=r"net\.data is cut short: it has 100 bytes.*'w' up to byte 4800"):
        read(path)
    data.unlink()
    with pytest.raises(OnnxFileError, match=r"keeps its weights in net\.data, which is missing.*beside the \.onnx"):
        read(path)


@pytest.mark.parametrize("location", ["/etc/passwd", "../net.data"])
def test_external_data_elsewhere_is_not_read(location: str, tmp_path: Path) -> None:
    model = small()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    refused(model, tmp_path, OnnxFileError, "not below the folder of the file")


def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(OnnxFileError, match=r"is not a file"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(OnnxFileError, match="is empty"):
        read(path)
    for content in (b"PK\x03\x04 some archive", b"a text that is no network\n" * 20, bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(OnnxFileError, match="damaged or another kind of file"):
            read(path)
    with pytest.raises(OnnxFileError, match=r"ends in \.onnx or \.pt2"):
        read(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_file(part: float, tmp_path: Path) -> None:
    whole = small().SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(OnnxError):
        read(path)


def test_an_empty_graph(tmp_path: Path) -> None:
    model = small()
    del model.graph.node[:], model.graph.output[:]
    refused(model, tmp_path, InvalidGraphError, "empty: it gives no outputs")


def _unknown_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _wrong_order(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", ["y"], ["z"], name="late"))
    model.graph.output[0].name = "z"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"], name="again"))


def _shapes(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((5, 3), np.float32), "w"))


def _declared(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7


def _missing_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nothing"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_unknown_input, r"node 'fc' \(MatMul\) reads 'nowhere', which nothing before it computes"),
        (_wrong_order, r"node 'late' \(Relu\) reads 'y'"),
        (_twice, "'y' is computed twice, at 'again'"),
        (_shapes, r"contradicts itself:.*MatMul"),
        (_declared, "contradicts itself"),
        (_missing_output, "nothing computes its outputs 'nothing'"),
    ],
)
def test_a_graph_that_contradicts_itself(damage: Callable[[onnx.ModelProto], None], match: str, tmp_path: Path) -> None:
    model = small()
    damage(model)
    refused(model, tmp_path, InvalidGraphError, match)


def test_a_tensor_whose_size_int64_cannot_hold(tmp_path: Path) -> None:
    model = small()
    model.graph.initializer[0].dims[:] = [2**40, 2**40]
    refused(model, tmp_path, InvalidGraphError, r"'w' says that its shape is .* which int64 cannot count")


def test_arithmetic_of_sizes_beyond_int64(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Mul", ["s", "big"], ["m"]),
        helper.make_node("Reshape", ["x", "m"], ["y"]),
    ]
    inputs: dict[str, Array] = {"x": X}
    model = model_of(nodes, inputs, {"big": np.array([2**62, 4])}, shapes={"x": ["n", "m"]})
    net = read(saved(model, tmp_path))
    with pytest.raises(InvalidGraphError, match=r"which int64 cannot hold"):
        net(torch.ones(4, 2))
    with pytest.raises(InvalidGraphError, match=r"needs more than int64 can count"):
        net(torch.ones(1, 8))


def two_inputs(folder: Path, first: Any = "batch", second: Any = "batch") -> torch.nn.Module:
    inputs = {"ids": np.zeros((2, 4), np.int64), "x.1": X}
    nodes = [
        helper.make_node("Cast", ["ids"], ["c"], to=1),
        helper.make_node("Concat", ["c", "x.1"], ["y"], axis=1),
    ]
    model = model_of(nodes, inputs, shapes={"ids": [first, 4], "x.1": [second, 4]})
    return read(saved(model, folder))


@pytest.mark.parametrize("name", ["batch", None])
def test_two_inputs_with_different_batch_sizes(name: str | None, tmp_path: Path) -> None:
    net = two_inputs(tmp_path, name, name)
    assert net(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4)).shape == (3, 8)
    with pytest.raises(InputError, match=r"inputs 'ids' and 'x_1' of net\.onnx differ in 'the batch'|'batch': 3 and 2"):
        net(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4))


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    net = two_inputs(tmp_path)
    ids, x = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)
    assert net(ids=ids.int(), **{"x.1": x}).shape == (2, 8)
    assert net(ids, x_1=x).shape == (2, 8)
    for args, kwargs, match in [
        ((ids,), {}, r"takes 2 inputs \(ids, x_1\); 'x_1' is missing"),
        ((ids, x, x), {}, r"takes 2 inputs \(ids, x_1\), but 3 inputs were given"),
        ((ids, x), {"mask": x}, r"'mask' was given as well"),
        ((ids, [1.0]), {}, "'x_1' of net.onnx must be a tensor, not list"),
        ((x, x), {}, r"'ids' of net\.onnx is float32; the file says int64: convert it"),
        ((ids, x[0]), {}, r"'x_1' of net\.onnx has shape \(4,\); the file says \('batch', 4\)"),
        ((ids, torch.zeros(2, 5)), {}, r"has shape \(2, 5\), but the file fixes \('batch', 4\)"),
    ]:
        with pytest.raises(InputError, match=match):
            net(*args, **kwargs)


def test_a_fixed_batch_says_how_to_get_another(tmp_path: Path) -> None:
    net = read(saved(small(), tmp_path))
    with pytest.raises(InputError, match=r"shape \(3, 4\), but the file fixes \(2, 4\): give batches of that size, or"):
        net(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("node", "match"),
    [
        (helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2], name="n"), "MaxPool with the indices"),
        (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16, name="n"), "Cast to float16 at 'n'"),
        (helper.make_node("Dropout", ["x", "", "t"], ["y"], name="n"), "Dropout in training mode"),
        (helper.make_node("Resize", ["x", "", "s"], ["y"], antialias=1, mode="linear", name="n"), "with antialias"),
    ],
)
def test_forms_of_operators_that_are_not_read_are_told(node: onnx.NodeProto, match: str, tmp_path: Path) -> None:
    constants = {"t": np.array(True), "s": np.ones(3, np.float32)}
    model = model_of([node], {"x": np.ones((1, 2, 4), np.float32)}, constants, opset=18)
    error = refused(model, tmp_path, UnsupportedOperatorError, match)
    assert "'n'" in str(error)
