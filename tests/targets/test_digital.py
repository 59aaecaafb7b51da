"""The digital accelerator's figures against its equations worked by hand, and its place in profile, search, report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsmith as bs
import smallnet
from bitsmith.model.network import network
from bitsmith.site import Site
from bitsmith.targets import DigitalAccelerator, EnergyTable, EnergyTableError
from bitsmith.targets._accelerator import Product, product_of
from bitsmith.targets._formulas import scaled
from bitsmith.technique import No
from bitsmith.testing import check_target
from targets_by_hand import TABLE, linear

CHIP = DigitalAccelerator(TABLE, rows=4, columns=8, clock_mhz=100.0, buffer_kib=8.0, dram_gb_s=1.0)
SRAM, DRAM = 10.0 / 64, 1300.0 / 64


def test_a_small_layer_in_8_bits_by_hand() -> None:
    """16 samples, 10 inputs, 20 outputs: everything fits in the buffer, and the input is already there."""
    site, technique = linear(16, 10, 20), bs.Int(8, 8)
    weights = 10 * 20 * 8 + 20 * 32  # a scale of float32 by output channel
    # 3 tiles of depth (10 / 4), 3 of outputs (20 / 8), 16 positions each
    assert CHIP.cycles(site, technique) == 3 * 3 * 16
    seconds = max(144 / 100e6, weights / 8 / 1e9)
    assert CHIP.cost(site, technique) == pytest.approx(seconds * 1e3)
    fetched = 16 * 10 * 3 * 8
    sums = 2 * (3 - 1) * 16 * 20 * 32
    buffer = fetched + weights + sums + 16 * 20 * 8 + weights
    macs = 16 * 10 * 20
    pj = macs * (0.2 + 0.1) + macs * (8 + 8 + 2 * 32) * 0.01 + buffer * SRAM + weights * DRAM
    assert CHIP.site_energy(site, technique) == pytest.approx(pj * 1e-9)


def test_the_same_layer_in_float_by_hand() -> None:
    site, technique = linear(16, 10, 20), bs.Float()
    weights = 10 * 20 * 32
    buffer = 16 * 10 * 3 * 32 + weights + 2 * 2 * 16 * 20 * 32 + 16 * 20 * 32 + weights
    macs = 3200
    pj = macs * (3.7 + 0.9) + macs * 4 * 32 * 0.01 + buffer * SRAM + weights * DRAM
    assert CHIP.site_energy(site, technique) == pytest.approx(pj * 1e-9)
    slow = dataclasses.replace(CHIP, float_rate=0.25)
    assert slow.cycles(site, technique) == 4 * CHIP.cycles(site, technique)


def test_sums_that_stay_in_the_array_by_hand() -> None:
    chip = dataclasses.replace(CHIP, dataflow="output")
    site, technique = linear(16, 10, 20), bs.Int(8, 8)
    weights = 10 * 20 * 8 + 20 * 32
    assert chip.cycles(site, technique) == 4 * 3 * 10  # 16 positions by 4, 20 outputs by 8
    buffer = 16 * 10 * 3 * 8 + 4 * weights + 16 * 20 * 8 + weights
    macs = 3200
    pj = macs * 0.3 + macs * 80 * 0.01 + buffer * SRAM + weights * DRAM
    assert chip.site_energy(site, technique) == pytest.approx(pj * 1e-9)


def test_what_does_not_fit_is_streamed_again_by_hand() -> None:
    """512 samples of 64 inputs and 128 outputs: 4096 bytes are half the buffer; the cheaper order is taken."""
    site, technique = linear(512, 64, 128), bs.Int(8, 8)
    weights, inputs, outputs = 64 * 128 * 8 + 128 * 32, 512 * 64 * 8, 512 * 128 * 8
    half = 4096 * 8
    one = weights + inputs * math.ceil(weights / half)
    other = inputs + weights * math.ceil(inputs / half)
    assert CHIP.traffic(site, technique).dram == min(one, other) + outputs
    roomy = dataclasses.replace(CHIP, buffer_kib=1024.0)
    assert roomy.traffic(site, technique).dram == weights
    entering = dataclasses.replace(
        site, operands=(dataclasses.replace(site.operands[0], tensor="@x"), site.operands[1])
    )
    assert roomy.traffic(entering, technique).dram == weights + inputs


def test_wide_operands_take_passes_and_narrow_ones_save_energy_only() -> None:
    site = linear(16, 10, 20)
    assert CHIP.cycles(site, bs.Int(8, 16)) == 2 * CHIP.cycles(site, bs.Int(8, 8))
    assert CHIP.cycles(site, bs.Int(4, 4)) == CHIP.cycles(site, bs.Int(8, 8))
    four, eight = CHIP.site_energy(site, bs.Int(4, 8)), CHIP.site_energy(site, bs.Int(8, 8))
    assert four is not None
    assert eight is not None
    # the products at half the energy, 4 bits less by register access, by weight in the buffer (twice) and outside
    less = 3200 * 0.1 + 3200 * 4 * 0.01 + 200 * 4 * (2 * SRAM + DRAM)
    assert eight - four == pytest.approx(less * 1e-9)


def test_pruned_weights_by_hand() -> None:
    chip = dataclasses.replace(CHIP, storage="bitmap", zeros="skip")
    site, technique = linear(16, 10, 20), bs.Sparse(0.25)
    stored = 200 + 0.25 * 200 * 32
    assert chip.stored(site, technique) == stored
    assert chip.cycles(site, technique) == CHIP.cycles(site, bs.Float()) / 4
    traffic = chip.traffic(site, technique)
    macs = 3200 / 4
    # a row has 10 places: 4 bits of an address; without bitwise operations a test is one bit of an addition
    controller = 200 * 0.1 / 32 + 50 * 0.1 * 4 / 32
    pj = macs * 4.6 + macs * 128 * 0.01 + traffic.buffer * SRAM + traffic.dram * DRAM + controller
    assert traffic.dram == stored
    assert chip.site_energy(site, technique) == pytest.approx(pj * 1e-9)
    gated = dataclasses.replace(chip, zeros="gate")
    assert gated.cycles(site, technique) == CHIP.cycles(site, bs.Float())
    assert gated.site_energy(site, technique) == pytest.approx(pj * 1e-9)
    dense = dataclasses.replace(CHIP, storage="dense")
    assert dense.stored(site, technique) == 200 * 32


def test_weights_on_the_chip_take_area_and_no_external_transfer() -> None:
    chip = dataclasses.replace(CHIP, weights_on_chip=True, weight_kib=8.0, sram_um2_per_bit=0.5)
    site, technique = linear(16, 10, 20), bs.Int(8, 8)
    weights = 10 * 20 * 8 + 20 * 32
    assert chip.traffic(site, technique).dram == 0
    assert chip.site_area(site, technique) == pytest.approx(weights * 0.5e-6)
    # 32 units: a multiplier of 8 bits, an adder of 32, and both in float; the buffer
    units = 32 * (600.0 + 200.0 + 2000.0 + 3000.0)
    assert chip.fixed_area() == pytest.approx((units + 8192 * 8 * 0.5) * 1e-6)
    assert CHIP.fixed_area() is None
    assert CHIP.site_area(site, technique) is None
    lost, gained = (c.site_energy(site, technique) for c in (CHIP, chip))
    assert lost is not None
    assert gained is not None
    # one read of the weights' own memory for an external transfer, a write and a read of the buffer
    assert lost - gained == pytest.approx(weights * (DRAM + SRAM) * 1e-9)


def test_a_technique_may_count_its_own_operations() -> None:
    @dataclasses.dataclass(frozen=True)
    class Adding(bs.Technique):
        """Only additions."""

        def fits(self, site: Site) -> bool | No:
            return True

        def build(self, site: Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
            raise NotImplementedError

        def operations(self, site: Site) -> dict[str, float]:
            return {"subtract": site.macs, "add": site.macs}

    site = linear(16, 10, 20)
    adding, multiplying = CHIP.site_energy(site, Adding()), CHIP.site_energy(site, bs.Float())
    assert adding is not None
    assert multiplying is not None
    assert multiplying - adding == pytest.approx(3200 * (3.7 - 0.9) * 1e-9)


def test_calls_multiply_and_changes_of_format_cost() -> None:
    once, thrice = (CHIP.site_energy(linear(4, 8, 8, calls), bs.Float()) for calls in (1, 3))
    assert once is not None
    assert thrice == pytest.approx(3 * once)
    assert CHIP.conversion_cost(81, "float", "u8") == pytest.approx(11 / 100e6 * 1e3)
    assert CHIP.conversion_energy(80, "float", "u8") == pytest.approx(80 * (4.6 + 40 * SRAM) * 1e-9)
    assert CHIP.conversion_cost(80, "u8", "u8") == CHIP.conversion_energy(80, "u8", "u8") == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 2))
def test_a_convolution_is_its_matrix_products(n: int, inner: int, outer: int, k: int, size: int, groups: int) -> None:
    channels, filters = inner * groups, outer * groups
    layer = torch.nn.Conv2d(channels, filters, k, padding=k // 2, groups=groups)
    record = network(torch.nn.Sequential(layer).eval(), torch.randn(n, channels, size + k, size + k)).record
    (site,) = record.sites.values()
    positions = math.prod(site.out_shapes[0]) // filters
    assert product_of(site) == Product(groups, positions, outer, inner * k * k)


def test_attention_s_products_are_counted() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.matmul(x, y)

    record = network(Two(), (torch.randn(2, 3, 5, 7), torch.randn(2, 3, 7, 11))).record
    (site,) = record.sites.values()
    assert product_of(site) == Product(6, 5, 11, 7)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rows": 0}, r"rows=0"),
        ({"clock_mhz": float("nan")}, r"clock_mhz"),
        ({"dataflow": "row"}, r"dataflow='row'"),
        ({"storage": "functional"}, r"storage='functional'"),
        ({"zeros": "skip"}, r"needs a storage"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CHIP, **wrong)


def test_a_width_that_the_table_lacks_is_not_offered() -> None:
    assert not TABLE.has("float_add", 16)
    verdict = DigitalAccelerator(TABLE).supports(bs.Float("bfloat16"), linear(1, 8, 8))
    assert isinstance(verdict, No)
    assert verdict.reason == f"the energy table {TABLE.name!r} has no float_add at 16 bits"
    assert DigitalAccelerator(TABLE).supports(bs.Float(), linear(1, 8, 8)) is True
    halves = (dataclasses.replace(e, bits=16) for e in TABLE.entries if e.operation in ("float_add", "float_multiply"))
    both = DigitalAccelerator(EnergyTable("both", (*TABLE.entries, *halves)))
    assert both.supports(bs.Float("bfloat16"), linear(1, 8, 8)) is True


def test_a_table_that_lacks_an_operation_is_refused_at_once() -> None:
    bare = EnergyTable("bare", tuple(e for e in TABLE.entries if e.operation != "float_add"))
    with pytest.raises(EnergyTableError, match=r"'bare' lacks float_add"):
        DigitalAccelerator(bare)
    integers = DigitalAccelerator(bare, float_rate=0.0)
    verdict = integers.supports(bs.Float(), linear(1, 8, 8))
    assert isinstance(verdict, No)
    assert "float_rate" in verdict.reason
    assert integers.supports(bs.Int(8, 8), linear(1, 8, 8)) is True
    memoryless = EnergyTable("small", tuple(e for e in TABLE.entries if not e.operation.startswith("dram")))
    with pytest.raises(EnergyTableError, match=r"'small' lacks dram_read"):
        DigitalAccelerator(memoryless)


def test_it_passes_the_conformance_suite() -> None:
    assert check_target(CHIP)
    assert check_target(dataclasses.replace(CHIP, sram_um2_per_bit=0.5, weights_on_chip=True))


def test_energy_and_area_go_through_profile_search_and_report(tmp_path: Path) -> None:
    chip = dataclasses.replace(CHIP, weights_on_chip=True, sram_um2_per_bit=0.5)
    model = smallnet.Small().eval()
    task = bs.Task(calibration=smallnet.batches(1), validation=smallnet.batches(2, seed=2), metric=bs.metrics.top1)
    profile = bs.profile(model, task, [bs.Int(8, 8), bs.Int(4, 8)], chip)
    assert profile.source == "modelled"
    # the sites' energies, worked out one by one, are the whole's
    record = network(model, smallnet.batches(1)[0][0]).record
    fixed = chip.fixed_area()
    assert fixed is not None
    whole = profile.predict(bs.Plan())
    assert whole["mm2"] == pytest.approx(fixed + sum(s.parameter_bytes for s in record.sites.values()) * 8 * 0.5e-6)
    again = bs.Profile.from_json(json.loads(json.dumps(profile.to_json())))
    assert again == profile
    room = 0.5 * (whole["mm2"] - fixed) + fixed
    evaluate = bs.evaluator(model, task, chip)
    found = bs.search(profile, bs.Budget(mm2=room, drop=1.0), "mj", evaluate=evaluate)
    got = found.best.evaluation
    assert got is not None
    assert got.source == "modelled"
    assert got.mm2 is not None
    assert got.mm2 <= room
    # what is predicted site by site is what the plan as a whole is modelled to cost
    assert got.mj == pytest.approx(found.best.mj)
    assert got.mm2 == pytest.approx(found.best.mm2)
    options = [[row.mj for row in rows if row.mj is not None] for rows in profile.options().values()]
    assert got.mj is not None
    assert got.mj >= sum(map(min, options)) - 1e-15

    made = bs.optimize(
        model, task, chip, bs.Budget(drop=1.0), minimize="mj", techniques=[bs.Int(8, 8)], folder=tmp_path
    )
    report = made.report
    assert report.plan_mj is not None
    assert report.float_mj is not None
    assert report.plan_mj.value < report.float_mj.value
    assert report.plan_mj.source == "modelled"
    assert any("modelled, not measured" in note for note in report.notes)
    assert any("made up" in line for line in report.citations)
    assert all(point.source == "modelled" and point.mj is not None for point in report.frontier)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "energy, mJ per batch (modelled)" in page
    assert bs.Report.load(tmp_path / "report.json") == report
    assert made.check.passed
    rows = {row.site: row for row in report.sites}
    assert all(row.mj is not None and row.float_mj is not None for row in report.sites)
    # the report is of one image, the record of a batch of 16
    one = chip.site_energy(scaled(record.sites["stem"], 1 / 16), bs.Float())
    assert rows["stem"].float_mj == pytest.approx(one)
    assert "Plan mJ" in page


def test_a_target_without_area_says_so() -> None:
    model = smallnet.Small().eval()
    task = bs.Task(calibration=smallnet.batches(1), validation=smallnet.batches(1), metric=bs.metrics.top1)
    with pytest.raises(ValueError, match=r"digital gives no area: leave mm2 out"):
        bs.optimize(model, task, CHIP, bs.Budget(mm2=1.0), minimize="ms")
    profile = bs.profile(model, task, [bs.Int(8, 8)], CHIP)
    with pytest.raises(ValueError, match=r"the profile has no area"):
        bs.search(profile, bs.Budget(mm2=1.0), "ms")


def convolution() -> Site:
    """6 channels to 10 of a map of 5 x 6, which 3 x 3 tiles of 2 cover."""
    layer = torch.nn.Conv2d(6, 10, 3, padding=1)
    *_, site = network(
        torch.nn.Sequential(torch.nn.ReLU(), layer).eval(), torch.randn(1, 6, 5, 6)
    ).record.sites.values()
    return site


def test_winograd_by_hand() -> None:
    """16 products of [9, 6] @ [6, 10] on 4 x 8 units: 2 folds of depth, 2 of outputs."""
    site, technique = convolution(), bs.Winograd(2)
    assert CHIP.precision(site, technique) == "int8"
    tiles, taps = 9, 16
    transformed = taps * tiles * (6 + 10)
    assert CHIP.cycles(site, technique) == max(taps * 2 * 2 * tiles, math.ceil(transformed / 8)) == 576
    stored = technique.bits(site)
    assert CHIP.stored(site, technique) == stored
    fetched = taps * tiles * 6 * 2 * 8
    first, sums = taps * tiles * 6 * (8 + 8), taps * tiles * 10 * 32 * 2
    unfinished = 2 * taps * tiles * 10 * 32
    written = 10 * 5 * 6 * 8
    found = CHIP.traffic(site, technique)
    assert found.dram == stored
    assert found.buffer == fetched + first + sums + unfinished + written + 2 * stored
    macs = taps * tiles * 6 * 10
    added = tiles * (6 * 32 + 10 * 24)
    pj = macs * (0.2 + 0.1) + added * 0.1 + transformed * (0.2 * 4 + 0.1) + macs * (8 + 8 + 2 * 32) * 0.01
    pj += found.buffer * SRAM + stored * DRAM
    assert CHIP.site_energy(site, technique) == pytest.approx(pj * 1e-9)
    # transforms alone decide where the array is large
    large = dataclasses.replace(CHIP, rows=64, columns=64)
    assert large.cycles(site, technique) == max(taps * tiles, math.ceil(transformed / 64))


def test_winograd_with_weights_that_are_transformed_at_each_call_by_hand() -> None:
    site, technique = convolution(), bs.Winograd(4, 16)
    chip = dataclasses.replace(CHIP, transform_weights=True)
    kernels, taps = 60, 36
    scales = technique.bits(site) - 16 * taps * kernels
    assert chip.stored(site, technique) == 16 * 9 * kernels + scales
    more = chip.traffic(site, technique).buffer - CHIP.traffic(site, technique).buffer
    less = technique.bits(site) - chip.stored(site, technique)
    assert more == 2 * taps * kernels * 16 - 2 * less
    # 4 additions in a row of G (two rows of 2 halves, shared), 3 columns then 6 rows; and the narrower memory
    own = technique.products(site)
    assert own is not None
    pj = own.weight_additions * 0.1 + more * SRAM - less * DRAM
    gained = chip.site_energy(site, technique) - CHIP.site_energy(site, technique)  # type: ignore[operator]
    assert gained == pytest.approx(pj * 1e-9)
    # others are what they were
    assert chip.site_energy(site, bs.Int(8, 8)) == CHIP.site_energy(site, bs.Int(8, 8))


def test_winograd_in_float_is_computed_by_the_float_units() -> None:
    site = convolution()
    assert CHIP.precision(site, bs.Winograd(4, 32)) == "float32"
    assert isinstance(dataclasses.replace(CHIP, float_rate=0.0).precision(site, bs.Winograd(4, 32)), No)
    wide = dataclasses.replace(CHIP, float_rate=0.5)
    assert wide.cycles(site, bs.Winograd(4, 32)) == 2 * CHIP.cycles(site, bs.Winograd(4, 32))


@pytest.mark.parametrize("technique", [bs.Winograd(2), bs.Winograd(4, 16)], ids=str)
def test_the_exported_file_of_winograd_computes_what_is_simulated(technique: bs.Winograd, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 7, 6)
    net = bs.apply(model, bs.Plan({"0": technique}), [(x, None)])
    artifact = bs.export(net, CHIP, tmp_path / "net.onnx", x, batch=2)
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(CHIP.run(artifact, [x.numpy()])[0]), net(x))
    assert CHIP.inspect(artifact)["0"].precision == f"int{technique.tap_bits}"
