"""Matrix products. With a constant matrix they are ``linear``: one weight row for each output channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Argument, Built, Call, Compute, Given, Operator, Own, Weight


def transposed(weight: Weight) -> Weight:
    """The weight with its two axes swapped. What was swapped before is the original again, so tied stays tied."""
    key = weight.key[:-1] if weight.key[-1] == "t" else (*weight.key, "t")
    return Weight(weight.value.t().contiguous(), key, weight.learned)


def _matmul(call: Call) -> Compute | Built:
    left, right = call.constant(0), call.constant(1)
    if left is None and right is not None and right.dim() == 2:
        return Built(F.linear, (Given(0, tensor=True), Own("weight")), {"weight": transposed(call.weight(1))})
    arguments: list[Argument] = [Given(0, tensor=True), Given(1, tensor=True)]
    weights = {}
    for index, constant in enumerate((left, right)):
        if constant is not None:
            name = f"weight{index}" if left is not None and right is not None else "weight"
            weights[name] = call.weight(index)
            arguments[index] = Own(name)
    return Built(torch.matmul, tuple(arguments), weights)


def _linear(call: Call) -> Built:
    """``Linear`` (x, matrix as MatMul has it, bias): made of MatMul and Add by ``fuse``."""
    weights = {"weight": transposed(call.weight(1)), "bias": _row(call.weight(2))}
    return Built(F.linear, (Given(0, tensor=True), Own("weight"), Own("bias")), weights)


def _row(bias: Weight) -> Weight:
    return bias if bias.value.dim() == 1 else Weight(bias.value.reshape(-1), (*bias.key, "row"), bias.learned)


def _scaled(weight: Weight, factor: float) -> Weight:
    if factor == 1.0:
        return weight
    return Weight(weight.value * factor, (*weight.key, f"x{factor!r}"), weight.learned)


def _gemm(call: Call) -> Compute | Built:
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    flip_a, flip_b = call.attribute("transA", 0), call.attribute("transB", 0)
    matrix, bias = call.constant(1), call.constant(2)
    if matrix is not None and call.constant(0) is None:
        weight = call.weight(1) if flip_b else transposed(call.weight(1))
        weights = {"weight": _scaled(weight, alpha)}
        outputs = weights["weight"].value.shape[0]
        arguments: tuple[Argument, ...] = (Given(0, tensor=True), Own("weight"))
        if bias is not None and bias.numel() == outputs and bias.shape[-1] == outputs:
            weights["bias"] = _scaled(_row(call.weight(2)), beta)
            arguments += (Own("bias"),)
        elif call.given(2):
            return _with_addition(call, weights, beta, flip_a)
        if flip_a:
            return Built(lambda x, *rest: F.linear(x.t(), *rest), arguments, weights)
        return Built(F.linear, arguments, weights)

    def compute(a: Tensor, b: Tensor, c: Any = None) -> Tensor:
        made = torch.matmul(a.t() if flip_a else a, b.t() if flip_b else b)
        made = made if alpha == 1.0 else made * alpha
        return made if c is None else made + (c if beta == 1.0 else c * beta)

    return compute


def _with_addition(call: Call, weights: dict[str, Weight], beta: float, flip_a: int) -> Built:
    """A third input that is not one value for each output: it is added."""
    third: Argument = Given(2, tensor=True)
    if call.constant(2) is not None:
        third, weights = Own("addend"), {**weights, "addend": call.weight(2)}

    def compute(x: Tensor, weight: Tensor, c: Tensor) -> Tensor:
        return F.linear(x.t() if flip_a else x, weight) + (c if beta == 1.0 else c * beta)

    return Built(compute, (Given(0, tensor=True), Own("weight"), third), weights)


def _einsum(call: Call) -> Compute:
    equation = call.attribute("equation")
    return lambda *operands: torch.einsum(equation, *operands)


OPERATORS: dict[str, Operator] = {
    "MatMul": Operator(_matmul),
    "Gemm": Operator(_gemm, ("a", "b", "bias"), ("a", "b", "bias")),
    "Einsum": Operator(_einsum, ("a", "b", "c"), ("a", "b", "c")),
}
"""Matrix products."""

FUSED: dict[str, Operator] = {"bitsmith.Linear": Operator(_linear)}
