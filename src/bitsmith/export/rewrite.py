"""Rewritings of an exported ONNX graph that preserve every value. Each changes the graph it is given, which is ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Array = np.ndarray[Any, Any]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def rewritten(model: onnx.ModelProto, *passes: Callable[[ir.Graph], None]) -> onnx.ModelProto:
    """A copy of the model after the passes, in order, without what became unused."""
    import onnx_ir as ir

    copy = ir.from_proto(model)
    for rewrite in passes:
        rewrite(copy.graph)
        remove_unused(copy.graph)
    return ir.to_proto(copy)


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer or a Constant node; None for anything else."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    array: Array = value.const_value.numpy()
    return array


def initializer(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer; an existing name gets a number."""
    import onnx_ir as ir

    taken = set(graph.initializers) | {v.name for node in graph for v in node.outputs} | {v.name for v in graph.inputs}
    unique, k = name, 0
    while unique in taken:
        k += 1
        unique = f"{name}.{k}"
    tensor = ir.Tensor(array, dtype=dtype, name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace(old: ir.Value, new: ir.Value) -> bool:
    """Let all readers of ``old`` read ``new``; a graph output keeps its name.

    False, and nothing done, if ``old`` is a graph output and ``new`` cannot take its name (input, initializer, output).
    """
    node = old.producer()
    if old.is_graph_output():
        if node is None or node.graph is None or new.producer() is None or new.is_graph_output():
            return False
        outputs, name = node.graph.outputs, old.name
        old.name, new.name = f"{name}.replaced", name
        for index, value in enumerate(outputs):
            if value is old:
                outputs[index] = new
    old.replace_all_uses_with(new)
    return True


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def same_parameters(a: ir.Node, b: ir.Node) -> bool:
    """Whether two quantizing or dequantizing nodes have equal constant parameters, axis and block size."""
    if attributes(a) != attributes(b) or len(a.inputs) != len(b.inputs):
        return False
    for left, right in zip(a.inputs[1:], b.inputs[1:], strict=True):
        if left is right:
            continue
        first, second = constant(left), constant(right)
        if first is None or second is None or first.dtype != second.dtype or not np.array_equal(first, second):
            return False
    return True


def merge_duplicates(graph: ir.Graph) -> None:
    """Quantize and dequantize a value once per set of parameters, however many cells read it."""
    seen: dict[tuple[int, str], list[ir.Node]] = {}
    for node in list(graph):
        if node.op_type not in (QUANTIZE, DEQUANTIZE, "Clip"):
            continue
        alike = seen.setdefault((id(node.inputs[0]), node.op_type), [])
        twin = next((other for other in alike if same_parameters(other, node)), None)
        if twin is None or not replace(node.outputs[0], twin.outputs[0]):
            alike.append(node)


def merge_requantization(graph: ir.Graph) -> None:
    """``Quantize(Dequantize(q))`` with equal parameters is ``q``: (q - z) s / s rounds to q - z for up to 16 bits."""
    for node in list(graph):
        if node.op_type != QUANTIZE:
            continue
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is not None and inner.op_type == DEQUANTIZE and same_parameters(inner, node):
            replace(node.outputs[0], inner.inputs[0])  # type: ignore[arg-type]


def fold_zero_padding(graph: ir.Graph) -> None:
    """``Pad`` with zeros before a convolution or a mean becomes part of its ``pads``.

    Exact behind and before a quantizer, for zero is one of its values; a padded quantizer gets a twin that is not.
    """
    import onnx_ir as ir

    for node in list(graph):
        while (found := _padded_input(node)) is not None:
            pad, quantizers = found
            sizes = _spatial_pads(pad, node)
            source = pad.inputs[0]
            if sizes is None or source is None:
                break
            value = source
            for quantizer in quantizers:
                twin = replacement(quantizer.op_type, [value, *quantizer.inputs[1:]], quantizer, attributes(quantizer))
                twin.outputs[0].shape = source.shape
                graph.insert_before(node, twin)
                value = twin.outputs[0]
            own = node.attributes.get_ints("pads", [0] * len(sizes))
            node.attributes.add(ir.AttrInt64s("pads", [a + b for a, b in zip(own, sizes, strict=True)]))
            if node.op_type == "AveragePool":
                node.attributes.add(ir.AttrInt64("count_include_pad", 1))
            node.replace_input_with(0, value)


def _padded_input(node: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """The ``Pad`` that a window operation reads, and the quantizing nodes in between, in order."""
    if node.op_type not in ("Conv", "AveragePool") or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    between: list[ir.Node] = []
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    while before is not None and before.op_type in (QUANTIZE, DEQUANTIZE, "Clip"):
        between.insert(0, before)
        before = before.inputs[0].producer() if before.inputs[0] is not None else None
    if before is None or before.op_type != "Pad" or not _keep_zero(between):
        return None
    return before, between


def _keep_zero(quantizers: list[ir.Node]) -> bool:
    """Whether nothing but whole quantizers lies there, which may clip their integers but not the zero point."""
    zero: Array | None = None
    for node in quantizers:
        if node.op_type == QUANTIZE and zero is None:
            zero = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), dtype=np.uint8)
            if zero is None:
                return False
        elif zero is None:
            return False
        elif node.op_type == DEQUANTIZE:
            back = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), dtype=np.uint8)
            if back is None or not np.array_equal(zero, back):
                return False
            zero = None
        else:
            low, high = bounds(node)
            if low is None or high is None or bool((zero < low).any() or (zero > high).any()):
                return False
    return zero is None


