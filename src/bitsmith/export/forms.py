"""The forms of the exported graph that runtimes fuse into integer kernels (read back on 1.31 and 2026.4).

ONNX Runtime matches exact patterns: a spatial ReduceMean between quantizers stays in float, as does anything with a
float bias (cells give it as int32 in units of ``s_x s_w``). With an integer bias, ``MatMul + Add`` on more than two
axes becomes one QGemm by itself. OpenVINO adds inside a convolution only behind a quantizer, whose rounding it then
leaves out. The rewritings keep every value that the runtime computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .binary import one_bit_kernels
from .onnx import name_nodes
from .rewrite import (
    DEQUANTIZE,
    QUANTIZE,
    attributes,
    constant,
    initializer,
    merge_duplicates,
    pads_zeros,
    replace,
    replacement,
    rewritten,
)
from .winograd import own_kernels

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


FUSING = ".Fusing.Dequantize"
"""End of the names of the quantizers that fuse and do not round: where a value between is asked for they would."""


def onnxruntime_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the form that ONNX Runtime's integer fusions match, its nodes named after their sites."""
    return rewritten(
        model,
        spatial_means,
        sums_before_normalisation,
        quantize_before_reshape,
        integer_padding,
        whole_channel_blocks,
        merge_duplicates,
        name_nodes,
    )


def openvino_form(model: onnx.ModelProto, one_bit: bool = False) -> onnx.ModelProto:
    """The model in the form in which OpenVINO's convolutions take in residual additions, and ours as one operation.
    ``one_bit``: layers of signs too become operations of ours; else they stay what OpenVINO computes in float."""
    return rewritten(model, own_kernels, *((one_bit_kernels,) if one_bit else ()), sums_in_convolutions)


def sums_in_convolutions(graph: ir.Graph) -> None:
    """``Conv -> Add(stored integers) -> [Relu] -> Quantize``: a wide quantizer goes behind the convolution.

    With it the plugin computes all four in one kernel, which clips but does not round in between (read back: the
    result is that of the unrounded sum). Twice the larger range of both ends leaves nothing to clip. A convolution in
    float stays as it is: behind one the plugin does round.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Add" or len(node.inputs) != 2:
            continue
        ends = [_maker(value) for value in node.inputs]
        stored = next((end for end in ends if end is not None and end.op_type == DEQUANTIZE), None)
        branches = [value.producer() if value is not None else None for value in node.inputs]
        branch = next((end for end in branches if end is not None and end.op_type == "Conv"), None)
        if stored is None or branch is None or len(branch.outputs[0].uses()) != 1:
            continue
        if not all(_is_dequantized(value) for value in branch.inputs[:2]):
            continue
        quantizers = _quantizers(node)
        scales = [constant(end.inputs[1]) for end in (stored, *quantizers)]
        sizes = [float(scale.max()) for scale in scales if scale is not None and scale.size == 1]
        if not quantizers or len(sizes) != len(scales) or branch.outputs[0].is_graph_output():
            continue
        name, value = node.name, branch.outputs[0]
        wide = initializer(graph, f"{name}.range", np.array(2.0 * 255 / 127 * max(sizes), dtype=np.float32))
        zero = initializer(graph, f"{name}.zero", np.array(0, dtype=np.int8))
        rounded = ir.node(QUANTIZE, [value, wide, zero], name=f"{name}.Fusing.Quantize")
        back = ir.node(DEQUANTIZE, [rounded.outputs[0], wide, zero], name=f"{name}{FUSING}")
        for made, suffix in ((rounded, "quantized"), (back, "dequantized")):
            made.outputs[0].name, made.outputs[0].shape = f"{value.name}.{suffix}", value.shape
        rounded.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        back.outputs[0].type = value.type
        graph.insert_before(node, [rounded, back])
        node.replace_input_with(node.inputs.index(value), back.outputs[0])


def _is_dequantized(value: ir.Value | None) -> bool:
    node = _maker(value)
    return node is not None and node.op_type == DEQUANTIZE


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The node that computed a value's numbers; what only moves them, or adds zeros at a border, is passed by."""
    node = value.producer() if value is not None else None
    while node is not None and (node.op_type in _VIEWS or (node.op_type == "Pad" and pads_zeros(node))):
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return node


