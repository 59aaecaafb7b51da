"""The study of Winograd-aware training, whole, on the small network."""

from __future__ import annotations

import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch

import bitsmith as bs
import smallnet
from bitsmith.store import Store
from repository import load

load("benchmarks.harness")
command, guided = load("studies._command"), load("studies._guided")
study, grid = load("studies.winograd_aware.__main__"), load("studies.winograd_aware.grid")
tables, images = load("studies.winograd_aware.tables"), load("studies._images")


def task():
    parts = [smallnet.Pool(smallnet.batches(count, seed=seed)) for count, seed in ((4, 5), (2, 6), (4, 7))]
    return bs.Task(*parts, metric=bs.metrics.top1, loss=torch.nn.functional.cross_entropy)


@pytest.fixture(scope="module")
def bed():
    with Store(None) as store:
        yield grid.Bed(guided.Subject("small", smallnet.small(), task(), guided.Size(32, 16), store))


def small_study(monkeypatch, folder):
    for module in (command, guided):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(study, "data_root", lambda: folder)
    monkeypatch.setattr(study, "network", lambda root: smallnet.small())
    monkeypatch.setattr(study, "task_of", lambda root: task())
    monkeypatch.setattr(study, "SIZE", guided.Size(32, 16))


def cell(form, route=None, steps=0, seed=0):
    settings = grid.Settings(steps, 1e-4) if steps else None
    return grid.Cell(grid.FORMS[form], route or grid.AFTER, seed, settings)


def test_the_first_convolution_stays_direct(bed):
    assert (bed.fitting, bed.others) == (["left", "right"], ["stem", "head"])
    plan = bed.plan(grid.FORMS["F4 int8"])
    assert {name: plan[name] for name in plan.sites} == {
        **dict.fromkeys(["stem", "head"], bs.Int(8, 8)),
        **dict.fromkeys(["left", "right"], bs.Winograd(4, 8)),
    }
    assert set(bed.plan(grid.FORMS["F6 fp32"]).sites) == {"left", "right"}
    assert not bed.plan(grid.FLOAT).sites
    flex = grid.FORMS["F2 int8"].by(grid.FLEX)
    assert bed.plan(flex)["left"] == bs.Winograd(2, 8, transforms="flex")


def test_only_what_has_kernels_is_shipped(bed):
    assert bed.refused(grid.FORMS["F6 int8"])
    assert not bed.refused(grid.DIRECT)
    assert bed.refused(grid.FLOAT)
    routes = {(c.form.name, c.route) for c in study.untrained(bed, 1)}
    assert ("direct int8", grid.SHIPPED) in routes
    assert ("F6 int8", grid.SHIPPED) not in routes
    plan = bed.shipped(grid.DIRECT)
    assert len(plan.sites) > 4


def test_trainings_are_of_every_form_once_and_of_float_ones_apart(bed):
    integers, floats = (list(study.trained(2, 5, routes)) for routes in (study.QUANTIZED, study.FLOATING))
    assert {c.seed for c in integers} == {c.seed for c in floats} == {0, 1}
    assert all(c.settings.steps == 5 for c in (*integers, *floats))
    assert all(c.form.rest is None for c in floats)
    assert not any(c.form.rest is None for c in integers)
    assert {c.form.name for c in floats} == {name for name, form in grid.FORMS.items() if form.rest is None}
    assert len({c.name for c in (*integers, *floats)}) == len(integers) + len(floats) == 2 * (10 + 7)


def test_float_winograd_is_float_and_integers_are_not(bed):
    float_, exact, coarse = (bed.record(cell(name), "test") for name in ("direct fp32", "F4 fp32", "F6 int8"))
    assert float_["largest gap"] == 0
    assert exact["right"] == float_["right"]
    assert exact["largest gap"] < 1e-4 < coarse["largest gap"]
    assert 0 <= np.mean(exact["kl"]) < 1e-6 < np.mean(coarse["kl"])


def test_seeds_draw_other_calibration_samples_and_orders(bed):
    one, again, other = (bed.record(cell("F4 int8", grid.FLEX, 2, seed), "test") for seed in (0, 0, 1))
    assert one == again != other
    assert bed.key(cell("F4 int8", seed=1), "test") != bed.key(cell("F4 int8"), "test")


