"""Metrics: one score per sample, as fractions, so that two models can be compared sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._hash import hash_function, hash_json
from .data import describe

PerSample = Callable[[Any, Any], Tensor]
"""``(output, target) -> scores`` of shape [samples]."""


class MetricError(ValueError):
    """A metric and an output or target that do not go together: says which and what to do."""


@dataclass(frozen=True)
class Metric:
    """A named metric. ``function(output, target)`` gives one score per sample, shape [n]; higher is better unless
    ``lower``. ``bounds``: the least and the greatest score there can be, where there are such: an evaluation can then
    stop before its end. Calling it checks the scores and returns them as float32, detached; raises
    :class:`MetricError`.

    >>> close = Metric("close", lambda output, target: (output - target).abs().flatten(1).amax(1) < 0.1)
    >>> close(torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0]]))
    tensor([1., 0.])
    """

    name: str
    function: PerSample
    lower: bool = False
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise MetricError(f"metric {self.name!r}: bounds={self.bounds} must be (least, greatest) score")

    def __call__(self, output: Any, target: Any) -> Tensor:
        scores = self.function(output, target)
        if not isinstance(scores, Tensor):
            raise MetricError(
                f"metric {self.name!r} returned {describe(scores)}; a tensor of one score per sample was expected"
            )
        n = _samples(output, target)
        if scores.ndim != 1 or (n is not None and len(scores) != n):
            hint = "keep the batch axis: average over the other axes only, as in scores.flatten(1).mean(1)"
            if scores.ndim == 0:
                hint = "do not average over the batch; a metric of the whole corpus goes in Task(evaluate=...)"
            raise MetricError(
                f"metric {self.name!r} returned {describe(scores)} for {'a batch' if n is None else f'{n} samples'}; "
                f"one score per sample was expected, shape [{'n' if n is None else n}]: {hint}"
            )
        scores = scores.detach().to(torch.float32)
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).sum())
            raise MetricError(f"metric {self.name!r} gave {bad} of {len(scores)} scores that are NaN or infinite")
        if self.bounds is not None and len(scores):
            low, high = float(scores.min()), float(scores.max())
            if low < self.bounds[0] or high > self.bounds[1]:
                raise MetricError(
                    f"metric {self.name!r} gave scores from {low:.6g} to {high:.6g}, outside its bounds={self.bounds}: "
                    "mend the bounds, or leave them out"
                )
        return scores


def metric(function: PerSample, lower: bool = False, name: str | None = None) -> Metric:
    """A plain function ``(output, target) -> scores [n]`` as a :class:`Metric`; a metric is returned as it is."""
    if isinstance(function, Metric):
        return function
    return Metric(name or str(getattr(function, "__name__", type(function).__name__)), function, lower)


def source_digest(function: Callable[..., Any]) -> str:
    """SHA-256 (hex) of what a metric (or another callable) computes, for the keys of a store.

    Its source, or without one its bytecode, and the values it closes over; for a :class:`Metric` also ``lower``.
    """
    if isinstance(function, Metric):
        return hash_json([function.name, function.lower, hash_function(function.function)])
    return hash_function(function)


def logits(output: Any) -> Tensor:
    """The tensor of scores in a model's output: itself, ``output["logits"]``, ``output.logits``, or a tuple's first."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise MetricError(
            f"no tensor of logits in the model's output, {describe(output)}; give a metric that picks it: "
            "bitsmith.metrics.metric(lambda output, target: ...)"
        )
    return output


def _samples(output: Any, target: Any) -> int | None:
    if isinstance(target, Tensor) and target.ndim:
        return len(target)
    try:
        found = logits(output)
    except MetricError:
        return None
    return len(found) if found.ndim else None


def _top(output: Any, target: Any, k: int) -> Tensor:
    scores = logits(output)
    classes = _class_axis(scores, target, k)
    best = scores.movedim(classes, -1).topk(k, -1).indices if k > 1 else scores.argmax(classes).unsqueeze(-1)
    hit: Tensor = (best == target.to(best.device).unsqueeze(-1)).any(-1)
    return hit.flatten(1).float().mean(1) if hit.ndim > 1 else hit.float()


def _class_axis(scores: Tensor, target: Any, k: int) -> int:
    name = f"top{k}"
    if not isinstance(target, Tensor):
        raise MetricError(f"{name} needs class indices as targets, a tensor [n]; got {describe(target)}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise MetricError(
            f"{name} needs class indices as targets, int64 [n]; got {describe(target)}. From one-hot: target.argmax(1)"
        )
    # the convention of cross_entropy: [n, classes, ...]; language models give [n, positions, classes]
    if scores.shape[:1] + scores.shape[2:] == target.shape and scores.ndim > 1:
        axis = 1
    elif scores.shape[:-1] == target.shape and scores.ndim > 1:
        axis = scores.ndim - 1
    else:
        raise MetricError(
            f"{name}: output {describe(scores)} and target {describe(target)} do not go together; "
            "expected output [n, classes, ...] and target [n, ...]"
        )
    classes = scores.shape[axis]
    if classes < 2:
        raise MetricError(
            f"{name}: the output {describe(scores)} has one logit, which is always the largest; for two classes write "
            "bitsmith.metrics.metric(lambda output, target: (output[:, 0] > 0) == target)"
        )
    if classes < k:
        raise MetricError(f"{name}: the output {describe(scores)} has only {classes} classes; use top1")
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise MetricError(
            f"{name}: targets run from {int(target.min())} to {int(target.max())}, classes from 0 to {classes - 1}; "
            "leave out what is to be ignored (such as -100) with a metric of your own"
        )
    return axis


def _top1(output: Any, target: Any) -> Tensor:
    return _top(output, target, 1)


def _top5(output: Any, target: Any) -> Tensor:
    return _top(output, target, 5)


def _squared_error(output: Any, target: Any) -> Tensor:
    predicted = logits(output)
    if not isinstance(target, Tensor) or target.shape != predicted.shape:
        raise MetricError(
            f"squared_error: output {describe(predicted)} and target {describe(target)} must have the same shape; "
            "reshape the target in the loader, such as y[:, None]"
        )
    difference = predicted.double() - target.to(predicted.device).double()
    return difference.square().reshape(len(difference), -1).mean(1)


top1 = Metric("top1", _top1, bounds=(0.0, 1.0))
"""1 if the largest logit is the target's class (the first of equal ones), else 0. Output [n, classes], target int64
[n]; with further axes (segmentation [n, classes, h, w], tokens [n, t, classes]) the fraction of its positions."""

top5 = Metric("top5", _top5, bounds=(0.0, 1.0))
"""1 if the target's class is among the five largest logits, else 0. Shapes as in :data:`top1`."""

squared_error = Metric("squared_error", _squared_error, lower=True)
"""Mean squared difference over a sample's elements. Output and target of one shape, [n, ...]. Lower is better."""
