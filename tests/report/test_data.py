from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.report.data import MEASURES, FrontierPoint, Measure, Report, ReportError, SiteRow, TrainingPoint

texts = st.text(max_size=12)
numbers = st.floats(allow_nan=False)
maybe = st.none() | numbers
measures = st.builds(
    Measure, value=numbers, spread=maybe, low=maybe, high=maybe, n=st.integers(0, 9), unit=texts, source=texts
)
rows = st.builds(
    SiteRow,
    *[texts] * 5,
    **dict.fromkeys(("sqnr_db", "gap_db", "agree", "loss", "ms", "float_ms", "bytes"), maybe),
    macs=st.integers(0, 10**12),
)
points = st.builds(FrontierPoint, texts, numbers, maybe, numbers, numbers, st.booleans(), st.booleans())
reports = st.builds(
    Report,
    *[texts] * 3,
    **{name: st.none() | measures for name in MEASURES},
    float_bytes=st.none() | st.integers(0),
    sites=st.tuples(rows, rows),
    frontier=st.tuples(points),
    notes=st.tuples(texts),
    seed=st.none() | st.integers(),
    time_whole=maybe,
    verify=st.dictionaries(
        texts.filter(lambda t: t not in ("inf", "-inf", "nan")), numbers | st.booleans() | st.none()
    ),
)


@given(reports)
def test_json_text_round_trip(report: Report) -> None:
    assert Report.from_json(json.loads(report.dumps())) == report


def test_json_is_flat_for_people(report: Report) -> None:
    data = json.loads(report.dumps())
    assert (data["kind"], data["schema"]) == ("bitsmith.report", 1)
    expected = {
        "float_metric": 351 / 359,
        "plan_metric": 350 / 359,
        "samples": 359,
        "float_ms": 8.91,
        "plan_ms": 4.21,
        "float_bytes": 1_180_000,
        "plan_bytes": 293_000,
    }
    assert {name: data[name] for name in expected} == expected
    assert data["plan_metric_interval"] == [0.953, 0.987]
    assert data["float_ms_spread"] == 0.12
    assert data["time_source"] == "measured"
    assert data["speedup"] == pytest.approx(8.91 / 4.21)
    assert len(data["sites"]) == 40
    assert data["sites"][0]["sqnr_db"] == "inf"
    assert data["verify"]["passed"] is True


def test_save_and_load(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "out" / "report.json")
    assert Report.load(path) == report
    page = report.save(tmp_path / "report.html")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "report.html"]


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.HTML.txt"])
def test_another_suffix_is_an_error_and_leaves_nothing(report: Report, tmp_path: Path, name: str) -> None:
    with pytest.raises(ReportError, match=r"saved as \.html or \.json"):
        report.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {k: v for k, v in data.items() if k != key}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {**data, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with(schema=2), "schema 2 is unknown.*pip install"),
        (_with(schema=True), "schema True is unknown"),
        (_with(kind="bitsmith.plan"), "not a Bitsmith report"),
        (lambda data: [data], "not a Bitsmith report"),
        (_without("plan_ms"), "lacks plan_ms"),
        (_with(surprise=1), "unknown keys surprise"),
        (_with(title=3), r"report\.title: 3 is not str"),
        (_with(plan_bytes="many"), r"report\.plan_bytes: 'many' is not int or null"),
        (_with(plan_ms="fast"), r"report\.plan_ms\.value: 'fast' is not float"),
        (_with(plan_ms_interval=[1]), r"plan_ms_interval: \[low, high\]"),
        (_with(sites={}), r"report\.sites: a list"),
        (_with(sites=[1]), r"report\.sites\[0\]: an object"),
        (_with(sites=[{"site": "a"}]), r"sites\[0\]: lacks asked, kind, realised"),
        (_with(notes=[1]), r"report\.notes\[0\]: 1 is not str"),
        (_with(verify=[]), r"report\.verify: an object"),
        (_with(budget={"ms": "fast"}), r"report\.budget\.ms: 'fast' is not float"),
        (_with(store={"hits": 1.5}), r"report\.store\.hits: 1\.5 is not int"),
        (_with(budget={"joules": 1.0}, missed={}), "'joules' is not a limit: ms, mib, mj, mm2 or drop"),
        (_with(missed={"joules": 1.0}), "missed names joules"),
    ],
)
def test_broken_json_says_where(report: Report, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        Report.from_json(change(report.to_json()))


def test_broken_file_is_named(tmp_path: Path, report: Report) -> None:
    path = tmp_path / "report.json"
    path.write_text(report.dumps()[:500])
    with pytest.raises(ReportError, match=r"report\.json is not a report: .*cut off"):
        Report.load(path)
    path.write_text('{"kind": "bitsmith.report", "schema": 7}')
    with pytest.raises(ReportError, match=r"report\.json: report schema 7"):
        Report.load(path)


def test_numpy_scalars_are_plain_numbers() -> None:
    report = Report("t", "x", "m", verify={"n": np.int64(3), "db": np.float32(1.5), "shape": [np.int32(1)]})
    assert report.verify == {"n": 3, "db": 1.5, "shape": (1,)}
    assert Report.from_json(json.loads(report.dumps())) == report


def test_what_json_cannot_hold_is_refused_at_once() -> None:
    with pytest.raises(ReportError, match=r"settings\.device: object cannot be written"):
        Report("t", "x", "m", settings={"device": object()})


def test_limits_are_judged_by_the_reports_own_numbers(report: Report) -> None:
    assert report.over == pytest.approx({"mib": 293_000 / 2**20 - 0.2})
    assert not report.met
    worse = dataclasses.replace(report, drop=Measure(0.03, n=359, unit="fraction"))  # held on validation, not on test
    assert worse.over["drop"] == pytest.approx(0.02)
    assert dataclasses.replace(report, budget={"ms": 4.5}, missed={}).met
    assert not dataclasses.replace(report, budget={"mj": 4.5}, missed={}).met  # nobody measured energy
    assert dataclasses.replace(report, plan_mj=Measure(2.0), budget={"mj": 4.5}, missed={}).met


def test_speedup_needs_both_times(report: Report) -> None:
    assert dataclasses.replace(report, float_ms=None).speedup is None
    assert dataclasses.replace(report, plan_ms=Measure(math.inf)).speedup == 0.0


def test_a_training_is_written_where_there_was_one(report: Report, tmp_path: Path) -> None:
    assert not {"training", "training_metric"} & report.to_json().keys()
    points = (TrainingPoint(1, 2.0, 0.1), TrainingPoint(2, 1.5, 0.05, 0.75, kept=True))
    trained = dataclasses.replace(report, training=points, training_metric="top-1")
    assert Report.load(trained.save(tmp_path / "report.json")) == trained
    with pytest.raises(ReportError, match=r"report\.training\[0\]: lacks lr, step"):
        Report.from_json({**trained.to_json(), "training": [{"loss": 1.0}]})