def test_a_trained_network_has_trained_transforms(bed):
    net = bed.network(cell("F4 int8", grid.FLEX, 2))
    matrices = {name: value for name, value in net.named_parameters() if name.endswith(".bt")}
    fresh = bed.network(cell("F4 int8", grid.FLEX))
    before = dict(fresh.named_parameters())
    assert matrices
    assert all(not torch.equal(value, before[name]) for name, value in matrices.items())


def test_fixed_transforms_stay_while_weights_are_trained(bed):
    before, after = (dict(bed.network(cell("F4 int8", grid.FIXED, steps)).named_parameters()) for steps in (0, 2))
    moved = {name.rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert moved.isdisjoint(grid.MATRICES)
    assert "weight" in moved
    exact, rounded = (bed.record(cell("F4 int8", route), "test") for route in (grid.AFTER, grid.ROUNDED))
    assert exact["kl"] != rounded["kl"]


def test_augmentation_turns_over_and_shifts(bed):
    x = torch.arange(2.0 * 3 * 12 * 12).view(2, 3, 12, 12) + 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = torch.cat([images.augmented(x) for _ in range(50)])
        first, second = (torch.cat([y for _, y in images.Augmented(task().calibration, 16)]) for _ in range(2))
    assert seen.shape == (100, 3, 12, 12)
    assert {0.0} < set(seen.unique().tolist()) <= {0.0, *x.unique().tolist()}
    rows = seen.flatten(1)
    assert any(torch.equal(row, x[0].flatten()) for row in rows) or len(torch.unique(rows, dim=0)) > 50
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())
    with pytest.raises(ValueError, match="fewer than a batch"):
        images.Augmented(task().validation, 64)


def test_jpeg_images_come_from_the_training_folder(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    path = tmp_path / images.ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:xz") as archive:
        for name, value in (("train/cat/0.jpg", 10), ("test/dog/0.jpg", 20), ("train/truck/1.jpg", 30)):
            data = io.BytesIO()
            pil.new("RGB", (32, 32), (value,) * 3).save(data, "jpeg")
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            archive.addfile(info, io.BytesIO(data.getvalue()))
    found = images.jpeg_training(tmp_path, 2)
    x, y = found.take([1, 0])
    assert (x.shape, y.tolist()) == ((2, 3, 32, 32), [9, 3])


def found(right, kl, seeds=None):
    right = np.array(right, bool)
    return tables.Found(tuple(seeds or range(len(right))), right, np.array(kl, float))


def test_differences_are_paired_by_seed_and_sample():
    some, all_ = found([[1, 0] * 50] * 2, np.ones((2, 100))), found([[1, 1] * 50] * 3, np.ones((3, 100)))
    mean, low, high = tables.gained(all_, some)
    assert (mean, tables.gained(some, some)) == (50.0, (0.0, 0.0, 0.0))
    assert low < 50 < high
    once = found([[1, 1] * 50], np.ones((1, 100)))
    assert tables.gained(once, some)[0] == 50.0  # what depends on no seed stands for each
    assert tables.gained(once, found([[1, 0] * 50], np.ones((1, 100)), seeds=[4]))[0] == 50.0


def test_nothing_is_less_than_zero():
    assert tables.said((-1e-9, -0.004, 0.25)) == "0.00 (0.00 to 0.25)"


def test_the_bar_can_be_missed():
    direct = found([[1] * 100] * 3, np.full((3, 100), 0.01))
    near = found([[1] * 99 + [0]] * 3, np.full((3, 100), 0.015))
    far = found([[1] * 99 + [0]] * 3, np.full((3, 100), 0.03))
    wrong = found([[1] * 80 + [0] * 20] * 3, np.full((3, 100), 0.01))
    for mine, met in ((near, True), (far, False), (wrong, False)):
        (one,) = tables.questions({("direct int8", grid.AFTER): direct, ("F2 int8", grid.AFTER): mine})
        assert one.met is met
        assert one.worse is (mine is wrong)


def test_the_whole_study_is_resumed(monkeypatch, tmp_path, capsys):
    small_study(monkeypatch, tmp_path)
    monkeypatch.setattr(study, "RATES", (1e-5, 1e-4))
    arguments = ["--seeds", "1", "--steps", "1", "--only", "tune", "--only", "grid"]
    study.main(arguments)
    text = capsys.readouterr().out
    assert re.search(r"grid: (\d+) networks, \1 to be made, about \d minutes", text)
    assert "F6 int8 is not shipped: " in text
    first = json.loads((tmp_path / "winograd_aware.json").read_text())
    study.main(arguments)
    again = capsys.readouterr().out
    assert "networks, 0 to be made" in again
    assert json.loads((tmp_path / "winograd_aware.json").read_text())["rows"] == first["rows"]
    trained = [row for row in first["rows"] if row["part"] == "grid" and row["route"] == grid.FLEX]
    assert len(trained) == len(grid.TILES)
    assert {row["route"] for row in first["rows"]} > {grid.ROUNDED, grid.FIXED, grid.TRAINED, grid.CORRECTED}
    assert {row["samples"] for row in trained} == {64}
    assert {row["split"] for row in first["rows"] if row["part"] == "tune"} == {"validation"}
    assert not {row["seed"] for row in first["rows"] if row["part"] == "grid"} & {study.TUNING_SEED}


def test_choices_are_held_against_one_everywhere(bed, monkeypatch, tmp_path, capsys):
    if bed.refused(grid.FORMS["F2 int8"]):
        pytest.skip("bitsmith-kernels is not installed")
    small_study(monkeypatch, tmp_path)
    monkeypatch.setattr(study.winas, "ROUNDS", 5)
    monkeypatch.setattr(study.winas, "UNIFORM", ("direct int8", "F2 int8"))
    arguments = ["--only", "winas", "--seeds", "1", "--steps", "1", "--search_steps", "2"]
    study.main(arguments)
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "winograd_aware.json").read_text())["rows"]
    (search,) = (row for row in rows if row["part"] == "winas search")
    assert sum(search["sites"].values()) == len(bed.fitting)
    times = {row["form"]: row["ms"] for row in rows if row["part"] == "winas times"}
    assert set(times) == {
        *study.winas.UNIFORM,
        "fastest by the table",
        f"wiNAS, measured, weight {study.winas.WEIGHT:g}",
    }
    assert min(times.values()) > 0
    assert "F6" not in text.partition("one choice and wiNAS")[2]
    study.main(arguments)
    assert json.loads((tmp_path / "winograd_aware.json").read_text())["rows"] == rows


