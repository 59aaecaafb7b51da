"""Scoring sample by sample until it is certain: the same answer as the whole set, and nothing scored twice."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bitsmith as bs
from bitsmith import gradual as module
from bitsmith import sequential
from bitsmith.bench import Bench
from bitsmith.gradual import Certainty, Gradual
from bitsmith.metrics import Metric
from bitsmith.runner import Runner
from bitsmith.site import Record, Site
from bitsmith.store import Store
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.technique import Cell, No, Technique
from bitsmith.testing import MockTarget
from smallnet import Batch, Small, batches, small, task


@dataclass(frozen=True)
class Scaled(Technique):
    """The output times a factor: 0 knows nothing, -1 says the opposite."""

    factor: float

    def fits(self, site: Site) -> bool | No:
        return True

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return ScaledCell(site, self.factor)


class ScaledCell(Cell):
    def __init__(self, site: Site, factor: float) -> None:
        super().__init__(site)
        self.factor = factor

    def forward(self, *operands: Any, **rest: Any) -> Any:
        return self.op(*operands, **rest) * self.factor


def hard(count: int, size: int = 16, last: int = 0, seed: int = 3) -> list[Batch]:
    """So much noise that one sample in five is missed; ``last``: samples of one more batch."""
    generator = torch.Generator().manual_seed(seed)
    found = batches(count, size, seed) + (batches(1, last, seed + 1) if last else [])
    return [(0.5 * x + torch.randn(x.shape, generator=generator), y) for x, y in found]


SET = hard(19, last=7)
TOTAL = 19 * 16 + 7
EVERY = ("stem", "left", "right", "head")
PLANS = {
    "8 bits": bs.Plan(dict.fromkeys(EVERY, bs.Int(8, 8))),
    "4 bits": bs.Plan(dict.fromkeys(EVERY, bs.Int(4, 4))),
    "stem 2 bits": bs.Plan({"stem": bs.Int(2, 8)}),
    "2 bits": bs.Plan(dict.fromkeys(EVERY, bs.Int(2, 2))),
    "head 2 bits": bs.Plan({"head": bs.Int(2, 8)}),
    "nothing": bs.Plan({"head": Scaled(0.0)}),
    "opposite": bs.Plan({"head": Scaled(-1.0)}),
}


@pytest.fixture(scope="module")
def model() -> Small:
    return small()


def opened(model: Small, target: bs.Target | None = None, store: Any = None, **changes: Any) -> Bench:
    parts: dict[str, Any] = {"validation": SET, "test": None, **changes}
    bench = Bench.open(model, task(**parts), MockTarget() if target is None else target, store=store, batch=4)
    bench.choose = False  # the plans are what they say
    return bench


@pytest.fixture(scope="module")
def bench(model: Small) -> Bench:
    return opened(model)


def fresh(bench: Bench, certainty: Certainty | None = None, seed: int = 0) -> Gradual:
    """With nothing in the store but the float network's score."""
    other = dataclasses.replace(bench, store=Store(None), seed=seed)
    other.store.put("accuracy", other.score_key(None, "validation"), bench.score(None).to_json())
    return Gradual(other, certainty or Certainty())


def simulated(bench: Bench, plan: bs.Plan) -> np.ndarray:
    """1 for every sample that the network of the plan has right, in the order of the set: no code of ours scores."""
    net = bs.apply(bench.model, plan, bench.task.calibration)
    with torch.no_grad():
        return np.concatenate([(net(x).argmax(1) == y).float().numpy() for x, y in SET])


@pytest.fixture(scope="module")
def truth(bench: Bench) -> dict[str, np.ndarray]:
    found = {name: simulated(bench, plan) for name, plan in PLANS.items()}
    found["float"] = simulated(bench, bs.Plan())
    return found


