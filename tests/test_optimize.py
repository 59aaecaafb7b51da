"""The main job end to end on ONNX Runtime, and on a simulated target where only the logic counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import bitsmith as bs
from bitsmith.bench import Bench
from bitsmith.evaluate import Evaluator
from bitsmith.testing import MockTarget
from smallnet import Batch, batches, small, task

NEEDED = (
    "float_metric",
    "plan_metric",
    "samples",
    "float_ms",
    "plan_ms",
    "float_bytes",
    "plan_bytes",
    "sites",
    "verify",
)


EVENTS: list[str] = []
TEST: list[torch.Tensor] = []


def forward(model: Any, x: torch.Tensor) -> Any:
    """Runs the model; says when it is given a test batch. No closure: what it closed over would be part of the keys."""
    if any(x is test for test in TEST):
        EVENTS.append("forward test")
    return model(x)


@dataclass
class Log:
    """What happened, in order: the pieces of work, and forwards of test batches."""

    events: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def start(self, task: str, total: int | None = None) -> None:
        self.events.append(task)

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Watched:
    """A loader that says when it is read."""

    data: list[Batch]
    log: Log

    def __iter__(self) -> Iterator[Batch]:
        self.log.events.append("read test")
        return iter(self.data)


@dataclass
class Done:
    optimized: bs.Optimized
    folder: Path
    log: Log
    budget: bs.Budget
    options: dict[str, Any]
    model: torch.nn.Module


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One run on ONNX Runtime. Size is minimized: it does not depend on how busy the machine is."""
    folder = tmp_path_factory.mktemp("optimized")
    test = batches(4, seed=4)
    TEST.extend(x for x, _ in test)
    log = Log(EVENTS)
    options = {
        "task": task(test=Watched(test, log), forward=forward),
        "target": bs.targets.OnnxRuntime(threads=1),
        "minimize": "mib",
    }
    budget, model = bs.Budget(drop=0.05), small(width=16)
    optimized = bs.optimize(model, budget=budget, folder=folder, progress=log, **options)
    return Done(optimized, folder, log, budget, options, model)


def test_everything_is_written_and_reads_back(done: Done) -> None:
    names = {path.name for path in done.folder.iterdir()}
    assert names == {"plan.json", "model.onnx", "model.onnx.json", "report.html", "report.json", "runs.db"}
    assert bs.Plan.load(done.folder / "plan.json") == done.optimized.plan
    artifact = bs.Artifact.load(done.folder / "model.onnx")
    assert artifact == done.optimized.artifact
    assert bs.Report.load(done.folder / "report.json") == done.optimized.report
    assert done.folder.joinpath("report.html").read_text(encoding="utf-8").startswith("<!")


def test_report_says_what_was_got(done: Done) -> None:
    data = json.loads((done.folder / "report.json").read_text(encoding="utf-8"))
    assert not [name for name in NEEDED if data.get(name) is None]
    assert data["samples"] == 64
    assert data["plan_bytes"] == (done.folder / "model.onnx").stat().st_size < data["float_bytes"]
    assert data["plan_ms"] > 0 < data["float_ms"]
    assert data["plan_ms_source"] == "measured"
    assert data["plan_ms_spread"] is not None
    assert data["verify"]["passed"] is True
    assert data["split"].startswith("test")
    assert done.optimized.report.met
    assert {row["site"] for row in data["sites"]} == set(bs.sites(done.model, batches(1)[0][0]))


