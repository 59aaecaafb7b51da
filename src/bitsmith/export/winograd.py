"""Integer 3x3 convolutions of a graph replaced by the Winograd operation of ``bitsmith-kernels``.

``Dequantize -> Conv or Winograd -> [Quantize -> Dequantize] -> [Add(Dequantize)] -> [Relu or Clip] -> Quantize``
becomes one node, whoever made the graph: 8-bit integers in NHWC in, the same out. Around it stand
``Quantize, Transpose`` and ``Dequantize, Transpose``, in that order, which OpenVINO turns into a layout and not into a
copy; with ``Transpose, Dequantize`` the next convolution would silently run in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import TYPE_CHECKING

import numpy as np

from ..numerics.winograd import CHANNELS
from ..technique import No
from .onnx import GIVES, origin_of
from .rewrite import (
    DEQUANTIZE,
    QUANTIZE,
    Array,
    attributes,
    bounds,
    constant,
    initializer,
    pads_zeros,
    replace,
    replacement,
    same_parameters,
)
from .translations import DOMAIN, WINOGRAD

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATION = "WinogradConv"
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
_MOVING = frozenset({"MaxPool", "Slice", "Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Gather"})


@dataclass(frozen=True)
class Levels:
    """An 8-bit tensor of the graph, and what its integers stand for: ``(q - zero) * scale``. ``grid``: where ``value``
    is floating, picked or moved from such integers, the node that dequantized them."""

    value: ir.Value
    scale: float
    zero: int
    signed: bool
    grid: ir.Node | None = None


@dataclass(frozen=True)
class Packed:
    """What the kernel reads of one layer: ``u`` [P, K, C] int8 or int16, ``mul`` int16 [P, C], ``offset`` int16 [C],
    ``us`` float32 [P, K]."""

    tile: int
    bits: int
    u: Array
    mul: Array
    offset: Array
    us: Array


@dataclass(frozen=True)
class Candidate:
    """A convolution with all that the kernel computes along with it.

    ``weight`` float64 [K, C, 3, 3], as the graph's integers stand for them, or what the technique ``packed`` already.
    ``bias`` float32 [K]. ``pads``: top, left, bottom, right. ``end``: the quantizer behind; its integers lie in ``low``
    to ``high``.
    """

    node: ir.Node
    x: Levels
    weight: Array | Packed
    bias: Array
    pads: tuple[int, int, int, int]
    residual: Levels | None
    end: ir.Node
    y: Levels
    low: int
    high: int

    @property
    def name(self) -> str:
        return name_of(self.node)


def name_of(node: ir.Node) -> str:
    """The node's name, or that of its output where it has none."""
    return str(node.name or node.outputs[0].name)


def convolutions(graph: ir.Graph) -> Iterator[tuple[ir.Node, Candidate | No]]:
    """Every convolution of the graph, and what the kernel would compute of it or why it cannot."""
    for node in graph:
        if (node.domain, node.op_type) in (("", "Conv"), (DOMAIN, WINOGRAD)):
            yield node, candidate(node)


def candidate(node: ir.Node) -> Candidate | No:
    """What the kernel would compute in the place of a convolution and of what follows, or why it cannot."""
    x = levels(node.inputs[0])
    own = _transformed(node) if node.op_type == WINOGRAD else _ordinary(node)
    if isinstance(own, No):
        return own
    if x is None:
        return No("its input is no 8-bit tensor with one scale")
    behind = _behind(node)
    if isinstance(behind, No):
        return behind
    residual, end, low, high = behind
    y = _levels_of(end.outputs[0], end)
    if y is None:
        return No("its output is quantized to no 8-bit tensor with one scale")
    top, left, bottom, right = node.attributes.get_ints("pads", [0] * 4)
    weight, bias = own
    pads = (top, left, bottom, right)
    return Candidate(node, x, weight, bias, pads, residual, end, y, _level(low, y), _level(high, y))


def _transformed(node: ir.Node) -> tuple[Packed, Array] | No:
    """What a node of the technique holds."""
    if list(node.attributes.get_ints("kernel", [])) != [3, 3]:
        return No("its kernel is no 3x3: there is no native kernel for those")
    u, mul, offset, us, bias = (constant(value) for value in node.inputs[1:6])
    if u is None or mul is None or offset is None or us is None or bias is None:
        return No("its weights are no constants")
    return Packed(node.attributes.get_int("tile", 0), node.attributes.get_int("bits", 0), u, mul, offset, us), bias


