"""Going down a ladder of plans with an evaluator that can stop early: the budget kept, no sample more than needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitsmith import sequential
from bitsmith.plan import Budget, Plan
from bitsmith.profile import Profile, Row
from bitsmith.search import BudgetError, Evaluation, Point, Result, search
from bitsmith.search.base import Staged
from bitsmith.search.ladder import bisect, climb, descend
from bitsmith.search.trials import Trials
from bitsmith.searches import Exact
from repository import load

TOTAL = 400


Rung = load("benchmarks.known_ladder").Rung


def rungs(count: int, losses: list[float] | None = None) -> list[Point]:
    """Least loss first, float the first of them; every next one is faster."""
    return [
        Point(Plan({"s": Rung(k)}), 10.0 - 0.1 * k, 100.0 - k, 0.01 * k if losses is None else losses[k])
        for k in range(count)
    ]


class Samples:
    """An evaluation set whose samples are known: under rung k, ``worse[k]`` of them are missed that float has right,
    and ``better[k]`` the other way round. Decides by betting, or only where nothing can change any more."""

    def __init__(
        self,
        worse: list[int],
        better: list[int] | None = None,
        *,
        certain: bool = False,
        level: float = 0.95,
        population: bool = False,
        batch: int = 10,
        seed: int = 0,
    ) -> None:
        order = np.random.default_rng(seed).permutation(TOTAL)
        self.differences: list[NDArray[np.float64]] = []
        for bad, good in zip(worse, better or [0] * len(worse), strict=True):
            one = np.repeat([1.0, -1.0, 0.0], [bad, good, TOTAL - bad - good])
            self.differences.append(one[order])
            order = np.random.default_rng([seed, len(self.differences)]).permutation(TOTAL)
        self.certain, self.level, self.population, self.batch = certain, level, population, batch
        self.seen = [0] * len(worse)
        self.log: list[tuple[str, int, int, bool | None]] = []
        """(what, rung, samples of all rungs but float so far, whether it is known to keep the drop)"""
        self.limit = 0.0

    def rung(self, plan: Plan) -> int:
        found = plan["s"]
        assert isinstance(found, Rung)
        return found.number

    def drop(self, plan: Plan) -> float:
        return float(self.differences[self.rung(plan)].mean())

    @property
    def total(self) -> int:
        return sum(self.seen[1:])

    def _known(self, k: int, limit: float) -> bool | None:
        seen = self.differences[k][: self.seen[k]]
        alpha = 1e-300 if self.certain else 1 - self.level
        return sequential.decide(seen, TOTAL, limit, -1.0, 1.0, alpha) if len(seen) else None

    def _measured(self, plan: Plan) -> Evaluation:
        k = self.rung(plan)
        return Evaluation(plan, ms=10.0 - 0.1 * k, bytes=100 - k, float_ms=10.0)

    def __call__(self, plan: Plan) -> Evaluation:
        k = self.rung(plan)
        self.seen[k] = TOTAL
        lost = self.drop(plan)
        self.log.append(("whole", k, self.total, lost <= self.limit))
        got = self._measured(plan)
        return Evaluation(
            plan, 0.8 - lost, lost, (lost, lost), got.ms, bytes=got.bytes, float_ms=10.0, samples=TOTAL,
            population=self.population,
        )  # fmt: skip

    def costs(self, plan: Plan) -> Evaluation:
        self.log.append(("costs", self.rung(plan), self.total, None))
        return self._measured(plan)

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        k = self.rung(plan)
        assert limit == self.limit
        within, likely = self._known(k, limit), 0.5
        while within is None and chance <= likely <= 1 - chance:
            self.seen[k] = min(self.seen[k] + self.batch, TOTAL)
            within = self._known(k, limit)
            likely = sequential.chance(self.differences[k][: self.seen[k]], TOTAL, limit, -1.0, 1.0)
        mean = float(self.differences[k][: self.seen[k]].mean()) if self.seen[k] else 0.0
        self.log.append(("decide", k, self.total, within))
        return Evaluation(
            plan, drop=mean, samples=self.seen[k], within=likely >= 0.5 if within is None else within,
            certain=within is not None, complete=self.seen[k] == TOTAL, population=self.population,
        )  # fmt: skip

    def bound(self, plan: Plan, candidates: int) -> float | None:
        return sequential.upper_bound(self.differences[self.rung(plan)], -1.0, 1.0, (1 - self.level) / candidates)

    def check(self, limit: float, candidates: int | None) -> str:
        if self.population and candidates is None:
            raise ValueError("candidates are not fixed")
        return ""

    def decided(self) -> list[int]:
        """The rungs whose drop was asked about, each once, in that order."""
        return list(dict.fromkeys(k for what, k, _, _ in self.log if what != "costs" and k))


def begun(samples: Samples, points: list[Point], limit: float, most: int = 64, chance: float = 0.1) -> Trials:
    """With the float plan measured, as searches do."""
    assert isinstance(samples, Staged)
    samples.limit = limit
    trials = Trials(samples, most, Budget(drop=limit), "ms", points[0], None, chance)
    trials.promise(len(points))
    trials.whole(points[0])
    return trials


def climbed(
    samples: Samples,
    points: list[Point],
    limit: float,
    passes: float = 2.0,
    most: int = 64,
    chance: float = 0.1,
) -> Result:
    trials = begun(samples, points, limit, most, chance)
    climb(trials, points, 0.0, passes)
    return trials.result(points)


def number(point: Point) -> int:
    technique = point.plan["s"]
    assert isinstance(technique, Rung)
    return technique.number


# -- what comes back -------------------------------------------------------------------------------------------------

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=14)


@st.composite
def ladders(draw: st.DrawFn) -> tuple[list[int], list[int], float]:
    """Misses of each rung, monotone or not, gains, and a limit at or about one of the drops."""
    worse = draw(COUNTS)
    if draw(st.booleans()):
        worse = sorted(worse)
    better = [draw(st.integers(0, 15)) for _ in worse]
    near = draw(st.sampled_from([(w - b) / TOTAL for w, b in zip(worse, better, strict=True)]) | st.just(0.02))
    limit = max(near + draw(st.sampled_from([-1, 0, 0, 1, 4])) / TOTAL, 1 / TOTAL)
    return [0, *worse], [0, *better], limit


@settings(max_examples=120, deadline=None)
@given(
    ladders(),
    st.booleans(),
    st.sampled_from([0.5, 0.95]),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.sampled_from([0.0, 2.0, 6.0]),
    st.sampled_from([3, 12, 64]),
    st.integers(0, 99),
)
def test_what_is_returned_keeps_the_drop(
    ladder: tuple[list[int], list[int], float],
    certain: bool,
    level: float,
    chance: float,
    passes: float,
    most: int,
    seed: int,
) -> None:
    worse, better, limit = ladder
    samples, points = Samples(worse, better, certain=certain, level=level, seed=seed), rungs(len(worse))
    result = climbed(samples, points, limit, passes, most, chance)
    got = result.best.evaluation
    assert got is not None
    assert got.complete
    assert got.samples == TOTAL
    assert got.drop == samples.drop(result.plan) <= limit + 1e-12
    assert result.evaluations <= most
    # and what it says of the others
    for point in result.frontier:
        if point.evaluation is not None and point.evaluation.drop is not None and point.evaluation.complete:
            assert point.evaluation.drop == samples.drop(point.plan)
        if certain and point.evaluation is not None and point.evaluation.certain and point.evaluation.drop is not None:
            assert ("drop" not in point.missed(Budget(drop=limit))) is (samples.drop(point.plan) <= limit + 1e-12)


@settings(max_examples=80, deadline=None)
@given(ladders(), st.sampled_from([0.1, 0.3]), st.sampled_from([0.0, 2.0, 20.0]), st.integers(0, 99))
def test_descend_ends_at_a_plan_that_keeps_it(
    ladder: tuple[list[int], list[int], float], chance: float, passes: float, seed: int
) -> None:
    worse, better, limit = ladder
    samples, points = Samples(worse, better, certain=True, seed=seed), rungs(len(worse))
    low = descend(begun(samples, points, limit, chance=chance), points, passes)
    keeps = [samples.drop(point.plan) <= limit + 1e-12 for point in points]
    assert low >= 0  # the float plan is among them
    assert keeps[low]
    if keeps[-1]:
        assert low == len(points) - 1 or samples.decided()[0] == len(points) - 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=14).map(sorted), st.integers(0, 99))
def test_with_passes_to_spare_the_edge_is_found_where_drops_are_monotone(worse: list[int], seed: int) -> None:
    samples, points = Samples([0, *worse], certain=True, seed=seed), rungs(len(worse) + 1)
    limit = 20 / TOTAL
    result = climbed(samples, points, limit, passes=100.0, chance=0.0)
    assert number(result.best) == sum(count <= 20 for count in worse)


@settings(max_examples=40, deadline=None)
@given(ladders(), st.integers(0, 99), st.sampled_from([1, 5, 100]))
def test_samples_are_counted(ladder: tuple[list[int], list[int], float], seed: int, batch: int) -> None:
    worse, better, limit = ladder
    samples, points = Samples(worse, better, seed=seed, batch=batch), rungs(len(worse))
    trials = begun(samples, points, limit)
    assert trials.used == 0  # the float network's are left out
    climb(trials, points, 0.0, 2.0)
    result = trials.result(points)
    assert result.samples == samples.total
    assert trials.used == pytest.approx(samples.total / TOTAL)
    for point in points:
        assert trials.left(point) == pytest.approx(1 - samples.seen[number(point)] / TOTAL)


# -- the way there ---------------------------------------------------------------------------------------------------


def test_the_far_end_comes_first_and_is_all_if_it_holds() -> None:
    samples, points = Samples([0] + [1] * 10), rungs(11)
    result = climbed(samples, points, 0.05)
    assert samples.decided() == [10]
    assert number(result.best) == 10
    assert result.samples == TOTAL


@pytest.mark.parametrize(("most", "share"), [(160, 3 * 20 / 160), (80, 0.75), (40, 0.75)])
def test_the_next_one_is_where_it_would_lose_three_times_the_limit(most: int, share: float) -> None:
    """If the drop goes with the loss; and at most at three quarters of the loss."""
    losses = [0.0, 0.1, 0.2, 0.5, 0.9, 1.1, 2.0, 2.9, 4.0]
    samples = Samples([0, *(round(most * loss / 4) for loss in losses[1:])], certain=True)
    points, limit = rungs(9, losses), 20 / TOTAL
    trials = begun(samples, points, limit, chance=0.0)
    low = descend(trials, points, 2.0)
    far, second = samples.decided()[:2]
    assert far == 8
    (told,) = [p.evaluation for p in trials.seen.values() if number(p) == 8 and p.evaluation is not None]
    assert told.drop is not None
    # from what was seen of the far end, which is not all of it
    target = 4.0 * min(3 * limit / told.drop, 0.75)
    assert target == pytest.approx(4.0 * share, rel=0.5)
    assert second == max(k for k in range(1, 8) if losses[k] <= target)
    assert samples.drop(points[low].plan) <= limit


def test_what_looks_as_if_it_kept_the_drop_is_decided_with_certainty() -> None:
    """At first rung 1 looks fine; all its misses come later."""
    samples, points = Samples([0, 40], certain=True), rungs(2)
    samples.differences[1] = np.repeat([0.0, 1.0], [TOTAL - 40, 40])
    trials = begun(samples, points, 0.05, chance=0.2)
    assert trials.keeps(points[1])
    assert samples.seen[1] < 100
    assert not trials.holds(points[1])
    assert samples.seen[1] > 300
    samples = Samples([0, 40], certain=True)
    samples.differences[1] = np.repeat([0.0, 1.0], [TOTAL - 40, 40])
    assert descend(begun(samples, points, 0.05, chance=0.2), points, 2.0) == 0


def needed(samples: Samples) -> float:
    """Full sets until a first plan (not float) was known to keep the drop and evaluated whole; inf if none was."""
    seen, last = dict.fromkeys(range(len(samples.seen)), 0), 0
    for _, k, total, known in samples.log:
        seen[k] += total - last
        last = total
        if k and known:
            return (total + TOTAL - seen[k]) / TOTAL
    return float("inf")


@settings(max_examples=150, deadline=None)
@given(ladders(), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 99))
def test_passes_are_kept_as_far_as_that_can_be_helped(
    ladder: tuple[list[int], list[int], float], passes: float, chance: float, seed: int
) -> None:
    worse, better, limit = ladder
    samples, points = Samples(worse, better, certain=True, seed=seed), rungs(len(worse))
    climbed(samples, points, limit, passes, chance=chance)
    assert samples.total / TOTAL <= max(passes, needed(samples)) + 1.0


def test_passes_are_kept_where_every_decision_takes_the_whole_set() -> None:
    """The far end fails at once and the 15th rung keeps it after one set; those between miss it by one sample."""
    samples, points = Samples([0] + [20] * 15 + [21] * 4 + [60], certain=True), rungs(21)
    result = climbed(samples, points, 20 / TOTAL, passes=3.0, chance=0.0)
    assert number(result.best) == 15
    assert needed(samples) < 2.0
    assert samples.total / TOTAL <= 3.0 + 1.0


def test_fewer_passes_see_fewer_samples() -> None:
    """Drops around the limit, hard to tell: with room for it, faster rungs are tried behind the first that keeps it."""
    totals = []
    for passes in (1.0, 3.0, 8.0):
        samples = Samples([0, 5, 10, 12, 14, 16, 18, 19, 21, 22, 23, 24, 60], certain=True)
        result = climbed(samples, rungs(13), 20 / TOTAL, passes)
        totals.append(samples.total)
        assert samples.drop(result.plan) <= 20 / TOTAL
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


# -- the bound on the population -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(COUNTS.map(sorted), st.integers(0, 99), st.floats(0.03, 0.2))
def test_the_bound_is_what_has_to_be_within_the_budget(worse: list[int], seed: int, limit: float) -> None:
    samples, points = Samples([0, *worse], population=True, seed=seed), rungs(len(worse) + 1)
    bounds = [samples.bound(point.plan, len(points)) for point in points]
    if min(b for b in bounds if b is not None) > limit:  # not even of float can it be shown
        with pytest.raises(BudgetError) as error:
            climbed(samples, points, limit)
        assert error.value.best.missed["drop"] > 0
        return
    result = climbed(samples, points, limit)
    best = result.best.evaluation
    assert best is not None
    assert best.drop_bound == bounds[number(result.best)]
    assert best.drop_bound is not None
    assert best.drop_bound <= limit
    assert best.judged == best.drop_bound
    assert result.candidates == len(points)


@pytest.mark.parametrize(
    ("population", "expected"),
    [(False, 2), (True, 1)],
)
def test_a_drop_within_the_limit_is_not_enough_for_the_population(population: bool, expected: int) -> None:
    """Rung 2 loses 4 %, and its bound is above the 5 % that rung 1 is below."""
    samples, points = Samples([0, 0, 16], population=population), rungs(3)
    bounds = [samples.bound(point.plan, 3) for point in points]
    assert bounds[1] is not None
    assert bounds[2] is not None
    assert (bounds[1] <= 0.05, bounds[2] <= 0.05) == (True, False)
    result = climbed(samples, points, 0.05, passes=10.0)
    assert number(result.best) == expected


def test_candidates_that_are_not_fixed_are_refused() -> None:
    samples, points = Samples([0, 0], population=True), rungs(2)
    trials = Trials(samples, 8, Budget(drop=0.1), "ms", points[0])
    with pytest.raises(ValueError, match="not fixed"):
        trials.promise(None)


def test_exact_search_with_a_bound_on_the_population() -> None:
    rows = tuple(Row("s", Rung(k), 0.01 * k, 10.0 - 0.1 * k, 100.0 - k) for k in range(4))
    samples = Samples([0, 0, 1, 60], population=True)
    samples.limit = 0.05
    result = search(Profile(rows), Budget(drop=0.05), evaluate=samples, method=Exact())
    assert number(result.best) == 2


# -- bisection of a ladder -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=30).map(sorted))
def test_bisect_finds_the_last_that_holds(worse: list[int]) -> None:
    samples, points = Samples([0, *worse], certain=True), rungs(len(worse) + 1)
    trials = begun(samples, points, 20 / TOTAL, chance=0.0)
    assert bisect(trials, points, fails_first=False) == sum(count <= 20 for count in worse)
    assert len(samples.decided()) <= np.ceil(np.log2(len(points) + 1)) + 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99))
def test_bisect_finds_the_first_that_meets_a_cost_limit(count: int, limit: int) -> None:
    """Times go down along the ladder, so the first ones are too slow."""
    samples, points = Samples([0] * count), rungs(count)
    trials = Trials(samples, 64, Budget(ms=6.951 + limit * 0.05), "drop", points[0])
    expected = next((k for k, point in enumerate(points) if point.ms <= 6.951 + limit * 0.05), count)
    assert bisect(trials, points, fails_first=True) == expected
    assert not samples.decided()