Scored = list[tuple[str, int]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """What is scored from here on: ``("some", samples)`` for a batch, ``("whole", 0)`` for a set."""
    found: Scored = []
    some, whole = module.batch_scores, bs.bench.score  # type: ignore[attr-defined]

    def batch_scores(model: Any, task: bs.Task, inputs: Any, *rest: Any) -> Any:
        found.append(("some", len(inputs)))
        return some(model, task, inputs, *rest)

    def score(*given: Any) -> Any:
        found.append(("whole", 0))
        return whole(*given)

    monkeypatch.setattr("bitsmith.gradual.batch_scores", batch_scores)
    monkeypatch.setattr("bitsmith.bench.score", score)
    return found


# -- the whole set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_whole_is_the_score_of_the_plan_in_the_loaders_order(
    bench: Bench, truth: dict[str, np.ndarray], name: str
) -> None:
    found = fresh(bench).whole(PLANS[name])
    assert np.array_equal(found.scores, truth[name])
    expected = bench.score(PLANS[name])
    assert {**found.to_json()} == {**expected.to_json()}
    assert found.n == TOTAL


def on_runtime(bench: Bench, plan: bs.Plan) -> np.ndarray:
    """As :func:`simulated`, from a session of the exported file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bench.artifact(plan).path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found = []
    for x, y in SET:
        for first in range(0, len(x), bench.batch):
            part = x[first : first + bench.batch]
            full = torch.cat([part, torch.zeros(bench.batch - len(part), *part.shape[1:])])
            logits = session.run(None, {given.name: full.numpy()})[0][: len(part)]
            found.append(logits.argmax(1) == y[first : first + bench.batch].numpy())
    return np.concatenate(found).astype(np.float32)


@pytest.mark.parametrize("run", [True, False])
def test_whole_on_onnx_runtime(model: Small, monkeypatch: pytest.MonkeyPatch, run: bool) -> None:
    monkeypatch.setattr("bitsmith.runner._faster", lambda *_: "runtime")
    bench = opened(model, OnnxRuntime(threads=1))
    for name in ("8 bits", "4 bits"):
        plan = bench.adapted(PLANS[name])
        gradual = Gradual(bench, run=run)
        assert isinstance(gradual.runner, Runner) is run
        found, expected = gradual.whole(plan), bench.score(plan)
        assert np.array_equal(found.scores, on_runtime(bench, plan) if run else expected.scores)
        assert found.samples == expected.samples
        assert np.mean(found.scores != expected.scores) <= 0.01


def test_a_partly_scored_plan_is_completed(bench: Bench, truth: dict[str, np.ndarray], scored: Scored) -> None:
    gradual = fresh(bench)
    some = gradual.decide(PLANS["2 bits"], 0.1, chance=0.4)
    assert 0 < len(some.scores) < TOTAL
    assert not some.complete
    assert np.array_equal(gradual.whole(PLANS["2 bits"]).scores, truth["2 bits"])
    assert sum(count for _, count in scored) == TOTAL
    assert ("whole", 0) not in scored
    gradual.whole(PLANS["2 bits"])
    assert sum(count for _, count in scored) == TOTAL


# -- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit", "within"), [("8 bits", 0.1, True), ("nothing", 0.05, False), ("opposite", 0.3, False)]
)
def test_what_is_clear_is_decided_early(
    bench: Bench, truth: dict[str, np.ndarray], scored: Scored, name: str, limit: float, within: bool
) -> None:
    found = fresh(bench).decide(PLANS[name], limit)
    assert found.within is within
    assert found.certain
    assert not found.complete
    assert len(found.scores) == sum(count for _, count in scored) < TOTAL / 2
    assert found.interval[0] <= found.mean <= found.interval[1]
    # not a batch more than it takes: without the last one nothing was certain
    order = np.random.default_rng(0).permutation(TOTAL)[: len(found.scores) - 16]
    worse = (truth["float"].astype(float) - truth[name])[order]
    assert sequential.decide(worse, TOTAL, limit, -1.0, 1.0, 1 - Certainty().level) is None


@pytest.mark.parametrize("name", PLANS)
def test_decisions_agree_with_the_whole_set(bench: Bench, truth: dict[str, np.ndarray], name: str) -> None:
    drop = float(np.mean(truth["float"].astype(float) - truth[name]))
    stopped = 0
    for limit, seed in itertools.product((0.001, 0.1, drop, drop + 0.03, drop - 1 / TOTAL), (0, 1)):
        found = fresh(bench, Certainty(0.9999), seed).decide(PLANS[name], limit)
        assert found.within is bool(drop <= limit + 1e-12)
        assert found.certain
        assert found.complete == (len(found.scores) == TOTAL)
        if found.complete:
            assert found.mean == pytest.approx(drop, abs=1e-9)
            assert found.interval == pytest.approx((drop, drop), abs=1e-9)
        stopped += not found.complete
    assert stopped  # and yet not all of them saw everything


def test_scores_are_in_the_random_order(bench: Bench, truth: dict[str, np.ndarray]) -> None:
    found = fresh(bench, seed=5).decide(PLANS["2 bits"], 0.1, chance=0.3)
    order = np.random.default_rng(5).permutation(TOTAL)[: len(found.scores)]
    assert np.array_equal(found.scores, truth["2 bits"][order])
    difference = (truth["float"].astype(float) - truth["2 bits"])[order]
    assert found.mean == pytest.approx(difference.mean())
    assert found.interval == sequential.interval(difference, TOTAL, -1.0, 1.0, 1 - Certainty().level)


@pytest.mark.parametrize("off", [-0.05, -0.02, 0.02, 0.05])
def test_what_is_likely_is_said_before_it_is_certain(
    bench: Bench, truth: dict[str, np.ndarray], scored: Scored, off: float
) -> None:
    """After the first batch that makes one of the two unlikely; what is known beyond it changes nothing."""
    worse = truth["float"].astype(float) - truth["2 bits"]
    limit, plan = float(worse.mean()) + off, PLANS["2 bits"]
    found = fresh(bench).decide(plan, limit, chance=0.3)
    seen, order = len(found.scores), np.random.default_rng(0).permutation(TOTAL)

    def likely(count: int) -> float:
        return sequential.chance(worse[order[:count]], TOTAL, limit, -1.0, 1.0)

    assert not found.certain
    assert not 0.3 <= likely(seen) <= 0.7
    assert all(0.3 <= likely(count) <= 0.7 for count in range(16, seen, 16))
    assert found.within is (likely(seen) >= 0.5)
    gradual = fresh(bench)
    gradual.whole(plan)
    scored.clear()
    assert len(gradual.decide(plan, limit, chance=0.3).scores) == seen
    assert not scored


def test_a_later_question_goes_on_where_the_last_one_ended(
    model: Small, bench: Bench, truth: dict[str, np.ndarray], scored: Scored, tmp_path: Path
) -> None:
    plan, path = PLANS["4 bits"], tmp_path / "runs.db"
    limit = float(np.mean(truth["float"].astype(float) - truth["4 bits"]))  # hard to tell

    def total() -> int:
        return sum(count for _, count in scored)

    with Store(path) as store:
        gradual = Gradual(opened(model, store=store))
        first = gradual.decide(plan, limit, chance=0.45)
        assert total() == len(first.scores)
        # the same question, and an easier one, cost nothing
        assert np.array_equal(gradual.decide(plan, limit, chance=0.45).scores, first.scores)
        assert gradual.decide(plan, 0.9).within is True
        assert total() == len(first.scores)
        second = gradual.decide(plan, limit, chance=0.05)
        assert total() == len(second.scores) > len(first.scores)
        assert np.array_equal(second.scores[: len(first.scores)], first.scores)
    with Store(path) as store:  # another process, the same file
        gradual = Gradual(opened(model, store=store))
        whole = scored.count(("whole", 0))
        third = gradual.decide(plan, limit)
        assert total() == len(third.scores) > len(second.scores)
        assert np.array_equal(third.scores[: len(second.scores)], second.scores)
        assert np.array_equal(gradual.whole(plan).scores, truth["4 bits"])
        assert total() == TOTAL
        assert scored.count(("whole", 0)) == whole  # nor the float network


def test_scores_of_one_order_or_plan_are_not_taken_for_anothers(bench: Bench, truth: dict[str, np.ndarray]) -> None:
    store = Store(None)
    for seed, name in itertools.product((0, 1), ("2 bits", "opposite")):
        gradual = Gradual(dataclasses.replace(bench, store=store, seed=seed))
        gradual.decide(PLANS[name], 0.09, chance=0.1)
        order = np.random.default_rng(seed).permutation(TOTAL)
        found = gradual.decide(PLANS[name], 0.09, chance=0.1)
        assert np.array_equal(found.scores, truth[name][order[: len(found.scores)]])


# -- where every evaluation sees the whole set -----------------------------------------------------------------------


class Generated:
    """Its samples can be read one after the other only."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(SET)


