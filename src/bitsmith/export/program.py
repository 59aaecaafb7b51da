"""The applied network as one exported program that every runtime reads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .._memory import uncollected
from ..data import call
from ..model.apply import materialised
from ..model.intercept import CHILD


class ExportError(RuntimeError):
    """A network that cannot be exported: which, why, what to do."""


def exported_program(net: nn.Module, example: Any, dynamic_batch: bool = False) -> ExportedProgram:
    """The network's forward pass as a graph of ATen and quantized reference operations.

    ``example``: a tensor, a tuple of positional inputs or a mapping of keyword inputs, as one item of a loader.
    ``dynamic_batch``: the first axis of every input tensor may have any size. The network is exported in evaluation
    mode and left as it was. Raises :class:`ExportError` with the cause if the forward pass cannot be exported.
    """
    args, kwargs = _arguments(example)
    shapes = _dynamic_shapes(args, kwargs) if dynamic_batch else None
    with _evaluating(net), quiet(), uncollected(), torch.no_grad():
        try:
            return torch.export.export(net, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(
                f"{type(net).__name__} cannot be exported: {first}. Its forward pass must be a fixed graph for the "
                "example: no branches on tensor values, no numpy, no in-place change of inputs"
            ) from error


def applied_program(net: nn.Module, example: Any, batch: int | None = None) -> tuple[ExportedProgram, Any]:
    """The program of an applied network with weights as they ship, and the example it was made with.

    A network that carries no plan is exported as it is. ``batch`` replaces the example's first size.
    """
    if batch is not None:
        example = with_batch(example, batch)
    return exported_program(shipped(net, example), example), example


def shipped(net: nn.Module, example: Any) -> nn.Module:
    """A copy of an applied network with weights as they ship; a network that carries no plan itself."""
    if CHILD not in dict(net.named_children()):
        return net
    return materialised(net, lambda replica: call(replica, example))


def with_batch(example: Any, batch: int) -> Any:
    """The example with its samples repeated or cut to ``batch``, along the first axis of every tensor.

    >>> with_batch({"x": torch.arange(3)}, 5)
    {'x': tensor([0, 1, 2, 0, 1])}
    """
    if isinstance(example, Mapping):
        return {name: with_batch(value, batch) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(with_batch(value, batch) for value in example)
    if not isinstance(example, torch.Tensor) or not example.dim() or len(example) == batch:
        return example
    return example[torch.arange(batch) % len(example)]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch's exporters say about themselves (not about the network)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx|copyreg).*")
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*dynamic_axes.*|.*opset.*", category=UserWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def _dynamic_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    batch = torch.export.Dim("batch", min=1)

    def shape(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) and value.dim() else None

    return {name: shape(value) for name, value in kwargs.items()} if kwargs else tuple(map(shape, args))
