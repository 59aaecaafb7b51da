"""ZigZag as a second opinion: bounds that any mapping keeps, and how near our own model comes."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

import bitsmith as bs
from bitsmith.model.network import network
from bitsmith.targets import DigitalAccelerator, TargetError, ZigZag
from bitsmith.targets.zigzag import hardware
from bitsmith.technique import No
from targets_by_hand import TABLE, linear

CHIP = DigitalAccelerator(TABLE, rows=16, columns=16, clock_mhz=100.0, buffer_kib=64.0, dram_gb_s=0.8)
SIZES = ((64, 144, 16), (1024, 144, 16), (16, 64, 64), (1, 64, 10))
"""Positions, depth, outputs."""


@pytest.fixture
def zigzag() -> ZigZag:
    pytest.importorskip("zigzag.stages.main", reason='needs ZigZag: pip install "bitsmith[zigzag]"')
    return ZigZag(CHIP)


@pytest.mark.filterwarnings("ignore")  # of packages that ZigZag imports
@pytest.mark.parametrize("size", SIZES)
def test_no_mapping_beats_what_must_move_and_be_computed(zigzag: ZigZag, size: tuple[int, int, int]) -> None:
    positions, depth, outputs = size
    site, technique = linear(positions, depth, outputs, tensor="@x"), bs.Int(8, 8)
    found = zigzag.searched(site, technique)
    assert found is not None
    pj, cycles = found
    macs = positions * depth * outputs
    moved = 8 * (positions * depth + depth * outputs + positions * outputs)
    # of a last, partial access of the bus ZigZag counts a part
    assert pj >= 0.995 * (macs * 0.3 + moved * 1300.0 / 64)
    assert cycles >= macs / 256
    assert cycles >= moved / 64  # bits of DRAM in a cycle


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES[:3])
def test_our_own_model_is_near(zigzag: ZigZag, size: tuple[int, int, int]) -> None:
    """Within 40 % of energy: what fits in the buffer stays there in our model, scales are left out in ZigZag's."""
    site = linear(*size, tensor="@x")
    theirs, ours = zigzag.site_energy(site, bs.Int(8, 8)), CHIP.site_energy(site, bs.Int(8, 8))
    assert theirs is not None
    assert ours is not None
    assert 0.6 < ours / theirs < 1.4
    slower, faster = zigzag.cost(site, bs.Int(8, 8)), CHIP.cost(site, bs.Int(8, 8))
    assert slower is not None
    assert faster is not None
    assert faster <= slower * 1.2


@pytest.mark.filterwarnings("ignore")
def test_a_convolution_s_inputs_are_moved_as_they_are(zigzag: ZigZag) -> None:
    layer = torch.nn.Conv2d(16, 16, 3, stride=2, padding=1).eval()
    (site,) = network(torch.nn.Sequential(layer).eval(), torch.randn(1, 16, 32, 32)).record.sites.values()
    pj, cycles = zigzag.searched(site, bs.Int(8, 8)) or (0.0, 0.0)
    macs, inputs, weights, outputs = 16 * 16 * 9 * 256, 16 * 32 * 32, 16 * 16 * 9, 16 * 256
    moved = 8 * (inputs + weights + outputs)
    assert pj >= 0.995 * (macs * 0.3 + moved * 1300.0 / 64)
    # all of it fits in the buffer: nothing has to be moved twice; the unrolled input has 2.25 times as many values
    assert pj < macs * 0.3 + 1.3 * moved * 1300.0 / 64 + macs * (8 + 8 + 2 * 32) * 0.01 + 10 * moved * TABLE.sram(
        65536, 1
    )
    assert cycles >= macs / 256


@pytest.mark.filterwarnings("ignore")
def test_narrow_weights_cost_less_and_calls_multiply(zigzag: ZigZag) -> None:
    site = linear(16, 64, 64)
    eight, four = (zigzag.site_energy(site, bs.Int(bits, 8)) for bits in (8, 4))
    thrice = zigzag.site_energy(linear(16, 64, 64, calls=3), bs.Int(8, 8))
    assert eight is not None
    assert four is not None
    assert four < eight
    assert thrice == pytest.approx(3 * eight)


@pytest.mark.filterwarnings("ignore")
def test_it_passes_the_conformance_suite(zigzag: ZigZag) -> None:
    from bitsmith.testing import check_target

    assert check_target(zigzag)
    assert "ZigZag 3" in zigzag.assumptions()[1]


@pytest.mark.filterwarnings("ignore")
def test_a_layer_without_a_mapping_is_named(zigzag: ZigZag) -> None:
    tiny = ZigZag(dataclasses.replace(CHIP, buffer_kib=0.001))
    with pytest.raises(TargetError, match=r"no mapping for 'fc'"):
        tiny.cost(linear(64, 64, 64), bs.Int(8, 8))


def test_the_hierarchy_is_written_from_the_registers_up() -> None:
    found = hardware(CHIP, (8, 8, 8), floating=False)
    assert list(found["memories"]) == ["weights", "sums", "buffer", "dram"]
    dram = found["memories"]["dram"]
    assert dram["ports"][0]["bandwidth_max"] == 64  # 0.8 GB/s at 100 MHz
    assert dram["r_cost"] == pytest.approx(1300.0)
    buffer = found["memories"]["buffer"]
    assert buffer["size"] == 64 * 1024 * 8
    assert buffer["r_cost"] / buffer["ports"][0]["bandwidth_max"] == pytest.approx(TABLE.sram(65536, 1))
    assert found["operational_array"]["unit_energy"] == pytest.approx(0.2 + 0.1 + 8 * 0.01)
    assert found["memories"]["weights"]["r_cost"] == pytest.approx(8 * 0.01)


def test_what_it_is_not_asked_for() -> None:
    refused = ZigZag(CHIP).supports(bs.Sparse(0.5), linear(4, 8, 8))
    assert isinstance(refused, No)
    assert "dense" in refused.reason
    with pytest.raises(ValueError, match=r"dataflow='weight'"):
        ZigZag(dataclasses.replace(CHIP, dataflow="output"))
    with pytest.raises(ValueError, match=r"loops=0"):
        ZigZag(CHIP, loops=0)


def test_without_zigzag_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "zigzag"), "zigzag"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"bitsmith\[zigzag\]\""):
        ZigZag(CHIP).cost(linear(7, 9, 11), bs.Int(8, 8))
