from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.plan import Budget, Plan
from bitsmith.profile import EdgeRow, Profile, Row
from bitsmith.search import BudgetError, Evaluation, Point, search
from bitsmith.searches import Exact
from formulas import FLOAT, MIB, Bits


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Small profiles: mixed formats, edges of either sign from and to profiled and other sites, groups."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    quarter = st.integers(0, 40).map(lambda n: n / 4)
    real = st.integers(0, 10**6).map(lambda n: n / 99991)
    cost = draw(st.sampled_from([quarter, real]))
    formats = st.sampled_from(["float", "u8"])
    rows = []
    for name in names:
        rows.append(Row(name, FLOAT, 0.0, draw(cost), draw(cost) * MIB, reads=("float", "float")))
        for bits in range(draw(st.integers(0, 2))):
            reads = tuple(draw(st.lists(formats, max_size=2)))
            rows.append(
                Row(name, Bits(bits), draw(cost), draw(cost), draw(cost) * MIB, reads=reads, writes=draw(formats))
            )
    ends = st.sampled_from([*names, "@x"])
    edge_cost = st.integers(-8, 20).map(lambda n: n / 4)
    edges = draw(st.lists(st.builds(EdgeRow, ends, ends, st.integers(0, 2), formats, formats, edge_cost), max_size=12))
    groups = ((names[0], names[-1]),) if len(names) > 2 and draw(st.booleans()) else ()
    return Profile(tuple(rows), tuple(edges), fixed_ms=1.5, fixed_bytes=0.5 * MIB, groups=groups)


def every_plan(profile: Profile) -> list[dict[str, float]]:
    """Predicted costs of every combination, by the profile itself."""
    options = profile.options()
    costs = []
    for combination in itertools.product(*options.values()):
        sites = {row.site: row.technique for row in combination}
        if all(len({sites[name] for name in group}) == 1 for group in profile.groups):
            costs.append(profile.predict(Plan(sites)))
    return costs


def changeable(profile: Profile) -> bool:
    return any(len(rows) > 1 for rows in profile.options().values())


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-5, abs=2e-5)


@settings(max_examples=60, deadline=None)
@given(profiles().filter(changeable), st.sampled_from([("ms", "mib"), ("mib", "ms"), ("drop", "ms")]), st.floats(0, 1))
def test_best_plan_equals_brute_force(profile: Profile, names: tuple[str, str], where: float) -> None:
    minimize, limited = names
    costs = every_plan(profile)
    key = {"ms": "ms", "mib": "bytes", "drop": "loss"}
    unit = {"ms": 1.0, "mib": MIB, "drop": 1.0}
    values = sorted(cost[key[limited]] / unit[limited] for cost in costs)
    # exactly at some plan's cost: the limit must include it
    limit = max(values[int(where * (len(values) - 1))], 1e-3)
    budget = Budget(**{limited: limit})
    feasible = [cost for cost in costs if cost[key[limited]] / unit[limited] <= limit + 1e-12]
    if not feasible:
        with pytest.raises(BudgetError) as error:
            search(profile, budget, minimize)
        assert error.value.best.missed[limited] == close(values[0] - limit)
        return
    result = search(profile, budget, minimize)
    best = min(cost[key[minimize]] for cost in feasible) / unit[minimize]
    assert result.best.predicted(minimize) == close(best)
    assert result.best.predicted(limited) <= limit + 1e-12
    assert result.label == "predicted"
    assert not result.missed
    again = profile.predict(result.plan)
    assert (again["ms"], again["bytes"], again["loss"]) == (result.best.ms, result.best.bytes, result.best.loss)


