"""Random plans: drawn as it says, the best of them returned, and nothing that was not measured."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from bitsmith.plan import Budget, Plan
from bitsmith.profile import Profile
from bitsmith.search import BudgetError, SearchInterrupted, search
from bitsmith.searches import RandomPlans
from bitsmith.technique import Technique
from formulas import EIGHT, FLOAT, FOUR, MIB, Called, InStages, layers, losing


def everything(profile: Profile, technique: Technique) -> Plan:
    return Plan(dict.fromkeys(profile.options(), technique))


def drawn(profile: Profile, method: RandomPlans) -> list[Plan]:
    """The plans that it looks at, float first, each once."""
    evaluate = Called(profile, lambda plan: 0.0)
    search(profile, Budget(drop=1e3), evaluate=evaluate, method=method)
    return evaluate.asked


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(0, 10**6), st.integers(1, 24), st.floats(0.01, 1.2), st.booleans())
def test_the_best_of_what_was_drawn(count: int, seed: int, plans: int, where: float, staged: bool) -> None:
    profile = layers(count, seed=seed)
    lost = losing(profile)
    limit = where * lost(everything(profile, FOUR))
    method = RandomPlans(plans=plans, seed=seed)
    candidates = drawn(profile, method)
    evaluate = (InStages if staged else Called)(profile, lost)
    result = search(profile, Budget(drop=limit), evaluate=evaluate, method=method)
    meeting = [plan for plan in candidates if lost(plan) <= limit]
    assert result.best.ms == min(profile.predict(plan)["ms"] for plan in meeting)
    assert result.plan in evaluate.asked
    assert result.best.evaluation is not None
    assert result.best.evaluation.drop == lost(result.plan) <= limit
    assert result.candidates == plans + 1
    if isinstance(evaluate, InStages):
        assert evaluate.promised == [plans + 1]
        # times of all, then drops from the fastest on, until one keeps it
        assert set(map(Plan.digest, evaluate.timed)) >= {plan.digest() for plan in candidates[1:]}
        times = [profile.predict(plan)["ms"] for plan in evaluate.decided]
        assert times == sorted(times)
        assert [lost(plan) <= limit for plan in evaluate.decided[:-1]] == [False] * (len(times) - 1)
        assert len(evaluate.asked) <= 2


def test_the_draw_is_that_of_its_seed() -> None:
    profile = layers(10)
    shuffled = list(profile.rows)
    random.Random(3).shuffle(shuffled)
    first = drawn(profile, RandomPlans(seed=5))
    assert 20 <= len(first) <= 25
    assert [dict(plan.sites) for plan in drawn(Profile(tuple(shuffled)), RandomPlans(seed=5))] == [
        dict(plan.sites) for plan in first
    ]
    assert drawn(profile, RandomPlans(seed=6)) != first
    # more plans are these and further ones
    assert drawn(profile, RandomPlans(plans=60, seed=5))[: len(first)] == first
    used = {technique for plan in first for technique in plan.sites.values()}
    assert used == {FLOAT, EIGHT, FOUR}


def shares(techniques: tuple[Technique, ...]) -> list[float]:
    """Of changed sites, in many draws over many sites."""
    profile = layers(60, techniques=techniques)
    plans = drawn(profile, RandomPlans(plans=300))[1:]
    return [float(np.mean([technique != FLOAT for technique in plan.sites.values()])) for plan in plans]


def test_shares_of_changed_sites_differ() -> None:
    found = shares((EIGHT, FOUR))
    assert min(found) < 0.1
    assert np.std(found) > 0.15


@pytest.mark.parametrize("techniques", [(EIGHT,), (EIGHT, FOUR)], ids=["two", "three"])
def test_the_share_of_changed_sites_is_uniform(techniques: tuple[Technique, ...]) -> None:
    found = shares(techniques)
    assert max(found) > 0.9
    assert kstest(found, "uniform").pvalue > 1e-4


def test_the_least_drop_within_a_time() -> None:
    profile = layers(8)
    lost, method = losing(profile), RandomPlans(plans=20)
    ms = 0.8 * profile.predict(Plan())["ms"]
    candidates = [plan for plan in drawn(profile, method) if profile.predict(plan)["ms"] <= ms]
    assert len(candidates) > 2
    result = search(profile, Budget(ms=ms), "drop", evaluate=Called(profile, lost), method=method)
    assert result.best.value("drop") == min(map(lost, candidates))


@pytest.mark.parametrize("staged", [Called, InStages])
def test_a_budget_that_cannot_be_met_carries_the_closest(staged: type[Called]) -> None:
    profile, method = layers(5), RandomPlans(plans=10)
    fastest = min(profile.predict(plan)["ms"] for plan in drawn(profile, method))
    evaluate = staged(profile, lambda plan: 0.0)
    with pytest.raises(BudgetError) as error:
        search(profile, Budget(ms=fastest / 2, drop=0.1), "ms", evaluate=evaluate, method=method)
    best = error.value.best
    assert best.best.ms == fastest
    assert best.label == "evaluated"
    assert best.missed == {"ms": pytest.approx(fastest / 2)}


def test_an_interrupt_carries_the_best_so_far() -> None:
    profile, method = layers(6), RandomPlans(plans=12)
    lost = losing(profile)
    limit = 0.3 * lost(everything(profile, FOUR))
    order = drawn(profile, method)
    found = set()
    for stop in range(1, len(order)):
        evaluate = Called(profile, lost, stop)
        with pytest.raises(SearchInterrupted) as error:
            search(profile, Budget(drop=limit), evaluate=evaluate, method=method)
        assert evaluate.asked == order[:stop]
        best = error.value.best
        meeting = [plan for plan in evaluate.asked if lost(plan) <= limit]
        assert best.plan in meeting
        assert best.best.ms == min(profile.predict(plan)["ms"] for plan in meeting)
        assert best.evaluations == stop
        found.add(best.best.ms)
    assert len(found) > 1
    with pytest.raises(KeyboardInterrupt):
        search(profile, Budget(drop=limit), evaluate=Called(profile, lost, 0), method=method)


@pytest.mark.parametrize("staged", [Called, InStages])
@pytest.mark.parametrize("minimize", ["ms", "mib"])
def test_without_time_it_is_the_float_plan(staged: type[Called], minimize: str) -> None:
    profile = layers(5)
    evaluate = staged(profile, lambda plan: 0.0)
    method = RandomPlans(seconds=0.0)
    result = search(profile, Budget(drop=0.1), minimize, evaluate=evaluate, method=method)
    assert set(result.plan.sites.values()) == {FLOAT}
    assert result.label == "evaluated"
    assert evaluate.asked == [result.plan]
    in_time = search(profile, Budget(drop=0.1), minimize, evaluate=Called(profile, lambda _: 0.0), method=RandomPlans())
    assert set(in_time.plan.sites.values()) != {FLOAT}


def test_without_an_evaluation_all_is_predicted() -> None:
    profile, method = layers(6), RandomPlans(plans=30)
    half = 0.5 * profile.predict(Plan())["bytes"] / MIB
    candidates = [plan for plan in drawn(profile, method) if profile.predict(plan)["bytes"] / MIB <= half]
    assert candidates
    result = search(profile, Budget(mib=half), "ms", method=method)
    assert result.label == "predicted"
    assert result.evaluations == 0
    assert result.best.ms == min(profile.predict(plan)["ms"] for plan in candidates)
    assert {point.label for point in result.frontier} == {"predicted"}
    with pytest.raises(BudgetError) as error:
        search(profile, Budget(mib=half / 100), "ms", method=method)
    assert error.value.best.label == "predicted"


@pytest.mark.parametrize("plans", [0, -3])
def test_settings_are_checked(plans: int) -> None:
    with pytest.raises(ValueError, match=rf"RandomPlans\(plans={plans}\): must be at least 1"):
        RandomPlans(plans=plans)
