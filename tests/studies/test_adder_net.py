"""The study of adder networks, on small data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import bitsmith as bs
from repository import load

load("benchmarks.harness")
command = load("studies._command")
study, networks = load("studies.adder_net.__main__"), load("studies.adder_net.networks")

TABLE = """operation,bits,energy_pJ
int_add,8,0.03
int_add,32,0.1
float_add,32,0.9
int_multiply,8,0.2
float_multiply,32,3.7
"""


@pytest.fixture
def root(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Images whose class is a bright stripe."""
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 400), ("test", 100)):
        y = draw.integers(0, 10, count)
        x = draw.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(x, y, strict=True):
            image[2 * label + 2 : 2 * label + 5] += 180
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    (tmp_path / "fashion_mnist").mkdir()
    np.savez(tmp_path / "fashion_mnist" / "fashion_mnist.npz", **arrays)
    (tmp_path / "energy_tables").mkdir()
    (tmp_path / "energy_tables" / "horowitz_45nm.csv").write_text(TABLE)
    monkeypatch.setattr(networks.Fashion, "training", 300)
    monkeypatch.setattr(networks.Fashion, "validation", 100)
    monkeypatch.setattr(networks, "CALIBRATION", 64)
    return tmp_path


def test_forms_share_what_begins_but_for_the_filters(root: Any) -> None:
    bed = networks.Fashion(root)
    plain, adder = (bed.started(networks.Cell(bed.name, form, 3, 1, 0.1)) for form in (networks.CONV, networks.ADDER))
    assert torch.equal(plain.stem.weight, adder.stem.weight)
    assert torch.equal(plain.linear.weight, adder.linear.weight)
    assert float(adder.blocks[2].conv2.weight.detach().std()) == pytest.approx(1.0, rel=0.05)
    sites = bs.sites(plain, torch.zeros(1, 1, 28, 28))
    assert len(networks.inner(sites)) == 6
    assert "stem" not in networks.inner(sites)


def test_rounded_networks_are_compared_with_the_float_one(root: Any) -> None:
    bed = networks.Fashion(root)
    found = bed.record(networks.Cell(bed.name, networks.ADDER, 0, 30, 0.1), "test")
    assert set(found["rounded"]) == {"float", *(f"{b} {s}" for b in (8, 6, 5, 4) for s in ("shared", "separate"))}
    assert found["rounded"]["float"] == found["accuracy"]
    assert abs(found["rounded"]["8 separate"] - found["accuracy"]) <= 0.2
    assert 0 < found["adder_macs"] < found["macs"]


def test_energy_is_the_tables_sums(root: Any) -> None:
    pj = networks.energies(root)
    record = {"macs": 3_000_000, "adder_macs": 2_000_000}
    assert networks.microjoules(record, pj, False) == pytest.approx(4.6 + 2 * 1.8)
    assert networks.microjoules(record, pj, True) == pytest.approx(0.3 + 2 * 0.13)


def test_a_table_that_misses_an_operation(root: Any) -> None:
    (root / "energy_tables" / "horowitz_45nm.csv").write_text("operation,bits,energy_pJ\nint_add,8,0.03\n")
    with pytest.raises(KeyError, match="float_add"):
        networks.microjoules({"macs": 1, "adder_macs": 1}, networks.energies(root), False)


def test_the_command_makes_tables_a_plot_and_goes_on(root: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = root / "results"
    monkeypatch.setattr(command, "RESULTS", folder)
    monkeypatch.setattr(study, "RESULTS", folder)
    monkeypatch.setattr(study, "data_root", lambda: root)
    monkeypatch.setattr(study, "STEPS", {"Fashion-MNIST": 4, "CIFAR-10": 4})
    monkeypatch.setattr(study, "Cifar", lambda root, depth: None)  # its archive is not here
    study.main(["--seeds", "1", "--workers", "1", "--only", "fashion"])
    said = capsys.readouterr().out
    assert "Fashion-MNIST, ResNet-8 on 28x28, 4 steps of 64; test accuracy" in said
    assert "adder, one scale" in said
    assert (folder / "adder_net.svg").stat().st_size > 1000
    rows = json.loads((folder / "adder_net.json").read_text())["rows"]
    assert [row["form"] for row in rows] == list(networks.FORMS)
    study.main(["--seeds", "1", "--workers", "1", "--only", "fashion"])
    assert "4 networks, 0 to be trained" in capsys.readouterr().out
