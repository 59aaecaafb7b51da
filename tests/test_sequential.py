from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, hypergeom

from bitsmith import sequential
from bitsmith.sequential import decide, interval, needed, upper_bound

Vector = NDArray[np.float64]
DIFFERENCES = st.lists(st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1), min_size=1, max_size=40)
ALPHAS = st.floats(0.001, 0.5)


def flips(total: int, worse: int, better: int) -> Vector:
    return np.repeat([1.0, -1.0, 0.0], [worse, better, total - worse - better])


def stop(order: Vector, limit: float, alpha: float) -> tuple[int, bool]:
    """Where one who looks after every draw stops, and with which answer: what is decided stays decided."""
    least, most = 0, len(order)
    while most - least > 1:
        middle = (least + most) // 2
        if decide(order[:middle], len(order), limit, -1.0, 1.0, alpha) is None:
            least = middle
        else:
            most = middle
    answer = decide(order[:most], len(order), limit, -1.0, 1.0, alpha)
    assert answer is not None
    return most, answer


# -- the equation ----------------------------------------------------------------------------------------------------


def slow_capitals(seen: list[float], total: int, m: float, low: float, high: float) -> tuple[list[float], list[float]]:
    """The mean capital after each draw of those who bet on less and on more than m, by the equation as printed."""
    fractions = [float(c) for c in sequential._FRACTIONS]
    less, more = ([1.0] * len(fractions) for _ in range(2))
    means: tuple[list[float], list[float]] = ([], [])
    for i, x in enumerate(seen, start=1):
        mu = (total * m - sum(seen[: i - 1])) / (total - i + 1)
        less = [capital * (1 - c / (high - mu) * (x - mu)) for capital, c in zip(less, fractions, strict=True)]
        more = [capital * (1 + c / (mu - low) * (x - mu)) for capital, c in zip(more, fractions, strict=True)]
        means[0].append(sum(less) / len(less))
        means[1].append(sum(more) / len(more))
    return means


def slow_decide(seen: list[float], total: int, limit: float, low: float, high: float, alpha: float) -> bool | None:
    rest = total - len(seen)
    if sum(seen) + rest * high <= total * (limit + 1e-12):
        return True
    if sum(seen) + rest * low > total * (limit + 1e-12):
        return False
    for less, more in zip(*slow_capitals(seen, total, limit + 1e-12, low, high), strict=True):
        if less >= 1 / alpha or more >= 1 / alpha:
            return less >= 1 / alpha
    return None


