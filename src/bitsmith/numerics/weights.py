"""Weights on their grid: simulated with a straight-through gradient, as integers, folded, and bias in 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..site import Format
from . import dialect
from .grid import Grid


def fake_quantize_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, fmt: Format) -> Tensor:
    """``scale * (clamp(round(w / scale) + z) - z)``, same shape, float32; the gradient passes inside the range.

    ``scale``, ``zero_point`` as :func:`~.ranges.weight_qparams` gives them: shape () with ``axis=None``, (C,) along
    ``axis``, (O, I / group) for groups of dimension 1 with ``axis=0``.
    """
    low, high = fmt.levels
    weight = weight.float()
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point.to(torch.int32), low, high)
    if scale.dim() == 1:
        return torch.fake_quantize_per_channel_affine(weight, scale, zero_point.to(torch.int32), axis, low, high)
    rows = weight.reshape(scale.numel(), -1)
    flat = torch.fake_quantize_per_channel_affine(
        rows, scale.reshape(-1), zero_point.reshape(-1).to(torch.int32), 0, low, high
    )
    return flat.reshape(weight.shape)


def learned_weight(weight: Tensor, grid: Grid, axis: int | None) -> Tensor:
    """The weight on a grid that is trained, same shape, float32: its steps as ``scale`` above."""
    shape = grid.first_step.shape
    if len(shape) == 2:
        found: Tensor = grid(weight.reshape(grid.first_step.numel(), -1), (-1, 1))
        return found.reshape(weight.shape)
    view = [1] * weight.dim()
    if shape and axis is not None:
        view[axis] = -1
    return grid(weight, tuple(view) if shape else ())  # type: ignore[no-any-return]


def integers_of(on_grid: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, fmt: Format) -> Tensor:
    """The integers of weights that are already on their grid (exact), same shape."""
    low, high = fmt.levels
    if scale.dim() == 2:
        rows = on_grid.reshape(scale.numel(), -1).double()
        integers = torch.round(rows / scale.reshape(-1, 1)) + zero_point.reshape(-1, 1)
        return integers.clamp(low, high).to(dialect.storage(fmt.bits, fmt.signed)).reshape(on_grid.shape)
    along = [1] * on_grid.dim()
    if axis is not None:
        along[axis] = -1
    integers = torch.round(on_grid.double() / scale.reshape(along)) + zero_point.reshape(along)
    return integers.clamp(low, high).to(dialect.storage(fmt.bits, fmt.signed))


def dequantize_bias(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``q * scale`` of a 32-bit bias in the reference dialect: ``q`` int32 (C,), ``scale`` float32 (C,) -> (C,)."""
    dialect.load()
    values: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel.default(
        q, scale, zero_point, 0, -(2**31), 2**31 - 1, torch.int32
    )
    return values


def folded_affine(
    mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``(factor, shift)`` of a batch normalisation in eval: ``y = x * factor + shift`` (Ioffe and Szegedy 2015)."""
    factor = torch.rsqrt(variance + eps)
    if gamma is not None:
        factor = factor * gamma
    shift = -mean * factor
    return factor, shift if beta is None else shift + beta
