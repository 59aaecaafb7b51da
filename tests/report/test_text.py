from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.report import text
from bitsmith.report.data import Measure, Report


@given(st.floats(1e-4, 9e5))
def test_number_keeps_three_significant_digits(value: float) -> None:
    assert float(text.number(value)) == pytest.approx(value, rel=5.001e-3)
    assert "e" not in text.number(value)


def _timed(report: Report, plan: float, spread: float = 0.05, source: str = "measured") -> Report:
    return dataclasses.replace(report, plan_ms=Measure(plan, spread=spread, n=30, unit="ms", source=source))


@pytest.mark.parametrize(
    ("plan", "spread", "said", "slow"),
    [
        (4.21, 0.05, "2.1x faster", False),
        (15.0, 0.05, "1.68x SLOWER than float", True),
        (8.95, 0.05, "as fast as float within the spread (1.00x)", False),
        (8.0, 0.05, "1.11x faster", False),
    ],
)
def test_speed_is_said_as_it_is(report: Report, plan: float, spread: float, said: str, slow: bool) -> None:
    timed = _timed(report, plan, spread)
    assert text.speed(timed) == said
    assert text.slower(timed) is slow
    assert text.headline(timed).startswith(said)


def test_a_modelled_time_is_not_called_measured(report: Report) -> None:
    assert text.speed(_timed(report, 4.0, source="modelled")).endswith("(modelled)")


def test_headline_has_sample_size_sizes_and_target(report: Report) -> None:
    assert text.headline(report) == "2.1x faster, top-1 97.8 % → 97.5 % (n=359), 1.13 MiB → 286 KiB on onnxruntime"
    assert text.headline(Report("t", "avr", "m")) == "Nothing was measured on avr"


def test_verdicts(report: Report) -> None:
    assert text.verdict(report) == "Missed: file size by 0.0794 MiB."
    assert text.verdict(dataclasses.replace(report, budget={}, missed={})) == "No limit was asked."
    assert text.verdict(dataclasses.replace(report, budget={"drop": 0.01}, missed={})) == "Every limit is met."
    unknown = dataclasses.replace(report, budget={"mj": 1.0}, missed={})
    assert text.verdict(unknown) == "Not checked: energy per batch was not measured."


def test_a_limit_that_only_the_mean_holds_says_so(report: Report) -> None:
    by_name = {name: (met, remark) for name, _, _, met, remark in text.limits(report)}
    assert by_name["drop of the metric"][0] == "yes"
    assert "interval reaches beyond the limit" in by_name["drop of the metric"][1]
    assert "(n=359)" in by_name["drop of the metric"][1]
    assert by_name["file size"][0] == "NO"
    assert by_name["energy per batch"][0] == "unknown"
    assert "measured, n=30" in by_name["time per batch"][1]
    surely = dataclasses.replace(report, drop=Measure(0.001, low=-0.001, high=0.004, n=9, unit="fraction"))
    assert "beyond" not in text.limits(surely)[0][4]


def test_sum_and_whole_are_both_said(report: Report) -> None:
    said = text.time_sum(report)
    assert "add up to 4.03 ms" in said
    assert "whole run takes 4.21 ms (measured)" in said
    assert "not timed" in text.time_sum(dataclasses.replace(report, time_whole=None))
    assert text.time_sum(dataclasses.replace(report, time_parts={}, time_whole=None)) == ""


def test_worst_sites_first_those_not_as_asked(report: Report) -> None:
    rows = text.worst(report.sites, 6)
    differing = [row for row in report.sites if row.why]
    assert {row.site for row in rows[:4]} == {row.site for row in differing}
    rest = sorted((row.loss or 0 for row in report.sites if not row.why), reverse=True)
    assert [row.loss for row in rows[4:]] == rest[:2]
