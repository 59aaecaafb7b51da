from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from bitsmith.compare import Score, drop, interval
from bitsmith.data import DataError


def made(scores: NDArray[np.float64] | list[float], lower: bool = False, name: str = "m") -> Score:
    values = np.asarray(scores, np.float32)
    low, high = interval(values)
    return Score(float(values.mean()), len(values), low, high, name, lower, scores=values)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_interval_of_zeros_and_ones_is_wilsons(n: int, share: float) -> None:
    hits = round(n * share)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert interval(np.repeat(np.float32([1, 0]), [hits, n - hits])) == pytest.approx(tuple(expected), abs=1e-9)


def test_interval_of_other_scores_is_normal() -> None:
    scores = np.random.default_rng(0).normal(size=400).astype(np.float32)
    half = 1.959964 * scores.std(ddof=1) / 20
    assert interval(scores) == pytest.approx((scores.mean() - half, scores.mean() + half), rel=1e-5)
    assert interval(scores[:1]) == (None, None)


def test_drop_is_positive_when_worse_in_both_directions() -> None:
    assert drop(made([1, 1, 1, 0]), made([1, 0, 0, 0])).mean == 0.5
    assert drop(made([1, 0, 0, 0]), made([1, 1, 1, 0])).mean == -0.5
    assert drop(made([0.1, 0.3], lower=True), made([0.2, 0.6], lower=True)).mean == pytest.approx(0.2)


def test_no_changed_sample_is_no_proof_of_no_change() -> None:
    for n in (50, 5000):
        binary = drop(made([1.0, 0.0] * (n // 2)), made([1.0, 0.0] * (n // 2)))
        graded = drop(made([0.25, 0.75] * (n // 2)), made([0.25, 0.75] * (n // 2)))
        assert binary.mean == graded.mean == 0
        # the rule of three as the independent reference: 3 / n
        assert binary.high == pytest.approx(3 / n, rel=0.15)
        assert binary.low == -binary.high  # type: ignore[operator]
        assert graded.high == pytest.approx(3 / n * 0.5)


@pytest.mark.parametrize(("worse", "better"), [(0.0, 0.0), (0.01, 0.0), (0.03, 0.02), (0.2, 0.1)])
def test_paired_interval_covers_the_truth(worse: float, better: float) -> None:
    rng, n, trials = np.random.default_rng(1), 200, 1500
    hits = 0
    for _ in range(trials):
        kind = rng.choice(3, n, p=[worse, better, 1 - worse - better])
        reference = np.where(kind == 0, 1.0, np.where(kind == 1, 0.0, rng.integers(0, 2, n)))
        candidate = np.where(kind == 0, 0.0, np.where(kind == 1, 1.0, reference))
        lost = drop(made(reference), made(candidate))
        assert lost.low is not None
        assert lost.high is not None
        hits += lost.low <= worse - better <= lost.high
    assert hits / trials > 0.935  # 95 % less three standard errors of the simulation


def test_graded_interval_is_paired() -> None:
    rng = np.random.default_rng(2)
    reference = rng.random(300)
    candidate = reference - 0.01 + 0.005 * rng.normal(size=300)
    lost = drop(made(reference), made(candidate))
    difference = (reference.astype(np.float32) - candidate.astype(np.float32)).astype(np.float64)
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(300)
    assert (lost.low, lost.high) == pytest.approx((difference.mean() - half, difference.mean() + half), rel=1e-4)
    assert lost.high - lost.low < 0.01  # type: ignore[operator]  # unpaired it would be 0.09


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_interval_holds_the_mean_and_stays_in_range(pairs: list[tuple[bool, bool]]) -> None:
    reference, candidate = ([float(p[i]) for p in pairs] for i in (0, 1))
    lost, gained = drop(made(reference), made(candidate)), drop(made(candidate), made(reference))
    assert lost.low is not None
    assert lost.high is not None
    assert -1 <= lost.low <= lost.mean <= lost.high <= 1
    assert (gained.mean, gained.low) == pytest.approx((-lost.mean, -lost.high))


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(DataError, match="3 and 2 scores"):
        drop(made([1, 0, 1]), made([1, 0]))
    with pytest.raises(DataError, match="'m' cannot be compared with one of 'k'"):
        drop(made([1, 0]), made([1, 0], name="k"))
    with pytest.raises(DataError, match="cannot be compared"):
        drop(made([1, 0]), made([1, 0], lower=True))
    with pytest.raises(DataError, match="3 and 0 scores"):
        drop(made([1, 0, 1]), Score(0.5, 0, None, None, "m"))
    single = drop(made([0.5]), made([0.25]))
    assert (single.mean, single.low, single.high) == (0.25, None, None)


def test_a_score_survives_json() -> None:
    score = made(np.random.default_rng(3).random(7))
    back = Score.from_json(json.loads(json.dumps(score.to_json())))
    assert back == score
    np.testing.assert_array_equal(back.scores, score.scores)
    assert back.scores.dtype == np.float32
    corpus = Score(0.5, 0, None, None, "f1")
    assert Score.from_json(corpus.to_json()) == corpus
