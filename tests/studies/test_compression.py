"""The study of compression, whole, on the small network."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import bitsmith as bs
import smallnet
from repository import load

load("benchmarks.harness")
command = load("studies._command")
cells, study = load("studies.compression.cells"), load("studies.compression.__main__")


class Subject:
    """The small network in the place of every one."""

    samples = torch.cat([x for x, _ in smallnet.batches(4, seed=5)])

    def __init__(self, name: str, root: Any, test: Any) -> None:
        self.name, self.model = name, smallnet.small()
        parts = [smallnet.batches(2, seed=seed) for seed in (5, 6, 7)]
        self.task = bs.Task(*parts, metric=bs.metrics.top1)

    drawn, training = cells.Subject.drawn, cells.Subject.training


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "data_root", lambda: tmp_path)
    monkeypatch.setattr(cells, "Subject", Subject)
    monkeypatch.setattr(cells, "PRUNED_FROM", 8)
    monkeypatch.setattr(cells, "STEPS", dict.fromkeys(cells.NETWORKS, 2))
    few = ("float", "int8", "palette of 2 bits", "half, SparseGPT", "half (SparseGPT), int8, palette of 4")
    for module in (study, cells):
        monkeypatch.setattr(module, "FORMS", {name: cells.FORMS[name] for name in few})
        monkeypatch.setattr(
            module, "TRAINED_FORMS", {name: cells.TRAINED_FORMS[name] for name in ("palette of 2 bits, soft",)}
        )
    return tmp_path


def test_the_whole_study(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--seeds", "2", "--only", "ds_cnn", "--only", "trained"])
    rows = json.loads((given / "compression.json").read_text())["rows"]
    seeds = {
        name: sorted(row["seed"] for row in rows if row["form"] == name and row["route"] == "after")
        for name in cells.FORMS
    }
    assert seeds["float"] == seeds["palette of 2 bits"] == [0]
    assert seeds["int8"] == seeds["half, SparseGPT"] == [0, 1]
    assert all(0 <= row["accuracy"] <= 1 and row["samples"] > 0 for row in rows)
    sizes = {row["form"]: row["bytes"] for row in rows if "bytes" in row and row["route"] == "after"}
    assert sizes["palette of 2 bits"] < sizes["float"]
    said = capsys.readouterr().out
    assert "(reduced)" in said
    assert "palette of 2 bits, soft, trained" in said
    assert (given / "compression.svg").exists()


def test_what_is_not_pruned_is_still_shared() -> None:
    technique = bs.Int(8, 8, of=bs.Palette(4, of=bs.Sparse(0.5)))
    assert cells.whole(technique) == bs.Int(8, 8, of=bs.Palette(4))
    assert cells.whole(bs.Int(8, 8, of=bs.Sparse(0.5))) == bs.Int(8, 8)
    assert cells.whole(bs.Sparse(0.5)) is None