def pads_zeros(pad: ir.Node) -> bool:
    """Whether a Pad of floats surrounds its input with zeros."""
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    value = constant(fill)
    zeros = fill is None or (value is not None and not value.any())
    return zeros and pad.attributes.get_string("mode", "constant") == "constant"


def _spatial_pads(pad: ir.Node, node: ir.Node) -> list[int] | None:
    """The sizes of a Pad as the attribute of ``node``; None if they are not zeros around the spatial axes only."""
    source, sizes = pad.inputs[0], constant(pad.inputs[1])
    if not pads_zeros(pad) or sizes is None or source is None or source.shape is None:
        return None
    rank = len(source.shape)
    given = constant(pad.inputs[3]) if len(pad.inputs) > 3 else None
    if given is None and len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return None
    axes = range(rank) if given is None else [int(axis) % rank for axis in given]
    before, after = [0] * rank, [0] * rank
    for axis, first, last in zip(axes, sizes[: len(axes)], sizes[len(axes) :], strict=True):
        before[axis], after[axis] = int(first), int(last)
    if any((*before[:2], *after[:2])) or min((*before, *after)) < 0:
        return None
    found = [*before[2:], *after[2:]]
    if node.op_type == "AveragePool" and not _counts(node, found):
        return None
    return found


def _counts(pool: ir.Node, sizes: list[int]) -> bool:
    """Whether a mean over padded windows divides as over given zeros, within what ONNX Runtime takes."""
    own = list(pool.attributes.get_ints("pads", [0] * len(sizes)))
    kernel = pool.attributes.get_ints("kernel_shape", ())
    if pool.attributes.get_int("ceil_mode", 0) or (any(own) and not pool.attributes.get_int("count_include_pad", 0)):
        return False
    return all(a + b < size for a, b, size in zip(own, sizes, (*kernel, *kernel), strict=True))


def drop_identity_gathers(graph: ir.Graph) -> None:
    """``Reshape to one axis -> Gather`` of all elements in order: the ``as_strided`` that torch puts behind a mean of a
    tensor whose channels lie last. It becomes nothing, or a Reshape where the shape changes."""
    for node in list(graph):
        indices = constant(node.inputs[1]) if node.op_type == "Gather" and node.inputs[0] is not None else None
        flat = node.inputs[0].producer() if indices is not None and node.inputs[0] is not None else None
        if indices is None or flat is None or flat.op_type != "Reshape" or flat.inputs[0] is None:
            continue
        source, shape = flat.inputs[0], constant(flat.inputs[1])
        if shape is None or shape.size != 1 or source.shape is None or not source.shape.is_static():
            continue
        sizes = tuple(source.shape.numpy())
        if math.prod(sizes) != indices.size or not np.array_equal(indices.ravel(), np.arange(indices.size)):
            continue
        if sizes == indices.shape and replace(node.outputs[0], source):
            continue
        target = initializer(graph, f"{node.name}.shape", np.array(indices.shape, dtype=np.int64))
        made = replacement("Reshape", [source, target], node)
        graph.insert_before(node, made)
        replace(node.outputs[0], made.outputs[0])