def _margin(output: Tensor, target: Tensor) -> Tensor:
    best = output.gather(1, target[:, None])[:, 0]
    return best - output.mean(1)


margin = Metric("margin", _margin)


def accuracy(model: Callable[[Tensor], Tensor]) -> float:
    with torch.no_grad():
        return float(np.mean(np.concatenate([(model(x).argmax(1) == y).numpy() for x, y in SET])))


CORPUS: dict[str, Any] = {"metric": None, "evaluate": accuracy}


@pytest.mark.parametrize(
    ("changes", "certainty", "why"),
    [
        ({"draws": 2}, Certainty(), "scored 2 times"),
        ({"metric": margin}, Certainty(), r"'margin' has no bounds.*bounds=\("),
        ({"validation": Generated()}, Certainty(), "cannot be read in random order"),
        ({}, Certainty(early=False), "asked for"),
    ],
    ids=["draws", "unbounded", "unreadable", "asked"],
)
def test_why_the_whole_set_is_seen(model: Small, changes: dict[str, Any], certainty: Certainty, why: str) -> None:
    bench = opened(model, **changes)
    gradual = Gradual(bench, certainty)
    assert re.search(why, gradual.why_whole)
    plan = PLANS["nothing"]
    lost = bench.score(None).mean - bench.score(plan).mean
    assert lost > 0.1
    for limit in (lost + 1e-3, lost - 1e-3):
        found = gradual.decide(plan, limit, chance=0.4)
        assert len(found.scores) == found.total == TOTAL
        assert found.complete
        assert found.certain
        assert found.within is (limit > lost)
        assert found.mean == pytest.approx(lost)
    assert np.array_equal(gradual.whole(plan).scores, bench.score(plan).scores)


