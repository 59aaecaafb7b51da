"""PyTorch's reference representation of a quantized graph: the one place that names its operations.

``torch.ops.quantized_decomposed`` exists once ``torch.ao.quantization.fx._decomposed`` is imported (80 ms), which
:func:`load` does. Call it where a module is built: inside ``torch.compile`` nothing can be imported.

A range narrower than its storage (below 8 bits) is written into the ONNX file as an additional Clip node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..site import Format

_loaded = False

_STORAGE = {(True, 8): torch.int8, (False, 8): torch.uint8, (True, 16): torch.int16, (False, 16): torch.uint16}
_WEIGHT_SIGNED = {torch.int8: True, torch.uint8: False, torch.int16: True, torch.uint16: False}


def load() -> None:
    """Register the operations; free after the first time."""
    global _loaded
    if not _loaded:
        import torch.ao.quantization.fx._decomposed  # noqa: F401  (importing registers them)

        _loaded = True


def storage(bits: int, signed: bool) -> torch.dtype:
    """The torch integer type that holds ``bits``: int8/uint8 up to 8, int16/uint16 above.

    >>> storage(4, signed=True)
    torch.int8
    """
    return _STORAGE[signed, 8 if bits <= 8 else 16]


def quantize(x: Tensor, scale: float, zero_point: int, fmt: Format, levels: tuple[int, int] | None = None) -> Tensor:
    """``clamp(round(x / scale) + zero_point)`` as integers of :func:`storage` (ties to even), same shape.

    ``x`` is float32, bfloat16 or float16. The division is a product with ``1 / scale``. ``levels``: the least and the
    greatest integer, where not all of the format's are used.
    """
    load()
    low, high = levels or fmt.levels
    integers: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor.default(
        x, scale, zero_point, low, high, storage(fmt.bits, fmt.signed)
    )
    return integers


def quantize_dequantize(
    x: Tensor, scale: float, zero_point: int, fmt: Format, levels: tuple[int, int] | None = None
) -> Tensor:
    """``x`` as the format holds it: quantized and back, float32, same shape. No gradient passes."""
    integers = quantize(x, scale, zero_point, fmt, levels)
    low, high = levels or fmt.levels
    values: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor.default(
        integers, scale, zero_point, low, high, integers.dtype
    )
    return values


def dequantize_weight(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, bits: int) -> Tensor:
    """``(q - zero_point) * scale`` in float32, same shape as ``q``.

    ``q``: integers of :func:`storage`, whose type says signed or unsigned (4-bit values are int8 in -8 .. 7).
    ``scale`` (float32) and ``zero_point`` (int64) as :func:`~.ranges.weight_qparams` gives them: shape () with
    ``axis=None``; (C,) along ``axis``; (O, I / group) for groups of dimension 1, with ``axis=0``.
    """
    load()
    if q.dtype not in _WEIGHT_SIGNED:
        raise TypeError(f"dequantize_weight(q of {q.dtype}): must be int8, uint8, int16 or uint16")
    low, high = Format(bits, signed=_WEIGHT_SIGNED[q.dtype]).levels
    operations = torch.ops.quantized_decomposed
    values: Tensor
    if axis is None:
        if scale.dim():
            raise ValueError(f"dequantize_weight: scale of shape {tuple(scale.shape)} needs an axis")
        return operations.dequantize_per_tensor.tensor(q, scale, zero_point, low, high, q.dtype)  # type: ignore[no-any-return]
    if q.dtype == torch.uint16:  # torch has no uint16 arithmetic; the values are the same
        q = q.to(torch.int32)
    if scale.dim() <= 1:
        return operations.dequantize_per_channel.default(q, scale, zero_point, axis, low, high, q.dtype)  # type: ignore[no-any-return]
    if axis != 0 or q.dim() < 2 or scale.shape[0] != q.shape[0] or q.shape[1] % scale.shape[1]:
        raise ValueError(
            f"dequantize_weight: scale of shape {tuple(scale.shape)} does not group dimension 1 of {tuple(q.shape)}"
        )
    # the operation takes matrices and groups their last dimension
    last = q.movedim(1, -1)
    repeat = last.numel() // (q.shape[0] * q.shape[1])
    values = operations.dequantize_per_channel_group.default(
        last.reshape(-1, q.shape[1]),
        scale.repeat_interleave(repeat, 0) if repeat > 1 else scale,
        zero_point.repeat_interleave(repeat, 0) if repeat > 1 else zero_point,
        low,
        high,
        q.dtype,
        q.shape[1] // scale.shape[1],
        torch.float32,
    )
    return values.reshape(last.shape).movedim(-1, 1)
