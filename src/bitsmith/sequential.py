"""How many samples a drop needs: decisions that may stop at any sample, and bounds that hold at any ``n``, by betting.

Everywhere a *difference* is how much worse a plan scores than the float model on one sample (positive is worse), within
``[low, high]`` (``[-1, 1]`` for a metric of 0 and 1); the *drop* is the mean difference.

A hypothesis "the drop is m or more" is tested by betting on smaller differences at odds fair under it. A bettor who
stakes the fraction ``c`` multiplies the capital by ``1 + c (mu - x) / (high - mu)`` at a sample of difference ``x``,
where ``mu`` is the mean of what is still to be drawn if the drop is ``m``. If the hypothesis holds, capital that began
as 1 ever reaches ``1 / alpha`` with probability ``alpha`` at most (Ville 1939), whenever one looks. "m or less" is the
mirror image.

Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS-B 86:1 (2024), arXiv:2010.09686:
the capital of either sign and the inversion to an interval (section 4, hedged capital, here as two one-sided tests),
fixed fractions averaged instead of one learned (diversified Kelly betting), and the mean of the rest when sampling
without replacement (section 5). The same authors, Confidence sequences for sampling without replacement, NeurIPS 2020,
arXiv:2006.04347: sequences that account for the finite set, and so for what is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_FRACTIONS: Vector = np.concatenate([np.geomspace(0.01, 0.3, 10), np.linspace(0.35, 0.99, 20)])
"""The stakes, each with an equal share of the capital. Small ones win where many samples differ, ones near 1 where
hardly any does; none is 1, which could lose all at one sample."""

_BLOCK = 4096
"""Samples bet on at a time: bounds the memory, and a test decided early never looks at the rest."""

_PRIOR = 4
"""Samples that a guess adds to the seen."""

_ROUNDING = 1e-12
"""A mean is known up to that, times the greatest magnitude that a difference may have where this is over 1."""

_HALVINGS = 50
_MOST = 10**12


def decide(differences: Vector, total: int, limit: float, low: float, high: float, alpha: float) -> bool | None:
    """Whether the drop over all ``total`` samples is within ``limit``, from those seen so far; None: not known yet.

    ``differences``: [t], in the order in which they were drawn at random without replacement; an order fixed in advance
    may serve many plans. ``limit``: in the metric's own unit. True: the drop is <= ``limit`` (up to rounding, 1e-12);
    False: it is above. Either is wrong with probability ``alpha`` at most *however often one asks while the samples
    come in and whenever one stops*; only one of the two can be wrong, so nothing is shared between them. The first
    crossing decides and stays. Where the unseen samples at their worst and at their best lead to the same answer, that
    answer is certain and goes before any bet: with t = ``total`` it always does.

    Asking about many plans makes that many errors possible: divide ``alpha`` by their number where none may be wrong.
    Raises ValueError for differences outside ``[low, high]``, t > ``total`` and other arguments without a meaning.

    >>> decide(np.zeros(100), 1000, 0.01, -1.0, 1.0, 0.05) is None
    True
    >>> decide(np.zeros(400), 1000, 0.01, -1.0, 1.0, 0.05)
    True
    >>> decide(np.tile([0.0, 0.0, 0.0, 0.0, 1.0], 20), 1000, 0.01, -1.0, 1.0, 0.05)
    False
    """
    seen = _checked("decide", differences, low, high, alpha)
    _check_total("decide", seen, total)
    if not math.isfinite(limit):
        raise ValueError(f"decide(limit={limit}): must be a finite drop, in the unit of the differences")
    edge = limit + _ROUNDING * max(1.0, abs(low), abs(high))
    least, most = _certain(seen, total, low, high)
    if most <= edge:
        return True
    if least > edge:
        return False
    holds = _crossing(seen, total, edge, high, alpha)
    fails = _crossing(-seen, total, -edge, -low, alpha)
    # Equal only if neither crossed: at any one sample at most one of the two bettors wins.
    return None if holds == fails else holds < fails


def chance(differences: Vector, total: int, limit: float, low: float, high: float) -> float:
    """How likely the drop over all ``total`` samples is within ``limit``, from those seen so far: a guess that helps to
    choose what to look at next, without the guarantee of :func:`decide`.

    The rest is taken as normal with mean and variance of the seen and of four samples more, of difference 0 and
    variance ``(high - low)^2 / 8`` (1/2 for a metric of 0 and 1), so that a few samples that agree prove little; the
    mean is uncertain itself. Raises ValueError as :func:`decide` does.

    >>> seen = np.array([0.0] * 95 + [1.0] * 5)
    >>> [round(chance(seen, 1000, limit, -1.0, 1.0), 2) for limit in (0.02, 0.05, 0.08)]
    [0.12, 0.53, 0.91]
    """
    seen = _checked("chance", differences, low, high, 0.5)
    _check_total("chance", seen, total)
    known, rest = math.fsum(seen), total - len(seen)
    if not rest:
        return float(known <= (limit + _ROUNDING) * total)
    count = len(seen) + _PRIOR
    variance = (math.fsum(seen**2) + _PRIOR * (high - low) ** 2 / 8) / count * rest * (1 + rest / count)
    mean = known / count
    return 0.5 * (1 + math.erf((limit * total - known - rest * mean) / math.sqrt(2 * variance)))


def upper_bound(differences: Vector, low: float, high: float, alpha: float) -> float:
    """A bound that the drop in the population exceeds with probability ``alpha`` at most, in the metric's own unit.

    ``differences``: [n], n >= 1, independent draws from that population: all of a set whose size was fixed in advance.
    It holds for any n and any distribution within ``[low, high]``, also where no sample differs at all, and does not
    depend on the order. Within [mean, ``high``], to 1e-14 of the range and from above. For the plan that a search chose
    among K by looking at the same samples, ask for ``alpha`` / K. Raises ValueError as :func:`decide` does.

    >>> round(upper_bound(np.zeros(1000), -1.0, 1.0, 0.05), 4)
    0.0045
    """
    seen = _checked("upper_bound", differences, low, high, alpha)
    if not len(seen):
        raise ValueError("upper_bound(differences=[]): nothing can be said of no sample; pass at least one")
    values, counts = np.unique(seen, return_counts=True)
    return _bound(values, counts.astype(np.float64), high, alpha)


def interval(differences: Vector, total: int, low: float, high: float, alpha: float) -> tuple[float, float]:
    """``(lower, upper)``: where the drop over all ``total`` samples lies, with probability 1 - ``alpha`` or more.

    ``differences``: [t], as :func:`decide` takes them. All m that neither one-sided test rejects, at ``alpha`` / 2 each
    and with the capital that it has now (so the interval holds whenever one stops, at that one time), and that the
    unseen samples still allow; the mean of the seen is always within. With t = ``total`` both ends are the mean. Raises
    ValueError as :func:`decide` does.

    >>> [round(end, 4) for end in interval(np.zeros(500), 1000, -1.0, 1.0, 0.05)]
    [-0.0077, 0.0077]
    >>> interval(np.array([0.0, 1.0]), 2, -1.0, 1.0, 0.05)
    (0.5, 0.5)
    """
    seen = _checked("interval", differences, low, high, alpha)
    _check_total("interval", seen, total)
    least, most = _certain(seen, total, low, high)
    if not len(seen) or len(seen) == total:
        return least, most
    mean = min(max(math.fsum(seen) / len(seen), least), most)

    def exceeds(m: float) -> bool:
        return _log_capital(_gains(seen, total, m, high)) >= math.log(2 / alpha)

    def falls_short(m: float) -> bool:
        return _log_capital(_gains(-seen, total, m, -low)) >= math.log(2 / alpha)

    return -_least(falls_short, -mean, -least), _least(exceeds, mean, most)


def needed(limit: float, alpha: float, low: float, high: float) -> int:
    """The least n with which :func:`upper_bound` can be <= ``limit``: so many samples, and not one that differs.

    ``limit``: a drop > 0, in the metric's own unit. Raises ValueError for others, for a range without 0, and for a
    ``limit`` so small that 10^12 samples would not do.

    >>> needed(0.01, 0.05, -1.0, 1.0)
    448
    """
    _check_range("needed", low, high, alpha)
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"needed(limit={limit}): no number of samples proves a drop of 0 or less; pass a limit > 0")
    if not low <= 0 <= high:
        raise ValueError(f"needed(low={low}, high={high}): samples without a difference need a range that includes 0")

    def enough(n: int) -> bool:
        return _bound(np.zeros(1), np.array([float(n)]), high, alpha) <= limit

    most = 1
    while not enough(most):
        most *= 2
        if most > _MOST:
            raise ValueError(f"needed(limit={limit}): over 10^12 samples; pass a limit nearer to the range's {high}")
    least = most // 2  # not enough: the more samples without a difference, the lower the bound
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


# -- betting -------------------------------------------------------------------------------------------------------
#
# Why the boundary m stands for all of "the drop is m or more": mu(m) = (total m - sum of the draws before) / (draws
# left) grows with m, and the factor is 1 - c + c (high - x) / (high - mu), which grows with mu. Be the truth M >= m:
# given the draws before, E[high - x] = high - mu(M) <= high - mu(m), so the factor's mean is <= 1 and the capital a
# nonnegative supermartingale. mu uses earlier draws only and x <= high, so every factor is known to be >= 1 - c > 0.
# The same growth makes "capital(m) has reached 1 / alpha" true of all m above one bound, which can be bisected for.


def _gains(seen: Vector, total: int, m: float, high: float) -> Vector:
    """[t], ``(mu - x) / (high - mu)``: what a whole stake on smaller differences wins at each draw; >= -1."""
    before = np.concatenate([[0.0], np.cumsum(seen[:-1])]) if len(seen) else seen
    mu = (total * m - before) / (total - np.arange(len(seen)))
    # mu < high as long as the hypothesis is possible, which the caller has seen to; below 1e-15 it is rounding
    gains: Vector = (mu - seen) / np.maximum(high - mu, 1e-15 * max(1.0, abs(high)))
    return gains


def _crossing(seen: Vector, total: int, m: float, high: float, alpha: float) -> int:
    """The first draw (from 0) after which the capital against "m or more" is ``1 / alpha``; t if it never was."""
    gains = _gains(seen, total, m, high)
    capital = np.zeros(len(_FRACTIONS))
    for start in range(0, len(gains), _BLOCK):
        logs = np.log1p(np.multiply.outer(gains[start : start + _BLOCK], _FRACTIONS))
        logs[0] += capital
        logs = np.cumsum(logs, axis=0)
        capital = logs[-1]
        reached = _log_mean(logs) >= -math.log(alpha)
        if reached.any():
            return start + int(reached.argmax())
    return len(gains)


def _log_capital(gains: Vector, counts: Vector | None = None) -> float:
    """The logarithm of the capital after gains [t], each met ``counts`` [t] times (once)."""
    logs = np.log1p(np.multiply.outer(gains, _FRACTIONS))
    return float(_log_mean((logs.sum(0) if counts is None else counts @ logs)[None])[0])


def _log_mean(logs: Vector) -> Vector:
    """[t]: logarithms of the means of exp(logs [t, fractions])."""
    greatest = logs.max(axis=1)
    means: Vector = greatest + np.log(np.exp(logs - greatest[:, None]).mean(axis=1))
    return means


def _bound(values: Vector, counts: Vector, high: float, alpha: float) -> float:
    """:func:`upper_bound` of ``values`` that were met so often. Independent draws: mu is m at all of them."""

    def exceeds(m: float) -> bool:
        return _log_capital((m - values) / (high - m), counts) >= -math.log(alpha)

    # The mean itself is never rejected: log(1 + y) <= y, and the gains there sum to 0.
    mean = math.fsum(values * counts) / math.fsum(counts)
    return _least(exceeds, min(mean, high), high)


def _least(rejected: Callable[[float], bool], low: float, high: float) -> float:
    """The least m within (low, high] that is rejected, found from above; all beyond it are. ``high`` if none is."""
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _certain(seen: Vector, total: int, low: float, high: float) -> tuple[float, float]:
    """The least and the greatest drop that the unseen samples allow."""
    known, unseen = math.fsum(seen), total - len(seen)
    return (known + unseen * low) / total, (known + unseen * high) / total


# -- arguments -----------------------------------------------------------------------------------------------------


def _check_range(where: str, low: float, high: float, alpha: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{where}(low={low}, high={high}): must be finite, low < high; -1 and 1 for scores of 0 and 1")
    if not 0 < alpha < 1:
        raise ValueError(f"{where}(alpha={alpha}): must lie between 0 and 1, both excluded; 0.05 for 95 %")


def _checked(where: str, differences: Vector, low: float, high: float, alpha: float) -> Vector:
    """The differences as float64 [t]; what is over the range by rounding only is put back."""
    _check_range(where, low, high, alpha)
    seen = np.asarray(differences, np.float64)
    if seen.ndim != 1:
        raise ValueError(f"{where}(differences of shape {seen.shape}): must be [t], one number per sample")
    slack = 1e-6 * (high - low)  # scores are kept as float32
    wrong = ~((seen >= low - slack) & (seen <= high + slack))  # so NaN is wrong too
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"{where}(differences[{at}]={seen[at]}): outside [{low}, {high}]; pass the range that the metric's "
            "differences can have, and no NaN"
        )
    return np.clip(seen, low, high)


def _check_total(where: str, seen: Vector, total: int) -> None:
    if total < 1 or len(seen) > total:
        raise ValueError(f"{where}(total={total}): {len(seen)} differences; pass the size of the whole set, 1 or more")
