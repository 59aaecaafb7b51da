"""Energy with its edges, and area, in the exact search: against every combination, added up in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from bitsmith.plan import Budget
from bitsmith.profile import EdgeRow, Profile, Row
from bitsmith.search import search
from bitsmith.search.program import Program
from bitsmith.searches import Exact, Pareto
from formulas import FLOAT, MIB, Bits


def made(seed: int) -> Profile:
    """Four sites in a row, three techniques at each, of which two read and write integers."""
    draw = random.Random(seed)
    rows, edges = [], []
    for i in range(4):
        for k, technique in enumerate((FLOAT, Bits(0), Bits(1))):
            fmt = ("float", "u8", "u4")[k]
            costs = [draw.randint(1, 40) / 4 for _ in range(4)]
            loss = 0.0 if k == 0 else draw.randint(1, 20) / 4
            rows.append(
                Row(f"s{i}", technique, loss, costs[0], costs[1] * MIB, costs[2], "", (fmt,), fmt, mm2=costs[3])
            )
        if i:
            for one, other in itertools.permutations(("float", "u8", "u4"), 2):
                edges.append(
                    EdgeRow(f"s{i - 1}", f"s{i}", 0, one, other, draw.randint(0, 8) / 4, draw.randint(0, 12) / 4)
                )
    return Profile(tuple(rows), tuple(edges), fixed_ms=1.0, fixed_bytes=MIB, fixed_mj=0.75, fixed_mm2=2.5)


def every(profile: Profile) -> list[dict[str, float]]:
    """ms, mj, mm2 and loss of every combination."""
    found = []
    for chosen in itertools.product(*profile.options().values()):
        by_site = {row.site: row for row in chosen}
        mj = profile.fixed_mj + sum(row.mj or 0.0 for row in chosen)
        for edge in profile.edges:
            formats = by_site[edge.producer].writes, by_site[edge.consumer].reads[0]
            if formats == (edge.produced, edge.consumed):
                mj += edge.mj or 0.0
        mm2 = profile.fixed_mm2 + sum(row.mm2 or 0.0 for row in chosen)
        found.append({"mj": mj, "mm2": mm2, "drop": sum(row.loss for row in chosen)})
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("minimize", "limited"), [("mj", "mm2"), ("mm2", "mj"), ("mj", "mj"), ("drop", "mj")])
def test_the_best_plan_is_the_best_of_all(seed: int, minimize: str, limited: str) -> None:
    profile = made(seed)
    costs = every(profile)
    values = sorted(cost[limited] for cost in costs)
    for limit in (values[0], values[len(values) // 3], values[-1]):
        result = search(profile, Budget(**{limited: limit}), minimize)
        best = min(cost[minimize] for cost in costs if cost[limited] <= limit + 1e-9)
        assert result.best.predicted(minimize) == pytest.approx(best, abs=2e-5)
        assert result.best.predicted(limited) <= limit + 1e-9


def test_predictions_are_the_sums() -> None:
    profile = made(3)
    program = Program(profile)
    for choice, cost in zip(itertools.product(range(3), repeat=4), every(profile), strict=True):
        techniques = [FLOAT, Bits(0), Bits(1)]
        order = [unit.techniques.index(techniques[k]) for unit, k in zip(program.units, choice, strict=True)]
        point = program.point(tuple(order))
        assert (point.mj, point.mm2) == (pytest.approx(cost["mj"]), pytest.approx(cost["mm2"]))


def test_a_profile_without_area_says_so() -> None:
    profile = made(0)
    bare = dataclasses.replace(profile, rows=tuple(dataclasses.replace(row, mm2=None) for row in profile.rows))
    assert "mm2" not in bare.predict(search(bare, Budget(mj=1e3), "mj").plan)
    with pytest.raises(ValueError, match=r"the profile has no area .* leave mm2 out"):
        search(bare, Budget(mm2=1.0), "ms")
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=r"no area"):
        Pareto(("drop", "mm2"), trials=2, seeds=Exact()).search(bare, Budget(ms=1e3), "ms")
