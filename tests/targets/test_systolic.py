"""The systolic array's cycles against an array that is simulated cycle by cycle."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsmith as bs
from bitsmith.model.network import network
from bitsmith.targets import DigitalAccelerator, SystolicArray
from bitsmith.testing import check_target
from targets_by_hand import TABLE, linear

ARRAY = SystolicArray(TABLE, rows=4, columns=8, clock_mhz=100.0, buffer_kib=8.0, dram_gb_s=1.0)


def marched(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """``a @ b`` on a grid as large as the result, sums in place: operands enter skewed, and each unit hands on what it
    read one cycle later; then the sums leave by the rows. The product and the cycles."""
    rows, steps = a.shape
    columns = b.shape[1]
    left, top = np.zeros((rows, columns)), np.zeros((rows, columns))
    sums = np.zeros((rows, columns))
    cycle, entered = 0, 0
    while entered < rows * columns * steps:
        left[:, 1:], top[1:] = left[:, :-1].copy(), top[:-1].copy()
        for i in range(rows):
            t = cycle - i
            left[i, 0] = a[i, t] if 0 <= t < steps else 0.0
        for j in range(columns):
            t = cycle - j
            top[0, j] = b[t, j] if 0 <= t < steps else 0.0
        for i in range(rows):
            for j in range(columns):
                if 0 <= cycle - i - j < steps:
                    entered += 1
        sums += left * top
        cycle += 1
    return sums, cycle + rows


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_a_fold_takes_what_a_simulated_array_takes(rows: int, columns: int, steps: int) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((rows, steps)), generator.standard_normal((steps, columns))
    product, cycles = marched(a, b)
    assert np.allclose(product, a @ b)
    assert cycles == SystolicArray.fold_cycles(rows, columns, steps)


@pytest.mark.parametrize(
    ("dataflow", "on_rows", "on_columns", "steps"),
    [("output", 16, 20, 10), ("weight", 10, 20, 16), ("input", 10, 16, 20)],
)
def test_folds_by_hand(dataflow: str, on_rows: int, on_columns: int, steps: int) -> None:
    array = dataclasses.replace(ARRAY, dataflow=dataflow)
    site = linear(16, 10, 20)
    folds = math.ceil(on_rows / 4) * math.ceil(on_columns / 8)
    cycles = folds * (2 * 4 + 8 + steps - 2)
    assert array.cycles(site, bs.Int(8, 8)) == cycles
    weights = 10 * 20 * 8 + 20 * 32
    assert array.cost(site, bs.Int(8, 8)) == pytest.approx(max(cycles / 100e6, weights / 8e9) * 1e3)
    assert array.cycles(site, bs.Int(8, 16)) == 2 * cycles


def test_it_is_never_faster_than_an_array_that_needs_no_filling() -> None:
    fields = {f.name: getattr(ARRAY, f.name) for f in dataclasses.fields(ARRAY)}
    chip = DigitalAccelerator(**fields)
    for batch, inputs, outputs in ((1, 3, 5), (16, 10, 20), (64, 64, 64)):
        site = linear(batch, inputs, outputs)
        assert ARRAY.cycles(site, bs.Int(8, 8)) > chip.cycles(site, bs.Int(8, 8))
        assert ARRAY.site_energy(site, bs.Int(8, 8)) == chip.site_energy(site, bs.Int(8, 8))


def test_it_passes_the_conformance_suite_and_says_what_it_is() -> None:
    assert check_target(ARRAY)
    assert "systolic array of 4 x 8" in ARRAY.assumptions()[0]
    assert any("1811.02883" in line for line in ARRAY.references())
    with pytest.raises(ValueError, match=r"dataflow='row'"):
        dataclasses.replace(ARRAY, dataflow="row")


def test_winograd_is_batched_products_by_tap() -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(6, 10, 3, padding=1)).eval()
    (site,) = network(layer, torch.randn(1, 6, 8, 8)).record.sites.values()
    # 16 products of [16, 6] @ [6, 10]: weights stay, 2 folds of depth and 2 of outputs
    assert ARRAY.cycles(site, bs.Winograd(2)) == 16 * 2 * 2 * (2 * 4 + 8 + 16 - 2)
    output = dataclasses.replace(ARRAY, dataflow="output")
    assert output.cycles(site, bs.Winograd(2)) == 16 * 4 * 2 * (2 * 4 + 8 + 6 - 2)
    assert ARRAY.cycles(site, bs.Winograd(2, 16)) == 4 * ARRAY.cycles(site, bs.Winograd(2))
    assert ARRAY.site_energy(site, bs.Winograd(2)) == ARRAY.chip.site_energy(site, bs.Winograd(2))
