"""The unzipFPGA engine against a loop over its tiles, and its search against trying every design in plain Python."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsmith as bs
import smallnet
from bitsmith.model.network import network
from bitsmith.site import Site
from bitsmith.targets import Design, DesignError, Layer, UnzipFpga
from bitsmith.technique import No
from bitsmith.testing import check_target

ENGINE = UnzipFpga(Design(8, 4, 6, 5), dsps=40, bram_kib=4.0, gb_s=0.5, clock_mhz=100.0)


def tile_by_tile(layer: Layer, engine: UnzipFpga) -> tuple[float, float]:
    """(cycles, bytes) of a layer: every tile in turn, the slowest of its three parts counts."""
    d, per_cycle = engine.design, engine.gb_s * 1e9 / (engine.clock_mhz * 1e6)
    value = layer.value_bytes
    held = 2 * ((d.rows * d.depth + d.depth * d.columns) * value + d.rows * d.columns * 4)
    may = engine.keeps_weights or layer.codes > 0
    kept = may and layer.weight_bytes <= engine.bram_kib * 1024 - held
    down = math.ceil(layer.positions / d.rows)
    cycles, moved = 0.0, 0.0
    for top in range(0, layer.positions, d.rows):
        tall = min(d.rows, layer.positions - top)
        for left in range(0, layer.outputs, d.columns):
            wide = min(d.columns, layer.outputs - left)
            helpers = d.columns // wide if engine.selective else 1
            work = math.ceil(tall / helpers) * math.ceil(layer.depth / d.depth)
            made = math.ceil(layer.codes * layer.depth * wide / d.lanes) if layer.codes else 0
            carried = layer.inputs * tall / layer.positions * value + tall * wide * value
            carried += layer.weight_bytes * wide / layer.outputs / (down if kept else 1)
            cycles += max(work, made, carried / per_cycle)
            moved += carried
    tall, wide = min(d.rows, layer.positions), min(d.columns, layer.outputs)
    first = layer.inputs * tall / layer.positions * value + layer.weight_bytes * wide / layer.outputs
    return layer.groups * cycles + first / per_cycle, layer.groups * moved


layers = st.builds(
    Layer,
    positions=st.integers(1, 40),
    depth=st.integers(1, 30),
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 500),
    weight_bytes=st.floats(1.0, 5000.0),
    value_bytes=st.sampled_from([1.0, 2.0]),
    codes=st.integers(0, 9),
    groups=st.integers(1, 3),
)


@settings(max_examples=150, deadline=None)
@given(layers, st.booleans(), st.booleans())
def test_a_layer_costs_what_its_tiles_cost(layer: Layer, selective: bool, keeps: bool) -> None:
    engine = dataclasses.replace(ENGINE, selective=selective, keeps_weights=keeps)
    cycles, moved = tile_by_tile(layer, engine)
    found = engine.layer_cost(layer)
    assert found.total == pytest.approx(cycles, rel=1e-9)
    assert found.bytes == pytest.approx(moved, rel=1e-9)


def test_one_tile_by_hand() -> None:
    """8 positions, a depth of 12, 6 outputs: one tile of 24 cycles; 5 bytes a cycle."""
    layer = Layer(8, 12, 6, 100, weight_bytes=144.0, codes=2)
    found = ENGINE.layer_cost(layer)
    assert (found.compute, found.generate) == (8 * 3, math.ceil(2 * 12 * 6 / 5))
    assert found.transfer == pytest.approx((100 * 2 + 144 + 8 * 6 * 2) / 5)
    assert found.total == pytest.approx(found.transfer + (200 + 144) / 5)
    assert found.bound == "transfer"


def test_idle_units_take_rows_of_the_last_column() -> None:
    layer = Layer(8, 12, 8, 1, weight_bytes=1.0)  # 6 outputs, then 2: three groups of units for 8 rows
    assert ENGINE.layer_cost(layer).compute == 24 + 3 * 3
    assert dataclasses.replace(ENGINE, selective=False).layer_cost(layer).compute == 48


@settings(max_examples=10, deadline=None)
@given(st.lists(layers, min_size=1, max_size=3), st.integers(2, 12), st.floats(0.15, 2.0))
def test_the_search_finds_the_best_of_all_designs(given_: list[Layer], dsps: int, kib: float) -> None:
    budget = UnzipFpga(Design(1, 1, 1), dsps=dsps, bram_kib=kib, gb_s=0.5, clock_mhz=100.0)
    generates = any(layer.codes for layer in given_)
    best = math.inf
    for depth in range(1, dsps + 1):
        for columns in range(1, dsps // depth + 1):
            left = dsps - depth * columns
            lanes = {2**k for k in range(8) if 2**k <= left} | {left} - {0} if generates else {0}
            for rows in (2**k for k in range(13)):
                for way in lanes:
                    try:
                        tried = dataclasses.replace(budget, design=Design(rows, depth, columns, way))
                    except DesignError:
                        continue
                    best = min(best, sum(tile_by_tile(layer, tried)[0] for layer in given_))
    found = budget.best(given_)
    assert found.total_ms(given_) * 1e5 == pytest.approx(best, rel=1e-9)
    assert found.design.dsps <= dsps
    assert found.design.buffers() <= kib * 1024


def test_fewer_codes_and_more_bandwidth_are_never_slower() -> None:
    full = [Layer.of_convolution(16, 16, 3, 8, 8, ratio=ratio) for ratio in (1.0, 0.5, 0.25)]
    assert [layer.codes for layer in full] == [9, 5, 3]
    assert [layer.weight_bytes for layer in full] == [256 * codes * 2 for codes in (9, 5, 3)]
    times = [ENGINE.total_ms([layer]) for layer in full]
    assert times == sorted(times, reverse=True)
    assert dataclasses.replace(ENGINE, gb_s=1.0).total_ms(full) <= ENGINE.total_ms(full)
    pointwise = Layer.of_convolution(16, 16, 1, 8, 8, ratio=0.25)
    assert (pointwise.codes, pointwise.weight_bytes) == (0, 512.0)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_ratios_outside_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"must be above 0 and at most 1"):
        Layer.of_convolution(4, 4, 3, 4, 4, ratio=ratio)


def test_a_budget_below_the_smallest_design_says_what_that_takes() -> None:
    tiny = UnzipFpga(Design(1, 1, 1), dsps=1, bram_kib=0.02, gb_s=0.5)
    generated = [Layer.of_convolution(4, 4, 3, 4, 4, ratio=0.5)]
    with pytest.raises(DesignError, match=r"the smallest takes 2 DSPs and 0\.016 KiB"):
        tiny.best(generated)
    assert tiny.best([Layer.of_convolution(4, 4, 3, 4, 4)]).design == Design(1, 1, 1)
    with pytest.raises(DesignError, match=r"takes 40 DSPs and .* the budget has 30 and 4"):
        UnzipFpga(Design(8, 5, 6, 10), dsps=30, bram_kib=4.0)
    with pytest.raises(DesignError, match=r"no lanes"):
        dataclasses.replace(ENGINE, design=Design(8, 4, 6)).layer_cost(generated[0])
    with pytest.raises(ValueError, match=r"at least one layer"):
        tiny.best([])


@dataclasses.dataclass(frozen=True)
class Generated(bs.Technique):
    """Stands for a technique with generated weights: only its ratio and its bits matter here."""

    ratio: float = 0.5

    def fits(self, site: Site) -> bool | No:
        return site.kind == "conv2d" or No("no convolution")

    def build(self, site: Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        raise NotImplementedError

    def bits(self, site: Site) -> float:
        return 32.0 * math.ceil(9 * self.ratio) * site.parameter_bytes / 4 / 9


def test_sites_become_layers() -> None:
    model = smallnet.Small(width=8).eval()
    record = network(model, smallnet.batches(1)[0][0][:2]).record
    engine = UnzipFpga(Design(64, 8, 8, 16), gb_s=0.1)
    stem, left, right, head = engine.layers_of(record, {"left": Generated(0.5), "right": bs.Int(8, 8)})
    assert stem == Layer(2 * 144, 27, 8, 2 * 3 * 144, 27 * 8 * 2.0, 2.0, 0, 1, "stem")
    # ceil(0.5 9) = 5 codes for each of 64 kernels, as values of 2 bytes
    assert left == Layer(2 * 144, 72, 8, 2 * 8 * 144, 64 * 5 * 2.0, 2.0, 5, 1, "left")
    assert right == Layer(2 * 144, 72, 8, 2 * 8 * 144, 72 * 8 + 8 * 4, 1.0, 0, 1, "right")
    assert head == Layer(2, 8, 4, 16, 64.0, 2.0, 0, 1, "head")
    cost = engine.cost(record.sites["left"], Generated(0.5))
    assert cost == pytest.approx(engine.layer_cost(left).total / 150e3)
    bare = dataclasses.replace(engine, design=Design(64, 8, 8))
    refused = bare.supports(Generated(0.5), record.sites["left"])
    assert isinstance(refused, No)
    assert "lanes" in refused.reason
    added = record.sites[":add"]
    assert engine.cost(added, bs.Float()) == pytest.approx(3 * 4 * 2 * 8 * 144 / 0.1e6)


def test_it_passes_the_conformance_suite_and_says_what_it_assumes() -> None:
    assert check_target(UnzipFpga(Design(64, 8, 8, 16)))
    assert "64 of 900 DSPs" in UnzipFpga(Design(64, 8, 8)).assumptions()[0]
    with pytest.raises(ValueError, match=r"tile sizes must be 1 or more"):
        UnzipFpga(Design(0, 1, 1))