def test_a_metric_of_the_corpus_is_scored_whole(model: Small, truth: dict[str, np.ndarray]) -> None:
    gradual = Gradual(opened(model, **CORPUS))
    assert "whole corpus" in gradual.why_whole
    assert gradual.whole(PLANS["nothing"]).mean == pytest.approx(truth["nothing"].mean())
    assert gradual.bound(PLANS["nothing"], 1) is None
    assert gradual.check(0.01, 5) == ""


@pytest.mark.parametrize("limit", [0.1, 0.9])
def test_a_decision_about_a_metric_of_the_corpus(model: Small, truth: dict[str, np.ndarray], limit: float) -> None:
    lost = truth["float"].mean() - truth["nothing"].mean()
    found = Gradual(opened(model, **CORPUS)).decide(PLANS["nothing"], limit)
    assert found.within is bool(lost <= limit)
    assert found.mean == pytest.approx(lost)
    assert found.certain


def test_nothing_stands_in_the_way_of_stopping_early(bench: Bench) -> None:
    assert fresh(bench).why_whole == ""


def test_an_unbounded_metric_is_scored_once(model: Small, scored: Scored) -> None:
    gradual = Gradual(opened(model, metric=margin))
    gradual.decide(PLANS["2 bits"], 0.1)
    forwarded = len(scored)
    gradual.whole(PLANS["2 bits"])
    assert len(scored) == forwarded


