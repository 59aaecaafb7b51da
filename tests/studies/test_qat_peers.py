"""The comparison of training at few bits, on the small network and ours alone: peers need their packages."""

from __future__ import annotations

import json

import pytest
import torch

import bitsmith as bs
import smallnet
from repository import load

load("benchmarks.harness")
command, guided = load("studies._command"), load("studies._guided")
study = load("studies.qat_peers.__main__")


def task():
    parts = [smallnet.batches(count, seed=seed) for count, seed in ((20, 5), (4, 6), (6, 7))]
    return bs.Task(*parts, metric=bs.metrics.top1, loss=torch.nn.functional.cross_entropy)


@pytest.fixture
def given(monkeypatch, tmp_path):
    for module in (command, guided):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "TRAINED", study.OURS)
    monkeypatch.setattr(study, "data_root", lambda: tmp_path)
    monkeypatch.setattr(study, "network", lambda root: smallnet.small())
    monkeypatch.setattr(study, "task_of", lambda root: task())
    return tmp_path


def test_the_whole_comparison(given, capsys):
    study.main(["--steps", "25", "--seeds", "2"])
    rows = json.loads((given / "qat_peers.json").read_text())["rows"]
    assert {(row["trainer"], row["w"], row["a"], row["seed"]) for row in rows} == {
        (name, w, a, seed) for name in study.OURS for w, a in study.BITS for seed in range(2)
    }
    assert all(row["samples"] == 96 and row["share"] > 0.95 for row in rows)
    learned = [row for row in rows if row["trainer"] == "bitsmith" and row["w"] == 2]
    assert all(row["accuracy"] > 0.9 for row in learned)
    assert "reduced" in capsys.readouterr().out
    study.main(["--steps", "25", "--seeds", "2"])  # from the store
    assert json.loads((given / "qat_peers.json").read_text())["seconds"] < 10


def test_seeds_draw_the_images_and_nothing_else(given):
    bed = study.Bed(smallnet.small(), task())
    one, again, other = (bed.record("bitsmith", (4, 4), 1e-3, 4, seed, "test") for seed in (0, 0, 1))
    assert one == again
    assert one["loss"] != other["loss"]
