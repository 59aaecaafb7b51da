"""What became of each technique, against plans costed by hand."""

from __future__ import annotations

import dataclasses

import pytest

import bitsmith as bs
from bitsmith.profile import EdgeRow, Profile, Row
from bitsmith.report.considered import Costs, alternatives, considered, costs_of_sites
from bitsmith.report.data import Report, SiteRow
from bitsmith.report.html import page
from bitsmith.search.base import Evaluation, Point, Result

FLOAT, W8, W4, W2, PRUNED = bs.Float(), bs.Int(8, 8), bs.Int(4, 8), bs.Int(2, 8), bs.Sparse(0.5)


def row(site: str, technique: bs.Technique, loss: float, mj: float, refused: str = "") -> Row:
    reads = ("u8", "float") if technique in (W8, W4, W2) else ("float", "float")
    return Row(site, technique, loss, 2 * mj, 100.0, mj, refused, reads, reads[0])


PROFILE = Profile(
    (
        *(row(site, FLOAT, 0.0, 8.0) for site in ("a", "b", "c")),
        *(row(site, W8, 0.01, 4.0) for site in ("a", "b", "c")),
        *(row(site, W4, loss, 2.0) for site, loss in (("a", 0.02), ("b", 0.5), ("c", 0.9))),
        *(row(site, W2, 0.0, 0.0, "no kernel") for site in ("a", "b")),
        row("c", W2, 0.0, 0.0, "too narrow"),
        *(row(site, PRUNED, 0.02, 5.0) for site in ("b", "c")),
        row("a", PRUNED, 0.0, 0.0, "the first layer is kept"),
    ),
    # between integers and floats a conversion costs
    (
        EdgeRow("a", "b", 0, "u8", "float", 0.0, 1.5),
        EdgeRow("a", "b", 0, "float", "u8", 0.0, 1.5),
        EdgeRow("b", "c", 0, "u8", "float", 0.0, 1.5),
        EdgeRow("b", "c", 0, "float", "u8", 0.0, 1.5),
    ),
    source="modelled",
    target="chip",
)


def result(minimize: str = "mj") -> Result:
    """W4 at a, W8 at b and c was chosen; W4 at a and b was measured and loses too much."""

    def point(plan: bs.Plan, drop: float) -> Point:
        found = PROFILE.predict(plan)
        measured = Evaluation(plan, 0.9 - drop, drop, ms=found["ms"], mj=found["mj"], bytes=300, source="modelled")
        return Point(plan, found["ms"], found["bytes"], found["loss"], found["mj"], measured)

    best = point(bs.Plan({"a": W4, "b": W8, "c": W8}), 0.005)
    others = (point(bs.Plan({"a": W4, "b": W4, "c": W8}), 0.04), point(bs.Plan(), 0.0))
    return Result(best, (best, *others), minimize, bs.Budget(drop=0.01), evaluations=3)


def test_each_technique_says_where_it_is_and_what_it_lost_by() -> None:
    rows = {found.technique: found for found in considered(PROFILE, result())}
    assert [(r.chosen, r.offered, r.refused) for r in rows.values()] == [
        *((0, 3, 0), (2, 3, 0), (1, 3, 0)),
        *((0, 0, 3), (0, 2, 1)),
    ]
    # b to 4 bits: 2 mJ less of 10, 0.49 more lost; measured, it is over the limit
    four = rows[W4.label()]
    assert (four.sites, four.lost_by, four.candidate) == ("a", "", "b")
    assert "in float these sites would take 7.50 mJ more (75 %), loss -0.0200" in four.why
    assert "elsewhere the best at b: 2.00 mJ less (20 %), loss +0.490" in four.why
    assert "in 2 measured plans, the chosen one among them" in four.why
    eight = rows[W8.label()]
    # float there: 8 mJ more, less no edge between b and c, and one between a and b
    assert (eight.chosen, eight.sites) == (2, "b, c")
    assert "in float these sites would take 9.50 mJ more (95 %)" in eight.why
    assert rows[W2.label()].lost_by == "not supported"
    assert rows[W2.label()].why == "not at 2 sites: no kernel; not at 1 site: too narrow"
    # pruned at c: 1 mJ more and a conversion, and it loses more
    pruned = rows[PRUNED.label()]
    assert (pruned.lost_by, pruned.candidate) == ("accuracy and cost", "c")
    assert "the best at c: 2.50 mJ more (25 %), loss +0.0100; in no measured plan" in pruned.why
    assert rows["float"].lost_by == "cost"


def test_a_measured_plan_says_which_limit_it_misses() -> None:
    wanted = result()
    best = wanted.frontier[1]
    other = dataclasses.replace(wanted, best=wanted.frontier[2], frontier=(best, wanted.frontier[2]))
    found = next(r for r in considered(PROFILE, other) if r.technique == W4.label())
    assert found.lost_by == "accuracy"
    assert "of which the best has 8.00 mJ, a drop of 0.0400, drop over the limit by 0.0300" in found.why


def test_changes_against_plans_that_are_predicted_whole() -> None:
    """Every site's alternative is the best of all plans that differ there."""
    found = alternatives(PROFILE, result())
    assert set(found) == {"a", "b", "c"}
    assert found["b"].startswith(f"{W4.label()}: accuracy: 2.00 mJ less")
    # at a: 8 bits lose less and cost 2 mJ more
    assert found["a"] == f"{W8.label()}: cost: 2.00 mJ more (20 %), loss -0.0100"


def test_sites_that_decide_together_change_together() -> None:
    grouped = dataclasses.replace(PROFILE, groups=(("b", "c"),))
    rows = {r.technique: r for r in considered(grouped, result())}
    assert "elsewhere the best at b: 4.00 mJ less (40 %), loss +1.38" in rows[W4.label()].why


@pytest.mark.parametrize("minimize", ["ms", "mib", "drop"])
def test_any_quantity_can_be_what_is_minimized(minimize: str) -> None:
    rows = {r.technique: r for r in considered(PROFILE, result(minimize))}
    assert rows[PRUNED.label()].lost_by == {"ms": "accuracy and cost"}.get(minimize, "accuracy")


def test_costs_by_site_are_those_of_formulas_only() -> None:
    plan = result().plan
    assert costs_of_sites(PROFILE, plan)["a"] == Costs(4.0, 16.0, 2.0, 8.0)
    assert costs_of_sites(dataclasses.replace(PROFILE, source="measured"), plan) == {}


def test_it_is_written_read_and_shown_and_files_without_it_are_read(report: Report) -> None:
    assert "techniques" not in report.to_json()
    assert "rejected" not in report.to_json()["sites"][0]
    sites = (SiteRow("a", "conv2d", "Int", "int8", rejected="next one"), *report.sites)
    more = dataclasses.replace(report, techniques=considered(PROFILE, result()), sites=sites)
    assert Report.from_json(more.to_json()) == more
    shown = page(more)
    assert "What became of each technique" in shown
    assert "not at 2 sites: no kernel" in shown
    assert "next one" in shown
    assert "What became of each technique" not in page(report)
