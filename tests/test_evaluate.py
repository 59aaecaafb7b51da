"""A whole plan measured: accuracy on validation data, time and size of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bitsmith as bs
from bitsmith.testing import MockTarget
from smallnet import batches, small, task

PLAN = bs.Plan({"stem": bs.Int(2, 4), "left": bs.Int(2, 4), "head": bs.Float()})


class Untouchable:
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("test data must not be read")


def accuracy(model: Any) -> float:
    data = batches(4, seed=3)
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in data) / 64


def test_it_measures_what_apply_computes(tmp_path: Path) -> None:
    model, target = small(), MockTarget(watts=2.0)
    evaluate = bs.evaluator(model, task(test=Untouchable()), target, folder=tmp_path)
    got = evaluate(PLAN)
    net = bs.apply(model, got.plan, batches(2, seed=2))
    assert set(got.plan.sites) == {"stem", "left"}  # what stays as it was is not in the adapted plan
    assert got.metric == pytest.approx(accuracy(net))
    assert got.drop == pytest.approx(accuracy(model) - accuracy(net))
    assert got.drop_interval is not None
    assert got.drop_interval[0] <= got.drop <= got.drop_interval[1]
    assert got.samples == 64
    assert got.source == "simulated"
    assert got.ms is not None
    assert got.float_ms is not None
    assert 0 < got.ms < got.float_ms
    assert got.mj == pytest.approx(2.0 * got.ms)
    assert got.bytes in {path.stat().st_size for path in (tmp_path / "artifacts").iterdir()}


def test_a_plan_that_changes_nothing_is_the_float_model() -> None:
    calls = []

    def forward(model: Any, x: torch.Tensor) -> Any:
        calls.append(type(model))
        return model(x)

    evaluate = bs.evaluator(small(), task(forward=forward), MockTarget())
    got = evaluate(bs.Plan({"left": bs.Float()}))
    once = len(calls)
    assert got.drop == 0.0
    assert got.metric == accuracy(small())
    assert got.ms == got.float_ms
    evaluate(bs.Plan())
    assert len(calls) == once


def test_a_measured_plan_is_not_measured_again(tmp_path: Path) -> None:
    target = MockTarget(noise=0.3)
    store = tmp_path / "runs.db"
    first = bs.evaluator(small(), task(), target, store=store)(PLAN)
    measured = target.calls["measure"]
    assert bs.evaluator(small(), task(), target, store=store)(PLAN) == first
    assert target.calls["measure"] == measured


def test_the_model_may_change_after_the_evaluator_was_made() -> None:
    model = small()
    evaluate = bs.evaluator(model, task(), MockTarget())
    before = evaluate(bs.Plan()).metric
    with torch.no_grad():
        model.head.weight.neg_()
    assert accuracy(model) < 0.5
    assert evaluate(PLAN).metric == bs.evaluator(small(), task(), MockTarget())(PLAN).metric
    assert evaluate(bs.Plan()).metric == before


def test_times_belong_to_the_batch_size() -> None:
    one, four = (bs.evaluator(small(), task(), MockTarget(), batch=batch)(PLAN) for batch in (1, 4))
    assert one.ms is not None
    assert four.ms is not None
    assert four.ms > 1.5 * one.ms


def test_a_metric_of_the_whole_corpus() -> None:
    data = batches(4, seed=3)
    task_ = bs.Task(calibration=batches(2, seed=2), validation=data, evaluate=accuracy)
    got = bs.evaluator(small(), task_, MockTarget())(PLAN)
    assert got.drop_interval is None
    assert got.metric is not None
    assert got.drop == pytest.approx(accuracy(small()) - got.metric)


def test_an_unknown_site_offers_the_closest() -> None:
    evaluate = bs.evaluator(small(), task(), MockTarget())
    with pytest.raises(bs.UnknownSiteError, match="closest: left"):
        evaluate(bs.Plan({"lefd": bs.Int(8, 8)}))
