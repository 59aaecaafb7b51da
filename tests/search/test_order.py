"""Orders of decisions against the greedy search by brute force, over losses that interact."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.plan import Plan
from bitsmith.profile import EdgeRow, Profile, Row
from bitsmith.search.order import ORDERS, levels, prefixes
from bitsmith.search.program import Program
from bitsmith.technique import Technique
from formulas import EIGHT, FLOAT, FOUR, MIB, Bits

Sites = dict[str, Technique]
Order = Callable[[Profile, Sites], list[str]]

# sums of these are exact, so that ties are ties however they are added up
EIGHTHS = st.integers(-24, 24).map(lambda n: n / 8)
LOSSES = st.integers(0, 24).map(lambda n: n / 8)


def changed(sites: Sites, name: str, technique: Technique) -> Sites:
    return {**sites, name: technique}


def loss(profile: Profile, sites: Sites, mu: float) -> float:
    """By the definition: what each loses alone, and ``mu`` times what every pair of them loses together."""
    total = sum(row.loss for row in profile.rows if sites[row.site] == row.technique)
    for i, j, together in profile.cross:
        one, other = profile.rows[i], profile.rows[j]
        if sites[one.site] == one.technique and sites[other.site] == other.technique:
            total += mu * together
    return total


def cost(profile: Profile, sites: Sites, minimize: str) -> float:
    got = profile.predict(Plan(sites))
    return {"ms": got["ms"], "mib": got["bytes"] / MIB}[minimize]


def greedy(
    profile: Profile, sites: Sites, technique: Technique, among: list[str], mu: float, by: str, minimize: str
) -> list[str]:
    """Every time the one that then adds least (for what it then saves), by trying all of them."""
    order: list[str] = []
    while len(order) < len(among):
        ranked = []
        for name in among:
            if name in order:
                continue
            after = changed(sites, name, technique)
            added = loss(profile, after, mu) - loss(profile, sites, mu)
            saved = cost(profile, sites, minimize) - cost(profile, after, minimize)
            last = by == "ratio" and saved <= 0
            ranked.append((last, added / saved if by == "ratio" and not last else added, name))
        order.append(min(ranked)[2])
        sites = changed(sites, order[-1], technique)
    return order


@st.composite
def profiles(draw: st.DrawFn, cross: bool = True) -> Profile:
    names = [f"s{k}" for k in range(draw(st.integers(1, 5)))]
    rows, edges = [], []
    for name in names:
        ms = draw(st.integers(8, 32)) / 8
        rows.append(Row(name, FLOAT, 0.0, ms, 4.0 * MIB))
        for technique in (EIGHT, FOUR):
            if technique is FOUR and not draw(st.booleans()):
                continue
            kind = draw(st.sampled_from(["float", "u8"]))
            rows.append(Row(name, technique, draw(LOSSES), ms + draw(EIGHTHS) / 4, MIB / 2, reads=(kind,), writes=kind))
    for one, other in itertools.pairwise(names):
        edges.append(EdgeRow(one, other, 0, "float", "u8", draw(LOSSES)))
        edges.append(EdgeRow(one, other, 0, "u8", "float", draw(LOSSES)))
    quantized = [k for k, row in enumerate(rows) if row.technique != FLOAT]
    pairs = [(i, j) for i, j in itertools.combinations(quantized, 2) if rows[i].site != rows[j].site]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=12)) if pairs and cross else []
    draw(st.randoms(use_true_random=False)).shuffle(rows_order := list(range(len(rows))))
    place = {old: new for new, old in enumerate(rows_order)}
    return Profile(
        tuple(rows[k] for k in rows_order),
        tuple(edges),
        cross=tuple((place[i], place[j], draw(EIGHTHS)) for i, j in chosen),
    )


def order_of(program: Program, found: list[Any]) -> list[str]:
    """The sites in the order in which they change; fails if more than one changes at a step."""
    order = []
    for before, after in itertools.pairwise(found):
        (unit,) = [u for u, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
        order.append(program.units[unit].sites[0])
    return order


def start(program: Program, profile: Profile, at: Technique) -> tuple[tuple[int, ...], Sites, list[str]]:
    """A choice that has ``at`` wherever that is possible, as sites too, and where a lower technique is possible."""
    base = tuple(
        unit.techniques.index(at) if at in unit.techniques else k
        for unit, k in zip(program.units, program.control, strict=True)
    )
    sites = {unit.sites[0]: unit.techniques[k] for unit, k in zip(program.units, base, strict=True)}
    return base, sites, [unit.sites[0] for unit in program.units]


@settings(max_examples=120, deadline=None)
@given(
    profiles(),
    st.sampled_from(["marginal", "ratio"]),
    st.sampled_from([(FLOAT, EIGHT), (FLOAT, FOUR), (EIGHT, FOUR)]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from(["ms", "mib"]),
)
def test_greedy_orders_equal_brute_force(
    profile: Profile, by: Any, between: tuple[Technique, Technique], mu: float, minimize: str
) -> None:
    program = Program(profile)
    base, sites, names = start(program, profile, between[0])
    technique = between[1]
    open_ = [name for name in names if any(r.site == name and r.technique == technique for r in profile.rows)]
    found = prefixes(program, technique, base, range(len(names)), by, minimize, mu)
    assert found[0] == base
    assert order_of(program, found) == greedy(profile, sites, technique, open_, mu, by, minimize)
    # the last one has it everywhere, and what a prefix loses is what the profile predicts of it
    last = dict(zip(names, (u.techniques[k] for u, k in zip(program.units, found[-1], strict=True)), strict=True))
    assert last == {name: technique if name in open_ else sites[name] for name in names}
    assert program.point(found[-1]).loss == loss(profile, last, 1.0)


@settings(max_examples=80, deadline=None)
@given(profiles(), st.sampled_from([(FLOAT, EIGHT), (EIGHT, FOUR)]))
def test_the_order_of_losses_is_that_of_what_each_adds_alone(
    profile: Profile, between: tuple[Technique, Technique]
) -> None:
    program = Program(profile)
    base, _, names = start(program, profile, between[0])
    rows = {(row.site, row.technique): row.loss for row in profile.rows}
    found = prefixes(program, between[1], base, range(len(names)), "loss", "ms")
    before = {unit.sites[0]: unit.techniques[k] for unit, k in zip(program.units, base, strict=True)}
    open_ = [name for name in names if (name, between[1]) in rows and before[name] != between[1]]
    expected = sorted(open_, key=lambda name: (rows[name, between[1]] - rows[name, before[name]], name))
    assert order_of(program, found) == expected
    # without interactions, the greedy order is the same
    assert prefixes(program, between[1], base, range(len(names)), "marginal", "ms", mu=0.0) == found


@settings(max_examples=40, deadline=None)
@given(profiles(cross=False), st.sampled_from([0.5, 1.0]))
def test_without_cross_terms_marginal_losses_are_losses(profile: Profile, mu: float) -> None:
    program = Program(profile)
    among = range(len(program.units))
    found = [prefixes(program, EIGHT, program.control, among, by, "ms", mu) for by in ("loss", "marginal")]
    assert found[0] == found[1]


def pairs(*together: tuple[str, str, float], losses: dict[str, float], **rest: Any) -> Profile:
    """Float and 8 bits at each site; what pairs of 8 bits lose together."""
    rows = [Row(name, FLOAT, 0.0, 2.0, 4.0 * MIB) for name in losses]
    rows += [Row(name, EIGHT, value, 1.0, MIB) for name, value in losses.items()]
    index = {row.site: k for k, row in enumerate(rows) if row.technique == EIGHT}
    return Profile(tuple(rows), cross=tuple((index[a], index[b], value) for a, b, value in together), **rest)


def names_of(profile: Profile, by: Any, **settings_: Any) -> list[str]:
    program = Program(profile)
    found = prefixes(program, EIGHT, program.control, range(len(program.units)), by, "ms", **settings_)
    return order_of(program, found)


def test_what_two_lose_together_moves_the_second_one_back() -> None:
    profile = pairs(("a", "b", 5.0), losses={"a": 1.0, "b": 1.5, "c": 2.0})
    assert names_of(profile, "loss") == ["a", "b", "c"]
    assert names_of(profile, "marginal") == ["a", "c", "b"]
    assert names_of(profile, "marginal", mu=0.05) == ["a", "b", "c"]
    gain = pairs(("a", "c", -1.5), losses={"a": 1.0, "b": 1.5, "c": 2.0})
    assert names_of(gain, "marginal") == ["a", "c", "b"]


def test_the_ratio_puts_what_saves_much_first_and_what_saves_nothing_last() -> None:
    rows = []
    for name, value, ms in (("a", 1.0, 1.9), ("b", 2.0, 1.0), ("c", 0.0, 2.0), ("d", 0.5, 2.5)):
        rows += [Row(name, FLOAT, 0.0, 2.0, 4.0), Row(name, EIGHT, value, ms, 1.0)]
    profile = Profile(tuple(rows))
    # a loses 10 for each ms, b 2; c and d save none
    assert names_of(profile, "ratio") == ["b", "a", "c", "d"]
    assert names_of(profile, "loss") == ["c", "d", "a", "b"]


@pytest.mark.parametrize("by", [by for by in ORDERS if by != "random"])
def test_ties_are_in_order_of_names(by: Any) -> None:
    names = [f"s{k}" for k in range(6)]
    random.Random(1).shuffle(names)
    profile = pairs(*[(a, b, 0.25) for a, b in itertools.combinations(names, 2)], losses=dict.fromkeys(names, 1.0))
    assert names_of(profile, by) == sorted(names)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_random_order_is_that_of_its_seed(count: int, seed: int, shuffle: int) -> None:
    losses = {f"s{k}": float(k) for k in range(count)}
    found = names_of(pairs(losses=losses), "random", seed=seed)
    assert sorted(found) == sorted(losses)
    names = list(losses)
    random.Random(shuffle).shuffle(names)  # rows in another order, other losses: the same
    assert names_of(pairs(losses=dict.fromkeys(names, 1.0)), "random", seed=seed) == found


def test_other_seeds_give_other_orders() -> None:
    profile = pairs(losses={f"s{k}": 0.0 for k in range(4)})
    found = {tuple(names_of(profile, "random", seed=seed)) for seed in range(400)}
    assert len(found) == 24


def test_only_what_is_open_is_changed() -> None:
    profile = pairs(losses={"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    program = Program(profile)
    eight = program.units[1].techniques.index(EIGHT)
    base = tuple(eight if u == 1 else k for u, k in enumerate(program.control))
    for by in ORDERS:
        found = prefixes(program, EIGHT, base, [0, 1, 3], by, "ms")
        assert set(order_of(program, found)) == {"a", "d"}
        assert prefixes(program, FOUR, base, [0, 1, 3], by, "ms") == [base]


def test_groups_change_together() -> None:
    profile = pairs(("a", "c", 3.0), losses={"a": 1.0, "b": 1.0, "c": 2.5}, groups=(("a", "b"),))
    program = Program(profile)
    found = prefixes(program, EIGHT, program.control, [0, 1], "marginal", "ms")
    assert order_of(program, found) == ["a", "c"]
    assert [program.point(choice).loss for choice in found] == [0.0, 2.0, 7.5]


def test_what_a_group_loses_with_itself_counts() -> None:
    """The group loses 0.5 and 2 together, the other site 1."""
    profile = pairs(("a", "b", 2.0), losses={"a": 0.25, "b": 0.25, "c": 1.0}, groups=(("a", "b"),))
    program = Program(profile)
    found = prefixes(program, EIGHT, program.control, [0, 1], "marginal", "ms")
    losses = [program.point(choice).loss for choice in found]
    assert losses[-1] == 3.5
    assert losses[1] == 1.0


# -- levels ----------------------------------------------------------------------------------------------------------


def several() -> Profile:
    """4 bits are faster than 8 and smaller, 2 bits smaller still but slower; 16 bits stand at one site only."""
    rows = []
    for name in ("a", "b"):
        rows += [
            Row(name, FLOAT, 0.0, 4.0, 4.0 * MIB),
            Row(name, EIGHT, 0.1, 2.0, 1.0 * MIB),
            Row(name, FOUR, 0.4, 1.0, 0.5 * MIB),
            Row(name, Bits(2), 0.9, 3.0, 0.25 * MIB),
        ]
    return Profile((*rows, Row("b", Bits(16), 0.05, 3.5, 2.0 * MIB)))


def test_levels_are_dearest_first() -> None:
    profile = several()
    for rows in (profile.rows, profile.rows[::-1]):
        program = Program(Profile(rows))
        # 16 bits leave one site float: 7.5 ms and 6 MiB
        assert levels(program, "ms") == [Bits(16), Bits(2), EIGHT, FOUR]
        assert levels(program, "mib") == [Bits(16), EIGHT, FOUR, Bits(2)]


def test_equal_levels_are_in_order_of_names() -> None:
    rows = [Row("a", Bits(bits), 0.0, 1.0, 1.0) for bits in (4, 16, 32, 8)]
    program = Program(Profile(tuple(rows)))
    control = program.units[0].techniques[program.control[0]]
    assert levels(program, "ms") == sorted({Bits(b) for b in (4, 8, 16, 32)} - {control}, key=str)


def test_levels_go_from_high_precision_to_low_where_the_drop_is_minimized() -> None:
    assert levels(Program(several()), "drop") == [Bits(16), EIGHT, FOUR, Bits(2)]
