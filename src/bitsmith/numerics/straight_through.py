"""Values that a rounding made, with the gradient of what was rounded (Bengio et al. 2013, arXiv:1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.has_slope = inputs[2] is not None
        ctx.dtype = inputs[0].dtype
        if ctx.has_slope:
            ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.has_slope:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient.to(ctx.dtype), None, None


def straight_through(x: Tensor, value: Tensor, slope: Tensor | None = None) -> Tensor:
    """``value`` bit for bit, whose gradient by ``x`` is ``slope`` (None: 1) elementwise. Both of the shape of ``x``."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return value
    found: Tensor = _StraightThrough.apply(x, value, slope)  # type: ignore[no-untyped-call]
    return found


def rounded(x: Tensor, limit: int) -> Tensor:
    """``clamp(round(x), -limit, limit)``, ties to even; the gradient is 1, and 0 where the level is clipped."""
    with torch.no_grad():
        level = torch.round(x)
        value = level.clamp(-limit, limit)
        slope = (value == level).to(x.dtype)
    return straight_through(x, value, slope)
