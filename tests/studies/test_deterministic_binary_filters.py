"""The study of deterministic binary filters, on small data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import bitsmith as bs
import smallnet
from repository import load

load("benchmarks.harness")
command = load("studies._command")
study, beds = load("studies.deterministic_binary_filters.__main__"), load("studies.deterministic_binary_filters.beds")
forms = load("studies.deterministic_binary_filters.forms")


@pytest.fixture
def root(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Clips whose class is a loud band; the small network for ResNet-20."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 12, 600)
    x = draw.integers(0, 60, (600, 49, 40)).astype(np.uint8)
    for clip, label in zip(x, y, strict=True):
        clip[:, 3 * label : 3 * label + 3] += 150
    (tmp_path / "speech_commands").mkdir()
    speaker = draw.integers(0, 90, 600).astype(np.int32)
    np.savez(tmp_path / "speech_commands" / "test_logmel49x40.npz", x=x, y=y, speaker=speaker)
    parts = [smallnet.Pool(smallnet.batches(count, seed=seed)) for count, seed in ((4, 5), (2, 6), (2, 7))]
    task = bs.Task(*parts, metric=bs.metrics.top1, loss=torch.nn.functional.cross_entropy)
    monkeypatch.setattr(beds, "task_of", lambda root: task)
    monkeypatch.setattr(beds, "network", lambda root: smallnet.small())
    monkeypatch.setattr(beds.Cifar, "loader", lambda self: self.task.calibration)
    return tmp_path


def sites() -> Any:
    return bs.sites(beds.keyword_network(), torch.zeros(1, 1, 49, 40))


def cell(form: str, ratio: float) -> Any:
    return forms.Cell("keywords", form, ratio, 0, 4, 1e-3)


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125])
def test_pruned_weights_take_no_more_bytes_than_codes(ratio: float) -> None:
    found = sites()
    codes, pruned = (
        forms.stored(forms.plan_of(cell(form, ratio), found), found, 0) for form in (forms.FILTER, forms.PRUNED)
    )
    assert 0.97 * codes[1] < pruned[1] <= codes[1]
    assert codes[1] == pytest.approx(ratio, rel=0.02)


def test_integers_and_8_bit_coefficients_take_what_they_say() -> None:
    found = sites()
    for form in (forms.INTEGER, forms.BASIS8):
        assert forms.stored(forms.plan_of(cell(form, 0.125), found), found, 0)[1] == pytest.approx(0.125, rel=0.05)


def test_the_first_layer_and_the_last_stay() -> None:
    found = sites()
    names = forms.chosen(found)
    assert len(names) == 3
    assert "0" not in names
    assert all(found[name].kind == "conv2d" for name in names)


def test_codes_by_kernel_save_products() -> None:
    found = sites()
    additions, products = forms.operations(forms.plan_of(cell(forms.KERNEL, 0.25), found), found)
    inner = sum(found[name].macs for name in forms.chosen(found))
    whole = sum(site.macs for site in found.values())
    assert products == pytest.approx(whole - inner * (1 - 3 / 9))
    assert 0 < additions < inner / 4


def test_speakers_are_in_one_part_only() -> None:
    speaker = np.random.default_rng(1).integers(0, 200, 2000)
    parts = beds.dealt(speaker)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(2000))
    assert sum(len(set(speaker[rows])) for rows in parts.values()) == len(set(speaker))
    assert len(parts["training"]) == pytest.approx(1200, abs=40)


def test_the_same_cell_gives_the_same_record(root: Any) -> None:
    found = [beds.Keywords(root, 3).record(cell(forms.FILTER, 0.5), "test") for _ in range(2)]
    assert found[0] == found[1]


def test_the_command_makes_tables_a_plot_and_goes_on(root: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = root / "results"
    monkeypatch.setattr(command, "RESULTS", folder)
    monkeypatch.setattr(study, "RESULTS", folder)
    monkeypatch.setattr(beds, "RESULTS", folder)
    monkeypatch.setattr(study, "data_root", lambda: root)
    monkeypatch.setattr(study, "START", 10)
    monkeypatch.setattr(study, "STEPS", {"keywords": 2, "CIFAR-10": 2})
    study.main(["--seeds", "1", "--workers", "1"])
    said = capsys.readouterr().out
    assert "keywords, 2 steps; test accuracy" in said
    assert "0 cells left out" in said
    assert (folder / "deterministic_binary_filters.svg").stat().st_size > 1000
    rows = json.loads((folder / "deterministic_binary_filters.json").read_text())["rows"]
    assert {row["data"] for row in rows} == {"keywords", "CIFAR-10"}
    study.main(["--seeds", "1", "--workers", "1"])
    assert ", 0 to be trained" in capsys.readouterr().out