@pytest.mark.parametrize("block", [7, 4096])
def test_decisions_are_the_equations(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(sequential, "_BLOCK", block)
    rng, found = np.random.default_rng(0), []
    for trial in range(150):
        total = int(rng.integers(5, 120))
        low, high = (-1.0, 1.0) if trial % 2 else (-0.5, 2.0)
        seen = rng.choice([low, high, 0.0, 0.1, -0.2], total, p=[0.1, 0.1, 0.5, 0.2, 0.1])[: rng.integers(total + 1)]
        limit = float(rng.normal(0.02, 0.2))
        found.append(decide(seen, total, limit, low, high, 0.2))
        assert found[-1] == slow_decide(seen.tolist(), total, limit, low, high, 0.2)
    assert min(found.count(answer) for answer in (True, False, None)) > 10


def test_capital_is_the_equations() -> None:
    seen = np.random.default_rng(1).permutation(flips(200, 20, 10))[:150]
    less, more = slow_capitals(seen.tolist(), 200, 0.04, -1.0, 1.0)
    for t in (1, 2, 70, 150):
        gains = sequential._gains(seen[:t], 200, 0.04, 1.0), sequential._gains(-seen[:t], 200, -0.04, 1.0)
        assert [sequential._log_capital(gain) for gain in gains] == pytest.approx(
            [math.log(less[t - 1]), math.log(more[t - 1])], abs=1e-10
        )


def test_the_upper_bound_is_where_the_capital_reaches_its_goal() -> None:
    x = flips(300, 9, 4)

    def capital(m: float) -> float:
        products = [math.prod(1 - c / (1 - m) * (v - m) for v in x.tolist()) for c in sequential._FRACTIONS]
        return sum(products) / len(products)

    bound = upper_bound(x, -1.0, 1.0, 0.05)
    assert capital(bound - 1e-9) < 20 <= capital(bound + 1e-12)
    assert upper_bound(np.random.default_rng(2).permutation(x), -1.0, 1.0, 0.05) == bound


def test_the_interval_inverts_both_tests() -> None:
    seen = np.random.default_rng(3).permutation(flips(400, 20, 12))[:250]
    lower, upper = interval(seen, 400, -1.0, 1.0, 0.1)
    assert slow_capitals(seen.tolist(), 400, upper - 1e-7, -1.0, 1.0)[0][-1] < 20
    assert slow_capitals(seen.tolist(), 400, upper + 1e-9, -1.0, 1.0)[0][-1] >= 20
    assert slow_capitals(seen.tolist(), 400, lower + 1e-7, -1.0, 1.0)[1][-1] < 20
    assert slow_capitals(seen.tolist(), 400, lower - 1e-9, -1.0, 1.0)[1][-1] >= 20
    assert lower < seen.mean() < upper


# -- certainty -------------------------------------------------------------------------------------------------------


@given(DIFFERENCES, st.floats(-1.2, 1.2), ALPHAS)
@settings(deadline=None)
def test_who_has_seen_all_knows(values: list[float], limit: float, alpha: float) -> None:
    x, mean = np.array(values), math.fsum(values) / len(values)
    if abs(mean - limit - 1e-12) > 1e-15:
        assert decide(x, len(x), limit, -1.0, 1.0, alpha) is (mean <= limit + 1e-12)
    assert decide(x, len(x), mean, -1.0, 1.0, alpha) is True
    assert decide(x, len(x), mean - 1e-9, -1.0, 1.0, alpha) is False
    assert interval(x, len(x), -1.0, 1.0, alpha) == (mean, mean)


@pytest.mark.parametrize("total", [3, 7, 436, 1222, 9973])
def test_a_drop_of_exactly_the_limit_is_within_it(total: int) -> None:
    for worse in {1, 2, total // 3, total // 2}:
        x = flips(total, worse, 0)
        assert decide(x, total, worse / total, -1.0, 1.0, 0.05) is True
        assert decide(x, total, (worse - 0.5) / total, -1.0, 1.0, 0.05) is False


def test_unseen_samples_that_cannot_matter_are_not_waited_for() -> None:
    sure = 1e-300  # no bet can win as much
    worse_first = np.r_[np.ones(10), np.zeros(90)]
    assert [decide(worse_first[:t], 100, -0.8, -1.0, 1.0, sure) for t in (9, 10, 11)] == [None, None, False]
    assert decide(np.zeros(0), 100, 1.0, -1.0, 1.0, sure) is True
    assert decide(np.zeros(0), 100, -1.1, -1.0, 1.0, sure) is False
    assert decide(np.zeros(0), 100, 0.0, -1.0, 1.0, sure) is None
    assert [decide(np.zeros(t), 100, 0.105, -1.0, 1.0, sure) for t in (89, 90)] == [None, True]
    # certainty goes before a bet that was won and wrong
    misleading = np.r_[np.zeros(900), np.ones(100)]
    assert decide(misleading[:900], 1000, 0.01, -1.0, 1.0, 0.05) is True
    assert decide(misleading, 1000, 0.01, -1.0, 1.0, 0.05) is False


# -- errors and power ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "worse", "better", "limit", "truth"),
    [
        (300, 4, 0, 0.01, False),  # one sample over the limit
        (300, 3, 0, 0.01, True),  # exactly at it
        (400, 21, 12, 0.02, False),
        (400, 20, 12, 0.02, True),
        (200, 60, 49, 0.05, False),
        (200, 60, 50, 0.05, True),
    ],
)
def test_errors_are_rare_whenever_one_stops(total: int, worse: int, better: int, limit: float, truth: bool) -> None:
    rng, x, trials, alpha = np.random.default_rng(4), flips(total, worse, better), 300, 0.05
    wrong = sum(stop(rng.permutation(x), limit, alpha)[1] is not truth for _ in range(trials))
    # were the rate alpha, more than that would be seen once in 10,000 runs
    assert wrong <= binom.isf(1e-4, trials, alpha)


def test_errors_are_rare_for_graded_differences() -> None:
    rng, wrong = np.random.default_rng(5), 0
    for trial in range(400):
        x = np.clip(rng.normal(0, 0.02, 300) + rng.choice([0.0, 0.3], 300, p=[0.95, 0.05]), -1, 1)
        limit = x.mean() - 1e-6 if trial % 2 else x.mean() + 1e-6
        wrong += stop(rng.permutation(x), limit, 0.05)[1] is (trial % 2 == 1)
    assert wrong <= binom.isf(1e-4, 400, 0.05)


@pytest.mark.parametrize(("worse", "better"), [(0.003, 0.0), (0.02, 0.01), (0.1, 0.1)])
@pytest.mark.parametrize("n", [300, 1000])
def test_the_upper_bound_covers_rare_differences(n: int, worse: float, better: float) -> None:
    rng, trials = np.random.default_rng(6), 400
    draws = rng.choice([1.0, -1.0, 0.0], (trials, n), p=[worse, better, 1 - worse - better])
    bounds = [upper_bound(x, -1.0, 1.0, 0.05) for x in draws]
    missed = sum(bound < worse - better for bound in bounds)
    assert missed <= binom.isf(1e-4, trials, 0.05)
    # and is no further off than twice the normal approximation, plus what no sample that differs costs
    assert np.median(bounds) < worse - better + 2 * 1.645 * math.sqrt((worse + better) / n) + 5 / n


def test_the_interval_covers_where_one_stops() -> None:
    rng, missed, x = np.random.default_rng(7), 0, flips(400, 20, 12)
    for _ in range(150):
        order = rng.permutation(x)
        seen = order[: stop(order, 0.02, 0.1)[0]]
        lower, upper = interval(seen, 400, -1.0, 1.0, 0.1)
        missed += not lower - 1e-12 <= 0.02 <= upper + 1e-12
    assert missed <= binom.isf(1e-4, 150, 0.1)


def test_clear_cases_are_decided_early() -> None:
    rng = np.random.default_rng(8)
    stops = [stop(rng.permutation(flips(1000, 60, 10)), 0.01, 0.05) for _ in range(60)]
    assert not any(answer for _, answer in stops)
    assert np.mean([at for at, _ in stops]) < 300
    at, answer = stop(np.zeros(1000), 0.01, 0.05)
    assert answer is True
    assert at < 400
    # rare differences cost little: as accurate as the rule of three within a factor
    for n in (300, 1000, 10_000):
        assert 3 / n < upper_bound(np.zeros(n), -1.0, 1.0, 0.05) < 5 / n


def test_a_long_set_is_decided_beyond_the_first_block() -> None:
    x = np.random.default_rng(9).permutation(flips(30_000, 400, 100))
    at, answer = stop(x, 0.0075, 0.05)
    assert answer is False
    assert sequential._BLOCK < at < len(x) / 2
    assert upper_bound(x, -1.0, 1.0, 0.05) == pytest.approx(0.0126, abs=1e-4)


# -- how the answers move --------------------------------------------------------------------------------------------


@given(DIFFERENCES, st.integers(0, 60), st.floats(-0.5, 0.5), ALPHAS, ALPHAS)
@settings(deadline=None)
def test_less_certainty_never_says_less(values: list[float], unseen: int, limit: float, one: float, two: float) -> None:
    x, total = np.array(values), len(values) + unseen
    strict, loose = sorted((one, two))
    if decide(x, total, limit, -1.0, 1.0, strict) is not None:
        assert decide(x, total, limit, -1.0, 1.0, loose) is not None
    assert x.mean() - 1e-12 <= upper_bound(x, -1.0, 1.0, loose) <= upper_bound(x, -1.0, 1.0, strict) <= 1.0
    (low, high), (lower, higher) = (interval(x, total, -1.0, 1.0, alpha) for alpha in (loose, strict))
    assert lower <= low <= high <= higher
    assert (x.sum() - unseen) / total - 1e-12 <= lower
    assert higher <= (x.sum() + unseen) / total + 1e-12
    assert low - 1e-12 <= x.mean() <= high + 1e-12


@given(DIFFERENCES, st.floats(-0.5, 0.5), ALPHAS)
@settings(deadline=None)
def test_a_decision_stays_until_certainty(values: list[float], limit: float, alpha: float) -> None:
    x, total, first = np.array(values), len(values), None
    truth = decide(x, total, limit, -1.0, 1.0, alpha)
    for t in range(total + 1):
        answer = decide(x[:t], total, limit, -1.0, 1.0, alpha)
        if first is not None:
            assert answer in (first, truth)
        first = answer if first is None else first


@given(DIFFERENCES, st.integers(0, 60), st.floats(0.1, 10.0), ALPHAS)
@settings(deadline=None)
def test_the_unit_does_not_matter(values: list[float], unseen: int, scale: float, alpha: float) -> None:
    x, total = np.array(values), len(values) + unseen
    scaled = tuple(scale * end for end in interval(x, total, -1.0, 1.0, alpha))
    assert interval(scale * x, total, -scale, scale, alpha) == pytest.approx(scaled, abs=1e-9 * scale)
    bound = scale * upper_bound(x, -1.0, 1.0, alpha)
    assert upper_bound(scale * x, -scale, scale, alpha) == pytest.approx(bound, abs=1e-9 * scale)


@pytest.mark.parametrize("limit", [0.3, 0.05, 0.01, 0.001, 1e-5])
@pytest.mark.parametrize(
    ("alpha", "low", "high"), [(0.05, -1.0, 1.0), (0.05 / 64, -1.0, 1.0), (0.01, 0.0, 0.5), (0.2, -3.0, 20.0)]
)
def test_needed_is_the_least_that_can_do(limit: float, alpha: float, low: float, high: float) -> None:
    n = needed(limit, alpha, low, high)
    assert upper_bound(np.zeros(n), low, high, alpha) <= limit
    assert n == 1 or upper_bound(np.zeros(n - 1), low, high, alpha) > limit


def test_needed_where_the_range_is_the_limit() -> None:
    assert needed(1.0, 0.05, -1.0, 1.0) == 1
    assert needed(0.5, 0.05, -1.0, 0.0) == 1
    assert upper_bound(np.zeros(1), -1.0, 0.0, 0.05) == 0.0


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: decide(np.array([0.0, 1.5]), 9, 0.0, -1.0, 1.0, 0.05), r"differences\[1\]=1.5.*outside \[-1.0, 1.0\]"),
        (lambda: upper_bound(np.array([math.nan]), -1.0, 1.0, 0.05), r"differences\[0\]=nan"),
        (lambda: interval(np.array([-2.0]), 9, -1.0, 1.0, 0.05), "outside"),
        (lambda: decide(np.zeros((2, 2)), 9, 0.0, -1.0, 1.0, 0.05), r"shape \(2, 2\)"),
        (lambda: decide(np.zeros(3), 2, 0.0, -1.0, 1.0, 0.05), r"total=2\): 3 differences"),
        (lambda: interval(np.zeros(0), 0, -1.0, 1.0, 0.05), "total=0"),
        (lambda: decide(np.zeros(3), 9, math.nan, -1.0, 1.0, 0.05), "limit=nan"),
        (lambda: decide(np.zeros(3), 9, 0.0, -1.0, 1.0, 0.0), "alpha=0.0"),
        (lambda: upper_bound(np.zeros(3), -1.0, 1.0, 1.0), "alpha=1.0"),
        (lambda: interval(np.zeros(3), 9, 1.0, 1.0, 0.05), "low=1.0, high=1.0"),
        (lambda: decide(np.zeros(3), 9, 0.0, -math.inf, 1.0, 0.05), "low=-inf"),
        (lambda: upper_bound(np.zeros(0), -1.0, 1.0, 0.05), "at least one"),
        (lambda: needed(0.0, 0.05, -1.0, 1.0), "limit=0.0"),
        (lambda: needed(math.nan, 0.05, -1.0, 1.0), "limit=nan"),
        (lambda: needed(1e-14, 0.05, -1.0, 1.0), "10\\^12 samples"),
        (lambda: needed(0.5, 0.05, 0.1, 1.0), "includes 0"),
        (lambda: needed(0.5, 2.0, -1.0, 1.0), "alpha=2.0"),
    ],
)
def test_arguments_without_a_meaning_are_refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_rounding_over_the_range_is_forgiven() -> None:
    assert upper_bound(np.array([1.0 + 1e-12, 0.0]), -1.0, 1.0, 0.05) <= 1.0
    assert decide(np.full(5, np.float32(0.1)), 5, 0.1, -0.1, 0.1, 0.05) is True


