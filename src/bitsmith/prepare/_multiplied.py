"""A factor per channel in front of a layer that nothing in front of it can take in: a multiplication of its input."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import call
from ..model.network import Network, duplicate
from ._layers import Layer

BUFFER = "input_factor"
"""The buffer of such a layer's module, shape (inputs,)."""


def multiply_input(module: nn.Module, factor: Tensor) -> None:
    """Let ``module`` compute with its first argument times ``factor``, shape (inputs,), along the last axis."""
    weight = next(module.parameters())
    module.register_buffer(BUFFER, factor.to(weight.device, weight.dtype))
    module.register_forward_pre_hook(_multiplied)


def _multiplied(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * module.get_buffer(BUFFER), *args[1:])


def confirmed(net: Network, found: Iterable[Layer]) -> dict[str, Layer]:
    """Which of these layers are a module of their own whose first argument can be multiplied, and the weight divided,
    with the same output; by site name. Tried on the recorded example."""
    replica = duplicate(net.model).eval()
    good: dict[str, Layer] = {}
    for layer in found:
        path, _, leaf = layer.key.rpartition(".")
        module = replica.get_submodule(path)
        if layer.site.name == path and not hasattr(module, BUFFER):
            module.register_forward_hook(_trial(layer, leaf, good), with_kwargs=True)
    with torch.no_grad():
        call(replica, net.example, net.forward)
    return good


def _trial(layer: Layer, leaf: str, good: dict[str, Layer]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        if args[0].shape[-1:] != layer.site.operands[0].shape[-1:]:
            return
        twin = copy.deepcopy(module)
        twin._forward_hooks.clear()
        weight: Tensor = getattr(twin, leaf)
        # factors that differ for every channel, so that no exchange of channels goes unseen
        factor = torch.linspace(0.5, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
        weight.div_(factor)
        multiply_input(twin, factor)
        got = twin(*args, **kwargs)
        if not output.isfinite().all():  # calibration says so
            return
        if got.shape == output.shape and torch.allclose(got, output, rtol=1e-4, atol=1e-4 * float(output.abs().max())):
            good[layer.site.name] = layer

    return hook
