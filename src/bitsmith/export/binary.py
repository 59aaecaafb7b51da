"""Layers of signs in a graph replaced by the operations of ``bitsmith-kernels`` that multiply signs by signs.

``Where(x >= 0, 1, -1) -> Conv, Gemm or MatMul`` with weights that are ``Dequantize(-1 and +1)`` becomes one node,
whoever made the graph: floats in and out, in the layout of the graph, weights of one bit. It computes the exact sum of
signs, times the weights' scale and plus the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..technique import No
from .rewrite import DEQUANTIZE, Array, constant, initializer, replace
from .translations import DOMAIN
from .winograd import name_of

if TYPE_CHECKING:
    import onnx_ir as ir

CONVOLUTION, LINEAR = "BinaryConv", "BinaryLinear"
MOST_PRODUCTS = 2**24
"""To a sum: float32 holds every integer up to there."""


@dataclass(frozen=True)
class Signed:
    """A layer that the kernel computes. ``x``: before its sign. ``bits``: uint8 [K, taps, ceil(C / 8)] of a convolution
    and [K, ceil(C / 8)] of a linear layer, the lowest bit first. ``scale``, ``shift``: float32 [K]. ``end``: what it
    gives.
    """

    x: ir.Value
    channels: int
    kernel: tuple[int, ...]
    bits: Array
    scale: Array
    shift: Array
    end: ir.Value


def one_bit_kernels(graph: ir.Graph) -> None:
    """The pass that gives every layer of signs its kernel; what the kernel does not compute stays as it is."""
    for node in list(graph):
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain or before_sign(node.inputs[0]) is None:
            continue
        found = signed(node)
        if not isinstance(found, No):
            _put(graph, node, found)


def before_sign(value: ir.Value | None) -> ir.Value | None:
    """What a value is the sign of; None if it is no sign."""
    where = value.producer() if value is not None else None
    if where is None or where.op_type != "Where" or [_scalar(one) for one in where.inputs[1:]] != [1.0, -1.0]:
        return None
    test = where.inputs[0].producer() if where.inputs[0] is not None else None
    if test is None or test.op_type != "GreaterOrEqual" or _scalar(test.inputs[1]) != 0.0:
        return None
    return test.inputs[0]


def signed(node: ir.Node) -> Signed | No:
    """What the kernel would compute in the place of a convolution or a matrix product, or why it cannot."""
    x = before_sign(node.inputs[0])
    if x is None:
        return No("its input is no sign")
    weight = _weight(node)
    if isinstance(weight, No):
        return weight
    bits, scale = weight
    if np.prod(bits.shape[1:]) > MOST_PRODUCTS:
        return No(f"{np.prod(bits.shape[1:])} products to a sum: float32 holds integers up to 2^24")
    if node.op_type == "Conv":
        refusal = _shape_refusal(node, bits.ndim)
        if refusal is not None:
            return refusal
    bias, end = _bias(node)
    shift = np.zeros(len(bits), np.float32) if bias is None else np.broadcast_to(bias, (len(bits),))
    packed = np.packbits(np.moveaxis(bits > 0, 1, -1).reshape(len(bits), -1, bits.shape[1]), axis=-1, bitorder="little")
    packed = packed if node.op_type == "Conv" else packed[:, 0]
    return Signed(x, bits.shape[1], bits.shape[2:], packed, np.broadcast_to(scale, (len(bits),)), shift, end)


def _weight(node: ir.Node) -> tuple[Array, Array] | No:
    """-1 and +1 [K, C, ...] and their scale, float32 [K] or ()."""
    value = node.inputs[1]
    made = value.producer() if value is not None else None
    if made is None or made.op_type != DEQUANTIZE:
        return No("its weights are no integers with a scale")
    integers, scale = constant(made.inputs[0]), constant(made.inputs[1])
    zero = constant(made.inputs[2]) if len(made.inputs) > 2 else np.zeros(())
    if integers is None or scale is None or zero is None or made.attributes.get_int("block_size", 0) > 0:
        return No("its weights are no constants with one scale or one by output channel")
    values = integers.astype(np.int32)
    if (zero.astype(np.int32) != 0).any() or (np.abs(values) != 1).any():
        return No("its weights are others than -1 and +1")
    if node.op_type == "Gemm" and any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return No("its product is multiplied by a number")
    last = node.op_type == "MatMul" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 0)
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0:
        return No("its input is transposed")
    if last and values.ndim != 2:
        return No("its weights have more than two axes")
    axis = made.attributes.get_int("axis", 1) % values.ndim
    if scale.size > 1 and axis != (1 if last else 0):
        return No("its weights have no scale by output channel")
    return values.T if last else values, scale.astype(np.float32).reshape(-1 if scale.size > 1 else ())


def _shape_refusal(node: ir.Node, rank: int) -> No | None:
    if rank != 4:
        return No(f"it is a convolution over {rank - 2} axes: there is a kernel for two")
    if node.attributes.get_int("group", 1) != 1:
        return No(f"{node.attributes.get_int('group', 1)} groups: there is a kernel for one")
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return No(f"its padding is {node.attributes.get_string('auto_pad', '')}: only sizes are read")
    return None


def _bias(node: ir.Node) -> tuple[Array | None, ir.Value]:
    """What is added by output channel, and the value behind it; a bias that is no constant stays an addition."""
    end = node.outputs[0]
    if node.op_type != "MatMul":
        given = node.inputs[2] if len(node.inputs) > 2 else None
        return (None if given is None else constant(given)), end
    uses = list(end.uses())
    reader = uses[0].node if len(uses) == 1 and not end.is_graph_output() else None
    if reader is None or reader.op_type != "Add":
        return None, end
    found = next((constant(value) for value in reader.inputs if value is not end), None)
    if found is None or found.ndim > 1:
        return None, end
    return found, reader.outputs[0]


def _put(graph: ir.Graph, node: ir.Node, what: Signed) -> None:
    import onnx_ir as ir

    name = name_of(node)
    inputs = [what.x]
    for suffix, array in (("bits", what.bits), ("scale", what.scale), ("shift", what.shift)):
        inputs.append(initializer(graph, f"{name}.binary.{suffix}", np.ascontiguousarray(array)))
    given: dict[str, int | list[int]] = {"channels": what.channels}
    if node.op_type == "Conv":
        given |= {
            "kernel": list(what.kernel),
            # OpenVINO's reader has no defaults: every attribute stands in every node
            "strides": list(node.attributes.get_ints("strides", [1, 1])),
            "dilations": list(node.attributes.get_ints("dilations", [1, 1])),
            "pads": list(node.attributes.get_ints("pads", [0] * 4)),
        }
    kind = CONVOLUTION if node.op_type == "Conv" else LINEAR
    made = ir.node(kind, inputs, given, domain=DOMAIN, name=f"{name}.Binary")
    made.metadata_props.update(node.metadata_props)
    out = made.outputs[0]
    out.name, out.type, out.shape = f"{name}.binary", what.end.type, what.end.shape
    last = what.end.producer()
    assert last is not None
    graph.insert_before(last, made)
    replace(what.end, out)
    graph.opset_imports.setdefault(DOMAIN, 1)


def _scalar(value: ir.Value | None) -> float | None:
    array = constant(value)
    return float(array.item()) if array is not None and array.size == 1 else None