class Refuses(Runner):
    """Runs nothing."""

    def __init__(self) -> None:
        pass

    def key(self) -> dict[str, Any]:
        return {}

    def scorer(self, plan: bs.Plan) -> Any:
        raise AssertionError("it ran")


def test_test_data_are_scored_where_validation_data_are(model: Small) -> None:
    gradual = Gradual(opened(model, test=SET[:2]), Certainty(early=False))
    gradual.__dict__["runner"] = Refuses()
    gradual.whole(PLANS["8 bits"])
    gradual.on(PLANS["8 bits"], "test")


# -- metrics with bounds ---------------------------------------------------------------------------------------------


def _missed(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) != target).float()


def _percent(output: Tensor, target: Tensor) -> Tensor:
    return 100 * output.softmax(1).gather(1, target[:, None])[:, 0]


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Brier's score, from 0 to 2; 5 added."""
    wanted = torch.nn.functional.one_hot(target, output.shape[1])
    return 5 + (output.softmax(1) - wanted).square().sum(1)


@pytest.mark.parametrize(
    "metric",
    [
        Metric("missed", _missed, lower=True, bounds=(0.0, 1.0)),
        Metric("missed", _missed, lower=True),  # seen to be 0 or 1
        Metric("percent", _percent, bounds=(0.0, 100.0)),
        Metric("distance", _distance, lower=True, bounds=(5.0, 7.0)),
    ],
    ids=["lower", "guessed", "percent", "distance"],
)
def test_other_metrics_with_bounds(model: Small, metric: Metric) -> None:
    bench = opened(model, metric=metric)
    sign = -1 if metric.lower else 1
    low, high = metric.bounds or (0.0, 1.0)
    stopped = 0
    for name in ("8 bits", "2 bits", "nothing", "opposite"):
        worse = sign * (bench.score(None).scores.astype(float) - bench.score(PLANS[name]).scores)
        for limit in (worse.mean() - 0.1 * (high - low), worse.mean() + 0.1 * (high - low)):
            gradual = fresh(bench, Certainty(0.9999))
            found = gradual.decide(PLANS[name], limit)
            assert gradual.why_whole == ""
            assert found.within is bool(worse.mean() <= limit)
            stopped += not found.complete
            bound = gradual.bound(PLANS[name], 7)
            assert bound == sequential.upper_bound(worse, low - high, high - low, (1 - 0.9999) / 7)
            assert bound >= worse.mean()
    assert stopped >= 4


def _above(output: Tensor, target: Tensor) -> Tensor:
    """How many classes are put before the right one: 0 to 3."""
    return (output > output.gather(1, target[:, None])).sum(1).float()


def test_a_plan_may_score_worse_than_float_ever_did(model: Small) -> None:
    easy = batches(4, seed=3)
    bench = opened(model, validation=easy, metric=Metric("above", _above, lower=True))
    assert set(bench.score(None).scores.tolist()) <= {0.0, 1.0}
    found = Gradual(bench).decide(PLANS["opposite"], 0.1)
    assert found.within is False


# -- the bound on the population -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("candidates", [1, 25])
def test_the_bound_on_the_population(bench: Bench, truth: dict[str, np.ndarray], level: float, candidates: int) -> None:
    gradual = fresh(bench, Certainty(level))
    for name in ("8 bits", "2 bits", "nothing"):
        worse = truth["float"].astype(float) - truth[name]
        bound = gradual.bound(PLANS[name], candidates)
        assert bound is not None
        assert bound == sequential.upper_bound(worse, -1.0, 1.0, (1 - level) / candidates)
        # by hand: the capital of one who bets on a smaller drop than this is what the level asks for
        for m, reached in ((bound + 1e-6, True), (bound - 1e-6, False)):
            stakes = sequential._FRACTIONS[:, None]
            capital = np.prod(1 + stakes * (m - worse) / (1 - m), axis=1).mean()
            assert (capital >= candidates / (1 - level)) is np.bool_(reached)


