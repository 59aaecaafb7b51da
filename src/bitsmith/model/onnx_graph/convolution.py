"""Convolutions, in one to three spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .graph import Call, Compute, Operator

Pads = list[tuple[Any, Any]]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def spatial(call: Call, name: str, rank: int, default: int = 1) -> tuple[int, ...]:
    """A list attribute with one entry for each spatial axis."""
    return tuple(call.attribute(name) or (default,) * rank)


def fixed_pads(call: Call, rank: int) -> Pads:
    given = call.attribute("pads") or [0] * (2 * rank)
    return [(given[axis], given[axis + rank]) for axis in range(rank)]


def same_pads(
    sizes: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], lower: bool
) -> Pads:
    """``auto_pad = SAME_*``: as many outputs as ``ceil(size / stride)``, the odd pixel at the end (or the start)."""
    found: Pads = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = ((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size
        total = max(total, 0) if isinstance(total, int) else total
        small, large = total // 2, total - total // 2
        found.append((large, small) if lower else (small, large))
    return found


def pads_of(call: Call, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Pads:
    mode, rank = call.attribute("auto_pad", "NOTSET"), len(kernel)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return same_pads(x.shape[2:], kernel, strides, dilations, mode == "SAME_LOWER")
    return fixed_pads(call, rank) if mode != "VALID" else [(0, 0)] * rank


def symmetric(pads: Pads) -> bool:
    return all(before is after or before == after for before, after in pads)


def padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    return F.pad(x, [size for pair in reversed(pads) for size in pair], value=value)


def _conv(call: Call) -> Compute:
    groups = call.attribute("group", 1)
    weight = call.constant(1)
    rank = (
        weight.dim() - 2 if weight is not None else len(call.attribute("kernel_shape") or ()) or (call.rank(1) or 0) - 2
    )
    if rank not in CONVOLUTIONS:
        raise call.refuse(f"over {rank} spatial axes" if rank > 0 else "with a weight of unknown rank")
    convolve = CONVOLUTIONS[rank]
    strides, dilations = spatial(call, "strides", rank), spatial(call, "dilations", rank)
    if call.attribute("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        pads = fixed_pads(call, rank) if call.attribute("auto_pad", "NOTSET") == "NOTSET" else [(0, 0)] * rank
        if symmetric(pads) and min(before for before, _ in pads) >= 0:
            ends = tuple(before for before, _ in pads)
            return lambda x, weight, bias=None: convolve(x, weight, bias, strides, ends, dilations, groups)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pads = pads_of(call, x, weight.shape[2:], strides, dilations)
        if symmetric(pads):
            return convolve(x, weight, bias, strides, tuple(before for before, _ in pads), dilations, groups)
        return convolve(padded(x, pads), weight, bias, strides, 0, dilations, groups)

    return compute


def _conv_transpose(call: Call) -> Compute:
    groups = call.attribute("group", 1)
    weight = call.constant(1)
    rank = weight.dim() - 2 if weight is not None else (call.rank(1) or 0) - 2
    if rank not in TRANSPOSED:
        raise call.refuse(f"over {rank} spatial axes" if rank > 0 else "with a weight of unknown rank")
    convolve = TRANSPOSED[rank]
    strides, dilations = spatial(call, "strides", rank), spatial(call, "dilations", rank)
    extra = spatial(call, "output_padding", rank, 0)
    mode, shape = call.attribute("auto_pad", "NOTSET"), call.attribute("output_shape")

    def pads_for(x: Tensor, kernel: Sequence[int]) -> Pads:
        if shape is None and mode in ("NOTSET", "VALID"):
            return fixed_pads(call, rank) if mode == "NOTSET" else [(0, 0)] * rank
        sizes = x.shape[2:]
        wanted = (
            tuple(shape)[-rank:] if shape is not None else tuple(n * s for n, s in zip(sizes, strides, strict=True))
        )
        found: Pads = []
        for n, s, k, d, e, size in zip(sizes, strides, kernel, dilations, extra, wanted, strict=True):
            total = s * (n - 1) + e + (k - 1) * d + 1 - size
            small, large = total // 2, total - total // 2
            found.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return found

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pads = pads_for(x, weight.shape[2:])
        if symmetric(pads) and all(before >= 0 for before, _ in pads):
            return convolve(x, weight, bias, strides, tuple(before for before, _ in pads), extra, groups, dilations)
        whole = convolve(x, weight, bias, strides, 0, extra, groups, dilations)
        return padded(whole, [(-before, -after) for before, after in pads])

    return compute


OPERATORS: dict[str, Operator] = {
    "Conv": Operator(_conv, ("x", "weight", "bias"), ("weight", "bias")),
    "ConvTranspose": Operator(_conv_transpose, ("x", "weight", "bias"), ("weight", "bias")),
}
"""Convolutions."""
