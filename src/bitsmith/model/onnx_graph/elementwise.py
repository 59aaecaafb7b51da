"""Operators that compute element by element: arithmetic, comparisons, functions and activations."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host
from .graph import Built, Call, Compute, Given, Literal, Operator
from .types import DTYPES, NAMES


def _plain(compute: Compute) -> Callable[[Call], Compute]:
    return lambda call: compute


def _arithmetic(compute: Compute, on_numbers: Compute | None = None) -> Operator:
    return Operator(_plain(compute), ("a", "b", "c"), scalars=True, on_numbers=host.elementwise(on_numbers or compute))


def _function(compute: Compute, on_numbers: Compute | None = None) -> Operator:
    return Operator(_plain(compute), ("x",), on_numbers=host.elementwise(on_numbers) if on_numbers else None)


def _divide(a: Any, b: Any) -> Any:
    kind = next(value for value in (a, b) if isinstance(value, Tensor))
    return a / b if kind.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: Any, b: Any) -> Any:
    made = a**b
    return made.to(a.dtype) if isinstance(a, Tensor) else made


def _variadic(compute: Callable[[Any, Any], Any], on_numbers: Compute) -> Operator:
    def build(call: Call) -> Compute:
        return lambda *values: functools.reduce(compute, values)

    return Operator(build, (), scalars=True, on_numbers=host.elementwise(on_numbers))


def _mean(call: Call) -> Compute:
    return lambda *values: functools.reduce(operator.add, values) / len(values)


def _minimum(a: Any, b: Any) -> Tensor:
    return _two(torch.minimum, a, b)


def _maximum(a: Any, b: Any) -> Tensor:
    return _two(torch.maximum, a, b)


def _two(function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Tensor:
    like = next(value for value in (a, b) if isinstance(value, Tensor))
    return function(
        *(v if isinstance(v, Tensor) else torch.scalar_tensor(v, dtype=like.dtype, device=like.device) for v in (a, b))
    )


def _modulo(call: Call) -> Compute:
    return torch.fmod if call.attribute("fmod", 0) else torch.remainder


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _cast(call: Call) -> Compute:
    kind = _kind(call)
    return lambda x: x.to(kind)


def _kind(call: Call) -> torch.dtype:
    number = call.attribute("to")
    if number not in DTYPES:
        raise call.refuse(f"to {NAMES.get(number, number)}")
    return DTYPES[number]


def _clip(call: Call) -> Compute | Built:
    """Clip(0, 6) is relu6, Clip(0) is relu, other constant limits are hardtanh, as in the networks that wrote them."""
    limits: list[Any] = []
    for index in (1, 2):
        constant = call.constant(index)
        if constant is None and call.given(index):
            arguments = tuple(Given(i, tensor=True) if call.given(i) else Literal(None) for i in range(3))
            return Built(lambda x, low, high: _clamp(x, low, high), _with_constants(call, arguments))
        limits.append(None if constant is None else constant.item())
    low, high = limits

    def compute(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x if low is None and high is None else torch.clamp(x, low, high)
        if low == 0.0 and high == 6.0:
            return F.relu6(x)
        if low == 0.0 and (high is None or high >= 3.4e38):
            return F.relu(x)
        if low is not None and high is not None and low < high:
            return F.hardtanh(x, low, high)
        return x if low is None and high is None else torch.clamp(x, low, high)

    return Built(compute, (Given(0),))


def _clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    return torch.clamp(x, low, high)


def _with_constants(call: Call, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    found = []
    for index, argument in enumerate(arguments):
        constant = call.constant(index)
        found.append(argument if constant is None else Literal(constant.item()))
    if any(isinstance(a, Literal) and a.value is not None for a in found[1:]):
        raise call.refuse("with one constant and one computed limit")
    return tuple(found)


def _hard_sigmoid(call: Call) -> Compute:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


def _gelu(call: Call) -> Compute:
    approximate = call.attribute("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def _elu(call: Call) -> Compute:
    alpha = call.attribute("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def _leaky(call: Call) -> Compute:
    slope = call.attribute("alpha", 0.01)
    return lambda x: F.leaky_relu(x, slope)


def _selu(call: Call) -> Compute:
    alpha, gamma = call.attribute("alpha", 1.6732632423543772), call.attribute("gamma", 1.0507009873554805)
    return lambda x: gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def _celu(call: Call) -> Compute:
    alpha = call.attribute("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def _thresholded(call: Call) -> Compute:
    alpha = call.attribute("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, 0.0)


def _shrink(call: Call) -> Compute:
    bias, limit = call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    return lambda x: torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, 0.0))


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _axis(function: Compute, default: int) -> Callable[[Call], Compute]:
    def build(call: Call) -> Compute:
        axis = call.attribute("axis", default)
        return lambda x: function(x, axis)

    return build


def _softmax(x: Tensor, axis: int) -> Tensor:
    return torch.softmax(x, axis)


def _log_softmax(x: Tensor, axis: int) -> Tensor:
    return torch.log_softmax(x, axis)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return F.one_hot(x.argmax(axis), x.shape[axis]).movedim(-1, axis).to(x.dtype)


def _is_infinite(call: Call) -> Compute:
    positive, negative = call.attribute("detect_positive", 1), call.attribute("detect_negative", 1)
    if positive and negative:
        return torch.isinf
    return (
        torch.isposinf if positive else torch.isneginf if negative else lambda x: torch.zeros_like(x, dtype=torch.bool)
    )


def _bit_shift(call: Call) -> Compute:
    return torch.bitwise_left_shift if call.attribute("direction") == "LEFT" else torch.bitwise_right_shift


def _cast_number(call: Call) -> Compute:
    return host.elementwise(host.convert(_kind(call)))(call)


OPERATORS: dict[str, Operator] = {
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _arithmetic(_divide, host.divide),
    "Pow": _arithmetic(_power, host.power),
    "Mod": Operator(_modulo, ("a", "b"), on_numbers=host.elementwise(operator.mod)),
    "Sum": _variadic(operator.add, host.total),
    "Mean": Operator(_mean),
    "Min": _variadic(_minimum, host.least),
    "Max": _variadic(_maximum, host.greatest),
    "Equal": _arithmetic(operator.eq),
    "Less": _arithmetic(operator.lt),
    "LessOrEqual": _arithmetic(operator.le),
    "Greater": _arithmetic(operator.gt),
    "GreaterOrEqual": _arithmetic(operator.ge),
    "And": Operator(_plain(torch.logical_and), ("a", "b"), on_numbers=host.elementwise(operator.and_)),
    "Or": Operator(_plain(torch.logical_or), ("a", "b"), on_numbers=host.elementwise(operator.or_)),
    "Xor": Operator(_plain(torch.logical_xor), ("a", "b"), on_numbers=host.elementwise(operator.xor)),
    "Not": _function(torch.logical_not, host.negate_bool),
    "BitwiseAnd": Operator(_plain(torch.bitwise_and), ("a", "b")),
    "BitwiseOr": Operator(_plain(torch.bitwise_or), ("a", "b")),
    "BitwiseXor": Operator(_plain(torch.bitwise_xor), ("a", "b")),
    "BitwiseNot": _function(torch.bitwise_not),
    "BitShift": Operator(_bit_shift, ("a", "b")),
    "Where": _arithmetic(_where, host.where),
    "Cast": Operator(_cast, ("x",), on_numbers=_cast_number, note="to float16, bfloat16 and smaller floats"),
    "CastLike": Operator(_plain(lambda x, like: x.to(like.dtype)), ("x", "like")),
    "Neg": _function(torch.neg, operator.neg),
    "Abs": _function(torch.abs, abs),
    "Sign": _function(torch.sign),
    "Floor": _function(torch.floor, host.floor),
    "Ceil": _function(torch.ceil, host.ceil),
    "Round": _function(torch.round),
    "Reciprocal": _function(torch.reciprocal, lambda x: 1 / x),
    "Sqrt": _function(torch.sqrt, host.sqrt),
    "Exp": _function(torch.exp),
    "Log": _function(torch.log),
    "Erf": _function(torch.erf),
    **{
        name: _function(getattr(torch, name.lower()))
        for name in ("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh")
    },
    "IsNaN": _function(torch.isnan),
    "IsInf": Operator(_is_infinite, ("x",)),
    "Relu": _function(F.relu),
    "Clip": Operator(_clip, ("x", "low", "high")),
    "Sigmoid": _function(torch.sigmoid),
    "Tanh": _function(torch.tanh),
    "HardSigmoid": Operator(_hard_sigmoid, ("x",)),
    "HardSwish": _function(F.hardswish),
    "Gelu": Operator(_gelu, ("x",)),
    "Elu": Operator(_elu, ("x",)),
    "LeakyRelu": Operator(_leaky, ("x",)),
    "Selu": Operator(_selu, ("x",)),
    "Celu": Operator(_celu, ("x",)),
    "ThresholdedRelu": Operator(_thresholded, ("x",)),
    "Shrink": Operator(_shrink, ("x",)),
    "PRelu": Operator(_plain(_prelu), ("x", "weight"), ("weight",)),
    "Softplus": _function(F.softplus),
    "Softsign": _function(F.softsign),
    "Mish": _function(F.mish),
    "Softmax": Operator(_axis(_softmax, -1), ("x",)),
    "LogSoftmax": Operator(_axis(_log_softmax, -1), ("x",)),
    "Hardmax": Operator(_axis(_hardmax, -1), ("x",)),
}
"""Elementwise operators (a softmax normalises along its axis)."""

FUSED: dict[str, Operator] = {"bitsmith.Silu": _function(F.silu)}