@settings(max_examples=30, deadline=None)
@given(profiles().filter(changeable))
def test_frontier_is_not_bettered_by_any_plan_and_holds_both_ends(profile: Profile) -> None:
    costs = every_plan(profile)
    result = search(profile, Budget(mib=1e6), "ms")
    assert [p.ms for p in result.frontier] == sorted(p.ms for p in result.frontier)
    losses = [p.loss for p in result.frontier]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)
    much = 1e-3 * max(1.0, *(cost["loss"] for cost in costs))  # ties in time are broken by loss this finely
    for point in result.frontier:
        assert not [c for c in costs if c["ms"] < point.ms - 1e-4 and c["loss"] <= point.loss]
        assert not [c for c in costs if c["ms"] <= point.ms and c["loss"] < point.loss - much]
    assert result.frontier[0].ms == close(min(c["ms"] for c in costs))
    assert result.frontier[-1].loss == close(min(c["loss"] for c in costs))


def chain(sites: int, seed: int = 0, mj: bool = False) -> Profile:
    """A chain of float, 8-bit and 4-bit layers, with a conversion wherever formats differ."""
    rng = random.Random(seed)
    rows, edges = [], []
    for i in range(sites):
        ms, size = rng.uniform(0.5, 1.5), rng.uniform(0.5, 2) * MIB
        for bits, kind in ((32, "float"), (8, "u8"), (4, "u8")):
            loss = 0.0 if bits == 32 else rng.uniform(0.5, 2) * 2.0**-bits
            rows.append(
                Row(
                    f"s{i:02}", Bits(bits), loss, ms * (bits / 32) ** 0.5, size * bits / 32,
                    mj=ms * bits if mj else None, reads=(kind,), writes=kind,
                )
            )  # fmt: skip
        if i:
            for a, b in (("float", "u8"), ("u8", "float")):
                edges.append(EdgeRow(f"s{i - 1:02}", f"s{i:02}", 0, a, b, 0.1))
    return Profile(tuple(rows), tuple(edges))


class Bench:
    """Measures by formula and remembers what was asked."""

    def __init__(self, profile: Profile, ms: float = 1.0, drop: float = 1.0, float_ms: float | None = None) -> None:
        self.profile, self.ms, self.drop, self.float_ms = profile, ms, drop, float_ms
        self.asked: list[Plan] = []

    def is_float(self, plan: Plan) -> bool:
        return all(technique == FLOAT for technique in plan.sites.values())

    def __call__(self, plan: Plan) -> Evaluation:
        assert plan not in self.asked, "measured twice"
        self.asked.append(plan)
        got = self.profile.predict(plan)
        scale = 1.0 if self.is_float(plan) else self.ms
        return Evaluation(
            plan, drop=got["loss"] * self.drop, ms=got["ms"] * scale, bytes=int(got["bytes"]), float_ms=self.float_ms
        )


def test_same_plan_whatever_the_order_of_rows() -> None:
    profile = chain(6)
    # equal costs everywhere: only the order of names can decide
    rows = [Row(row.site, row.technique, 0.0, 1.0, 1.0, reads=row.reads, writes=row.writes) for row in profile.rows]
    expected = None
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        plan = search(Profile(tuple(rows), profile.edges), Budget(mib=1.0), "ms").plan
        assert expected in (None, plan)
        expected = plan


def test_groups_share_their_technique() -> None:
    profile = chain(5)
    grouped = Profile(profile.rows, profile.edges, groups=(("s00", "s03"), ("s01", "s04")))
    result = search(grouped, Budget(mib=1.5), "drop")
    assert result.plan["s00"] == result.plan["s03"]
    assert result.plan["s01"] == result.plan["s04"]
    assert result.plan.groups == grouped.groups
    alone = search(profile, Budget(mib=1.5), "drop")
    assert alone.best.loss < result.best.loss


def test_bisection_finds_the_fastest_plan_that_keeps_the_drop() -> None:
    profile = chain(12)
    bench = Bench(profile)
    result = search(profile, Budget(drop=0.05), evaluate=bench)
    assert result.minimize == "ms"
    assert result.label == "evaluated"
    assert result.best.evaluation is not None
    assert result.best.evaluation.drop is not None
    assert result.best.evaluation.drop <= 0.05
    assert result.evaluations == len(bench.asked) <= 12
    meeting = [point for point in result.frontier if point.loss <= 0.05]
    assert result.best.ms == min(point.ms for point in meeting)
    assert result.best.ms < profile.predict(Plan(dict.fromkeys(profile.options(), FLOAT)))["ms"]