def _quantizers(node: ir.Node) -> list[ir.Node]:
    """The quantizers that alone read a node, an activation in between allowed; none if anything else reads it."""
    readers = [use.node for use in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        node = readers[0]
        readers = [use.node for use in node.outputs[0].uses()]
    quantized = all(reader.op_type == QUANTIZE for reader in readers) and not node.outputs[0].is_graph_output()
    return readers if quantized else []


def spatial_means(graph: ir.Graph) -> None:
    """A ReduceMean over all spatial axes becomes GlobalAveragePool (and a Reshape where the axes are dropped)."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "ReduceMean" else None
        if source is None or source.shape is None or len(source.shape) not in (3, 4, 5):
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        rank = len(source.shape)
        if axes is None or sorted(int(axis) % rank for axis in axes.ravel()) != list(range(2, rank)):
            continue
        pool = replacement("GlobalAveragePool", [source], node)
        graph.insert_before(node, pool)
        made = pool
        if not node.attributes.get_int("keepdims", 1):
            pool.outputs[0].shape = None
            shape = initializer(graph, f"{node.name}.shape", np.array([0, -1], dtype=np.int64))
            made = replacement("Reshape", [pool.outputs[0], shape], node)
            graph.insert_before(node, made)
        replace(node.outputs[0], made.outputs[0])


def sums_before_normalisation(graph: ir.Graph) -> None:
    """``Add -> LayerNormalization`` becomes ``Sum -> LayerNormalization``, which ONNX Runtime leaves apart.

    Fused into SkipLayerNormalization they leave the kernels that were faster when this was tried.
    """
    for node in list(graph):
        if node.op_type != "Add" or not any(use.node.op_type == "LayerNormalization" for use in node.outputs[0].uses()):
            continue
        apart = replacement("Sum", [value for value in node.inputs if value is not None], node)
        graph.insert_before(node, apart)
        replace(node.outputs[0], apart.outputs[0])


def quantize_before_reshape(graph: ir.Graph) -> None:
    """``Reshape -> Quantize`` becomes ``Quantize -> Dequantize -> Reshape -> Quantize`` behind a fusable operation.

    A per-tensor quantizer commutes with a reshape; the operation before it then sees its quantized output.
    """
    for node in list(graph):
        if node.op_type not in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose") or node.inputs[0] is None:
            continue
        source, uses = node.inputs[0], node.outputs[0].uses()
        producer = source.producer()
        if producer is None or producer.op_type not in _NEEDS_OUTPUT or len(source.uses()) != 1 or not uses:
            continue
        if source.is_graph_output() or node.outputs[0].is_graph_output():
            continue
        quantizers = [use.node for use in uses]
        if len(quantizers) != 1 or quantizers[0].op_type != QUANTIZE:
            continue
        scale = constant(quantizers[0].inputs[1])
        if scale is None or scale.size != 1:
            continue
        quantize = replacement(QUANTIZE, [source, *quantizers[0].inputs[1:]], quantizers[0])
        dequantize = replacement(DEQUANTIZE, [quantize.outputs[0], *quantizers[0].inputs[1:]], quantizers[0])
        for made in (quantize, dequantize):
            made.outputs[0].shape = source.shape
        dequantize.outputs[0].type = source.type
        graph.insert_before(node, quantize)
        graph.insert_before(node, dequantize)
        node.replace_input_with(0, dequantize.outputs[0])


def integer_padding(graph: ir.Graph) -> None:
    """``Dequantize -> views -> Pad`` with zeros pads integers with the zero point, and dequantizes behind it.

    A float Pad cuts the integer chain: its reader finds no Dequantize in front. Requantizing behind views is exact.
    """
    for node in list(graph):
        if node.op_type != "Pad" or not pads_zeros(node):
            continue
        source = node.inputs[0]
        quantized = _dequantized_before(source)
        if source is None or quantized is None or node.outputs[0].is_graph_output():
            continue
        parameters = quantized.inputs[1:]
        integers = quantized.inputs[0]
        if source.producer() is not quantized or integers is None:
            quantize = replacement(QUANTIZE, [source, *parameters], quantized)
            quantize.outputs[0].shape = source.shape
            quantize.outputs[0].type = integers.type if integers is not None else None
            graph.insert_before(node, quantize)
            integers = quantize.outputs[0]
        pad = replacement("Pad", [integers, node.inputs[1], parameters[1], *node.inputs[3:]], node, attributes(node))
        pad.outputs[0].type = integers.type
        dequantize = replacement(DEQUANTIZE, [pad.outputs[0], *parameters], quantized)
        dequantize.outputs[0].shape, dequantize.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        graph.insert_before(node, [pad, dequantize])
        replace(node.outputs[0], dequantize.outputs[0])


def whole_channel_blocks(graph: ir.Graph) -> None:
    """An integer convolution of three input channels, as of pictures, gets a fourth that meets zero weights.

    The direct kernel takes input channels by fours (and 16 outputs at least); what does not divide goes through im2col
    and a matrix product. The integers are the same. One channel made four costs more than it saves.
    """
    for node in list(graph):
        if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
            continue
        source, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
        if source is None or weight is None or source is not _dequantized_before(node.inputs[0]):
            continue
        integers, narrow = source.inputs[0], weight.inputs[0] if weight.op_type == DEQUANTIZE else None
        stored = constant(narrow)
        if integers is None or narrow is None or stored is None or stored.dtype != np.int8:
            continue
        if stored.shape[1] != 3 or stored.shape[0] < 16:
            continue
        sizes, widths = np.zeros(2 * stored.ndim, dtype=np.int64), [(0, 0)] * stored.ndim
        sizes[stored.ndim + 1], widths[1] = 1, (0, 1)
        pad = replacement("Pad", [integers, initializer(graph, f"{node.name}.channels", sizes), source.inputs[2]], node)
        pad.outputs[0].type = integers.type
        values = replacement(DEQUANTIZE, [pad.outputs[0], *source.inputs[1:]], node)
        wide = initializer(graph, f"{narrow.name}.blocks", np.pad(stored, widths))
        weights = replacement(DEQUANTIZE, [wide, *weight.inputs[1:]], weight, attributes(weight))
        weights.outputs[0].shape = wide.shape
        for made in (pad, values):
            made.outputs[0].shape = None
        graph.insert_before(node, [pad, values, weights])
        node.replace_input_with(0, values.outputs[0])
        node.replace_input_with(1, weights.outputs[0])


def _dequantized_before(value: ir.Value | None) -> ir.Node | None:
    """The per-tensor DequantizeLinear, with a zero point, whose values alone reach ``value``; None if there is none."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _VIEWS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != DEQUANTIZE or len(node.inputs) != 3:
        return None
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    return node if scale is not None and zero is not None and scale.ndim == zero.ndim == 0 else None


_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "MaxPool")
_NEEDS_OUTPUT = ("Conv", "Gemm", "MatMul", "Add", "Mul", "GlobalAveragePool", "AveragePool")
