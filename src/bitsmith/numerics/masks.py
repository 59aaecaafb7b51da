"""Which weights are left: the largest, one by one or by structure. Output channels come first, inputs second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["weight", "kernel", "block", "n:m"]


def places(shape: Sequence[int], granularity: Granularity, block: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """How many parts of a weight stay or go by themselves, and how many weights each has.

    >>> places((8, 4, 3, 3), "kernel"), places((8, 4, 3, 3), "block", (4, 2))
    ((32, 9), (36, 8))
    """
    total = math.prod(shape)
    size = {"kernel": math.prod(shape[2:]), "block": block[0] * block[1]}.get(granularity, 1)
    return total // size, size


def left(count: int, density: float) -> int:
    """How many of ``count`` places stay: at least one.

    >>> left(10, 0.25)
    2
    """
    return max(1, round(density * count))


def largest(
    weight: Tensor, density: float, granularity: Granularity, block: tuple[int, int] = (1, 1), m: int = 4
) -> Tensor:
    """1 where a weight is left, 0 elsewhere: int8, of the weight's shape, or with 1 on axes on which it is constant.

    ``weight``: single weights by magnitude. ``kernel``: between one input and one output channel, by Euclidean norm.
    ``block``: ``block`` = (output, input) channels at one position of the kernel, by norm. ``n:m``: of every ``m``
    input channels in a row, at one position of the kernel, the ``ceil(density m)`` largest.
    """
    values = weight.detach().float()
    if granularity == "weight":
        return _top(values.abs(), left(values.numel(), density))
    if granularity == "kernel":
        size = values.flatten(2).norm(dim=2) if values.dim() > 2 else values.abs()
        kept = _top(size, left(size.numel(), density))
        return kept.reshape(*size.shape, *[1] * (values.dim() - size.dim()))
    outputs, inputs = values.shape[:2]
    flat = values.reshape(outputs, inputs, -1)
    if granularity == "block":
        rows, columns = block
        parts = flat.reshape(outputs // rows, rows, inputs // columns, columns, -1)
        size = parts.square().sum((1, 3))
        kept = _top(size, left(size.numel(), density))[:, None, :, None]
        return kept.expand_as(parts).reshape(values.shape).contiguous()
    groups = flat.reshape(outputs, inputs // m, m, -1).abs()
    chosen = groups.topk(math.ceil(density * m - 1e-9), dim=2).indices
    return torch.zeros_like(groups, dtype=torch.int8).scatter_(2, chosen, 1).reshape(values.shape)


def _top(size: Tensor, count: int) -> Tensor:
    kept = torch.zeros(size.numel(), dtype=torch.int8, device=size.device)
    kept[size.flatten().topk(count).indices] = 1
    return kept.reshape(size.shape)


def polynomial(time: float, begin: float, end: float, first: float, last: float) -> float:
    """Density at ``time``: from ``first`` at ``begin`` to ``last`` at ``end``, as Zhu and Gupta 2017, arXiv:1710.01878,
    eq. 1, write it for the part that is left out.

    >>> [round(polynomial(t, 0.0, 1.0, 1.0, 0.1), 4) for t in (0.0, 0.5, 1.0)]
    [1.0, 0.2125, 0.1]
    """
    done = min(max((time - begin) / (end - begin), 0.0), 1.0)
    return last + (first - last) * (1.0 - done) ** 3