def test_no_bound_without_bounds_of_the_metric(model: Small) -> None:
    assert Gradual(opened(model, metric=margin)).bound(PLANS["8 bits"], 3) is None


# -- what a set can tell ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "candidates"), [(0.95, 1), (0.95, 10), (0.8, 3)])
@pytest.mark.parametrize("metric", [bs.metrics.top1, Metric("percent", _percent, bounds=(0.0, 100.0))])
def test_too_few_samples_for_a_bound_on_the_population(
    model: Small, level: float, candidates: int, metric: Metric
) -> None:
    x, y = batches(1, 200)[0]
    scale = 1.0 if metric.name == "top1" else 100.0
    limit, certainty = 0.07 * scale, Certainty(level, population=True)
    few = Gradual(opened(model, validation=[(x[:20], y[:20])], metric=metric), certainty)
    with pytest.raises(ValueError, match="20 samples can never show at") as error:
        few.check(limit, candidates)
    assert f"{level:.0%}" in str(error.value)
    assert f"whichever of {candidates} plans" in str(error.value)
    stated = re.search(r"it takes (\d+)", str(error.value))
    assert stated is not None
    needed = int(stated[1])
    # so many without a difference are enough, and one fewer is not
    alpha = (1 - level) / candidates
    assert sequential.upper_bound(np.zeros(needed), -scale, scale, alpha) <= limit
    assert sequential.upper_bound(np.zeros(needed - 1), -scale, scale, alpha) > limit
    for count, enough in ((needed, True), (needed - 1, False)):
        gradual = Gradual(opened(model, validation=[(x[:count], y[:count])], metric=metric), certainty)
        if enough:
            assert gradual.check(limit, candidates) == ""
            assert gradual.check(limit, max(candidates - 1, 1)) == ""
        else:
            with pytest.raises(ValueError, match=f"it takes {needed}"):
                gradual.check(limit, candidates)


def test_a_bound_that_was_asked_for_needs_its_conditions(model: Small, bench: Bench) -> None:
    population = Certainty(population=True)
    for gradual, limit, candidates in (
        (fresh(bench, population), 0.2, None),
        (fresh(bench, population), 0.0, 5),
        (Gradual(opened(model, metric=margin), population), 0.2, 5),
        (Gradual(opened(model, **CORPUS), population), 0.2, 5),
    ):
        with pytest.raises(ValueError, match="needs a drop above 0, a metric with bounds"):
            gradual.check(limit, candidates)
    assert fresh(bench, population).check(0.2, 5) == ""


def test_a_limit_below_one_sample_is_said(model: Small, bench: Bench) -> None:
    gradual = fresh(bench)
    assert re.search(rf"one of {TOTAL} samples is {1 / TOTAL:.4f}.*none gets worse", gradual.check(0.9 / TOTAL, None))
    assert gradual.check(1.0001 / TOTAL, None) == ""
    assert gradual.check(0.1, 5) == ""
    assert gradual.check(0.0, 5) == ""
    percent = Gradual(opened(model, metric=Metric("percent", _percent, bounds=(0.0, 100.0))))
    assert f"is {100 / TOTAL:.4f}" in percent.check(0.9 * 100 / TOTAL, 5)
    assert percent.check(1.0001 * 100 / TOTAL, 5) == ""


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.49, 1.0, 1.5, -1.0, float("nan")])
def test_a_level_is_a_probability(level: float) -> None:
    with pytest.raises(ValueError, match=r"Certainty\(level="):
        Certainty(level)


def test_levels_that_are_fine() -> None:
    assert Certainty(0.5).level == 0.5
    assert Certainty(0.999).level == 0.999


def test_a_higher_level_takes_more_samples(bench: Bench) -> None:
    seen = [len(fresh(bench, Certainty(level)).decide(PLANS["nothing"], 0.2).scores) for level in (0.5, 0.95, 0.999999)]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
