"""Rounding to the nearest integer with a choice of what its derivative is taken to be."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from ..site import Backward

BACKWARDS: tuple[Backward, ...] = get_args(Backward)


def slope(residual: Tensor, gradient: Tensor, backward: Backward, strength: float) -> Tensor:
    """What ``gradient``, which reaches a rounded value, is multiplied by on its way to what was rounded: same shape.

    ``residual``: ``x - round(x)``, in [-1/2, 1/2]; ``strength``: delta. With r the residual and s the gradient's sign:

    * ``ste``: 1 (Bengio et al. 2013, arXiv:1308.3432);
    * ``psgd``: 1 + delta abs(r) (after the position-based scaled gradient of Kim et al. 2020, arXiv:2005.11035);
    * ``ewgs``: 1 + delta s r (Lee et al. 2021, arXiv:2104.00903);
    * ``tanh``: 1 + delta s tanh(4 r) / 2, and ``inverse_tanh``: 1 + delta s artanh(1.9 r) / (2 artanh(0.95)) (Schaefer
      et al. 2022, arXiv:2206.07741);
    * ``noise``: 1 + delta s u, u uniform in [-1/2, 1/2] from torch's global generator: ours, ``ewgs`` by what is not
      the residual, as a control.

    At ``strength`` up to 2 no factor is negative.
    """
    if backward == "ste":
        return torch.ones_like(gradient)
    if backward == "psgd":
        return 1 + strength * residual.abs()
    sign = gradient.sign()
    if backward == "ewgs":
        shape = residual
    elif backward == "tanh":
        shape = torch.tanh(4 * residual) / 2
    elif backward == "inverse_tanh":
        shape = torch.atanh(1.9 * residual) / (2 * math.atanh(0.95))
    else:
        shape = torch.rand_like(residual) - 0.5
    return 1 + strength * sign * shape


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, backward: Backward, strength: float) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Backward, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] - output)  # type: ignore[attr-defined]
        ctx.how = inputs[1:]  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        (residual,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * slope(residual, gradient, *ctx.how), None, None  # type: ignore[attr-defined]


def round_through(x: Tensor, backward: Backward = "ste", strength: float = 5e-3) -> Tensor:
    """``round(x)``, ties to even, same shape, whose gradient is multiplied by :func:`slope`.

    >>> x = torch.tensor([0.4], requires_grad=True)
    >>> round_through(x, "ewgs", 0.1).backward()
    >>> x.grad
    tensor([1.0400])
    """
    found: Tensor = _Round.apply(x, backward, strength)  # type: ignore[no-untyped-call]
    return found
