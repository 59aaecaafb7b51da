"""The forms of the exported graph that ONNX Runtime fuses into integer kernels (read back on 1.31).

ONNX Runtime matches exact patterns: a spatial ReduceMean between quantizers stays in float, as does anything with a
float bias (cells give it as int32 in units of ``s_x s_w``). With an integer bias, ``MatMul + Add`` on more than two
axes becomes one QGemm by itself. The rewritings keep every value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .rewrite import (
    DEQUANTIZE,
    QUANTIZE,
    constant,
    initializer,
    merge_duplicates,
    replace,
    replacement,
    rewritten,
)

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def onnxruntime_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the form that ONNX Runtime's integer fusions match."""
    return rewritten(model, spatial_means, quantize_before_reshape, merge_duplicates)


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


_NEEDS_OUTPUT = ("Conv", "Gemm", "MatMul", "Add", "Mul", "GlobalAveragePool", "AveragePool")
