"""Scores and drops with their intervals: what a difference between two models is worth on ``n`` samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import DataError

_Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Score:
    """How good a model is. ``mean``: a fraction (or the metric's own unit) over ``n`` samples.

    ``low``, ``high``: 95 % interval of the mean for further samples of the same kind: Wilson's (1927) for scores that
    are 0 or 1, else mean +- 1.96 standard errors; None where ``n`` cannot say (a corpus metric, whose ``n`` is 0 for
    unknown, or a single sample). ``scores``: float32 [n], means over the draws; empty for a corpus metric. ``spread``:
    standard deviation of the mean from draw to draw (0 for one draw). ``samples``: hash of the targets in order.
    """

    mean: float
    n: int
    low: float | None
    high: float | None
    name: str = "score"
    lower: bool = False
    spread: float = 0.0
    draws: int = 1
    samples: str = ""
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32), compare=False, repr=False)

    def __str__(self) -> str:
        bounds = "" if self.low is None or self.high is None else f", 95 % {self.low:.4f} to {self.high:.4f}"
        spread = f", spread {self.spread:.4f} over {self.draws} draws" if self.draws > 1 else ""
        return f"{self.name} {self.mean:.4f} (n = {self.n or 'unknown'}{bounds}{spread})"

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, for a store."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "scores"}
        return {**plain, "scores": self.scores.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "scores": np.asarray(data["scores"], np.float32)})


@dataclass(frozen=True)
class Drop:
    """How much worse a candidate is than a reference on the same ``n`` samples: ``mean``, absolute, positive is worse.

    ``low``, ``high``: 95 % interval of it; None for corpus metrics and for a single sample. ``method``: how it was got.
    """

    mean: float
    n: int
    low: float | None
    high: float | None
    method: str

    def __str__(self) -> str:
        bounds = "" if self.low is None or self.high is None else f", 95 % {self.low:.4f} to {self.high:.4f}"
        return f"{self.mean:.4f} (n = {self.n or 'unknown'}{bounds})"


def interval(scores: NDArray[np.float32]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of scores [n].

    Scores that are 0 or 1: Wilson (1927), J. Amer. Statist. Assoc. 22, 209-212. Else mean +- 1.96 s / sqrt(n);
    ``(None, None)`` for fewer than two of those.
    """
    n = len(scores)
    if n and _binary(scores):
        p = float(scores.mean(dtype=np.float64))
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
    if n < 2:
        return None, None
    mean = float(scores.mean(dtype=np.float64))
    half = _Z * float(scores.std(ddof=1, dtype=np.float64)) / math.sqrt(n)
    return mean - half, mean + half


def drop(reference: Score, candidate: Score) -> Drop:
    """By how much ``candidate`` is worse than ``reference``, paired by sample: absolute, positive is worse.

    The interval: scores that are 0 or 1, Bonett and Price's adjusted Wald (2012, J. Educ. Behav. Stat. 37, 479-488),
    which stays honest when few or no samples changed; other scores, mean difference +- 1.96 standard errors, and where
    no score differed at all the rule of three (Hanley and Lippman-Hand 1983): up to 3/n of further samples may change,
    each by as much as the scores range. Raises :class:`~bitsmith.data.DataError` for scores that cannot be paired.
    """
    if (reference.name, reference.lower) != (candidate.name, candidate.lower):
        raise DataError(f"a score of {reference.name!r} cannot be compared with one of {candidate.name!r}")
    sign = -1.0 if reference.lower else 1.0
    if not len(reference.scores) and not len(candidate.scores):
        return Drop(sign * (reference.mean - candidate.mean), 0, None, None, "corpus metric: difference only")
    n = len(reference.scores)
    if n != len(candidate.scores):
        raise DataError(f"{n} and {len(candidate.scores)} scores cannot be paired: score both on the same split")
    if reference.samples and candidate.samples and reference.samples != candidate.samples:
        raise DataError("the samples came in another order or are others: the loader must not shuffle, or be a list")
    difference = sign * (reference.scores.astype(np.float64) - candidate.scores)
    mean = float(difference.mean())
    if _binary(reference.scores) and _binary(candidate.scores):
        worse, better = ((int((difference * s > 0).sum()) + 1) / (n + 2) for s in (1, -1))
        centre = worse - better
        half = _Z * math.sqrt((worse + better - centre**2) / (n + 2))
        return Drop(mean, n, max(-1.0, centre - half), min(1.0, centre + half), "paired, Bonett-Price 2012")
    if n < 2:
        return Drop(mean, n, None, None, "one sample: difference only")
    half = _Z * float(difference.std(ddof=1)) / math.sqrt(n)
    if not difference.any():
        pooled = np.concatenate([reference.scores, candidate.scores])
        half = min(1.0, 3 / n) * float(pooled.max() - pooled.min())
        return Drop(mean, n, -half, half, "paired, rule of three")
    return Drop(mean, n, mean - half, mean + half, "paired, normal")


def _binary(scores: NDArray[np.float32]) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())
