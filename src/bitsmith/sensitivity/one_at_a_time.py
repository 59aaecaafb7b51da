"""Measured sensitivity: one site quantized, everything else float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..data import call, items, tensors_in
from ..plan import Plan
from ..task import Task, evaluating, mean_loss
from ..technique import Technique


def output_error(
    model: nn.Module,
    task: Task,
    pairs: Sequence[tuple[str, Technique]],
    simulate: Callable[[Plan], nn.Module],
) -> Iterator[float]:
    """Relative squared error of the model's output, ``sum |y_q - y|^2 / sum |y|^2`` over the calibration data.

    One pass of the data for the float output and one per pair; float outputs are kept on the CPU.
    """
    reference = _outputs(model, task)
    power = sum(float(y.double().square().sum()) for y in reference)
    for site, technique in pairs:
        net = simulate(Plan({site: technique}))
        error = sum(
            float((got.double() - expected.double()).square().sum())
            for got, expected in zip(_outputs(net, task), reference, strict=True)
        )
        yield error / power if power else error


def loss_rise(
    model: nn.Module,
    task: Task,
    pairs: Sequence[tuple[str, Technique]],
    simulate: Callable[[Plan], nn.Module],
) -> Iterator[float]:
    """Rise of the task's mean loss over the calibration data; needs ``Task(loss=...)``. Never below 0."""
    base = mean_loss(model, task)
    for site, technique in pairs:
        yield max(mean_loss(simulate(Plan({site: technique})), task) - base, 0.0)


def _outputs(model: nn.Module, task: Task) -> list[Tensor]:
    found: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for inputs, _ in items(task.calibration, "calibration"):
            output = call(model, inputs, task.forward)
            found += [tensor.detach().cpu() for tensor in tensors_in(output) if tensor.is_floating_point()]
    return found
