"""Reductions over axes, which are an attribute or an input, by operator and opset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import host
from .graph import Call, Compute, Operator

Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: Reduce, alone: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Call], Compute]:
    """``alone``: what is left of the function when no axis is reduced."""

    def build(call: Call) -> Compute:
        keep, given = bool(call.attribute("keepdims", 1)), call.attribute("axes")
        nothing = call.attribute("noop_with_empty_axes", 0)

        def compute(x: Tensor, axes: Any = None) -> Tensor:
            found = tuple(given or ()) if axes is None else host.vector(axes)
            if not found:
                if nothing:
                    return alone(x)
                found = tuple(range(x.dim()))
            return function(x, found, keep)

        return compute

    return build


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    return torch.div(x.sum(axes, keep), _count(x, axes), rounding_mode="trunc").to(x.dtype)


def _count(x: Tensor, axes: tuple[int, ...]) -> int:
    found = 1
    for axis in axes:
        found *= x.shape[axis]
    return found


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep).log()


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep)


def _largest(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.amax(axes, keep)


def _least(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.amin(axes, keep)


def _l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return (x * x).sum(axes, keep).sqrt()


def _squares(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _operator(function: Reduce, alone: Callable[[Tensor], Tensor] = lambda x: x) -> Operator:
    return Operator(_reduction(function, alone), ("x",), host=(1,))


def _numbers(function: Callable[..., Any]) -> Callable[[Call], Compute]:
    """On a vector; a single number left of it is a scalar or a vector of one."""

    def build(call: Call) -> Compute:
        keep = call.attribute("keepdims", 1)

        def compute(value: Any, axes: Any = None) -> Any:
            made = function(value)
            return (made,) if keep and isinstance(value, tuple) else made

        return compute

    return build


OPERATORS: dict[str, Operator] = {
    "ReduceMean": _operator(_mean),
    "ReduceSum": Operator(
        _reduction(_sum), ("x",), host=(1,), on_numbers=_numbers(lambda v: host.total(0, *host.vector(v)))
    ),
    "ReduceProd": Operator(_reduction(_product), ("x",), host=(1,), on_numbers=_numbers(host.product)),
    "ReduceMax": Operator(
        _reduction(_largest), ("x",), host=(1,), on_numbers=_numbers(lambda v: host.greatest(*host.vector(v)))
    ),
    "ReduceMin": Operator(
        _reduction(_least), ("x",), host=(1,), on_numbers=_numbers(lambda v: host.least(*host.vector(v)))
    ),
    "ReduceL1": _operator(_l1, torch.abs),
    "ReduceL2": _operator(_l2, torch.abs),
    "ReduceLogSum": _operator(_log_sum, torch.log),
    "ReduceLogSumExp": _operator(_log_sum_exp),
    "ReduceSumSquare": _operator(_squares, torch.square),
}
"""Reductions over axes."""
