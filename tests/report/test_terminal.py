from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from bitsmith.report.data import Measure, Report
from bitsmith.report.terminal import site_table, summary


def _printed(report: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    summary(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_summary_says_result_limits_worst_sites_and_notes(report: Report) -> None:
    said = _printed(report)
    flat = " ".join(said.split())
    assert "2.1x faster, top-1 97.8 % → 97.5 % (n=359)" in flat
    assert "Missed: file size by 0.0794 MiB." in flat
    assert "test (never used for selection)" in flat
    assert "4 of 40 are not what was asked for" in flat
    assert "no int8 kernel: its output is not quantized" in flat
    assert "note: 4 sites ran in float32" in flat
    assert "simulated against run: passed" in flat


def test_slower_and_failed_are_said(report: Report) -> None:
    bad = dataclasses.replace(report, plan_ms=Measure(20.0, spread=0.1, n=30), verify={"passed": False})
    said = _printed(bad)
    assert "2.2x SLOWER than float" in said
    assert "simulated against run: FAILED" in said


def test_fits_80_columns_without_breaking_numbers(report: Report) -> None:
    said = _printed(report, 80)
    assert max(map(len, said.splitlines())) <= 80
    assert "layer3.2.conv2  Int(w=8, a=8)  float32" in said


def test_markup_in_names_is_text(report: Report) -> None:
    row = dataclasses.replace(report.sites[1], site="[bold red]x[/nothing]", why="[/]")
    said = _printed(dataclasses.replace(report, title="[red]t[/wrong]", sites=(row,), notes=("[/oops]",)), 140)
    for name in ("[bold red]x[/nothing]", "[red]t[/wrong]", "[/oops]"):
        assert name in said


def test_empty_report_prints() -> None:
    assert "Nothing was measured on t" in _printed(Report("empty", "t", "m"))


def test_wide_table_has_the_rest(report: Report) -> None:
    narrow, wide = site_table(report.sites), site_table(report.sites, wide=True)
    assert [c.header for c in narrow.columns] == ["site", "asked", "realised", "SQNR dB", "loss", "float ms", "plan ms"]
    assert {c.header for c in wide.columns} - {c.header for c in narrow.columns} == {
        "kind",
        "gap dB",
        "agree",
        "weights",
    }
    assert narrow.row_count == wide.row_count == 40
