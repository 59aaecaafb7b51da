"""Bisection over an order: the longest beginning that keeps the drop, in few decisions, and never more than it says."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.plan import Budget, Plan
from bitsmith.profile import Profile
from bitsmith.search import BudgetError, Evaluation, SearchInterrupted, search
from bitsmith.search.order import prefixes
from bitsmith.search.program import Program
from bitsmith.searches import Bisection
from formulas import EIGHT, FLOAT, FOUR, MIB, Called, InStages, Lost, layers, losing


def longest(profile: Profile, method: Bisection, lost: Lost, limit: float) -> tuple[Plan, list[set[str]]]:
    """By trying every prefix in turn: the plan, and the sites that were accepted at each level, 8 bits before 4."""
    program = Program(profile)
    names = [unit.sites[0] for unit in program.units]
    base, among, accepted = program.control, list(range(len(names))), []
    for technique in (EIGHT, FOUR):
        if not any(technique in unit.techniques for unit in program.units):
            continue
        ladder = prefixes(program, technique, base, among, method.order, "ms", method.mu, method.seed)
        holding = [choice for choice in ladder if lost(program.point(choice).plan) <= limit + 1e-12]  # as Budget has it
        assert holding == ladder[: len(holding)]  # it grows
        base = holding[-1]
        among = [u for u in among if program.units[u].techniques[base[u]] == technique]
        accepted.append({names[u] for u in among})
    return program.point(base).plan, accepted


ORDERS = st.sampled_from(["loss", "marginal", "ratio", "random"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.floats(0, 1), ORDERS, st.integers(0, 99), st.booleans())
def test_the_longest_beginning_in_log_n_decisions(
    count: int, where: float, order: Any, seed: int, staged: bool
) -> None:
    profile = layers(count, (EIGHT,), seed)
    lost = losing(profile)
    limit = max(where * lost(Plan({f"s{k:02}": EIGHT for k in range(count)})), 1e-9)
    method = Bisection(order=order, seed=seed, passes=0.0)
    evaluate = (InStages if staged else Called)(profile, lost)
    result = search(profile, Budget(drop=limit), evaluate=evaluate, method=method)
    assert result.plan == longest(profile, method, lost, limit)[0]
    got = result.best.evaluation
    assert got is not None
    assert got.complete
    assert got.drop == pytest.approx(lost(result.plan))
    assert result.plan in evaluate.asked  # whole
    if isinstance(evaluate, InStages):
        assert len(evaluate.decided) <= math.ceil(math.log2(count + 1)) + 1
        assert len(evaluate.asked) <= 2  # float, and what is returned


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.floats(0, 1.2), ORDERS, st.integers(0, 99))
def test_four_bits_only_where_eight_were_accepted(count: int, where: float, order: Any, seed: int) -> None:
    profile = layers(count, seed=seed)
    lost = losing(profile)
    limit = max(where * 2 * lost(Plan({f"s{k:02}": EIGHT for k in range(count)})), 1e-9)
    method = Bisection(order=order, seed=seed, passes=0.0)
    evaluate = InStages(profile, lost)
    result = search(profile, Budget(drop=limit), evaluate=evaluate, method=method)
    expected, accepted = longest(profile, method, lost, limit)
    assert result.plan == expected
    for plan in evaluate.decided:
        assert {name for name, technique in plan.sites.items() if technique == FOUR} <= accepted[0]
    assert len(evaluate.decided) <= 2 * (math.ceil(math.log2(count + 1)) + 1)
    assert evaluate.promised == [(count + 1) ** 2]
    assert result.candidates == (count + 1) ** 2


def test_both_levels_are_used() -> None:
    """Of ten sites, with room for all at 8 bits and some at 4."""
    profile = layers(10)
    method, lost = Bisection(passes=0.0), losing(profile)
    limit = 4 * lost(Plan({f"s{k:02}": EIGHT for k in range(10)}))
    result = search(profile, Budget(drop=limit), evaluate=InStages(profile, lost), method=method)
    used = list(result.plan.sites.values())
    assert 0 < used.count(FOUR) < 10
    assert used.count(FOUR) + used.count(EIGHT) == 10


def erratic(seed: int) -> Lost:
    """Any drop at all, by plan; float has none."""

    def lost(plan: Plan) -> float:
        if all(technique == FLOAT for technique in plan.sites.values()):
            return 0.0
        text = f"{seed} {sorted((name, str(technique)) for name, technique in plan.sites.items())}"
        return hashlib.sha256(text.encode()).digest()[0] / 256

    return lost


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.floats(0.01, 0.9),
    ORDERS,
    st.sampled_from([2, 5, 64]),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
)
def test_accuracy_that_is_not_monotone(
    count: int, seed: int, limit: float, order: Any, most: int, passes: float, staged: bool
) -> None:
    profile, lost = layers(count, seed=seed), erratic(seed)
    evaluate = (InStages if staged else Called)(profile, lost)
    method = Bisection(order=order, max_evaluations=most, passes=passes)
    result = search(profile, Budget(drop=limit), evaluate=evaluate, method=method)
    assert lost(result.plan) <= limit
    assert result.plan in evaluate.asked  # as a whole, not decided only
    assert result.best.evaluation is not None
    assert result.best.evaluation.drop == lost(result.plan)
    assert result.evaluations <= most
    if not staged:
        meeting = [plan for plan in evaluate.asked if lost(plan) <= limit]
        assert result.best.ms == min(profile.predict(plan)["ms"] for plan in meeting)
        assert len(evaluate.asked) <= most


def test_a_plain_function_is_asked_log_n_times() -> None:
    profile = layers(40, (EIGHT,))
    lost = losing(profile)
    limit = 0.2 * lost(Plan({f"s{k:02}": EIGHT for k in range(40)}))
    evaluate = Called(profile, lost)
    search(profile, Budget(drop=limit), evaluate=evaluate, method=Bisection(passes=0.0))
    assert len(evaluate.asked) <= 2 * math.log2(40) + 3


@pytest.mark.parametrize("minimize", ["ms", "mib", "drop"])
def test_other_limits_hold_too(minimize: str) -> None:
    profile = layers(8)
    lost = losing(profile)
    whole = profile.predict(Plan())
    everywhere = lost(Plan({f"s{k:02}": EIGHT for k in range(8)}))
    budget = Budget(ms=0.7 * whole["ms"], drop=None if minimize == "drop" else 2 * everywhere)
    result = search(profile, budget, minimize, evaluate=Called(profile, lost), method=Bisection())
    assert not result.missed
    assert result.best.value("ms") <= 0.7 * whole["ms"]
    if budget.drop is not None:
        assert lost(result.plan) <= budget.drop
    # better than 8 bits everywhere, which is within all limits as well
    plain = Plan({f"s{k:02}": EIGHT for k in range(8)})
    value = {"ms": profile.predict(plain)["ms"], "mib": profile.predict(plain)["bytes"] / MIB, "drop": lost(plain)}
    assert result.best.value(minimize) <= value[minimize] + 1e-12


def test_a_budget_that_cannot_be_met_carries_the_closest() -> None:
    profile = layers(6)
    least = profile.predict(Plan({f"s{k:02}": FOUR for k in range(6)}))["ms"]
    for staged in (Called, InStages):
        evaluate = staged(profile, losing(profile))
        with pytest.raises(BudgetError) as error:
            search(profile, Budget(ms=least / 2, drop=1e3), "ms", evaluate=evaluate, method=Bisection())
        best = error.value.best
        assert set(best.plan.sites.values()) == {FOUR}
        assert best.label == "evaluated"
        assert best.missed["ms"] == pytest.approx(least / 2)


def test_an_interrupt_carries_the_best_so_far() -> None:
    profile = layers(12)
    lost = losing(profile)
    limit = 1.5 * lost(Plan({f"s{k:02}": EIGHT for k in range(12)}))
    complete = Called(profile, lost)
    search(profile, Budget(drop=limit), evaluate=complete, method=Bisection())
    assert len(complete.asked) > 5
    changed = 0
    for stop in range(1, len(complete.asked)):

        class Stopped(Called):
            def __call__(self, plan: Plan, stop: int = stop) -> Evaluation:
                if len(self.asked) == stop:
                    raise KeyboardInterrupt
                return super().__call__(plan)

        evaluate = Stopped(profile, lost)
        with pytest.raises(SearchInterrupted) as error:
            search(profile, Budget(drop=limit), evaluate=evaluate, method=Bisection())
        assert evaluate.asked == complete.asked[:stop]  # and goes the same way until then
        meeting = [plan for plan in evaluate.asked if lost(plan) <= limit]
        best = error.value.best
        assert best.evaluations == stop
        assert best.best.ms == min(profile.predict(plan)["ms"] for plan in meeting)
        assert best.plan in meeting
        changed += best.plan != complete.asked[0]
    assert changed


def test_an_interrupt_before_anything_was_measured_is_itself() -> None:
    def evaluate(plan: Plan) -> Evaluation:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        search(layers(3), Budget(drop=0.1), evaluate=evaluate, method=Bisection())
    assert not isinstance(error.value, SearchInterrupted)


@pytest.mark.parametrize("staged", [Called, InStages])
def test_without_time_it_is_the_float_plan(staged: type[Called]) -> None:
    profile = layers(6)
    evaluate = staged(profile, losing(profile))
    result = search(profile, Budget(drop=1e3), evaluate=evaluate, method=Bisection(seconds=0.0))
    assert set(result.plan.sites.values()) == {FLOAT}
    assert result.label == "evaluated"
    assert evaluate.asked == [result.plan]
    in_time = search(profile, Budget(drop=1e3), evaluate=staged(profile, losing(profile)), method=Bisection())
    assert set(in_time.plan.sites.values()) == {FOUR}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10), st.floats(0.1, 1.1), ORDERS, st.integers(0, 99))
def test_without_an_evaluation_all_is_predicted(count: int, share: float, order: Any, seed: int) -> None:
    """The fastest of all prefixes, 8 bits and then 4 bits in the place of 8, that are small enough."""
    profile = layers(count, seed=seed)
    method = Bisection(order=order, seed=seed)
    program = Program(profile)
    base, points = program.control, []
    for technique in (EIGHT, FOUR):
        ladder = prefixes(program, technique, base, range(count), order, "ms", seed=seed)
        points += [program.point(choice) for choice in ladder]
        base = ladder[-1]
    budget = Budget(mib=share * profile.predict(Plan())["bytes"] / MIB)
    small = [point.ms for point in points if point.bytes / MIB <= budget.limits["mib"]]
    if not small:
        with pytest.raises(BudgetError) as error:
            search(profile, budget, "ms", method=method)
        assert error.value.best.label == "predicted"
        assert error.value.best.best.bytes == min(point.bytes for point in points)
        return
    result = search(profile, budget, "ms", method=method)
    assert result.label == "predicted"
    assert result.evaluations == 0
    assert result.best.ms == min(small)
    assert {point.label for point in result.frontier} == {"predicted"}


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"order": "size"}, "order='size'.*loss, marginal, ratio, random"),
        ({"mu": -0.1}, "mu=-0.1"),
        ({"mu": float("nan")}, "mu=nan"),
        ({"margin": -0.1}, "margin"),
        ({"max_evaluations": 1}, "max_evaluations"),
    ],
)
def test_settings_are_checked(bad: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Bisection(**bad)