def test_walks_on_where_accuracy_is_not_monotone() -> None:
    profile = chain(12)
    fastest = search(profile, Budget(mib=1e6), "ms").plan

    class Uneven(Bench):
        def __call__(self, plan: Plan) -> Evaluation:
            got = super().__call__(plan)
            return Evaluation(plan, drop=0.0, ms=got.ms) if plan == fastest else got

    result = search(profile, Budget(drop=0.05), evaluate=Uneven(profile), method=Exact(max_evaluations=30))
    assert result.plan == fastest


@pytest.mark.parametrize("float_ms", [None, 5.0])
def test_float_is_the_control(float_ms: float | None) -> None:
    profile = chain(5)
    bench = Bench(profile, ms=50.0, float_ms=float_ms)  # every changed plan is measured far slower than predicted
    result = search(profile, Budget(drop=0.05), evaluate=bench)
    assert bench.is_float(result.plan)


def test_speed_is_compared_with_the_float_plan_of_the_same_run() -> None:
    profile = chain(4)
    fastest = search(profile, Budget(mib=1e6), "ms").plan

    def evaluate(plan: Plan) -> Evaluation:
        # the machine was twice as slow while the fastest plan was timed
        ms = profile.predict(plan)["ms"]
        load = 2.0 if plan == fastest else 1.0
        return Evaluation(plan, drop=0.0, ms=ms * load, float_ms=4.5 * load)

    assert search(profile, Budget(drop=0.05), evaluate=evaluate).plan == fastest


@pytest.mark.parametrize("slower", [1.0, 1.3, 2.0])
def test_other_limits_hold_as_measured(slower: float) -> None:
    profile = chain(10)
    float_ms = profile.predict(Plan(dict.fromkeys(profile.options(), FLOAT)))["ms"]
    budget = Budget(ms=float_ms * 0.8)
    result = search(profile, budget, "mib", evaluate=Bench(profile, ms=slower))
    assert result.best.evaluation is not None
    assert result.best.evaluation.ms is not None
    assert result.best.evaluation.ms <= budget.limits["ms"]
    result = search(profile, budget, "drop", evaluate=Bench(profile, ms=slower))
    assert result.best.value("ms") <= budget.limits["ms"]


def test_optimistic_limits_are_tried_when_predictions_are_too_high() -> None:
    profile = chain(6)
    least = search(profile, Budget(mib=1e6), "ms").best.ms
    result = search(profile, Budget(ms=least * 0.9), "drop", evaluate=Bench(profile, ms=0.5))
    assert result.best.value("ms") <= least * 0.9


def test_unmet_budget_carries_the_closest_plan() -> None:
    profile = chain(4)
    least = min(cost["ms"] for cost in every_plan(profile))
    with pytest.raises(BudgetError, match=r"over the limit of .* by .*; |over the limit") as error:
        search(profile, Budget(ms=least / 2), "mib")
    assert error.value.best.missed["ms"] == close(least / 2)
    assert len(error.value.best.plan) == 4
    with pytest.raises(BudgetError, match="ms") as error:
        search(profile, Budget(ms=least / 2, drop=1.0), "ms", evaluate=Bench(profile))
    best = error.value.best
    assert best.label == "evaluated"
    assert best.missed["ms"] == close(least / 2)


def test_nan_accuracy_never_meets_a_budget() -> None:
    profile = chain(4)

    def evaluate(plan: Plan) -> Evaluation:
        float_plan = all(t == FLOAT for t in plan.sites.values())
        return Evaluation(plan, drop=0.0 if float_plan else float("nan"), ms=profile.predict(plan)["ms"])

    result = search(profile, Budget(drop=0.5), evaluate=evaluate)
    assert set(result.plan.sites.values()) == {FLOAT}


