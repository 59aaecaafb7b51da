"""Energy and area in the report, and where its numbers come from: never without the word."""

from __future__ import annotations

import dataclasses
import re

import pytest

from bitsmith.report import plots
from bitsmith.report.data import FrontierPoint, Measure, Report
from bitsmith.report.html import page


def point(k: int, source: str, mj: float | None = 1.0) -> FrontierPoint:
    return FrontierPoint(f"plan {k}", 1.0 + k, 0.01 / (k + 1), 0.5, 0.1, True, k == 0, mj, 3.0 + k, source)


@pytest.mark.parametrize(
    ("minimize", "label"),
    [
        ("ms", "time, ms per batch (modelled)"),
        ("mj", "energy, mJ per batch (modelled)"),
        ("mm2", "area of the chip, mm2 (modelled)"),
        ("mib", "exported file, MiB"),
        ("drop", "time, ms per batch (modelled)"),
    ],
)
def test_the_axis_says_what_and_where_from(minimize: str, label: str) -> None:
    drawn = plots.pareto([point(k, "modelled") for k in range(3)], minimize=minimize)
    assert label in drawn
    assert "1.00 mJ, 3.00 mm2, modelled, " in drawn


def test_sources_are_never_mixed_without_the_word() -> None:
    drawn = plots.pareto([point(0, "measured"), point(1, "modelled")])
    assert "time, ms per batch (measured and modelled)" in drawn
    plain = plots.pareto([point(k, "measured", None) for k in range(2)])
    assert "modelled" not in plain
    assert re.search(r"time, ms per batch<", plain)


def test_without_energy_everywhere_time_is_drawn() -> None:
    drawn = plots.pareto([point(0, "modelled"), point(1, "modelled", None)], minimize="mj")
    assert "time, ms per batch (modelled)" in drawn


def test_area_is_written_read_and_shown_and_files_without_it_are_read(report: Report) -> None:
    assert "plan_mm2" not in report.to_json()
    assert Report.from_json(report.to_json()) == report
    area = Measure(2.5, unit="mm2", source="modelled")
    more = dataclasses.replace(
        report, plan_mm2=area, float_mm2=dataclasses.replace(area, value=4.0), budget={"mm2": 3.0}, missed={}
    )
    assert Report.from_json(more.to_json()) == more
    assert more.met
    shown = page(more)
    assert "area of the chip" in shown
    assert "2.50 mm2 (modelled)" in shown
    assert "Area" not in page(report)
