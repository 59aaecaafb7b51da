"""What "good" means: the data, the metric, and how two models are compared on them."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._hash import update
from .compare import Drop as Drop
from .compare import Score as Score
from .compare import drop as drop
from .compare import interval as interval
from .data import DataError, Forward, batch_size, call, check_loader, describe, device_of, items, tensors_in, to_device
from .metrics import Metric, PerSample, metric

Split = Literal["calibration", "validation", "test"]
Progress = Callable[[int, int | None], None]
"""``progress(done, total)`` in batches; ``total`` is None where the loader has no length."""


class TaskError(ValueError):
    """A task that does not say what good means, or asks for two things at once."""


class NonFiniteError(ValueError):
    """The model's output has NaN: no score can be given."""


@dataclass(frozen=True)
class Task:
    """The data and what is measured on it.

    ``calibration``, ``validation``, ``test``: loaders of ``(inputs, target)`` that can be read again and keep their
    order (see ``bitsmith.data``). ``test`` is read once, for the report. ``metric``: one score per sample (a
    :class:`~bitsmith.metrics.Metric`, or a plain function of output and target). ``evaluate``: instead of it, a corpus
    metric of the model on the validation data, such as F1. ``lower``: smaller is better. ``loss(output, target)``: a
    scalar. ``forward(model, inputs)``: how to run the model where ``model(x)``, ``model(*x)``, ``model(**x)`` do not
    fit. ``draws``: how often each sample is scored, for networks that draw random numbers.

    Raises :class:`TaskError` and :class:`~bitsmith.data.DataError`.
    """

    calibration: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None = None
    metric: Metric | PerSample | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    forward: Forward | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    lower: bool = False
    draws: int = 1

    def __post_init__(self) -> None:
        for role in ("calibration", "validation", "test"):
            loader = getattr(self, role)
            if loader is not None:
                check_loader(loader, role)
            elif role != "test":
                raise TaskError(f"Task({role}=None): a loader is needed, such as a list [(inputs, target), ...]")
        if (self.metric is None) == (self.evaluate is None):
            raise TaskError(
                "Task: give either metric= (one score per sample, such as bitsmith.metrics.top1) "
                "or evaluate= (model -> float, for a metric of the whole corpus)"
            )
        for name in ("metric", "loss", "forward", "evaluate"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TaskError(f"Task({name}={value!r}): a function was expected")
        if isinstance(self.metric, Metric) and self.lower and not self.metric.lower:
            raise TaskError(
                f"Task(lower=True): the metric {self.metric.name!r} says higher is better; set lower in the metric"
            )
        if self.metric is not None:
            object.__setattr__(self, "metric", metric(self.metric, lower=self.lower))
            object.__setattr__(self, "lower", self.scored_by.lower)
        if self.evaluate is not None and self.test is not None:
            raise TaskError(
                "Task(evaluate=..., test=...): evaluate knows its own data only, so test would never be read; "
                "leave test out, or give a metric with one score per sample"
            )
        if not isinstance(self.draws, int) or self.draws < 1:
            raise TaskError(f"Task(draws={self.draws!r}): must be a whole number from 1")

    @property
    def scored_by(self) -> Metric:
        """The per-sample metric; raises :class:`TaskError` for a task with ``evaluate``."""
        if not isinstance(self.metric, Metric):
            raise TaskError("this task has a corpus metric (evaluate=) and no score per sample")
        return self.metric

    @property
    def name(self) -> str:
        """The name of what is measured."""
        if self.evaluate is not None:
            return getattr(self.evaluate, "__name__", type(self.evaluate).__name__)
        return self.scored_by.name

    def loader(self, split: Split) -> Iterable[Any]:
        """The loader of that split; raises :class:`TaskError` for a test split that was not given."""
        if split not in ("calibration", "validation", "test"):
            raise TaskError(f"split {split!r}: must be 'calibration', 'validation' or 'test'")
        found: Iterable[Any] | None = getattr(self, split)
        if found is None:
            raise TaskError("this task has no test data: give Task(test=loader)")
        return found


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every training flag and every buffer is as before."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    # counters of noise and running statistics may be buffers: written in place, or replaced
    buffers = [(module, name, value, value.clone()) for module in modules for name, value in _buffers(module)]
    if isinstance(model, nn.Module):
        model.eval()
    try:
        # inference_mode would make tensors without a version, which recording relies on
        with torch.no_grad():
            yield
    finally:
        for module, name, value, before in buffers:
            module._buffers[name] = value
            if not torch.equal(value, before):
                with torch.no_grad():
                    value.copy_(before)
        for module, training in zip(modules, flags, strict=True):
            module.training = training


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in module._buffers.items() if value is not None)