def test_energy() -> None:
    profile = chain(4, mj=True)
    result = search(profile, Budget(drop=1e6), "mj", evaluate=Bench(profile))
    assert set(result.plan.sites.values()) == {Bits(4)}
    expected = sum(row.mj or 0.0 for row in profile.chosen(result.plan))
    assert result.best.mj == pytest.approx(expected)
    limited = search(profile, Budget(mj=2 * expected), "drop")
    assert expected < limited.best.predicted("mj") <= 2 * expected


def test_interrupt_reaches_the_caller() -> None:
    def evaluate(plan: Plan) -> Evaluation:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(chain(3), Budget(drop=0.1), evaluate=evaluate)


def test_diverged_techniques_are_never_chosen_and_unknown_costs_are_errors() -> None:
    rows = (Row("a", FLOAT, 0.0, 2.0, 4.0), Row("a", Bits(8), float("inf"), 1.0, 1.0), Row("a", Bits(4), 0.1, 1.5, 1.0))
    assert search(Profile(rows), Budget(mib=1.0), "ms").plan["a"] == Bits(4)
    with pytest.raises(ValueError, match=r"'a'.*ms=nan"):
        search(Profile((*rows, Row("a", Bits(2), 0.0, float("nan"), 1.0))), Budget(mib=1.0), "ms")


def test_refused_rows_are_never_chosen() -> None:
    rows = (
        Row("a", FLOAT, 0.0, 2.0, 4.0),
        Row("a", Bits(8), 0.0, 1.0, 1.0, refused="no kernel"),
        Row("a", Bits(4), 0.1, 1.5, 1.0),
    )
    assert search(Profile(rows), Budget(mib=1.0), "ms").plan["a"] == Bits(4)


def test_group_without_a_common_technique_is_an_error() -> None:
    rows = (Row("a", FLOAT, 0.0, 1.0, 1.0), Row("a", Bits(8), 0.0, 1.0, 1.0), Row("b", Bits(4), 0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="no technique can be chosen at a, b"):
        search(Profile(rows, groups=(("a", "b"),)), Budget(mib=1.0), "ms")


def test_questions_without_an_answer_are_errors() -> None:
    profile = chain(2)
    with pytest.raises(ValueError, match="say what to minimize"):
        search(profile, Budget(mib=1.0))
    with pytest.raises(ValueError, match="must be one of"):
        search(profile, Budget(mib=1.0), "bytes")
    with pytest.raises(ValueError, match="needs evaluate="):
        search(profile, Budget(drop=0.1))
    with pytest.raises(ValueError, match="no energy"):
        search(profile, Budget(mib=1.0), "mj")
    with pytest.raises(ValueError, match="no energy"):
        search(profile, Budget(mj=1.0), "ms")
    with pytest.raises(ValueError, match="profile is empty"):
        search(Profile(()), Budget(mib=1.0), "ms")
    refused = tuple(Row(row.site, row.technique, 0, 0, 0, refused="no int8 kernel") for row in profile.rows)
    with pytest.raises(ValueError, match=r"zero sites can change:\n  no int8 kernel: .* and 3 more"):
        search(Profile(refused), Budget(mib=1.0), "ms")
    with pytest.raises(ValueError, match="gave no drop"):
        search(profile, Budget(drop=0.1), evaluate=lambda plan: Evaluation(plan, ms=1.0))


@pytest.mark.parametrize("bad", [{"points": 1}, {"margin": -0.1}, {"max_evaluations": 1}])
def test_settings_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Exact(**bad)  # type: ignore[arg-type]


def test_progress_and_scale_of_a_resnet50(capfd: pytest.CaptureFixture[str]) -> None:
    profile = chain(70)
    told: list[tuple[str, int, int]] = []
    result = search(profile, Budget(drop=0.5), evaluate=Bench(profile), progress=lambda *what: told.append(what))
    assert isinstance(result.best, Point)
    assert len(result.frontier) >= 10
    assert result.best.value("drop") <= 0.5
    assert {what for what, _, _ in told} == {"solving for loss limits", "measuring whole plans"}
    assert all(done < total for _, done, total in told)
    assert capfd.readouterr().out == ""
