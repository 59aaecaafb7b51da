"""Which layers of an ONNX graph become operations on signs, whoever made it, and what of them the kernel is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitsmith.export.binary import before_sign, one_bit_kernels, signed
from bitsmith.export.rewrite import rewritten
from bitsmith.technique import No


def graph(
    op: str,
    weight: np.ndarray,
    scale: np.ndarray | float = 0.5,
    *,
    high: float = 1.0,
    zero: int = 0,
    axis: int = 0,
    bias: np.ndarray | None = None,
    added: np.ndarray | None = None,
    **given: Any,
) -> onnx.ModelProto:
    """``op(Where(x >= 0, high, -1), Dequantize(weight))``, with a bias of its own or one that is added behind."""
    arrays = {"zero": np.float32(0), "high": np.float32(high), "low": np.float32(-1), "w": weight.astype(np.int8)}
    arrays |= {"s": np.asarray(scale, np.float32), "z": np.full(np.shape(scale), zero, np.int8)}
    arrays |= {} if bias is None else {"b": bias.astype(np.float32)}
    arrays |= {} if added is None else {"a": added.astype(np.float32)}
    last = "y" if added is None else "m"
    nodes = [
        helper.make_node("GreaterOrEqual", ["x", "zero"], ["up"]),
        helper.make_node("Where", ["up", "high", "low"], ["sign"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["real"], axis=axis),
        helper.make_node(op, ["sign", "real", *(["b"] if bias is not None else [])], [last], name="layer", **given),
    ]
    nodes += [] if added is None else [helper.make_node("Add", ["m", "a"], ["y"])]
    shape = [2, weight.shape[1], 5, 6] if op == "Conv" else [2, weight.shape[0 if op == "MatMul" else 1]]
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def replaced(model: onnx.ModelProto) -> Mapping[str, Any]:
    """The operation that is left, as its name, arrays and attributes."""
    found = rewritten(model, one_bit_kernels)
    assert len(found.graph.node) == 1
    (node,) = found.graph.node
    arrays = {one.name: numpy_helper.to_array(one) for one in found.graph.initializer}
    assert [value.name for value in found.graph.output] == list(node.output) == ["y"]
    assert node.input[0] == "x"
    return {
        "op": (node.domain, node.op_type),
        **{key: arrays[name] for key, name in zip(("bits", "scale", "shift"), node.input[1:], strict=True)},
        **{one.name: helper.get_attribute_value(one) for one in node.attribute},
    }


RNG = np.random.default_rng(0)
CONV, MATRIX = np.sign(RNG.normal(size=(3, 11, 3, 2))), np.sign(RNG.normal(size=(3, 11)))


def unpacked(bits: np.ndarray, channels: int) -> np.ndarray:
    return np.unpackbits(bits, axis=-1, bitorder="little")[..., :channels].astype(int) * 2 - 1


def test_a_convolution() -> None:
    bias, scale = RNG.normal(size=3), RNG.random(3)
    got = replaced(graph("Conv", CONV, scale, bias=bias, strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2]))
    assert got["op"] == ("bitsmith", "BinaryConv")
    assert (got["channels"], got["kernel"], got["strides"]) == (11, [3, 2], [2, 1])
    assert (got["pads"], got["dilations"]) == ([1, 0, 2, 1], [1, 2])
    assert got["bits"].shape == (3, 6, 2)
    np.testing.assert_array_equal(unpacked(got["bits"], 11), np.moveaxis(CONV, 1, -1).reshape(3, 6, 11))
    np.testing.assert_array_equal(got["scale"], scale.astype(np.float32))
    np.testing.assert_array_equal(got["shift"], bias.astype(np.float32))


@pytest.mark.parametrize("form", ["Gemm", "transposed Gemm", "MatMul"])
def test_a_linear_layer(form: str) -> None:
    bias, scale = RNG.normal(size=3), RNG.random(3)
    if form == "transposed Gemm":
        model = graph("Gemm", MATRIX, scale, bias=bias, transB=1)
    elif form == "Gemm":
        model = graph("Gemm", MATRIX.T, scale, bias=bias, axis=1)
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 11
    else:
        model = graph("MatMul", MATRIX.T, scale, axis=1, added=bias)
    got = replaced(model)
    assert got["op"] == ("bitsmith", "BinaryLinear")
    assert got["channels"] == 11
    np.testing.assert_array_equal(unpacked(got["bits"], 11), MATRIX)
    np.testing.assert_array_equal(got["scale"], scale.astype(np.float32))
    np.testing.assert_array_equal(got["shift"], bias.astype(np.float32))


def test_one_scale_and_no_bias() -> None:
    got = replaced(graph("Conv", CONV, 0.25))
    np.testing.assert_array_equal(got["scale"], np.full(3, 0.25, np.float32))
    np.testing.assert_array_equal(got["shift"], np.zeros(3, np.float32))
    assert (got["strides"], got["pads"], got["dilations"]) == ([1, 1], [0, 0, 0, 0], [1, 1])


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "levels": (graph("Conv", 2 * CONV), "others than -1 and"),
    "zeros": (graph("Conv", CONV * (RNG.random(CONV.shape) > 0.5)), "others than -1 and"),
    "zero point": (graph("Conv", CONV, zero=1), "others than -1 and"),
    "scales by input": (graph("Conv", CONV, RNG.random(11), axis=1), "no scale by output channel"),
    "groups": (graph("Conv", np.concatenate([CONV, CONV[:1]])[:, :5], group=2), "2 groups"),
    "three axes": (graph("Conv", CONV[..., None]), "over 3 axes"),
    "padding": (graph("Conv", CONV, auto_pad="SAME_UPPER"), "SAME_UPPER"),
    "alpha": (graph("Gemm", MATRIX, transB=1, alpha=0.5), "multiplied by a number"),
    "transposed": (graph("Gemm", MATRIX, transB=1, transA=1), "transposed"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_kernel_does_not_compute_stays(why: str) -> None:
    model, says = REFUSED[why]
    node = next(node for node in ir.from_proto(model).graph if node.name == "layer")
    verdict = signed(node)
    assert isinstance(verdict, No)
    assert says in str(verdict)
    left = rewritten(model, one_bit_kernels)
    assert [node.op_type for node in left.graph.node] == [node.op_type for node in model.graph.node]


def test_values_of_two_levels_that_are_no_signs_stay() -> None:
    model = graph("Conv", CONV, high=2.0)
    node = next(node for node in ir.from_proto(model).graph if node.name == "layer")
    assert before_sign(node.inputs[0]) is None
    assert isinstance(signed(node), No)
    assert len(rewritten(model, one_bit_kernels).graph.node) == 4


def test_what_is_added_stays_where_it_is_no_bias() -> None:
    found = rewritten(graph("MatMul", MATRIX.T, axis=1, added=RNG.normal(size=(2, 3))), one_bit_kernels)
    assert [node.op_type for node in found.graph.node] == ["BinaryLinear", "Add"]