def _ordinary(node: ir.Node) -> tuple[Array, Array] | No:
    """Weights and bias of a convolution that Winograd's algorithm can compute."""
    refusal = _shape_refusal(node)
    if refusal is not None:
        return refusal
    weight = dequantized(node.inputs[1])
    if weight is None:
        return No("its weights are no constants")
    if weight.shape[2:] != (3, 3):
        return No(f"its kernel is {'x'.join(map(str, weight.shape[2:]))}, not 3x3")
    if weight.shape[1] > CHANNELS[16]:
        return No(
            f"{weight.shape[1]} input channels: a 32-bit accumulator has room for {CHANNELS[16]} products of taps"
        )
    bias = dequantized(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
    if bias is None:
        return No("its bias is no constant")
    return weight.astype(np.float64), np.broadcast_to(bias.astype(np.float32), (weight.shape[0],)).copy()


def _level(bound: float, y: Levels) -> int:
    """The integer that a bound is quantized to: quantizing is monotone, so clipping may come behind it."""
    limits = np.iinfo(np.int8 if y.signed else np.uint8)
    steps = np.rint(np.clip(np.float32(bound) * (np.float32(1) / np.float32(y.scale)), -512, 512))
    return int(np.clip(steps + y.zero, limits.min, limits.max))


def _shape_refusal(node: ir.Node) -> No | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or len(shape) != 4:
        return No("it is no convolution over two axes")
    given = node.attributes
    if given.get_string("auto_pad", "NOTSET") != "NOTSET":
        return No(f"its padding is {given.get_string('auto_pad', '')}: only sizes are read")
    for name, why in (("strides", "tiles overlap by a stride of 1"), ("dilations", "weights stand side by side")):
        sizes = list(given.get_ints(name, [1, 1]))
        if sizes != [1, 1]:
            return No(f"{name[:-1]} {'x'.join(map(str, sizes))}: Winograd's {why}")
    if given.get_int("group", 1) != 1:
        return No(f"{given.get_int('group', 1)} groups: the sum over channels is what the kernel is fast at")
    if max(given.get_ints("pads", [0] * 4)) > 2:
        return No("it pads more than 2 on a side")
    return None


Behind = tuple[Levels | None, "ir.Node", float, float]


def _behind(node: ir.Node) -> Behind | No:
    """What follows a convolution up to the quantizer of its integers: residual, quantizer, bounds of the value."""
    first = _only(node.outputs[0])
    if first is None or first.op_type != QUANTIZE:
        return _fused(node.outputs[0])
    inner = _only(first.outputs[0])
    if node.op_type != WINOGRAD and inner is not None and inner.op_type == DEQUANTIZE and same_parameters(first, inner):
        # rounded once more before a sum: left out where no plan says so, as the sum is nearer to float without
        add = _only(inner.outputs[0])
        found = _fused(inner.outputs[0]) if add is not None and add.op_type == "Add" else None
        if isinstance(found, tuple):
            return found
    return None, first, -np.inf, np.inf


def _fused(value: ir.Value) -> Behind | No:
    """The same from a value on: a sum, an activation, a quantizer."""
    reader, residual = _only(value), None
    if reader is not None and reader.op_type == "Add":
        other = next((v for v in reader.inputs if v is not value), None)
        residual = levels(other)
        if residual is None:
            return No("what is added behind it is no 8-bit tensor with one scale")
        if other is not None and value.shape is not None and other.shape is not None and other.shape != value.shape:
            return No("what is added behind it has another shape")
        value, reader = reader.outputs[0], _only(reader.outputs[0])
    low, high = -np.inf, np.inf
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        limits = bounds(reader)
        if limits[0] is None or limits[1] is None:
            return No("it is clipped at limits that are no constants")
        low, high, reader = limits[0], limits[1], _only(reader.outputs[0])
    if reader is None:
        return No("its output is read as it is, or more than once: the kernel gives 8-bit integers only")
    if reader.op_type != QUANTIZE:
        return No(f"{reader.op_type} reads its output: the kernel gives 8-bit integers only")
    return residual, reader, low, high


def _only(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def levels(value: ir.Value | None) -> Levels | None:
    """The 8-bit tensor behind a dequantized value, if it has one scale and is no constant.

    What only picks or moves dequantized integers gives such integers again: quantized anew, they are exact.
    """
    node = value.producer() if value is not None else None
    moved = node is not None and node.op_type != DEQUANTIZE
    while node is not None and node.op_type in _MOVING and (node.op_type != "Pad" or pads_zeros(node)):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != DEQUANTIZE or node.inputs[0] is None or constant(node.inputs[0]) is not None:
        return None
    found = _levels_of(node.inputs[0], node)
    return replace_fields(found, value=value, grid=node) if found is not None and value is not None and moved else found


def _levels_of(integers: ir.Value, node: ir.Node) -> Levels | None:
    """What integers stand for by the parameters of the node that makes or reads them."""
    scale, zero = constant(node.inputs[1]), _zero_point(node, integers)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype not in (np.uint8, np.int8):
        return None
    return Levels(integers, float(scale.item()), int(zero.item()), zero.dtype == np.int8)


def _zero_point(node: ir.Node, integers: ir.Value | None) -> Array | None:
    """A constant of the integers' type; without one of its own it is 0 of the type that the integers have, and a
    quantizer that does not say makes unsigned ones. None: not known."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return constant(node.inputs[2])
    if integers is not None and integers.dtype is not None:
        return np.zeros((), integers.dtype.numpy())
    return np.zeros((), np.uint8) if node.op_type == QUANTIZE else None


def dequantized(value: ir.Value | None) -> Array | None:
    """What a constant stands for: an array as it is, or the integers of a DequantizeLinear, times their scales.

    Weights that are quantized in the graph (Quantize, Dequantize of a float constant) are folded.
    """
    found = constant(value)
    if found is not None:
        return found
    node = value.producer() if value is not None else None
    if node is None or node.op_type != DEQUANTIZE:
        return None
    scale, zero, integers = constant(node.inputs[1]), _zero_point(node, node.inputs[0]), constant(node.inputs[0])
    if scale is None or zero is None or node.attributes.get_int("block_size", 0) > 0:
        return None
    if integers is None:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        source = constant(inner.inputs[0]) if inner is not None and inner.op_type == QUANTIZE else None
        if source is None or inner is None or not same_parameters(inner, node):
            return None
        limits = np.iinfo(zero.dtype)
        steps = source.astype(np.float32) / _along(scale, source, node)
        integers = np.clip(np.rint(steps) + _along(zero, source, node).astype(np.float64), limits.min, limits.max)
    exact = integers.astype(np.float64) - _along(zero, integers, node)
    return np.asarray(exact * _along(scale, integers, node).astype(np.float64))


def _along(parameter: Array, array: Array, node: ir.Node) -> Array:
    """One parameter for each entry of the axis, in the array's rank."""
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * array.ndim
    shape[node.attributes.get_int("axis", 1) % array.ndim] = -1
    return parameter.reshape(shape)


# -- the other way round -----------------------------------------------------------------------------------------------


def own_kernels(graph: ir.Graph) -> None:
    """The pass that gives every convolution of the technique its kernel. Raises ``ValueError`` where it cannot."""
    with_kernels([name_of(node) for node in graph if (node.domain, node.op_type) == (DOMAIN, WINOGRAD)])(graph)


def with_kernels(
    chosen: Sequence[str], pack: Callable[[Candidate], Packed] | None = None
) -> Callable[[ir.Graph], None]:
    """The pass that puts the kernel in the place of the convolutions of these names. Raises ``ValueError`` for one that
    cannot be replaced. ``pack``: the taps of ordinary convolutions."""

    def rewrite(graph: ir.Graph) -> None:
        nodes = {name_of(node): node for node, _ in convolutions(graph)}
        for name in chosen:
            # looked at anew each time: what was replaced before gives other values
            what = candidate(nodes[name]) if name in nodes else No("the graph has no such convolution")
            if isinstance(what, No):
                raise ValueError(f"{name} cannot be computed by the Winograd kernel: {what}")
            packed = what.weight if isinstance(what.weight, Packed) else pack(what) if pack is not None else None
            if packed is None:
                raise ValueError(f"{name}: nothing says how its weights are transformed")
            _put(graph, what, packed)
        join_layouts(graph)

    return rewrite


def _put(graph: ir.Graph, what: Candidate, packed: Packed) -> None:
    """Insert the operation before the quantizer that it takes in; its readers read the operation's integers."""
    import onnx_ir as ir

    end, name = what.end, what.name
    inputs = [_turned(graph, end, _integers(graph, end, what.x), NHWC)]
    arrays = {suffix: getattr(packed, suffix) for suffix in ("u", "mul", "offset", "us")}
    for suffix, array in (arrays | {"bias": what.bias}).items():
        inputs.append(initializer(graph, f"{name}.winograd.{suffix}", np.ascontiguousarray(array)))
    if what.residual is not None:
        inputs.append(_turned(graph, end, _integers(graph, end, what.residual), NHWC))
    residual = what.residual
    made = ir.node(
        OPERATION,
        inputs,
        # OpenVINO's reader has no defaults: every attribute stands in every node
        {
            "tile": packed.tile,
            "bits": packed.bits,
            "pads": list(what.pads),
            "x_zero": what.x.zero,
            "y_scale": what.y.scale,
            "y_zero": what.y.zero,
            "y_signed": int(what.y.signed),
            "low": what.low,
            "high": what.high,
            "residual_scale": residual.scale if residual is not None else 1.0,
            "residual_zero": residual.zero if residual is not None else 0,
        },
        domain=DOMAIN,
        name=f"{name}.Winograd",
    )
    made.metadata_props.update(what.node.metadata_props)
    if tensor := origin_of(end.metadata_props).tensor:
        made.metadata_props[GIVES] = tensor
    out = made.outputs[0]
    integers = end.outputs[0]
    out.name, out.type = f"{integers.name}.nhwc", integers.type
    out.shape = _permuted(integers.shape, NHWC)
    graph.insert_before(end, made)
    replace(integers, _turned(graph, end, out, NCHW, like=integers))
    graph.opset_imports.setdefault(DOMAIN, 1)


def _integers(graph: ir.Graph, before: ir.Node, what: Levels) -> ir.Value:
    """The integers, quantized again where the graph has floating ones only."""
    import onnx_ir as ir

    if what.grid is None:
        return what.value
    made = ir.node(QUANTIZE, [what.value, *what.grid.inputs[1:]], name=f"{before.name}/{what.value.name}.again")
    out = made.outputs[0]
    out.name, out.shape = f"{made.name}.value", what.value.shape
    out.type = ir.TensorType(ir.DataType.INT8 if what.signed else ir.DataType.UINT8)
    graph.insert_before(before, made)
    return out


def _turned(
    graph: ir.Graph, before: ir.Node, value: ir.Value, order: list[int], like: ir.Value | None = None
) -> ir.Value:
    """The value in another layout."""
    import onnx_ir as ir

    layout = "nhwc" if order == NHWC else "nchw"
    turn = ir.node("Transpose", [value], {"perm": order}, name=f"{before.name}/{value.name}.{layout}")
    out = turn.outputs[0]
    out.name, out.type = f"{turn.name}.value", value.type
    out.shape = _permuted(value.shape, order) if like is None else like.shape
    graph.insert_before(before, turn)
    return out


def _permuted(shape: ir.Shape | None, order: list[int]) -> ir.Shape | None:
    import onnx_ir as ir

    return None if shape is None else ir.Shape([shape[k] for k in order])


def join_layouts(graph: ir.Graph) -> None:
    """Operations behind one another hand on NHWC; what else reads their integers dequantizes before it transposes."""
    import onnx_ir as ir

    turned: dict[tuple[int, tuple[int, ...]], ir.Node] = {}
    for node in list(graph):
        if node.op_type != "Transpose" or node.inputs[0] is None:
            continue
        order = tuple(node.attributes.get_ints("perm", ()))
        source = node.inputs[0].producer()
        if order == tuple(NHWC) and source is not None and _made(source) and source.inputs[0] is not None:
            replace(node.outputs[0], source.inputs[0])
            continue
        twin = turned.setdefault((id(node.inputs[0]), order), node)
        if twin is not node:
            replace(node.outputs[0], twin.outputs[0])
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == DEQUANTIZE and node.inputs[0] is not None else None
        if source is None or not _made(source):
            continue
        inner = replacement(DEQUANTIZE, [source.inputs[0], *node.inputs[1:]], node, attributes(node))
        inner.outputs[0].shape = source.inputs[0].shape if source.inputs[0] is not None else None
        turn = ir.node("Transpose", [inner.outputs[0]], {"perm": NCHW}, name=f"{node.name}.nchw")
        turn.metadata_props.update(node.metadata_props)
        turn.outputs[0].name = f"{node.outputs[0].name}.nchw"
        turn.outputs[0].type, turn.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, [inner, turn])
        replace(node.outputs[0], turn.outputs[0])


def _made(turn: ir.Node) -> bool:
    """Whether it is the transpose behind an operation."""
    before = turn.inputs[0].producer() if turn.op_type == "Transpose" and turn.inputs[0] is not None else None
    return before is not None and before.domain == DOMAIN and before.op_type == OPERATION
