"""Operators that make, move and cut tensors without computing with their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host
from .errors import InvalidGraphError
from .graph import Built, Call, Compute, Operator
from .host import sizes


def _shape(call: Call) -> Compute:
    start, end = call.attribute("start", 0), call.attribute("end")
    return lambda x: tuple(x.shape)[start:end] if isinstance(x, Tensor) else (len(x),)[start:end]


def _size(x: Any) -> Any:
    return math.prod(x.shape) if isinstance(x, Tensor) else len(x)


def _reshape(call: Call) -> Compute:
    keep_zero = call.attribute("allowzero", 0)

    def compute(x: Tensor, shape: Any) -> Tensor:
        wanted = sizes(shape)
        if not keep_zero:
            wanted = tuple(
                x.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(wanted)
            )
        return x.reshape(wanted)

    return compute


def _reshape_numbers(call: Call) -> Compute:
    def compute(value: Any, shape: Any) -> Any:
        return host.vector(value)[0] if len(host.vector(shape)) == 0 else host.vector(value)

    return compute


def _flatten(call: Call) -> Compute:
    axis = call.attribute("axis", 1)

    def compute(x: Tensor) -> Tensor:
        at = axis + x.dim() if axis < 0 else axis
        if at == 1 and x.dim() > 1:
            return x.flatten(1)
        return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))

    return compute


def _transpose(call: Call) -> Compute:
    order = call.attribute("perm")
    return lambda x: x.permute(order if order is not None else tuple(range(x.dim()))[::-1])


def _squeeze(call: Call) -> Compute:
    def compute(x: Tensor, axes: Any = None) -> Tensor:
        if axes is None:
            return x.squeeze()
        given = sizes(axes)
        for axis in given:
            if x.shape[axis] != 1:
                raise InvalidGraphError(
                    f"Squeeze at {call.node.label!r}: axis {axis} of shape {tuple(x.shape)} is not 1"
                )
        return x.squeeze(given)

    return compute


def _unsqueeze(x: Tensor, axes: Any) -> Tensor:
    given = sizes(axes)
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def _expand(x: Tensor, shape: Any) -> Tensor:
    wanted = sizes(shape)
    rank = max(x.dim(), len(wanted))
    have = (1,) * (rank - x.dim()) + tuple(x.shape)
    want = (1,) * (rank - len(wanted)) + tuple(wanted)
    # a 1 in the shape leaves the tensor's own size
    return x.expand(tuple(h if isinstance(w, int) and w == 1 else w for h, w in zip(have, want, strict=True)))


def _expand_numbers(call: Call) -> Compute:
    def compute(value: Any, shape: Any) -> Any:
        length = host.product(shape)
        if not isinstance(length, int):
            raise call.refuse("of a number to a dynamic length")
        found = host.vector(value)
        return found * length if len(found) == 1 else found

    return compute


def _tile(x: Tensor, repeats: Any) -> Tensor:
    return x.repeat(sizes(repeats))


def _concat(call: Call) -> Compute:
    axis = call.attribute("axis")
    return lambda *tensors: torch.cat(tensors, axis)


def _split(call: Call) -> Compute | Built:
    axis, outputs = call.attribute("axis", 0), len(call.node.outputs)

    def by_sizes(x: Tensor, parts: Any) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes(parts)), axis)

    def equally(x: Tensor) -> tuple[Tensor, ...]:
        length = -(-x.shape[axis] // outputs)
        last = x.shape[axis] - length * (outputs - 1)
        return torch.split(x, [length] * (outputs - 1) + [last], axis)

    compute = by_sizes if call.given(1) else equally
    # one output is a tensor, not a tuple of one
    return (lambda *arguments: compute(*arguments)[0]) if outputs == 1 else compute


_GREATEST = (2**31 - 1, 2**63 - 1)


def _slice(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    starts, ends = host.vector(starts), host.vector(ends)
    axes = tuple(range(len(starts))) if axes is None else host.vector(axes)
    steps = (1,) * len(starts) if steps is None else host.vector(steps)
    index: list[slice] = [slice(None)] * x.dim()
    backwards: list[int] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.dim()
        if step > 0:
            index[axis] = slice(_bound(start), _bound(end), step)
            continue
        # x[start:end:-s] of the flipped axis
        size = x.shape[axis]
        first = max(min(start + size if start < 0 else start, size - 1), 0)
        # backwards to the greatest integer is to the first element, as ONNX Runtime reads it
        last = -1 if end in _GREATEST else max(end + size if end < 0 else end, -1)
        index[axis] = slice(size - 1 - first, max(size - 1 - last, size - 1 - first), -step)
        backwards.append(axis)
    if backwards:
        x = x.flip(backwards)
    return x[tuple(index)]


def _bound(at: Any) -> Any:
    """A bound of a slice; the least int64 means before the first element, which torch would warn about."""
    return at if not isinstance(at, int) or at > -(2**62) else 0


def _pad(call: Call) -> Compute:
    mode = call.attribute("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise call.refuse(f"with mode {mode!r}")

    def compute(x: Tensor, pads: Any, value: Any = None, axes: Any = None) -> Tensor:
        given = host.vector(pads)
        along = range(x.dim()) if axes is None else [axis % x.dim() for axis in host.vector(axes)]
        count = len(given) // 2
        sides = {axis: (given[i], given[i + count]) for i, axis in enumerate(along)}
        if mode == "constant":
            flat = [size for axis in reversed(range(min(sides), x.dim())) for size in sides.get(axis, (0, 0))]
            fill = 0.0 if value is None else value
            return F.pad(x, flat, value=fill) if any(not isinstance(s, int) or s for s in flat) else x
        for axis, (before, after) in sides.items():
            x = _repeat_border(x, axis, before, after, mode)
        return x

    return compute


def _repeat_border(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """One axis longer on both sides by mirrored, last or wrapped values; negative sizes crop."""
    if before < 0 or after < 0:
        x = x.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0))
        before, after = max(before, 0), max(after, 0)
    if not before and not after:
        return x
    size = x.shape[axis]
    at = torch.arange(-before, size + after, device=x.device)
    if mode == "edge":
        at = at.clamp(0, size - 1)
    elif mode == "wrap":
        at = at % size
    else:
        period = max(2 * size - 2, 1)
        at = at % period
        at = torch.where(at >= size, period - at, at)
    return x.index_select(axis, at)


def _range(call: Call) -> Compute:
    def compute(start: Any, limit: Any, step: Any) -> Tensor:
        return torch.arange(start, limit, step)

    return compute


def _constant_of_shape(call: Call) -> Compute:
    value = call.attribute("value")
    number = 0.0 if value is None else value.item()
    kind = torch.float32 if value is None else value.dtype
    return lambda shape: torch.full(sizes(shape), number, dtype=kind)


def _eye_like(call: Call) -> Compute:
    shift = call.attribute("k", 0)

    def compute(x: Tensor) -> Tensor:
        ones = torch.ones_like(x, dtype=_dtype(call, x))
        return ones.triu(shift).tril(shift)

    return compute


def _dtype(call: Call, x: Tensor) -> torch.dtype:
    from .types import DTYPES

    number = call.attribute("dtype")
    return x.dtype if number is None else DTYPES[number]


def _trilu(call: Call) -> Compute:
    upper = call.attribute("upper", 1)

    def compute(x: Tensor, k: Any = 0) -> Tensor:
        at = host.vector(k)[0]
        return torch.triu(x, at) if upper else torch.tril(x, at)

    return compute


def _depth_to_space(call: Call) -> Compute:
    block, mode = call.attribute("blocksize"), call.attribute("mode", "DCR")

    def compute(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if mode == "CRD":
            return F.pixel_shuffle(x, block)
        parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, c // block**2, h * block, w * block)

    return compute


def _space_to_depth(call: Call) -> Compute:
    block = call.attribute("blocksize")

    def compute(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, c * block**2, h // block, w // block)

    return compute


def _same(call: Call) -> Compute:
    return lambda x, *rest: x


def _numbers(function: Compute) -> Any:
    return lambda call: function


def _concatenate(call: Call) -> Compute:
    return host.concatenate


def _unsqueezed(call: Call) -> Compute:
    return lambda value, axes: host.vector(value)


def _split_numbers(call: Call) -> Compute:
    outputs = len(call.node.outputs)

    def compute(value: Any, parts: Sequence[int] | None = None) -> Any:
        lengths = list(parts) if parts is not None else [-(-len(value) // outputs)] * outputs
        found, at = [], 0
        for length in lengths:
            found.append(value[at : at + length])
            at += length
        return found[0] if outputs == 1 else tuple(found)

    return compute


OPERATORS: dict[str, Operator] = {
    "Shape": Operator(_shape, on_numbers=_shape),
    "Size": Operator(lambda call: _size, on_numbers=lambda call: _size),
    "Reshape": Operator(_reshape, ("x",), host=(1,), on_numbers=_reshape_numbers),
    "Flatten": Operator(_flatten, ("x",)),
    "Transpose": Operator(_transpose, ("x",), on_numbers=_same),
    "Squeeze": Operator(_squeeze, ("x",), host=(1,), on_numbers=_numbers(host.squeezed)),
    "Unsqueeze": Operator(_numbers(_unsqueeze), ("x",), host=(1,), on_numbers=_unsqueezed),
    "Expand": Operator(_numbers(_expand), ("x",), host=(1,), on_numbers=_expand_numbers),
    "Tile": Operator(_numbers(_tile), ("x",), host=(1,)),
    "Concat": Operator(_concat, on_numbers=_concatenate),
    "Split": Operator(_split, ("x",), host=(1,), on_numbers=_split_numbers),
    "Slice": Operator(_numbers(_slice), ("x",), host=(1, 2, 3, 4), on_numbers=_numbers(host.cut)),
    "Pad": Operator(_pad, ("x",), host=(1, 2, 3)),
    "Range": Operator(_range, host=(0, 1, 2)),
    "ConstantOfShape": Operator(_constant_of_shape, host=(0,)),
    "EyeLike": Operator(_eye_like, ("x",)),
    "Trilu": Operator(_trilu, ("x",), host=(1,)),
    "DepthToSpace": Operator(_depth_to_space, ("x",)),
    "SpaceToDepth": Operator(_space_to_depth, ("x",)),
    "Identity": Operator(_same, ("x",), on_numbers=_same),
    "Dropout": Operator(_same, ("x",), note="training mode"),
}
"""Shapes, views, concatenation, padding and tensors made from sizes."""
