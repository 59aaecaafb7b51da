"""The study of generated weights on the modelled engine, whole, on one small network and two bandwidths."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bitsmith.targets import Design
from repository import load

load("benchmarks.harness")
command, guided = load("studies._command"), load("studies._guided")
engines, study = load("studies.unzip_fpga.engines"), load("studies.unzip_fpga.__main__")


@pytest.fixture(scope="module")
def found():
    return engines.shapes("ResNet-18", 32)


def test_layers_are_those_of_the_network(found):
    assert len(found) == 21  # 20 convolutions, three of them shortcuts, and the linear layer
    dense = engines.layers(found, engines.DENSE)
    assert sum(layer.weight_bytes for layer in dense) == 2 * sum(s.channels * s.kernel * s.outputs for s in found)
    by_name = {layer.name: layer for layer in dense}
    first = by_name["layer1.0.conv1"]
    assert (first.positions, first.depth, first.outputs, first.codes) == (64, 576, 64, 0)


def test_pruned_layers_fit_together_and_generated_ones_store_less(found):
    pruned = engines.layers(found, engines.Engine("", kept=0.5))
    assert [layer.outputs for layer in pruned[:3]] == [32, 32, 32]
    assert pruned[-1].outputs == 1000
    assert pruned[-1].depth == 256
    dense, generated = (engines.layers(found, engines.Engine("", ratio=r)) for r in (None, 0.25))
    for before, after in zip(dense, generated, strict=True):
        kernel = 9 if after.codes else 1
        assert after.weight_bytes == before.weight_bytes * (3 / kernel if after.codes else 1)
    assert [layer.codes for layer in generated[:2]] == [0, 3]  # the first layer stays as it is


def test_pointwise_kernels_share_codes_by_segments_of_channels(found):
    whole = engines.shapes("SqueezeNet", 64)
    plain, more = (engines.layers(whole, engines.Engine("", ratio=0.25, pointwise=p)) for p in (False, True))
    for shape, before, after in zip(whole, plain, more, strict=True):
        last = shape is whole[-1]
        if shape.kernel > 1 or last:
            assert after == before
        else:
            assert (before.codes, after.codes) == (0, 4)
            assert after.weight_bytes == before.weight_bytes / 4
    own = engines.shares(whole)
    ones = sum(s.channels * s.outputs for s in whole[:-1] if s.kernel == 1)
    everything = sum(s.channels * s.outputs * s.kernel for s in whole)
    assert own["pointwise"] == ones / everything
    assert own["millions"] == everything / 1e6


def test_weights_that_are_moved_are_counted_tile_by_tile(found):
    best = dataclasses.replace(engines.BUDGET, design=Design(64, 13, 64))
    layer = next(one for one in engines.layers(found, engines.DENSE) if one.name == "layer1.0.conv1")
    # 64 positions are one row of tiles: each weight once
    assert engines.weights_moved(best, layer) == pytest.approx(layer.weight_bytes)
    lower = dataclasses.replace(best, design=Design(16, 13, 64))
    assert engines.weights_moved(lower, layer) == pytest.approx(4 * layer.weight_bytes)


def test_raised_ratios_cost_at_most_one_per_cent(found):
    engine = engines.Engine("", ratio=0.25, selective=True, free=True)
    best = dataclasses.replace(engines.BUDGET, design=Design(64, 13, 64, 64))
    chosen = engines.raised(found, engine, best)
    assert set(chosen.values()) <= set(engines.RATIOS)
    plain, raised = (best.total_ms(engines.layers(found, engine, ratios)) for ratios in (None, chosen))
    assert plain <= raised <= 1.01 * plain


def test_the_whole_study(monkeypatch, tmp_path, capsys):
    for module in (command, guided, study):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "BANDWIDTHS", (1.0, 0.25))
    monkeypatch.setattr(engines, "BUDGET", dataclasses.replace(engines.BUDGET, dsps=64, bram_kib=256.0))
    whole = engines.shapes
    monkeypatch.setattr(study, "shapes", lambda name: whole(name, 32))
    study.main(["--only", "ResNet-18"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "unzip_fpga.json").read_text())
    assert not result["left_out"]
    assert len(result["rows"]) == 2 * len(engines.ENGINES)
    times = {(row["engine"], row["bandwidth"]): row["ms"] for row in result["rows"]}
    for engine in engines.ENGINES:
        assert times[engine.name, 0.25] >= times[engine.name, 1.0]
        assert all(row["dsps"] <= 64 for row in result["rows"])
    for name in ("dense", "generated, ratio 0.25"):
        assert times[f"{name}, design of 1x", 1.0] == times[name, 1.0]
        assert times[f"{name}, design of 1x", 0.25] >= times[name, 0.25]
    assert "How much the weights are" in said
    assert "keeps its design of 1x" in said
    # what a best design can do, a better machine can do as well
    assert times["dense, keeps weights", 0.25] <= times["dense, selective", 0.25] <= times["dense", 0.25]
    assert times["generated, ratio 0.25", 0.25] <= times["generated, ratio 0.5", 0.25]
    assert "published: 2.14x over dense" in said
    assert (tmp_path / "unzip_fpga.svg").exists()
