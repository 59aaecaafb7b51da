"""Greedy search against greedy search by hand: every site tried, kept where the drop allows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.plan import Budget, Plan
from bitsmith.profile import Profile, Row
from bitsmith.search import BudgetError, SearchInterrupted, search
from bitsmith.searches import Bisection, Greedy
from bitsmith.technique import Technique
from formulas import EIGHT, FLOAT, FOUR, MIB, Called, InStages, layers

Sites = dict[str, Technique]


def true_losses(count: int, seed: int) -> Callable[[Any], float]:
    """What is lost, whatever the profile says; two that lose together are among them."""
    rng = random.Random(seed)
    alone = {(f"s{k:02}", bits): rng.random() * 4 / bits for k in range(count) for bits in (8, 4)}
    together = {pair: rng.uniform(-0.2, 0.4) for pair in itertools.combinations(range(count), 2)}

    def lost(sites: Plan | Sites) -> float:
        low = [k for k in range(count) if sites[f"s{k:02}"] != FLOAT]
        total = sum(alone[f"s{k:02}", sites[f"s{k:02}"].bits_] for k in low)  # type: ignore[attr-defined]
        return total + sum(together[pair] for pair in itertools.combinations(low, 2))

    return lost


def by_hand(profile: Profile, lost: Callable[[Any], float], limit: float) -> list[Sites]:
    """Every plan that was accepted, float first: sites by what the profile says they lose, 8 bits and then 4."""
    rows = {(row.site, row.technique): row for row in profile.rows}
    sites: Sites = dict.fromkeys(sorted({row.site for row in profile.rows}), FLOAT)
    accepted, open_ = [sites], sorted(sites)
    for technique in (EIGHT, FOUR):
        added = {name: rows[name, technique].loss - rows[name, sites[name]].loss for name in open_}
        kept = []
        for name in sorted(open_, key=lambda name: (added[name], name)):
            tried = {**sites, name: technique}
            if lost(tried) <= limit:
                sites = tried
                accepted.append(sites)
                kept.append(name)
        open_ = kept
    return accepted


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10), st.integers(0, 10**6), st.floats(0.01, 3), st.sampled_from(["loss", "marginal"]), st.booleans()
)
def test_it_is_the_greedy_search(count: int, seed: int, limit: float, order: Any, staged: bool) -> None:
    """Without cross terms in the profile both orders are that of its losses."""
    profile, lost = layers(count, seed=seed), true_losses(count, seed)
    evaluate = (InStages if staged else Called)(profile, lost)
    result = search(profile, Budget(drop=limit), evaluate=evaluate, method=Greedy(order=order))
    accepted = by_hand(profile, lost, limit)
    assert dict(result.plan.sites) == accepted[-1]  # every change saves time, so the last one is the fastest
    assert result.plan in evaluate.asked
    assert result.best.evaluation is not None
    assert result.best.evaluation.drop == lost(accepted[-1]) <= limit
    if staged:
        assert len(evaluate.asked) <= 2  # float, and what is returned: the rest was decided on a part
    else:
        assert len(evaluate.asked) <= 2 * count + 1


def test_a_bad_order_costs_one_site_where_bisection_loses_all() -> None:
    """The profile takes s00 for the least sensitive one; in truth it alone is over the limit."""
    profile = layers(8, techniques=(EIGHT,))
    rows = [
        Row(row.site, row.technique, 0.0 if row.site == "s00" else row.loss, row.ms, row.bytes) for row in profile.rows
    ]
    profile = Profile(tuple(rows))

    def lost(plan: Plan) -> float:
        return 0.5 * (plan["s00"] == EIGHT) + 0.001 * sum(plan[name] == EIGHT for name in plan)

    found = {
        type(method): search(profile, Budget(drop=0.1), evaluate=InStages(profile, lost), method=method).plan
        for method in (Greedy(order="loss"), Bisection(order="loss", passes=0.0))
    }
    assert set(found[Bisection].sites.values()) == {FLOAT}
    assert found[Greedy]["s00"] == FLOAT
    assert {technique for name, technique in found[Greedy].sites.items() if name != "s00"} == {EIGHT}


def test_where_the_last_one_does_not_hold_those_before_it_are_there() -> None:
    """With six sites and more at 8 bits the part that is seen is misleading; five keep the drop."""
    profile = layers(10, techniques=(EIGHT,))

    def low(plan: Plan) -> int:
        return sum(plan[name] == EIGHT for name in plan)

    evaluate = InStages(profile, lambda plan: 0.1 * low(plan), wrong=lambda plan: low(plan) > 5)
    result = search(profile, Budget(drop=0.51), evaluate=evaluate, method=Greedy(order="loss"))
    assert low(result.plan) == 5
    assert result.best.evaluation is not None
    assert result.best.evaluation.complete
    assert result.best.evaluation.drop == pytest.approx(0.5)


def test_its_candidates_are_not_fixed() -> None:
    profile, lost = layers(4), true_losses(4, 0)
    evaluate = InStages(profile, lost)
    result = search(profile, Budget(drop=0.5), evaluate=evaluate, method=Greedy())
    assert evaluate.promised == [None]
    assert result.candidates is None

    class Refusing(InStages):
        def check(self, limit: float, candidates: int | None) -> str:
            raise ValueError("a bound on the population needs candidates")

    refusing = Refusing(profile, lost)
    with pytest.raises(ValueError, match="needs candidates"):
        search(profile, Budget(drop=0.5), evaluate=refusing, method=Greedy())
    assert not refusing.asked


@pytest.mark.parametrize("most", [2, 5, 100])
def test_it_measures_no_more_than_it_may(most: int) -> None:
    profile, lost = layers(6), true_losses(6, 3)
    evaluate = Called(profile, lost)
    result = search(profile, Budget(drop=1.0), evaluate=evaluate, method=Greedy(max_evaluations=most))
    assert result.evaluations == len(evaluate.asked) <= most
    assert lost(dict(result.plan.sites)) <= 1.0


@pytest.mark.parametrize("order", ["loss", "marginal", "ratio", "random"])
@pytest.mark.parametrize("minimize", ["ms", "mib"])
def test_every_order_keeps_the_drop_and_gains(order: Any, minimize: str) -> None:
    profile, lost = layers(7), true_losses(7, 5)
    method = Greedy(order=order, seed=4)
    result = search(profile, Budget(drop=0.8), minimize, evaluate=Called(profile, lost), method=method)
    assert lost(dict(result.plan.sites)) <= 0.8
    plain = profile.predict(Plan())
    assert result.best.value(minimize) < {"ms": plain["ms"], "mib": plain["bytes"] / MIB}[minimize]


@pytest.mark.parametrize("staged", [Called, InStages])
def test_a_budget_that_cannot_be_met_carries_the_closest(staged: type[Called]) -> None:
    profile = layers(5)
    least = profile.predict(Plan({f"s{k:02}": FOUR for k in range(5)}))["ms"]
    evaluate = staged(profile, lambda sites: 0.0)
    with pytest.raises(BudgetError) as error:
        search(profile, Budget(ms=least / 2, drop=0.1), "ms", evaluate=evaluate, method=Greedy())
    best = error.value.best
    assert set(best.plan.sites.values()) == {FOUR}
    assert best.label == "evaluated"
    assert best.missed == {"ms": pytest.approx(least / 2)}


def test_an_interrupt_carries_the_best_so_far() -> None:
    profile, lost, limit = layers(6), true_losses(6, 3), 1.0
    complete = Called(profile, lost)
    search(profile, Budget(drop=limit), evaluate=complete, method=Greedy())
    seen = set()
    for stop in range(1, len(complete.asked)):
        evaluate = Called(profile, lost, stop)
        with pytest.raises(SearchInterrupted) as error:
            search(profile, Budget(drop=limit), evaluate=evaluate, method=Greedy())
        assert evaluate.asked == complete.asked[:stop]
        best = error.value.best
        meeting = [plan for plan in evaluate.asked if lost(dict(plan.sites)) <= limit]
        assert best.plan in meeting
        assert best.best.ms == min(profile.predict(plan)["ms"] for plan in meeting)
        seen.add(best.best.ms)
    assert len(seen) > 3
    with pytest.raises(KeyboardInterrupt):
        search(profile, Budget(drop=limit), evaluate=Called(profile, lost, 0), method=Greedy())


@pytest.mark.parametrize("staged", [Called, InStages])
def test_without_time_it_is_the_float_plan(staged: type[Called]) -> None:
    profile = layers(5)
    evaluate = staged(profile, lambda sites: 0.0)
    result = search(profile, Budget(drop=0.1), evaluate=evaluate, method=Greedy(seconds=0.0))
    assert set(result.plan.sites.values()) == {FLOAT}
    assert result.label == "evaluated"
    assert evaluate.asked == [result.plan]
    in_time = search(profile, Budget(drop=0.1), evaluate=staged(profile, lambda sites: 0.0), method=Greedy())
    assert set(in_time.plan.sites.values()) == {FOUR}


def test_without_an_evaluation_all_is_predicted() -> None:
    profile = layers(5)
    half = 0.5 * profile.predict(Plan())["bytes"] / MIB
    result = search(profile, Budget(mib=half), "drop", method=Greedy())
    assert result.label == "predicted"
    assert result.evaluations == 0
    assert 0 < result.best.predicted("mib") <= half
    assert {point.label for point in result.frontier} == {"predicted"}
    # the least loss of the plans on its way
    assert result.best.loss == min(point.loss for point in result.frontier if point.predicted("mib") <= half)
    with pytest.raises(BudgetError) as error:
        search(profile, Budget(mib=half / 100), "ms", method=Greedy())
    assert error.value.best.label == "predicted"
    assert set(error.value.best.plan.sites.values()) == {FOUR}


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"order": "size"}, "order='size'.*loss, marginal, ratio, random"),
        ({"mu": -1}, "mu=-1"),
        ({"mu": float("nan")}, "mu=nan"),
        ({"max_evaluations": 1}, "max_evaluations=1"),
    ],
)
def test_settings_are_checked(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=rf"Greedy\({match}"):
        Greedy(**bad)
