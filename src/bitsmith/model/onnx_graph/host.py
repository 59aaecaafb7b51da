"""Arithmetic of shapes on Python numbers: a scalar is a number, a vector a tuple of numbers.

Sizes of tensors stay sizes that way: under ``torch.export`` they are symbols (``torch.SymInt``), and a batch size that
passes through Shape, Gather and Concat into Reshape stays dynamic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidGraphError
from .graph import Call, Compute

INT64 = range(-(2**63), 2**63)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
# not typed in torch
_sym_not: Callable[[Any], Any] = torch.sym_not
_sym_float: Callable[[Any], Any] = torch.sym_float
_sym_int: Callable[[Any], Any] = torch.sym_int


def as_numbers(value: Tensor) -> Any:
    """A scalar or a vector as Python numbers."""
    found = value.tolist()
    return tuple(found) if isinstance(found, list) else found


def as_tensor(value: Any, device: torch.device | None = None) -> Tensor:
    """A number or a tuple of them as a tensor: int64, float32 or bool."""
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(n, _SYMBOLS) for n in numbers):
        parts = [torch.scalar_tensor(n, dtype=_dtype(n), device=device) for n in numbers]
        return torch.stack(parts) if isinstance(value, tuple) else parts[0]
    return torch.tensor(value, dtype=_dtype(numbers[0]) if numbers else torch.int64, device=device)


def _dtype(number: Any) -> torch.dtype:
    if isinstance(number, (bool, torch.SymBool)):
        return torch.bool
    return torch.float32 if isinstance(number, (float, torch.SymFloat)) else torch.int64


def hostable(value: Tensor) -> bool:
    """Whether a constant can stand in the arithmetic of shapes: a short vector or a scalar."""
    return value.dim() <= 1 and value.numel() <= 64


def sizes(value: Any) -> tuple[Any, ...]:
    """A vector of sizes or axes, whatever form the file gives it in. Sizes beyond int64 are an error."""
    found = value if isinstance(value, tuple) else tuple(value) if isinstance(value, list) else (value,)
    known = [n for n in found if isinstance(n, int)]
    if any(n not in INT64 for n in known) or (all(n > 0 for n in known) and math.prod(known) not in INT64):
        raise InvalidGraphError(
            f"a shape {list(found)} needs more than int64 can count; the arithmetic of sizes in this file overflows "
            "(look for a Shape, Mul or ReduceProd chain fed by a wrong constant)"
        )
    return found


def _each(function: Callable[..., Any], *values: Any) -> Any:
    """``function`` on numbers and vectors, a number (or a vector of one) beside every element."""
    lengths = {len(v) for v in values if isinstance(v, tuple)}
    if not lengths:
        return _checked(function(*values))
    length = max(lengths) if lengths != {0, 1} else 0
    if lengths - {1, length}:
        raise InvalidGraphError(f"vectors of {sorted(lengths)} elements do not go together in the arithmetic of shapes")
    columns = [(v * length if len(v) == 1 else v) if isinstance(v, tuple) else (v,) * length for v in values]
    return tuple(_checked(function(*row)) for row in zip(*columns, strict=True))


def _checked(number: Any) -> Any:
    if isinstance(number, int) and number not in INT64:
        raise InvalidGraphError(
            f"the arithmetic of sizes gives {number}, which int64 cannot hold; the constants of this file are wrong"
        )
    return number


def elementwise(function: Callable[..., Any]) -> Callable[[Call], Compute]:
    """The builder of an elementwise function on numbers."""

    def build(call: Call) -> Compute:
        return lambda *values: _each(function, *values)

    return build


def _integral(number: Any) -> bool:
    return isinstance(number, (int, torch.SymInt))


def divide(a: Any, b: Any) -> Any:
    """Integers are divided towards zero, as ONNX does."""
    if not (_integral(a) and _integral(b)):
        return a / b
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # sizes are not negative


def where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


def sqrt(value: Any) -> Any:
    return torch.sym_sqrt(value) if isinstance(value, _SYMBOLS) else math.sqrt(value)


def power(a: Any, b: Any) -> Any:
    return type(a)(a**b) if isinstance(a, (int, float)) else a**b


def negate_bool(value: Any) -> Any:
    return _sym_not(value) if isinstance(value, torch.SymBool) else not value


def floor(value: Any) -> Any:
    return value if _integral(value) else _sym_float(math.floor(value))


def ceil(value: Any) -> Any:
    return value if _integral(value) else _sym_float(math.ceil(value))


def least(*values: Any) -> Any:
    return _fold(torch.sym_min, values)


def greatest(*values: Any) -> Any:
    return _fold(torch.sym_max, values)


def total(*values: Any) -> Any:
    return _fold(operator.add, values)


def _fold(function: Callable[[Any, Any], Any], values: tuple[Any, ...]) -> Any:
    found = values[0]
    for value in values[1:]:
        found = function(found, value)
    return found


def convert(kind: torch.dtype) -> Callable[[Any], Any]:
    """Cast of numbers."""
    if kind is torch.bool:
        return lambda value: value != 0
    if kind.is_floating_point:
        return lambda value: _sym_float(value)
    return lambda value: int(value) if isinstance(value, (bool, int, float)) else _sym_int(value)


# -- vectors ---------------------------------------------------------------------------------------------------------


def vector(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def take(values: Any, indices: Any) -> Any:
    """Gather."""
    try:
        return tuple(values[i] for i in indices) if isinstance(indices, tuple) else values[indices]
    except IndexError:
        raise InvalidGraphError(f"a shape of {len(values)} sizes has no element {indices}") from None


def concatenate(*values: Any) -> tuple[Any, ...]:
    return tuple(number for value in values for number in vector(value))


def cut(value: tuple[Any, ...], starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> tuple[Any, ...]:
    """Slice of a vector."""
    start, end = vector(starts)[0], vector(ends)[0]
    step = 1 if steps is None else vector(steps)[0]
    if step < 0 and end < -len(value):
        end = None
    return value[start:end:step]


def squeezed(value: Any, axes: Any = None) -> Any:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def product(value: Any) -> Any:
    return _checked(_fold(operator.mul, (1, *vector(value))))