def test_choices_on_measured_times_need_the_kernels(bed, monkeypatch, tmp_path, capsys):
    small_study(monkeypatch, tmp_path)
    monkeypatch.setattr(grid.Bed, "refused", lambda *_: "no kernels here")
    study.main(["--only", "winas", "--seeds", "1"])
    assert "wiNAS on measured times is left out: no kernels here" in capsys.readouterr().out
    assert json.loads((tmp_path / "winograd_aware.json").read_text())["rows"] == []


def test_a_model_counts_multiplications(bed, monkeypatch, tmp_path, capsys):
    model = study.winas.multiplications(bed)
    direct = 8 * 8 * 9 * 12 * 12 / 1e6
    assert model["left", bs.Int(8, 8)] == pytest.approx(direct)
    assert model["left", bs.Winograd(2)] == pytest.approx(direct * 4 / 9)
    assert model["left", bs.Winograd(4, 16)] == pytest.approx(2 * model["left", bs.Winograd(4)])
    small_study(monkeypatch, tmp_path)
    study.main(["--only", "modelled", "--seeds", "1", "--steps", "1", "--search_steps", "2"])
    text = capsys.readouterr().out
    assert "M multiplications, modelled" in text
    assert "measured" not in text.partition("one choice and wiNAS")[2]


def test_what_is_taught_is_the_teachers_output():
    teacher, loader = smallnet.small(), task().validation
    for (inputs, target), (plain, _) in zip(study.winas.Taught(loader, teacher), loader, strict=True):
        assert torch.equal(inputs, plain)
        assert torch.equal(target, teacher(inputs))
        assert torch.is_grad_enabled()


def test_time_that_is_over_leaves_cells_out(monkeypatch, tmp_path, capsys):
    small_study(monkeypatch, tmp_path)
    study.main(["--minutes", "-1"])
    assert "left out: grid, direct fp32, post-training, seed 0" in capsys.readouterr().out
