"""What a stored measurement depends on: each thing that changes a figure makes it be measured again."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.bench import Bench
from bitsmith.profile import measure
from bitsmith.targets.base import Timing
from bitsmith.testing import MockTarget
from smallnet import Batch, Small, batches, small, task

SOURCE = '''
from dataclasses import dataclass
import torch
import bitsmith as bs

@dataclass(frozen=True)
class Rounded(bs.Technique):
    """Weights rounded to a step."""
    step: float = 0.5

    def fits(self, site):
        return site.kind == "conv2d" or bs.No("convolutions only")

    def build(self, site, record, rng):
        return RoundedCell(site, self.step)

class RoundedCell(bs.Cell):
    def __init__(self, site, step):
        super().__init__(site)
        self.step_size = step

    def forward(self, x, weight, **rest):
        return self.op(x, torch.round(weight / self.step_size) * self.step_size, **rest)
'''


def imported(path: Path, source: str) -> ModuleType:
    """A module from a file that was just written."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@pytest.fixture
def rounded(tmp_path: Path) -> Any:
    """Writes the technique's file and gives its class; forgets the module afterwards."""
    yield lambda source: imported(tmp_path / "rounded_of_test_bench.py", source).Rounded()
    sys.modules.pop("rounded_of_test_bench", None)


def count(store: bs.Store, kind: str) -> int:
    return len(store.rows(kind))


def profiled(store: bs.Store, technique: bs.Technique) -> bs.Profile:
    sites = ("stem", "left", "right")
    return bs.profile(
        small(), task(), [technique], MockTarget(), store=store, sensitivity=bs.output_error, patterns=sites
    )


def timed(store: bs.Store, model: nn.Module, **changes: Any) -> tuple[int, ...]:
    """A profile with times; how many rows of each kind the store has then."""
    bs.profile(model, task(**changes), [bs.Int(8, 8)], MockTarget(), store=store, sensitivity=bs.output_error)
    return tuple(count(store, kind) for kind in ("sensitivity", "range", "time", "site times"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, ...]]:
    """A store after one profile, and its rows."""
    path = tmp_path_factory.mktemp("full") / "runs.db"
    with bs.Store(path) as store:
        rows = timed(store, small())
        assert min(rows) > 0
        assert timed(store, small()) == rows
    return path, rows


def test_one_line_of_a_technique_makes_its_rows_be_measured_again(rounded: Callable[[str], bs.Technique]) -> None:
    with bs.Store(None) as store:
        first = profiled(store, rounded(SOURCE))
        assert count(store, "sensitivity") == 3
        profiled(store, rounded(SOURCE))
        assert count(store, "sensitivity") == 3
        assert profiled(store, rounded(SOURCE)).rows[1].loss == first.rows[1].loss
        edited = SOURCE.replace("torch.round(", "torch.floor(")
        again = profiled(store, rounded(edited))
        assert count(store, "sensitivity") == 6
        assert again.rows[1].loss > first.rows[1].loss


def test_a_techniques_field_makes_its_rows_be_measured_again() -> None:
    with bs.Store(None) as store:
        for technique, expected in ((bs.Int(8, 8), 3), (bs.Int(8, 8, granularity="tensor"), 6), (bs.Int(8, 8), 6)):
            profiled(store, technique)
            assert count(store, "sensitivity") == expected


def test_moving_a_techniques_file_changes_nothing(tmp_path: Path) -> None:
    name = "moved_of_test_bench"
    try:
        with bs.Store(None) as store:
            for folder in ("here", "there"):
                (tmp_path / folder).mkdir()
                profiled(store, imported(tmp_path / folder / f"{name}.py", SOURCE).Rounded())
            assert count(store, "sensitivity") == 3
    finally:
        sys.modules.pop(name, None)


def one_weight(model: Small, data: list[Batch]) -> None:
    with torch.no_grad():
        model.left.weight[0, 0, 0, 0] = torch.nextafter(model.left.weight[0, 0, 0, 0], torch.tensor(9.0))


def one_statistic(model: Small, data: list[Batch]) -> None:
    model.norm.running_mean[0] += 1e-6  # type: ignore[index]


def an_argument(model: Small, data: list[Batch]) -> None:
    model.norm.eps = 2e-5


def the_order(model: Small, data: list[Batch]) -> None:
    x, y = data[0]
    data[0] = x[[1, 0, *range(2, len(x))]], y[[1, 0, *range(2, len(y))]]


def one_pixel(model: Small, data: list[Batch]) -> None:
    data[1][0][3, 0, 0, 0] += 1e-3


CHANGES = [one_weight, one_statistic, an_argument, the_order, one_pixel]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_arguments_and_calibration_data(
    change: Callable[[Small, list[Batch]], None], full: tuple[Path, tuple[int, ...]], tmp_path: Path
) -> None:
    path, rows = full
    model, data = small(), batches(2, seed=2)
    change(model, data)
    with bs.Store(shutil.copy(path, tmp_path / "runs.db")) as store:
        assert timed(store, model, calibration=data) == tuple(2 * n for n in rows)


