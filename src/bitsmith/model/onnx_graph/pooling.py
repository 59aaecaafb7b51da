"""Pooling, in one to three spatial axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import Pads, padded, pads_of, spatial, symmetric
from .graph import Call, Compute, Operator

Pool = Callable[..., Tensor]
MAXIMA: dict[int, Pool] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGES: dict[int, Pool] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
GLOBAL: dict[int, Pool] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _window(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel = tuple(call.attribute("kernel_shape"))
    if len(kernel) not in MAXIMA:
        raise call.refuse(f"over {len(kernel)} spatial axes")
    return kernel, spatial(call, "strides", len(kernel)), spatial(call, "dilations", len(kernel))


def _ceiled(x: Tensor, pads: Pads, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Pads:
    """Longer pads at the end, so that rounding down gives as many outputs as ``ceil_mode`` rounding up.

    A window that would start behind the input and its first pad is left out, as torch and ONNX Runtime do.
    """
    found: Pads = []
    for size, (before, after), k, s, d in zip(x.shape[2:], pads, kernel, strides, dilations, strict=True):
        reach = (k - 1) * d + 1
        outputs = -(-(size + before + after - reach) // s) + 1
        if (outputs - 1) * s >= size + before:
            outputs -= 1
        found.append((before, max(after, (outputs - 1) * s + reach - size - before)))
    return found


def _max_pool(call: Call) -> Compute:
    if call.wants(1):
        raise call.refuse("with the indices as a second output")
    kernel, strides, dilations = _window(call)
    pool, ceil = MAXIMA[len(kernel)], call.attribute("ceil_mode", 0)

    def compute(x: Tensor) -> Tensor:
        pads = pads_of(call, x, kernel, strides, dilations)
        if symmetric(pads) and not ceil and all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True)):
            return pool(x, kernel, strides, tuple(before for before, _ in pads), dilations)
        if ceil:
            pads = _ceiled(x, pads, kernel, strides, dilations)
        least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        return pool(padded(x, pads, least), kernel, strides, 0, dilations)

    return compute


def _average_pool(call: Call) -> Compute:
    kernel, strides, dilations = _window(call)
    pool, ceil, count_pads = (
        AVERAGES[len(kernel)],
        call.attribute("ceil_mode", 0),
        call.attribute("count_include_pad", 0),
    )
    if any(d != 1 for d in dilations):
        raise call.refuse("with dilations")

    def compute(x: Tensor) -> Tensor:
        pads = pads_of(call, x, kernel, strides, dilations)
        if symmetric(pads) and not ceil and all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True)):
            return pool(x, kernel, strides, tuple(before for before, _ in pads), False, bool(count_pads))
        whole = _ceiled(x, pads, kernel, strides, dilations) if ceil else pads
        # the mean over the window, times its size, over how many of its places count
        counted = torch.ones_like(x[:1, :1])
        if count_pads:
            counted = padded(counted, pads, 1.0)
            missing = [(0, after - counted_after) for (_, after), (_, counted_after) in zip(whole, pads, strict=True)]
            counted = padded(counted, missing)
        else:
            counted = padded(counted, whole)
        return pool(padded(x, whole), kernel, strides) / pool(counted, kernel, strides)

    return compute


def _lp_pool(call: Call) -> Compute:
    kernel, strides, dilations = _window(call)
    pool, p = AVERAGES[len(kernel)], call.attribute("p", 2)
    if any(d != 1 for d in dilations):
        raise call.refuse("with dilations")

    def compute(x: Tensor) -> Tensor:
        pads = pads_of(call, x, kernel, strides, dilations)
        if call.attribute("ceil_mode", 0):
            pads = _ceiled(x, pads, kernel, strides, dilations)
        total = pool(padded(x.abs() ** p, pads), kernel, strides) * math.prod(kernel)
        return torch.pow(total, 1.0 / p)

    return compute


def _global_average(x: Tensor) -> Tensor:
    return GLOBAL[x.dim() - 2](x, 1)


def _spatial_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _global_max(x: Tensor) -> Tensor:
    return x.amax(_spatial_axes(x), keepdim=True)


def _global_lp(call: Call) -> Compute:
    p = call.attribute("p", 2)
    return lambda x: (x.abs() ** p).sum(_spatial_axes(x), keepdim=True) ** (1.0 / p)


OPERATORS: dict[str, Operator] = {
    "MaxPool": Operator(_max_pool, ("x",), note="the second output (indices)"),
    "AveragePool": Operator(_average_pool, ("x",), note="dilations"),
    "LpPool": Operator(_lp_pool, ("x",), note="dilations"),
    "GlobalAveragePool": Operator(lambda call: _global_average, ("x",)),
    "GlobalMaxPool": Operator(lambda call: _global_max, ("x",)),
    "GlobalLpPool": Operator(_global_lp, ("x",)),
}
"""Pooling."""
