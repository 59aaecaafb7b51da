"""The float torch model of a job and the steps that tuners with a size constraint share: evaluation and bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .common import ROUNDING, Job, Run
from .scoring import BATCH, Inputs, Logits, batches, correct


def float_model(job: Job) -> nn.Module:
    """A fresh float model. MiniLM's fitted head is kept beside the job's ONNX file."""
    from benchmarks.int8_tasks import NETWORKS
    from bitsmith.zoo.data import data_root

    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    root = data_root()
    if root is None:
        raise FileNotFoundError("the data folder: set BITSMITH_DATA")
    return NETWORKS[job.network].model(root, job.onnx.parent).eval()


def tensors(inputs: Inputs) -> Tensor | dict[str, Tensor]:
    """A batch as the zoo's models take it: the single input, or all by name."""
    found = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def forward(model: Any, batch: Tensor | dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**batch) if isinstance(batch, dict) else model(batch)
    return output


def logits(model: Any) -> Logits:
    def run(batch: Inputs) -> Any:
        with torch.no_grad():
            return forward(model, tensors(batch)).numpy()

    return run


def evaluate(run: Run, model: Any, size: int = BATCH) -> float:
    """Accuracy on the validation data, counted as an evaluation."""
    data = batches(run.job.inputs("validation"), size)
    hits = correct(logits(model), data, run.job.target("validation"), lambda n: run.counts.add("evaluation", n))
    return float(hits.mean())


def smallest(
    run: Run, low: float, high: float, trials: int, build: Callable[[float], nn.Module]
) -> tuple[float, nn.Module, float] | None:
    """What a user of a tuner does whose constraint is a size, not an accuracy: bisects it, with an evaluation each.

    The smallest of ``trials`` sizes that keeps the budget: ``(size, model, score)``. ``low`` comes first, then the
    geometric mean of the largest size that failed and the smallest that did not; ``high`` is never built.
    """
    kept, size = None, low
    for _ in range(trials):
        model = build(size)
        score = evaluate(run, model)
        if run.job.float_score - score <= run.job.budget + ROUNDING:
            kept, high = (size, model, score), size
            if size == low:
                break
        else:
            low = size
        size = math.sqrt(low * high)
    return kept


Choices = Literal["eight", "narrow", "wide"]


def tuned(
    run: Run, low: float, high: float, trials: int, build: Callable[[Choices, float], nn.Module]
) -> tuple[float, nn.Module, float] | None:
    """The smallest size that keeps the budget, or None; mean bits of weights from ``low`` to ``high``.

    ``build(choices, size)``: all in 8 bits comes first (``eight``). Where that holds, only fewer are offered
    (``narrow``), else more as well (``wide``): offered all, the tuners pay for 4 bits here with 16 there, by scores
    that are not exact, and miss the network that is all in 8.
    """
    kept = smallest(run, 8, 8, 1, partial(build, "eight"))
    if kept is None:
        return smallest(run, 8, high, trials - 1, partial(build, "wide"))
    return (smallest(run, low, 8, trials - 1, partial(build, "narrow")) if low < 8 else None) or kept