# -- chances ---------------------------------------------------------------------------------------------------------


def hypergeometric(seen: int, worse: int, total: int, limit: int) -> float:
    """The chance that at most ``limit`` of all samples differ, every number of them being as likely beforehand."""
    numbers = range(worse, total - seen + worse + 1)
    weights = [hypergeom.pmf(worse, total, number, seen) for number in numbers]
    return float(sum(w for w, number in zip(weights, numbers, strict=True) if number <= limit) / sum(weights))


@pytest.mark.parametrize(("seen", "worse", "limit"), [(100, 5, 20), (100, 5, 50), (200, 30, 120), (300, 10, 20)])
def test_chances_are_near_those_of_a_flat_prior(seen: int, worse: int, limit: int) -> None:
    differences = np.repeat([1.0, 0.0], [worse, seen - worse])
    found = sequential.chance(differences, 1000, limit / 1000, -1.0, 1.0)
    assert found == pytest.approx(hypergeometric(seen, worse, 1000, limit), abs=0.12)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), max_size=60), st.integers(0, 60), st.floats(-0.5, 0.5))
def test_chances_grow_with_the_limit_and_end_at_certainty(seen: list[float], more: int, limit: float) -> None:
    differences, total = np.array(seen), len(seen) + more
    if not total:
        return
    chances = [sequential.chance(differences, total, limit + step, -1.0, 1.0) for step in (0.0, 0.1, 0.3)]
    assert chances == sorted(chances)
    assert all(0 <= chance <= 1 for chance in chances)
    if not more:
        assert chances[0] == float(differences.mean() <= limit + 1e-12)


def test_a_few_samples_that_agree_prove_little() -> None:
    zeros = [sequential.chance(np.zeros(count), 1000, -0.1, -1.0, 1.0) for count in (8, 16, 100, 400)]
    assert zeros[0] > 0.1 > zeros[2] > zeros[3]
    with pytest.raises(ValueError, match="outside"):
        sequential.chance(np.array([2.0]), 10, 0.1, -1.0, 1.0)
    with pytest.raises(ValueError, match="total=3"):
        sequential.chance(np.zeros(4), 3, 0.1, -1.0, 1.0)
