"""Values of one bit: signs, drawn or not, with the gradient that passes them, and the scale that stands before them."""

from __future__ import annotations

import torch
from torch import Tensor

from .straight_through import straight_through


def signs(x: Tensor) -> Tensor:
    """+1 where ``x >= 0``, zero of either sign included, and -1 below, in the type of ``x``; NaN stays NaN.

    >>> signs(torch.tensor([-0.5, -0.0, 0.0, 2.0])).tolist()
    [-1.0, 1.0, 1.0, 1.0]
    """
    return _signed(x >= 0, x)


def binarize(x: Tensor, cancel: bool) -> Tensor:
    """:func:`signs` with the gradient 1 (Bengio et al. 2013, arXiv:1308.3432), and 0 where \\|x\\| > 1 if ``cancel``,
    as of a hard tanh (Courbariaux et al. 2016, arXiv:1602.02830, eq. 4)."""
    with torch.no_grad():
        value = signs(x)
    return straight_through(x, value, _inside(x) if cancel else None)


def binarize_at_random(x: Tensor, uniform: Tensor, cancel: bool) -> Tensor:
    """+1 with probability ``clamp((x + 1) / 2, 0, 1)``, else -1 (Courbariaux et al. 2015, arXiv:1511.00363, eqs. 2, 3),
    with the gradient of :func:`binarize`.

    ``uniform``: numbers in [0, 1) of the shape of ``x``, one for each draw.
    """
    with torch.no_grad():
        value = _signed(uniform < (x + 1) / 2, x)
    return straight_through(x, value, _inside(x) if cancel else None)


def channel_scale(weight: Tensor) -> Tensor:
    """Mean magnitude by output channel, [out, ...] -> [out]: the scale of least squared error before the signs
    (Rastegari et al. 2016, arXiv:1603.05279, eq. 6). Its gradient is the exact one, sign(w) / n.

    >>> channel_scale(torch.tensor([[1.0, -3.0], [0.5, 0.0]])).tolist()
    [2.0, 0.25]
    """
    return weight.abs().flatten(1).mean(1)


def _signed(up: Tensor, x: Tensor) -> Tensor:
    """+1 where ``up``, else -1, NaN where ``x`` is NaN: one that became a sign would hide a training that diverged. By
    arithmetic, since ``torch.where`` of numbers takes five times as long."""
    number = (x == x).to(x.dtype)
    return up.to(x.dtype).mul_(2).sub_(number).div_(number)


def _inside(x: Tensor) -> Tensor:
    return (x.detach().abs() <= 1).to(x.dtype)