def test_the_models_own_code() -> None:
    class Other(Small):
        """Computes another thing with the same weights, sites and shapes: a constant factor is no site."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.5

    other = Other()
    other.load_state_dict(small().state_dict())
    with bs.Store(None) as store:
        keys = [Bench.open(m, task(), MockTarget(), store=store).model_key for m in (small(), other.eval())]
    assert keys[0]["state"] == keys[1]["state"]
    assert keys[0]["code"] != keys[1]["code"]


def half_right(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (output.argmax(1) == target)


def all_right(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1.0 * (output.argmax(1) == target)


def second_half(model: Any, x: torch.Tensor) -> Any:
    return model(x.flip(0)).flip(0)


def scored(store: bs.Store, **changes: Any) -> float:
    got = bs.evaluator(small(), task(**changes), MockTarget(), store=store)(bs.Plan()).metric
    assert got is not None
    return got


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": half_right},
        {"metric": bs.metrics.Metric("right", all_right)},
        {"metric": bs.metrics.Metric("all_right", all_right, lower=True)},
        {"validation": batches(4, seed=5)},
        {"forward": second_half},
    ],
    ids=["source", "name", "direction", "data", "forward"],
)
def test_the_metric_the_data_and_how_the_model_is_run(changes: dict[str, Any]) -> None:
    with bs.Store(None) as store:
        scored(store, metric=all_right)
        scored(store, metric=all_right)
        assert count(store, "accuracy") == 1
        scored(store, **{"metric": all_right, **changes})
        assert count(store, "accuracy") == 2


@pytest.mark.parametrize(
    ("target", "batch"),
    [(MockTarget(seed=1), 1), (MockTarget(noise=0.1), 1), (MockTarget(), 2)],
    ids=["seed", "noise", "batch"],
)
def test_times_depend_on_the_targets_settings_and_the_batch(target: MockTarget, batch: int) -> None:
    with bs.Store(None) as store:
        for given, size, expected in ((MockTarget(), 1, 1), (MockTarget(), 1, 1), (target, batch, 2)):
            bs.evaluator(small(), task(), given, store=store, batch=size)(bs.Plan())
            assert count(store, "time") == expected


def test_ranges_of_two_formats_of_one_tensor_are_collected_together() -> None:
    with bs.Store(None) as store:
        first = Bench.open(small(), task(), MockTarget(), store=store)
        plain, fine = bs.Format(8), bs.Format(8, range=bs.Range("mse"))
        first.ranges([("stem", fine), ("stem", plain)])
        found = first.net.record.statistics["stem"]
        assert found.histogram is not None
        second = Bench.open(small(), task(), MockTarget(), store=store)
        second.ranges([("stem", fine)])
        assert store.hits == 1
        assert second.net.record.statistics["stem"].to_json() == found.to_json()


def test_a_store_given_as_a_path_is_closed_and_its_folder_of_artifacts_removed(tmp_path: Path) -> None:
    bench = Bench.open(small(), task(), MockTarget(), store=tmp_path / "runs.db")
    path, store = bench.artifact(bs.Plan()).path, bench.store
    assert path.exists()
    del bench
    assert not path.exists()
    with pytest.raises(bs.StoreError, match="closed"):
        store.rows("time")


def test_computed_times_take_no_file() -> None:
    """The size is then that of the float file with the plan's weights; with steps the plan is exported after all."""
    target = bs.targets.Roofline(float32=10.0, int8=40.0, bandwidth_gb_s=5.0)
    bench = Bench.open(small(), task(), target)
    plan = bench.adapted(bs.Plan(dict.fromkeys(("left", "right"), bs.Int(8, 8))))
    plain, timing = bench.times([bs.Plan(), plan])
    assert not list(bench.folder.rglob("*.onnx"))
    sites = bench.net.record.sites
    saved = sum(sites[name].parameter_bytes - bs.Int(8, 8).bits(sites[name]) / 8 for name in ("left", "right"))
    assert saved > 0
    assert bench.size(plan) == round(bench.artifact(bs.Plan()).bytes - saved)
    assert bench.size(bs.Plan()) == bench.artifact(bs.Plan()).bytes
    (artifact,) = bench.folder.rglob("*.onnx")
    assert artifact == bench.artifact(bs.Plan()).path
    measured = target.measure([bench.artifact(bs.Plan()), bench.artifact(plan)])
    assert [plain.ms, timing.ms] == [pytest.approx(t.ms) for t in measured]
    corrected, smoothed = (plan.replace(prepare=(s,)) for s in (bs.CorrectBias(), bs.SmoothQuant(0.5, multiply=True)))
    assert bench.size(corrected) == bench.size(plan)
    assert bench.size(smoothed) == bench.artifact(smoothed).bytes


def test_statistics_are_collected_once_for_choices_sensitivities_and_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass over the calibration data makes one copy of the network."""
    calibrating = importlib.import_module("bitsmith.model.calibrate")
    passes, plain = [], calibrating.duplicate
    monkeypatch.setattr(calibrating, "duplicate", lambda model: passes.append(1) or plain(model))
    target = bs.targets.Roofline(float32=50.0, int8=200.0, bandwidth_gb_s=20.0)
    bench = Bench.open(small(), task(), target, store=None)
    profile = measure(bench, [bs.Int(8, 8)])
    plan = bench.adapted(bs.Plan({site: bs.Int(8, 8) for site in profile.options()}))
    bench.simulate(plan)
    # all tensors once; the input's methods ask for what is known by then
    assert len(passes) == 1


def test_times_are_taken_again_where_other_work_shows() -> None:
    """Two clocks: one that is level, and one that other work holds up in every second round."""

    @dataclasses.dataclass(frozen=True)
    class Held(MockTarget):
        by: float = 1.0

        def measure(self, artifacts: Sequence[Any], rounds: int = 30) -> list[Timing]:
            samples = tuple(self.by if k % 2 else 1.0 for k in range(rounds))
            return [Timing(samples, 1, 1, "measured") for _ in artifacts]

    for by, expected in ((1.0, 10), (1.08, 10), (1.2, 40)):
        bench = Bench.open(small(), task(), Held(by=by))
        (timing,) = bench.steady_times([bs.Plan()], 10, 40)
        assert len(timing.samples) == expected
        assert timing.low == 1.0
        assert len(bench.steady_times([bs.Plan()], 40, 40)[0].samples) == 40