def test_whole_plans_are_measured_and_returned_with_their_steps(tmp_path: Path) -> None:
    model, steps = small(width=16), bs.default_steps(bs.Int(8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"task": task(forward=forward), "target": bs.targets.OnnxRuntime(threads=1), "minimize": "mib"}
    found = bs.optimize(model, budget=bs.Budget(drop=0.05), prepare=steps, folder=tmp_path, **given)
    assert found.plan.prepare == steps
    assert found.plan.sites
    assert bs.Plan.load(tmp_path / "plan.json") == found.plan == bs.plan_of(found.net)
    assert found.check.passed
    # measured whole: the plan's validation score is that of the prepared network
    bench = Bench.open(model, given["task"], given["target"])
    evaluate = Evaluator(bench, steps)
    point = found.result.best
    assert point.evaluation is not None
    assert point.evaluation.plan == found.plan == evaluate.adapted(point.plan)
    assert point.evaluation.metric == bench.score(found.plan).mean
    assert evaluate.adapted(bs.Plan()) == bs.Plan()  # nothing to prepare
    assert evaluate.adapted(found.plan) == found.plan
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_plan_metric_is_the_accuracy_of_the_returned_network(done: Done) -> None:
    data = batches(4, seed=4)
    with torch.no_grad():
        right = sum(int((done.optimized.net(x).argmax(1) == y).sum()) for x, y in data)
        was = sum(int((done.model(x).argmax(1) == y).sum()) for x, y in data)
    report = done.optimized.report
    assert report.plan_metric is not None
    assert report.float_metric is not None
    assert report.drop is not None
    assert report.plan_metric.value == pytest.approx(right / 64)
    assert report.float_metric.value == pytest.approx(was / 64)
    assert report.drop.value == pytest.approx((was - right) / 64)


def test_the_file_computes_what_the_network_simulates(done: Done) -> None:
    optimized = done.optimized
    x = batches(1, seed=9)[0][0][:1]
    (ran,) = done.options["target"].run(optimized.artifact, [x.numpy()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(ran), optimized.net(x), rtol=0.02, atol=0.02)
    changed = [site for site in optimized.check.sites if site.asked.startswith("Int")]
    assert {"left", "right"} <= {site.site for site in changed}
    assert {site.realised for site in changed} <= {"int8", "folded"}


def test_test_data_is_forwarded_once_per_model_and_only_at_the_end(done: Done) -> None:
    events = done.log.events
    assert events.count("forward test") == 2 * 4  # float and plan, four batches each
    first = min(i for i, event in enumerate(events) if event in ("forward test", "read test"))
    last = max(i for i, event in enumerate(events) if event not in ("forward test", "read test"))
    assert events[last].startswith("exporting, verifying")
    assert last < first


def test_the_same_store_gives_the_same_bytes_and_measures_nothing(done: Done, tmp_path: Path) -> None:
    again = bs.optimize(done.model, budget=done.budget, folder=tmp_path, store=done.folder / "runs.db", **done.options)
    assert (tmp_path / "plan.json").read_bytes() == (done.folder / "plan.json").read_bytes()
    assert (tmp_path / "model.onnx").read_bytes() == (done.folder / "model.onnx").read_bytes()
    assert again.report.store["misses"] == 0
    assert again.report.store["hits"] > 10
    first, second = done.optimized.report, again.report
    assert (second.plan_ms, second.float_ms, second.frontier) == (first.plan_ms, first.float_ms, first.frontier)


def test_the_rest_is_estimated_before_it_is_measured(done: Done) -> None:
    assert "float: top1" in done.log.notes[0]
    assert "minutes" in done.log.notes[0]


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_budget_nobody_can_meet_still_saves_the_best_plan(tmp_path: Path) -> None:
    budget = bs.Budget(mib=0.0001)
    with pytest.raises(bs.BudgetError, match=r"mib .* over the limit of 0.0001 by") as caught:
        bs.optimize(small(), task(), MockTarget(), budget, minimize="mib", folder=tmp_path)
    result = caught.value.best
    assert set(result.missed) == {"mib"}
    report = bs.Report.load(tmp_path / "report.json")
    assert report.missed == pytest.approx(result.missed)
    assert report.over["mib"] > 0
    assert not report.met
    saved = bs.Plan.load(tmp_path / "plan.json")
    assert {name for name, technique in saved.sites.items() if technique != bs.Float()} == {
        name for name, technique in result.plan.sites.items() if technique != bs.Float()
    }
    assert saved.sites
    assert bs.Artifact.load(tmp_path / "model.onnx").plan == saved.to_json()
    assert "mib" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()


def test_a_time_nobody_can_meet(tmp_path: Path) -> None:
    with pytest.raises(bs.BudgetError, match="ms") as caught:
        bs.optimize(small(), task(), MockTarget(), bs.Budget(ms=1e-6, drop=0.5), minimize="ms", folder=tmp_path)
    assert caught.value.best.missed["ms"] > 0
    assert (tmp_path / "plan.json").exists()


def test_a_negative_drop_asks_for_a_better_plan_than_float(tmp_path: Path) -> None:
    with pytest.raises(bs.BudgetError, match="drop") as caught:
        bs.optimize(small(), task(), MockTarget(), bs.Budget(drop=-0.5), folder=tmp_path)
    assert caught.value.best.missed["drop"] >= 0.5
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("budget", [bs.Budget(ms=1.0), bs.Budget(mib=1.0, drop=0.01)])
def test_what_to_minimize_must_be_said_before_anything_is_measured(budget: bs.Budget) -> None:
    target = MockTarget()
    with pytest.raises(ValueError, match="say what to minimize"):
        bs.optimize(small(), task(), target, budget)
    assert not target.calls


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="must be one of ms, mib, mj, mm2, drop"):
        bs.optimize(small(), task(), MockTarget(), bs.Budget(drop=0.1), minimize="flops")


@pytest.mark.parametrize(("budget", "minimize"), [(bs.Budget(mj=1.0), "ms"), (bs.Budget(drop=0.1), "mj")])
def test_energy_on_a_target_that_has_none(budget: bs.Budget, minimize: str) -> None:
    target = MockTarget()
    with pytest.raises(ValueError, match="mock gives no energy"):
        bs.optimize(small(), task(), target, budget, minimize=minimize)
    assert target.calls["export"] == 1  # before the long part


def test_energy_on_a_target_that_has_it() -> None:
    found = bs.optimize(small(), task(), MockTarget(watts=2.0), bs.Budget(drop=0.1), minimize="mj")
    report = found.report
    assert report.plan_mj is not None
    assert report.float_mj is not None
    assert report.plan_ms is not None
    assert report.plan_mj.value == pytest.approx(2.0 * report.plan_ms.value)
    assert report.plan_mj.value < report.float_mj.value
    assert report.plan_mj.source == "simulated"


# -- other ways to call it ---------------------------------------------------------------------------------------------


def test_without_test_data_the_report_says_so_and_without_a_folder_the_file_lives() -> None:
    found = bs.optimize(small(), task(test=False), MockTarget(), bs.Budget(drop=0.1))
    assert found.report.split == "selected on these samples"
    assert found.report.samples == 64
    path = found.artifact.path
    assert bs.Artifact.load(path) == found.artifact
    del found
    assert not path.exists()


def test_a_file_path_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = MockTarget()
    with pytest.raises(PermissionError, match="choose another folder"):
        bs.optimize(small(), task(), target, bs.Budget(drop=0.1), folder=tmp_path / "file" / "out")
    assert not target.calls


def test_float_only_when_nothing_is_better() -> None:
    slow = MockTarget(refuses=dict.fromkeys(("conv2d", "linear"), "no kernel"))
    found = bs.optimize(small(), task(), slow, bs.Budget(drop=0.0), minimize="mib")
    assert not any(name in found.plan.sites for name in ("stem", "left", "right", "head"))
    reasons = {row.site: row.why for row in found.report.sites}
    assert set(found.plan.sites) <= set(reasons)
