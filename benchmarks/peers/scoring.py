"""What a model does with a peer's data: batches, hits, and what a plan's bits come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Inputs = Mapping[str, NDArray[Any]]
Logits = Callable[[Inputs], NDArray[Any]]

FLOAT_BITS, BATCH = 32, 50


def batches(inputs: Inputs, size: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Batches of ``size`` samples; the last one is smaller where they do not divide."""
    for start in range(0, samples(inputs), size):
        yield {name: array[start : start + size] for name, array in inputs.items()}


def samples(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def correct(
    logits: Logits, data: Iterable[Inputs], target: NDArray[Any], count: Callable[[int], None] = lambda _: None
) -> NDArray[np.int64]:
    """1 for each sample whose largest logit is its class. ``count(samples)`` is called before each forward."""
    hits, start = [], 0
    for batch in data:
        size = samples(batch)
        count(size)
        hits.append(logits(batch).reshape(size, -1).argmax(1) == target[start : start + size])
        start += size
    if start != len(target):
        raise ValueError(f"{start} samples for {len(target)} classes")
    return np.concatenate(hits).astype(np.int64)


def named(inputs: Inputs, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The inputs under a model's own input names: a single input takes the first name."""
    if len(inputs) == 1:
        return {names[0]: next(iter(inputs.values()))}
    return {name: inputs[name] for name in names}


def mean_bits(plan: Mapping[str, int | str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Mean weight bits of a plan's layers by their number of weights, where float is 32 bits."""
    total = sum(sizes[name] for name in plan)
    bits = sum(sizes[name] * (value if isinstance(value, int) else FLOAT_BITS) for name, value in plan.items())
    return {"weights_mean": bits / total if total else None, "float_counts_as": FLOAT_BITS}
