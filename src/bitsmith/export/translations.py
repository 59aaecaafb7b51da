"""How the reference quantization operations are written in ONNX, where torch's own table falls short.

torch 2.13 drops ``quant_min`` and ``quant_max`` of per-tensor quantization, so 4-bit activations would silently run
with 8 bits, and it has no translation for group-wise weights. Operations of ours become nodes of our own domain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..numerics import dialect, winograd_operation

DOMAIN, WINOGRAD = "bitsmith", "Winograd"
"""Where operations are that ONNX does not have, and the one there is."""


def translations(opset: int) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export(custom_translation_table=...)`` at that opset (20 or later)."""
    import onnx_ir as ir
    from onnxscript import opset20, opset21

    dialect.load()
    winograd_operation.load()
    op: Any = opset21 if opset >= 21 else opset20

    def parameters(scale: Any, zero_point: Any, dtype: Any) -> tuple[Any, Any]:
        scale = op.Constant(value_float=scale) if isinstance(scale, float) else op.Cast(scale, to=ir.DataType.FLOAT)
        zero_point = op.Constant(value_int=zero_point) if isinstance(zero_point, int) else zero_point
        return scale, op.Cast(zero_point, to=int(dtype))

    def quantize_per_tensor(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: Any) -> Any:
        integers = op.QuantizeLinear(x, *parameters(scale, zero_point, dtype))
        full = _LIMITS[ir.DataType(int(dtype)).name]
        if (low, high) == full:
            return integers
        bounds = (op.Cast(op.Constant(value_int=bound), to=int(dtype)) for bound in (low, high))
        return op.Clip(integers, *bounds)

    def dequantize_per_tensor(
        x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: Any, out_dtype: Any = None
    ) -> Any:
        return op.DequantizeLinear(x, *parameters(scale, zero_point, dtype))

    def dequantize_per_channel_group(
        w: Any, scales: Any, zero_points: Any, low: int, high: int, dtype: Any, group_size: int, out_dtype: Any
    ) -> Any:
        if opset < 21:
            raise ValueError("group-wise weights need opset 21")
        group_size = min(group_size, int(w.shape[-1]))
        if zero_points is None:
            return op.DequantizeLinear(w, scales, axis=1, block_size=group_size)
        return op.DequantizeLinear(w, scales, op.Cast(zero_points, to=int(dtype)), axis=1, block_size=group_size)

    def winograd(
        x: Any,
        u: Any,
        mul: Any,
        offset: Any,
        us: Any,
        bias: Any,
        scale: float,
        tile: int,
        kernel: Sequence[int],
        pads: Sequence[int],
        bits: int,
    ) -> Any:
        given = {"scale": scale, "tile": tile, "kernel": list(kernel), "pads": list(pads), "bits": bits}
        return _winograd()(x, u, mul, offset, us, bias, **given)

    decomposed = torch.ops.quantized_decomposed
    return {
        torch.ops.bitsmith.winograd.default: winograd,
        decomposed.quantize_per_tensor.default: quantize_per_tensor,
        decomposed.quantize_per_tensor.tensor: quantize_per_tensor,
        decomposed.dequantize_per_tensor.default: dequantize_per_tensor,
        decomposed.dequantize_per_tensor.tensor: dequantize_per_tensor,
        decomposed.dequantize_per_channel_group.default: dequantize_per_channel_group,
    }


@functools.cache
def _winograd() -> Any:
    """``bitsmith::Winograd``: float in and out, as ``torch.ops.bitsmith.winograd``."""
    from onnx.defs import OpSchema
    from onnxscript import values

    real, word = "tensor(float)", "tensor(int16)"
    kinds = {"x": real, "u": "U", "mul": word, "offset": word, "us": real, "bias": real}
    types, own = OpSchema.AttrType, OpSchema.Attribute
    attributes = {"scale": types.FLOAT, "tile": types.INT, "kernel": types.INTS, "pads": types.INTS, "bits": types.INT}
    schema = OpSchema(
        WINOGRAD,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, kind) for name, kind in kinds.items()],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
        type_constraints=[("U", ["tensor(int8)", "tensor(int16)"], "transformed weights")],
        attributes=[own(name, kind) for name, kind in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), WINOGRAD, schema)


_LIMITS = {
    "UINT8": (0, 255),
    "INT8": (-128, 127),
    "UINT16": (0, 65535),
    "INT16": (-32768, 32767),
    "INT32": (-(2**31), 2**31 - 1),
}
