"""The benchmark of the native kernels: what a layer takes, its bars, and one small run of each part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import bitsmith as bs
from repository import load

winograd, harness = load("benchmarks.winograd"), load("benchmarks.harness")


def test_a_layer_is_the_difference_of_chains() -> None:
    longest, shortest = harness.Samples((3.0, 5.0)), harness.Samples((1.4, 1.0))
    assert winograd.difference(longest, shortest).ms == pytest.approx((0.2, 0.5))  # eight layers


def test_bars_are_those_of_the_issue() -> None:
    found = {
        (form, layer): bar
        for form in winograd.FORMS
        for layer in winograd.LAYERS
        if (bar := winograd.bar_of(form, *layer)) is not None
    }
    f2 = {("F2 int8", layer): 1.2 if layer == (512, 7) else 1.45 for layer in winograd.LAYERS}
    f4 = {("F4 int8", layer): 2.0 for layer in winograd.LAYERS[:3]}
    wide = {("F4 16 bits", layer): 1.3 for layer in winograd.LAYERS[:2]}
    assert found == f2 | f4 | wide


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("openvino")
    pytest.importorskip("bitsmith_kernels")
    threads = torch.get_num_threads()
    monkeypatch.setattr(winograd, "LAYERS", ((32, 8),))
    monkeypatch.setattr(winograd, "DEPTHS", (3, 2, 1))
    monkeypatch.setattr(winograd, "OPENINGS", 2)
    made = harness.Benchmark("winograd", winograd.PARTS, default_threads=1)
    made.start([])
    torch.set_num_threads(threads)
    return made


def test_layers_have_figures_of_every_form(bench: Any) -> None:
    winograd.layers(bench)
    names = ["OpenVINO", "ONNX Runtime", *winograd.FORMS]
    assert [row["file"] for row in bench.rows] == 3 * names
    assert [row["where"] for row in bench.rows] == [where for where in ("chain", "inside", "alone") for _ in names]
    assert all(row["ms"] > 0 for row in bench.rows if row["where"] != "inside")
    assert all(row["db"] > 5 for row in bench.rows)
    assert [verdict.what for verdict in bench.verdicts] == [
        "F2 int8 32@8, chain",
        "F2 int8 32@8, inside",
    ]  # of 8 pixels F4 has no bar


def test_products_are_a_share_of_the_peak(bench: Any) -> None:
    winograd.products(bench)
    assert [row["form"] for row in bench.rows] == [*winograd.FORMS]
    assert all(0 < row["share"] < 1.2 and row["by"] for row in bench.rows)


def test_a_network_is_accelerated_in_every_file(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3, padding=1)
    ).eval()
    images = torch.randn(10, 3, 12, 12)
    ours = winograd.sources

    def only_ours(*arguments: Any) -> dict[str, Path]:
        monkeypatch.setattr(winograd, "made", lambda *_: [])
        found = ours(*arguments)
        target = bs.targets.OpenVino(1)
        net = bs.quantize(model, bs.data.Unlabelled([images[:1]]), target, prepare=(), choose=False)
        found["a rival's own form"] = bs.export(net, target, tmp_path / "rival.xml", images[:1]).path
        return found

    monkeypatch.setattr(winograd, "sources", only_ours)
    lines = winograd.one_network(bench, "small", model, images, {1: 0.01})
    assert [line[1] for line in lines] == ["Bitsmith", "a rival's own form"]
    first, second, pair = bench.rows
    assert pair["fastest"] in {line[1] for line in lines}
    assert len(pair["alone"]) == 2
    assert len(first["gains"]) == len(first["own"]) == 2
    assert first["direct_db"] > 15
    assert second["before"] > 0
    assert "gains" not in second
    assert [verdict.what for verdict in bench.verdicts] == [f"small over {pair['fastest']}, the fastest int8 file"]


def test_our_files_are_in_the_form_of_our_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    path = tmp_path / "model.onnx"
    winograd.write_float(model, torch.randn(1, 3, 6, 6), path)
    made = winograd.in_form(path)
    assert made != path
    onnx.checker.check_model(onnx.load(str(made)))