def score(model: Any, task: Task, split: Split = "validation", progress: Progress | None = None) -> Score:
    """Score a model (or any function of the inputs) on a split; with ``draws`` > 1, so many times over.

    The model keeps its training flags and buffers. Raises :class:`NonFiniteError` for NaN in the output,
    :class:`~bitsmith.data.DataError`, :class:`~bitsmith.data.ModelRunError`, :class:`~bitsmith.metrics.MetricError`.
    """
    if task.evaluate is not None:
        return _corpus(model, task, split)
    passes: list[NDArray[np.float32]] = []
    targets = hashlib.sha256()
    loader = task.loader(split)
    with evaluating(model):
        for draw in range(task.draws):
            parts = []
            for _, target, output in _outputs(model, task, loader, split, progress, draw):
                parts.append(task.scored_by(output, target).cpu().numpy())
                if draw == 0:
                    _add(targets, target)
            passes.append(np.concatenate(parts))
            if len(passes[-1]) != len(passes[0]):
                raise DataError(
                    f"the {split} loader gave {len(passes[0])} samples, then {len(passes[-1])}: give a list"
                )
    means = [float(scores.mean(dtype=np.float64)) for scores in passes]
    scores = passes[0] if task.draws == 1 else np.stack(passes).mean(axis=0, dtype=np.float64).astype(np.float32)
    mean = statistics.fmean(means)
    low, high = interval(scores)
    spread = statistics.stdev(means) if task.draws > 1 else 0.0
    metric = task.scored_by
    return Score(
        mean, len(scores), low, high, metric.name, metric.lower, spread, task.draws, targets.hexdigest(), scores
    )


def batch_scores(
    model: Callable[[Any], Any], task: Task, inputs: Any, target: Any, where: str, device: torch.device | None = None
) -> NDArray[np.float32]:
    """The metric's scores of one batch, [samples]. ``model(inputs)`` gives the output; ``where`` names the batch."""
    output = model(inputs)
    _check_output(output, inputs, where)
    return task.scored_by(output, to_device(target, device)).cpu().numpy()


def score_of(scores: NDArray[np.float32], task: Task, samples: str) -> Score:
    """The :class:`Score` of per-sample scores that were got one way or another; ``samples``: hash of the targets."""
    mean, (low, high), metric = float(scores.mean(dtype=np.float64)), interval(scores), task.scored_by
    return Score(mean, len(scores), low, high, metric.name, metric.lower, samples=samples, scores=scores)


def _corpus(model: Any, task: Task, split: Split) -> Score:
    assert task.evaluate is not None
    if split != "validation":
        raise TaskError(f"this task's evaluate= scores its own data only, not the {split} split")
    values = []
    with evaluating(model):
        for _ in range(task.draws):
            value = float(task.evaluate(model))
            if not math.isfinite(value):
                raise NonFiniteError(f"evaluate ({task.name}) returned {value}: the model's output may have NaN")
            values.append(value)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), 0, None, None, task.name, task.lower, spread, task.draws)


def _outputs(
    model: Any, task: Task, loader: Iterable[Any], split: Split, progress: Progress | None = None, draw: int = 0
) -> Iterator[tuple[Any, Any, Any]]:
    """Inputs, target and checked output of each batch; targets are put where the model is."""
    device = device_of(model)
    batches = _length(loader)
    total = None if batches is None else batches * task.draws
    for index, (inputs, target) in enumerate(items(loader, split)):
        output = call(model, inputs, task.forward)
        _check_output(output, inputs, f"{split} item {index}")
        yield inputs, to_device(target, device), output
        if progress is not None:
            progress((batches or 0) * draw + index + 1, total)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _check_output(output: Any, inputs: Any, where: str) -> None:
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            bad = int(torch.isnan(tensor).sum())
            dirty = any(x.is_floating_point() and bool(torch.isnan(x).any()) for x in tensors_in(inputs))
            cause = "its inputs have NaN too: clean the data" if dirty else "its inputs have none: the model made them"
            raise NonFiniteError(f"{where}: the output {describe(tensor)} has {bad} NaN of {tensor.numel()}; {cause}")


def _add(hasher: Any, target: Any) -> None:
    try:
        update(hasher, target)
    except TypeError:
        update(hasher, describe(target))  # a target of some other type: what can be told of it


def mean_loss(model: Any, task: Task, split: Split = "calibration") -> float:
    """The task's loss over a split: the mean over samples, in the loss's own unit; flags and buffers stay.

    Each batch's loss counts by its number of samples, as it is taken for their mean.
    """
    if task.loss is None:
        raise TaskError("this task has no loss: give Task(loss=...), such as torch.nn.functional.cross_entropy")
    total, n = 0.0, 0
    with evaluating(model):
        for index, (inputs, target, output) in enumerate(_outputs(model, task, task.loader(split), split)):
            loss = task.loss(output, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TaskError(
                    f"loss(output, target) returned {describe(loss)}; one number was expected (reduction='mean')"
                )
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(f"{split} item {index}: the loss is {value}")
            size = len(target) if isinstance(target, Tensor) else batch_size(inputs)
            total, n = total + value * size, n + size
    return total / n
