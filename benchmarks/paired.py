"""Models on the same samples: McNemar's exact test, Holm's correction, divergence from float, bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def mcnemar(first: Array, second: Array) -> float:
    """Two-sided exact p-value that two classifiers, right or wrong on the same samples [n], are equally often right.

    Only the samples on which they differ tell (McNemar 1947): a fair coin decides each, under the null.

    >>> right, wrong = np.ones(10, bool), np.zeros(10, bool)
    >>> round(mcnemar(right, wrong), 6), mcnemar(right, right)
    (0.001953, 1.0)
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if not only_first + only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of one family (Holm 1979): the k-th smallest of m times m - k + 1, never decreasing.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, highest = {}, 0.0
    ordered = sorted(values, key=lambda name: values[name])
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, values[name] * (len(ordered) - rank)))
        adjusted[name] = highest
    return adjusted


def divergence(reference: Array, logits: Array) -> Array:
    """Kullback-Leibler divergence of each sample [n], in nats, of the classes' distribution from the reference's.

    Both [n, classes], logits.

    >>> divergence(np.zeros((1, 2)), np.zeros((1, 2)))
    array([0.])
    """
    p, q = _log_softmax(reference), _log_softmax(logits)
    found: Array = (np.exp(p) * (p - q)).sum(1)
    return found


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def mean_interval(values: Array, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval (percentile method) of the mean of [n]."""
    return _interval(values[_draws(len(values), draws, seed)].mean(1))


def ratio_interval(numerator: Array, denominator: Array, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of two means over the same samples [n]."""
    chosen = _draws(len(numerator), draws, seed)
    return _interval(numerator[chosen].mean(1) / denominator[chosen].mean(1))


def pooled_drop(pairs: Sequence[tuple[Array, Array]], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over networks of how much less often the second of each pair is right than the first, and its interval.

    Each pair: right or wrong of float and of the candidate on the same samples; a network counts as one.
    """
    lost = [first.astype(np.float64) - second.astype(np.float64) for first, second in pairs]
    means = np.mean([values[_draws(len(values), draws, seed + k)].mean(1) for k, values in enumerate(lost)], axis=0)
    return (float(np.mean([values.mean() for values in lost])), *_interval(means))


def _draws(samples: int, draws: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, samples, (draws, samples))


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
