"""The study of compression, whole, on the small network."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
import smallnet
from bitsmith.model.network import network
from repository import load

load("benchmarks.harness")
command = load("studies._command")
cells, study = load("studies.compression.cells"), load("studies.compression.__main__")
forms, tables = load("studies.compression.forms"), load("studies.compression.tables")


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
    monkeypatch.setattr(cells, "NARROW", 8)
    monkeypatch.setattr(cells, "STEPS", dict.fromkeys(cells.NETWORKS, 2))
    few = ("float", "int8", "palette of 4 bits", "half, SparseGPT", "half (SparseGPT), int8, palette of 4")
    for module in (study, cells, tables):
        monkeypatch.setattr(module, "FORMS", {name: forms.FORMS[name] for name in few})
        monkeypatch.setattr(
            module, "TRAINED_FORMS", {name: forms.TRAINED_FORMS[name] for name in ("palette of 2 bits, soft",)}
        )
    return tmp_path


def test_the_whole_study(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--seeds", "2", "--workers", "1", "--only", "ds_cnn", "--only", "trained"])
    rows = json.loads((given / "compression.json").read_text())["rows"]
    seeds = {
        name: sorted(row["seed"] for row in rows if row["form"] == name and row["route"] == "after")
        for name in study.FORMS
    }
    assert seeds["float"] == seeds["palette of 4 bits"] == [0]
    assert seeds["int8"] == seeds["half, SparseGPT"] == [0, 1]
    assert all(0 <= row["accuracy"] <= 1 and row["samples"] > 0 for row in rows)
    sizes = {row["form"]: row["bytes"] for row in rows if "bytes" in row and row["route"] == "after"}
    assert sizes["palette of 4 bits"] < sizes["float"]
    said = capsys.readouterr().out
    assert "(reduced)" in said
    assert "palette of 2 bits, soft, trained" in said
    assert (given / "compression.svg").exists()


@pytest.fixture
def sites() -> Any:
    """One narrow layer, and others of 64 to 32 channels, 32 to 16 and 16 to 12."""
    layers = (nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 12, 2))
    record = network(nn.Sequential(*layers), torch.zeros(1, 64, 5, 5)).record
    return [site for site in record.sites.values() if site.weight]


def test_narrow_layers_keep_eight_bits(sites: Any) -> None:
    narrow, wide = sites[:2]
    palette, both = forms.Form(bs.Palette(4)), forms.Form(bs.Int(8, 8, of=bs.Palette(4, of=bs.Sparse(0.5))))
    assert cells.at(palette, narrow) == bs.Int(8, None)
    assert cells.at(palette, wide) == palette.technique
    assert cells.at(forms.Form(bs.Palette(4), narrow=False), narrow) == palette.technique
    assert cells.at(both, narrow) == bs.Int(8, 8)
    assert cells.at(both, wide) == both.technique
    assert cells.at(forms.Form(bs.Sparse(0.5)), narrow) is None
    assert cells.at(forms.Form(None), wide) is None


def test_groups_that_do_not_divide_a_layer_are_left_out(sites: Any) -> None:
    palette, integers = forms.Form(bs.Palette(4, group=16)), forms.Form(forms.INT4_BY_32)
    assert [cells.at(palette, site) for site in sites[1:]] == [palette.technique, palette.technique, bs.Palette(4)]
    assert [cells.at(integers, site) for site in sites[1:]] == [forms.INT4_BY_32, forms.INT4_BY_32, forms.INT4]


def test_the_front_has_what_nothing_smaller_beats() -> None:
    def line(label: str, size: int, accuracy: float) -> Any:
        return tables.Line(label, "integers", False, size, size, [accuracy], 100)

    given = [line("a", 10, 0.5), line("b", 20, 0.4), line("c", 20, 0.7), line("d", 30, 0.7), line("e", 40, 0.9)]
    assert [one.label for one in tables.front(given)] == ["a", "c", "e"]


def test_what_peers_store_is_counted_from_what_they_keep() -> None:
    common = load("studies.compression.peers.common")
    assert common.stored(torch.ones(4, 8), 4) == 32 * 4
    assert common.stored(torch.cat([torch.zeros(24), torch.ones(8)]), 32) == 32 + 8 * 32
    assert common.stored(torch.cat([torch.zeros(1), torch.ones(31)]), 8) == 32 * 8


def test_peers_stand_beside_ours(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    beside, asked = load("studies.compression.beside"), load("studies.compression.peers.asked")
    name = cells.NETWORKS[0]
    ours = [(cells.Cell(name, "int4 weights", "after", seed), {"accuracy": 0.8, "samples": 5}) for seed in (0, 1)]
    ours.append((cells.Cell(name, "0.75 of the channels"), {"accuracy": 0.9, "samples": 5}))
    theirs = [
        (cells.Cell(name, "palette of 4 bits", "coremltools"), {"accuracy": 0.85, "weights": 900.0, "samples": 5}),
        (cells.Cell(name, "half, SparseGPT", "coremltools"), {"error": "RuntimeError: shapes"}),
    ]
    found = beside.points([*ours, *theirs], name, asked.family, lambda cell: 1000.0)
    assert [(one.who, one.label, one.bytes, len(one.accuracies)) for one in found] == [
        ("Bitsmith", "int4 weights", 1000.0, 2),
        ("coremltools", "palette of 4 bits", 900.0, 1),
    ]
    assert tables.front(found) == found[1:]
    beside.told(found, name)
    beside.plot({name: found}, tmp_path / "peers.svg")
    assert "coremltools" in capsys.readouterr().out
    assert (tmp_path / "peers.svg").exists()


def test_a_peer_that_is_not_there_says_how_it_gets_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    asked = load("studies.compression.peers.asked")
    monkeypatch.setenv("BITSMITH_PEERS", str(tmp_path))
    missing = asked.missing()
    assert {"NNCF", "Neural Compressor"} <= {peer.name for peer in missing}
    assert "python -m benchmarks.peers.environment nncf" in asked.PEERS["NNCF"].install()
    assert not [cell for cell in asked.wanted(1) if cell.route == "NNCF"]
    monkeypatch.delenv("BITSMITH_PEERS")
    assert asked.PEERS["NNCF"].python() is None
