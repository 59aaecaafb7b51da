"""Storage forms: rooms counted on real masks, crossovers found by trying, energies by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.targets import Connections, EnergyTable, Entry, best_format, controller_pj, crossovers
from bitsmith.targets.storage import FORMATS, encode_runs, run_tokens, storage_pj, stored_bits

TABLE = EnergyTable(
    "toy", (Entry("int_add", 32, 0.32), Entry("bitwise", 32, 0.064), Entry("sram_read_8KiB", 64, 10.0)), "made up"
)


def mask(rows: int, columns: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, columns)) < density


def written(form: str, taken: np.ndarray, bits: int, run_bits: int) -> int:
    """The bits of a form, written out place by place."""
    rows, columns = taken.shape
    address = max(1, (columns - 1).bit_length())
    if form == "dense":
        return rows * columns * bits
    if form == "bitmap":
        return sum(1 + (bits if place else 0) for place in taken.ravel())
    if form == "index":
        return sum(address + bits for place in taken.ravel() if place)
    total = 0
    for row in taken:
        gap = 0
        for place in row:
            if place or gap == 2**run_bits - 1:
                total, gap = total + run_bits + bits, 0
            else:
                gap += 1
    return total


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("form", ["dense", "bitmap", "index", "run-length"])
def test_room_is_what_writing_it_out_takes(form: str, density: float) -> None:
    taken = mask(64, 512, density)
    found = Connections(64, 512, float(taken.mean()), 5)
    expected = written(form, taken, 5, 3)
    # runs are expected values, at random and without ends: within 2 % of one mask
    near = 0.02 if form == "run-length" else 1e-12
    assert stored_bits(form, found, 3) == pytest.approx(expected, rel=near)  # type: ignore[arg-type]


def test_expected_runs_are_the_mean_of_counted_ones() -> None:
    taken = mask(400, 2000, 0.03, seed=1)
    counted = sum(encode_runs(row.tolist(), 4) for row in taken)
    assert run_tokens(Connections(400, 2000, 0.03, 8)) == pytest.approx(counted, rel=0.02)
    assert run_tokens(Connections(1, 160, 0.0, 8)) == 10.0


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(2, 4096), st.floats(0.0, 1.0), st.integers(2, 16), st.integers(1, 8))
def test_the_best_form_is_never_beaten(rows: int, columns: int, density: float, bits: int, runs: int) -> None:
    c = Connections(rows, columns, density, bits)
    best = stored_bits(best_format(c, runs), c, runs)
    for form in ("dense", "bitmap", "index", "run-length"):
        assert best <= stored_bits(form, c, runs)


@pytest.mark.parametrize(("columns", "bits", "run_bits"), [(256, 4, 4), (1024, 8, 4), (64, 8, 5), (4096, 2, 3)])
def test_forms_change_places_at_the_crossovers(columns: int, bits: int, run_bits: int) -> None:
    found = crossovers(columns, bits, run_bits)
    assert found
    for (below, above), density in found.items():
        left, right = (
            stored_bits(form, Connections(1, columns, density * 0.999, bits), run_bits) for form in (below, above)
        )
        assert left < right
        left, right = (
            stored_bits(form, Connections(1, columns, min(1.0, density * 1.001), bits), run_bits)
            for form in (below, above)
        )
        assert left > right
    assert found["index", "bitmap"] == 1 / math.ceil(math.log2(columns))
    # every pair that is not listed keeps its order on a grid of densities
    for one, other in itertools.combinations(("dense", "bitmap", "index", "run-length"), 2):
        if (one, other) in found or (other, one) in found:
            continue
        signs = set()
        for k in range(1, 100):
            c = Connections(1, columns, k / 100, bits)
            gap = stored_bits(one, c, run_bits) - stored_bits(other, c, run_bits)
            signs.add(gap > 0)
        assert len(signs) == 1


def test_a_convolution_keeps_its_weights_once() -> None:
    c = Connections.of_convolution(channels=3, filters=4, kernel=3, height=5, width=6, bits=8)
    assert stored_bits("functional", c) == 3 * 4 * 9 * 8
    # an input reaches 9 places of each of 4 filters; an index names one of 120 outputs
    assert stored_bits("index", c) == pytest.approx(3 * 5 * 6 * 36 * (7 + 8))
    assert stored_bits("dense", c) == 90 * 120 * 8


def test_controllers_and_reads_by_hand() -> None:
    c = Connections(rows=10, columns=256, density=0.25, bits=4)
    add, test = 0.32 * 8 / 32, 0.064 / 32
    assert controller_pj("dense", c, TABLE) == pytest.approx(2560 * add)
    assert controller_pj("bitmap", c, TABLE) == pytest.approx(2560 * test + 640 * add)
    assert controller_pj("index", c, TABLE) == pytest.approx(640 * add)
    assert controller_pj("run-length", c, TABLE) == pytest.approx(run_tokens(c) * add)
    assert controller_pj("functional", c, TABLE) == pytest.approx(2 * 640 * add)
    bits = 2560 + 640 * 4
    per_bit = 10.0 / 64 * math.sqrt(bits / 8 / 8192)
    assert storage_pj("bitmap", c, TABLE) == pytest.approx(bits * per_bit + controller_pj("bitmap", c, TABLE))
    assert storage_pj("index", c, TABLE, on_chip=8192) == pytest.approx(640 * 12 * 10 / 64 + 640 * add)


def test_computed_connections_save_energy_in_a_convolution() -> None:
    """As published for spiking networks (58 % for updates): many indices are dearer than computing addresses."""
    c = Connections.of_convolution(channels=16, filters=16, kernel=3, height=16, width=16, bits=8)
    assert storage_pj("functional", c, TABLE) < storage_pj("index", c, TABLE)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Connections(0, 1, 0.5, 8), "sizes and bits"),
        (lambda: Connections(1, 1, 1.5, 8), "density must be 0 to 1"),
        (lambda: stored_bits("sparse", Connections(1, 1, 0.5, 8)), f"must be one of {', '.join(FORMATS)}"),  # type: ignore[arg-type]
        (lambda: run_tokens(Connections(1, 8, 0.5, 8), 0), "run_bits=0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
