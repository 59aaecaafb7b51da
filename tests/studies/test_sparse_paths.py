"""The study of sparse paths, whole, on few images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import bitsmith as bs
from repository import load

load("benchmarks.harness")
command = load("studies._command")
study, training = load("studies.sparse_paths.__main__"), load("studies.sparse_paths.training")
tables = load("studies.sparse_paths.tables")


@pytest.fixture
def root(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Images whose class is a bright stripe."""
    draw = np.random.default_rng(0)
    for name in training.FILES.values():
        arrays = {}
        for part, count in (("train", 700), ("test", 200)):
            y = draw.integers(0, 10, count)
            x = draw.integers(0, 60, (count, 28, 28)).astype(np.uint8)
            for image, label in zip(x, y, strict=True):
                image[2 * label + 2 : 2 * label + 5] += 180
            arrays |= {f"x_{part}": x, f"y_{part}": y}
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / f"{name}.npz", **arrays)
    monkeypatch.setattr(training, "TRAINING", 512)
    monkeypatch.setattr(training, "HELD_OUT", slice(512, None))
    return tmp_path


def cell(form: str, network: str = "MLP", paths: int = 512, seed: int = 0, epochs: int = 2) -> Any:
    return training.Cell("MNIST", network, form, 0 if form == training.DENSE else paths, seed, epochs, 1e-2)


def test_forms_are_compared_at_equal_weights(root: Any) -> None:
    bed = training.Bed(root)
    found = {form: bed.record(cell(form), "test") for form in (training.SOBOL, training.RANDOM, training.PRUNED)}
    wanted = found[training.SOBOL]["weights"]
    assert found[training.PRUNED]["weights"] == wanted
    assert wanted <= found[training.RANDOM]["weights"] <= wanted + 3
    assert found[training.RANDOM]["paths"] > 512 == found[training.SOBOL]["paths"]
    assert all(0 <= record["accuracy"] <= 1 and record["samples"] == 200 for record in found.values())
    assert found[training.SOBOL] == training.Bed(root).record(cell(training.SOBOL), "test")
    dense = bed.record(cell(training.DENSE), "test")
    assert dense["weights"] == 784 * 256 + 256 * 256 + 2560
    assert dense["accuracy"] > 0.5


def test_whole_kernels_are_pruned_where_paths_leave_whole_kernels(root: Any) -> None:
    bed = training.Bed(root)
    pruned, sobol = (
        bed.record(cell(form, "convolutional", 64, epochs=1), "test") for form in (training.PRUNED, training.SOBOL)
    )
    assert pruned["weights"] == sobol["weights"]


def test_the_held_out_images_are_others(root: Any) -> None:
    images = training.Bed(root).images("MNIST")
    assert [len(images[part].y) for part in ("training", "validation", "test")] == [512, 188, 200]
    assert abs(float(images["training"].x.mean())) < 0.05


def test_a_random_start_has_the_deviation_of_the_sparse_fan_in() -> None:
    one = cell(training.NORMAL)
    model = training.started(one)
    weight = model.get_submodule("3").weight  # type: ignore[union-attr]
    example = training.torch.zeros(2, 1, 28, 28)
    left = training.left(training.paths_like(one, model, example), bs.sites(model, example))["3"]
    assert float(weight.detach().std()) == pytest.approx((2 * 256 / left) ** 0.5, rel=0.02)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("limit", [3, 17, 64])
def test_the_least_number_is_found(limit: int) -> None:
    assert training.least(lambda n: n >= limit, 1) == limit


@pytest.mark.filterwarnings("ignore")
def test_the_command_makes_tables_a_plot_and_goes_on(root: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = root / "results"
    monkeypatch.setattr(command, "RESULTS", folder)
    monkeypatch.setattr(study, "RESULTS", folder)
    monkeypatch.setattr(study, "data_root", lambda: root)
    monkeypatch.setattr(study, "PATHS", (256,))
    monkeypatch.setattr(study, "START_PATHS", (256,))
    monkeypatch.setattr(study, "CONV_PATHS", (32,))
    arguments = ["--seeds", "2", "--epochs", "1"]
    study.main(arguments)
    said = capsys.readouterr().out
    assert "MNIST, 784-256-256-10, 1 epochs: test error in %" in said
    assert "signs fixed" in said
    assert "0 cells left out" in said
    assert (folder / "sparse_paths.svg").stat().st_size > 1000
    rows = json.loads((folder / "sparse_paths.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"mlp", "starts", "conv"}
    study.main(arguments)
    assert "16 networks, 0 to be trained" in capsys.readouterr().out


def test_gaps_are_taken_seed_by_seed() -> None:
    found = [
        (cell(form, seed=seed), {"accuracy": accuracy})
        for form, seed, accuracy in (
            (training.SOBOL, 0, 0.9),
            (training.RANDOM, 0, 0.8),
            (training.SOBOL, 1, 0.7),
            (training.RANDOM, 2, 0.1),
        )
    ]
    assert tables.gaps(found, training.RANDOM, training.SOBOL, 512) == pytest.approx([0.1])