def fold_weight_transposes(graph: ir.Graph) -> None:
    """``Transpose(Dequantize(W))`` of a constant 2-D weight becomes ``Dequantize(W^T)`` with the axis moved."""
    for node in list(graph):
        if node.op_type != "Transpose" or node.inputs[0] is None:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != DEQUANTIZE:
            continue
        weight = constant(inner.inputs[0])
        if weight is None or weight.ndim != 2 or list(node.attributes.get_ints("perm", (1, 0))) != [1, 0]:
            continue
        source: ir.Value = inner.inputs[0]  # type: ignore[assignment]
        turned = initializer(graph, f"{source.name}.T", np.ascontiguousarray(weight.T), source.dtype)
        parameters: list[ir.Value | None] = []
        for value in inner.inputs[1:]:
            array = constant(value)
            if value is not None and array is not None and array.ndim == 2:
                value = initializer(graph, f"{value.name}.T", np.ascontiguousarray(array.T), value.dtype)
            parameters.append(value)
        given = attributes(inner)
        axis = given.get("axis", 1) % 2
        made = replacement(DEQUANTIZE, [turned, *parameters], node, {**given, "axis": 1 - axis})
        graph.insert_before(node, made)
        replace(node.outputs[0], made.outputs[0])


def fold_casts(graph: ir.Graph) -> None:
    """``Cast`` of a constant to 8 bits becomes a constant: the exporter leaves a large table's zero points int64."""
    import onnx_ir as ir

    for node in list(graph):
        array = constant(node.inputs[0]) if node.op_type == "Cast" else None
        if array is None or node.outputs[0].is_graph_output():
            continue
        dtype = ir.DataType(node.attributes.get_int("to", 1))
        if dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            node.outputs[0].replace_all_uses_with(initializer(graph, f"{node.name}.cast", array.astype(dtype.numpy())))


def look_up_integers(graph: ir.Graph) -> None:
    """``Gather(Dequantize(W))`` of a table of symmetric 8-bit rows looks up integers and, where rows have scales of
    their own, those; only what was found is multiplied. Runtimes else make a float table of it when they load."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0 or node.inputs[0] is None:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != DEQUANTIZE or inner.attributes.get_int("block_size", 0) > 0:
            continue
        table, scale = constant(inner.inputs[0]), constant(inner.inputs[1])
        zero = constant(inner.inputs[2]) if len(inner.inputs) > 2 else np.zeros((), dtype=np.int8)
        if table is None or table.dtype != np.int8 or scale is None or zero is None or zero.any():
            continue
        if _is_int4(inner.inputs[0]):  # no runtime looks those up
            continue
        if scale.size > 1 and inner.attributes.get_int("axis", 1) % table.ndim != 0:
            continue
        found = replacement("Gather", [inner.inputs[0], node.inputs[1]], node)
        found.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        numbers = replacement("Cast", [found.outputs[0]], node, {"to": int(ir.DataType.FLOAT)})
        made = [found, numbers]
        factor = inner.inputs[1]
        if scale.size > 1:
            rows = scale.reshape(-1, *[1] * (table.ndim - 1))
            along = initializer(graph, f"{node.name}.scale", rows)
            gathered = replacement("Gather", [along, node.inputs[1]], node)
            gathered.name, gathered.outputs[0].name = f"{node.name}.scale", f"{node.outputs[0].name}.scale"
            gathered.outputs[0].shape = None
            factor = gathered.outputs[0]
            made.append(gathered)
        made.append(replacement("Mul", [numbers.outputs[0], factor], node))
        graph.insert_before(node, made)
        replace(node.outputs[0], made[-1].outputs[0])


def drop_implied_clips(graph: ir.Graph) -> None:
    """Remove a Relu or Clip that is read only by quantizers whose saturation implies it.

    Quantizing is monotone, so a bound is implied exactly if it is itself quantized to the first (last) integer.
    """
    for node in list(graph):
        if node.op_type not in ("Relu", "Clip") or node.outputs[0].is_graph_output() or node.inputs[0] is None:
            continue
        if node.inputs[0].dtype is not None and not node.inputs[0].dtype.is_floating_point():
            continue
        low, high = bounds(node)
        uses = node.outputs[0].uses()
        if low is None or high is None or not uses:
            continue
        if all(use.idx == 0 and _saturates(use.node, low, high) for use in uses):
            replace(node.outputs[0], node.inputs[0])


def bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """The limits of a Relu or Clip; None where one is no constant."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    limits: list[float | None] = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = constant(value)
        limits.append(default if value is None else None if array is None else float(array))
    return limits[0], limits[1]


