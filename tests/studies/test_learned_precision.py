"""The study of learned precision, whole, on the small network."""

from __future__ import annotations

import json

import pytest
import torch

import bitsmith as bs
import smallnet
from repository import load

load("benchmarks.harness")
command, guided = load("studies._command"), load("studies._guided")
cells, searched = load("studies.learned_precision.cells"), load("studies.learned_precision.searched")
study = load("studies.learned_precision.__main__")


def task():
    parts = [smallnet.Pool(smallnet.batches(count, seed=seed)) for count, seed in ((8, 5), (2, 6), (4, 7))]
    return bs.Task(*parts, metric=bs.metrics.top1, loss=torch.nn.functional.cross_entropy)


def test_the_whole_study(monkeypatch, tmp_path, capsys):
    for module in (command, guided):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "data_root", lambda: tmp_path)
    monkeypatch.setattr(study, "network", lambda root: smallnet.small())
    monkeypatch.setattr(study, "task_of", lambda root: task())
    for name, value in (("UNIFORM", (4, 8)), ("LEARNED", ((5, 1.0),)), ("SEARCHED", (4,))):
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "ABLATED", ({"moves": 3}, {"method": "penalty", "rhythm": 2, "grid_rate": 0.3}))
    monkeypatch.setattr(study, "ABLATED_AT", (5, 1.0))
    arguments = ["--steps", "40", "--seeds", "2", "--plot", str(tmp_path / "front.svg")]
    study.main(arguments)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "learned_precision.json").read_text())
    assert not result["left_out"]
    assert "the learned front against each uniform point" in said
    rows = [row for row in result["rows"] if "top1" in row]
    assert len(rows) == 2 * (2 + 1 + 1 + 2)
    assert all(row["samples"] == 64 for row in rows)
    by_name = {row["name"]: row for row in rows}
    uniform, mine = by_name["8 bits everywhere"], by_name["searched, weights of 4 bits, post-training"]
    assert mine["weights"] <= by_name["4 bits everywhere"]["weights"] < uniform["weights"]
    verdicts = [row for row in result["rows"] if row.get("part") == "front"]
    assert [verdict["uniform"] for verdict in verdicts] == ["8 bits everywhere"]  # no learned one is as small as 4 bits
    assert (tmp_path / "front.svg").stat().st_size > 1000
    study.main(arguments)  # everything is in the store
    assert ": 0 s" not in capsys.readouterr().out.replace("about 0 minutes", "")


def test_phases_are_all_of_the_steps():
    for method, moves in (("allocation", 1), ("allocation", 3), ("penalty", 1)):
        assert [sum(study.phases(steps, method, moves)) for steps in (10, 90, 3000)] == [10, 90, 3000]
    assert study.phases(90) == (10, 0, 80)


def test_pooled_errors_by_hand():
    assert study.standard_error([1.0, 3.0], [2.0, 2.0]) == pytest.approx(1.0)
    assert study.standard_error([1.0], [2.0]) == 0.0
