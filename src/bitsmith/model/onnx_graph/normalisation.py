"""Normalisations. Batch normalisation uses its statistics whatever the network's mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Built, Call, Compute, Operator


def _batch(call: Call) -> Built:
    if call.attribute("training_mode", 0) or call.wants(1):
        raise call.refuse("in training mode (export the network after .eval())")
    eps = call.attribute("epsilon", 1e-5)

    # ONNX has scale and bias before the statistics
    def compute(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.1, eps)

    return Built(compute, settings={"eps": eps})


def _layer(call: Call) -> Compute:
    if call.wants(1) or call.wants(2):
        raise call.refuse("with mean or deviation as outputs")
    axis, eps = call.attribute("axis", -1), call.attribute("epsilon", 1e-5)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:] if axis < 0 else x.shape[axis % x.dim() :]
        if weight.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(x, tuple(shape), weight, bias, eps)
        made = F.layer_norm(x, tuple(shape), None, None, eps) * weight  # a scale that is broadcast
        return made if bias is None else made + bias

    return compute


def _instance(call: Call) -> Compute:
    eps = call.attribute("epsilon", 1e-5)
    return lambda x, weight, bias: F.instance_norm(x, None, None, weight, bias, True, 0.1, eps)


def _group(call: Call) -> Compute:
    groups, eps, per_channel = call.attribute("num_groups"), call.attribute("epsilon", 1e-5), call.opset >= 21

    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not per_channel:  # before opset 21 scale and bias belong to groups
            each = x.shape[1] // groups
            weight, bias = weight.repeat_interleave(each), bias.repeat_interleave(each)
        return F.group_norm(x, groups, weight, bias, eps)

    return compute


def _local_response(call: Call) -> Compute:
    """x / (bias + alpha / size * sum of squares over ``size`` channels) ** beta (Krizhevsky et al. 2012, 3.3)."""
    size, bias = call.attribute("size"), call.attribute("bias", 1.0)
    alpha, beta = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75)
    before = (size - 1) // 2

    def compute(x: Tensor) -> Tensor:
        squares = F.pad((x * x).movedim(1, -1), (before, size - 1 - before))
        total = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
        scaled: Tensor = x / (bias + alpha / size * total) ** beta
        return scaled

    return compute


def _lp(call: Call) -> Compute:
    axis, p = call.attribute("axis", -1), call.attribute("p", 2)
    norm = torch.abs if p == 1 else torch.square

    def compute(x: Tensor) -> Tensor:
        length = norm(x).sum(axis, keepdim=True)
        length = length if p == 1 else length.sqrt()
        return torch.where(length == 0, 0.0, x / length)

    return compute


_SCALED = ("x", "weight", "bias")

OPERATORS: dict[str, Operator] = {
    "BatchNormalization": Operator(
        _batch, (*_SCALED, "running_mean", "running_var"), ("weight", "bias"), note="training mode"
    ),
    "LayerNormalization": Operator(_layer, _SCALED, ("weight", "bias"), note="the second and third output"),
    "InstanceNormalization": Operator(_instance, _SCALED, ("weight", "bias")),
    "GroupNormalization": Operator(_group, _SCALED, ("weight", "bias")),
    "LRN": Operator(_local_response, ("x",)),
    "LpNormalization": Operator(_lp, ("x",)),
}
"""Normalisations."""