def _saturates(quantizer: ir.Node, low: float, high: float) -> bool:
    if quantizer.op_type != QUANTIZE:
        return False
    scale, zero = constant(quantizer.inputs[1]), constant(quantizer.inputs[2] if len(quantizer.inputs) > 2 else None)
    if scale is None or zero is None or scale.size != 1:
        return False
    limits = np.iinfo(zero.dtype)
    least, greatest = limits.min, limits.max
    for use in quantizer.outputs[0].uses():  # fewer bits: the integers are clipped behind the quantizer
        clip = bounds(use.node) if use.node.op_type == "Clip" else (None, None)
        if clip[0] is None or clip[1] is None or len(quantizer.outputs[0].uses()) > 1:
            break
        least, greatest = max(least, int(clip[0])), min(greatest, int(clip[1]))
    step, at = np.float32(scale.item()), float(zero.item())
    below, above = (float(np.rint(np.float32(bound) / step)) + at for bound in (low, high))
    return below <= least and above >= greatest


def pack_int4(graph: ir.Graph) -> None:
    """Store weights whose buffer is named ``...weight_q4`` (values -8 to 7) in 4 bits. Needs opset 21."""
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        array = constant(value)
        if not _is_int4(value) or array is None or array.dtype != np.int8:
            continue
        if array.size and (array.min() < -8 or array.max() > 7):
            raise ValueError(f"{name} is to be stored in 4 bits but holds values from {array.min()} to {array.max()}")
        packed = _as_int4(graph, value, array)
        for node in [use.node for use in value.uses()]:
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            zeros = constant(zero)
            if node.op_type != DEQUANTIZE:
                raise ValueError(f"{name} is to be stored in 4 bits but {node.op_type} reads it")
            if zero is not None and zeros is not None and zero.dtype != ir.DataType.INT4:
                node.replace_input_with(2, _as_int4(graph, zero, zeros))
        replace(value, packed)


def _is_int4(value: ir.Value | None) -> bool:
    """Whether the cell that made the weight means it to be stored in 4 bits."""
    return value is not None and (value.name or "").partition(".T")[0].endswith("weight_q4")


def _as_int4(graph: ir.Graph, value: ir.Value, array: Array) -> ir.Value:
    import ml_dtypes
    import onnx_ir as ir

    return initializer(graph, f"{value.name}.int4", array.astype(ml_dtypes.int4), ir.DataType.INT4)


def attributes(node: ir.Node) -> dict[str, Any]:
    """The node's attributes by name, those of quantizers without their defaults."""
    defaults = {"axis": 1, "block_size": 0, "saturate": 1, "output_dtype": 0, "precision": 0}
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return {name: value for name, value in given.items() if value != defaults.get(name)}


def replacement(
    op_type: str, inputs: Sequence[ir.Value | None], like: ir.Node, attributes: dict[str, Any] | None = None
) -> ir.Node:
    """A node in the place of ``like``: its output's name, shape and type, its origin."""
    import onnx_ir as ir

    node = ir.node(op_type, inputs, attributes, name=f"{like.name}.{op_type}")
    node.metadata_props.update(like.metadata_props)
    node.outputs[0].name = f"{like.outputs[0].name}.{op_type}"
    node.outputs[0].shape, node.outputs[0].type = like.outputs[0].shape, like.outputs[0].type
    return node
