"""Energy tables: what they answer, worked by hand, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith._files import data_root
from bitsmith.targets import EnergyTable, EnergyTableError, Entry

TOY = EnergyTable(
    "toy",
    (
        Entry("int_add", 8, 0.03, 36.0),
        Entry("int_add", 32, 0.1),
        Entry("int_multiply", 8, 0.2),
        Entry("int_multiply", 32, 3.1),
        Entry("float_add", 32, 0.9),
        Entry("sram_read_8KiB", 64, 10.0),
        Entry("sram_read_32KiB", 64, 20.0),
        Entry("dram_read_low", 64, 1300.0),
    ),
    "made up",
)


def write(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_widths_of_the_table_are_given_as_they_are() -> None:
    assert (TOY.energy("int_add", 8), TOY.energy("int_add", 32)) == (0.03, 0.1)
    assert (TOY.multiply(8, 8), TOY.multiply(32, 32)) == (0.2, 3.1)


def test_other_widths_come_from_the_next_wider_entry() -> None:
    assert TOY.energy("int_add", 4) == pytest.approx(0.03 * 4 / 8)
    assert TOY.energy("int_add", 16) == pytest.approx(0.1 * 16 / 32)
    assert TOY.energy("int_add", 48) == pytest.approx(0.1 * 48 / 32)  # wider than all
    assert TOY.multiply(4, 8) == TOY.multiply(8, 4) == pytest.approx(0.2 * 32 / 64)
    assert TOY.multiply(9, 4) == pytest.approx(3.1 * 36 / 1024)
    assert TOY.area("int_add", 4) == pytest.approx(18.0)
    assert TOY.area("int_add", 32) is None


def test_floats_are_not_scaled() -> None:
    assert TOY.energy("float_add", 32) == 0.9
    with pytest.raises(EnergyTableError, match=r"float_add at 32 bits, not at 16: add a line"):
        TOY.energy("float_add", 16)


def test_memories_lie_on_a_line_of_logarithms() -> None:
    assert TOY.sram(8 * 1024, 64) == pytest.approx(10.0)
    assert TOY.sram(16 * 1024, 64) == pytest.approx(math.sqrt(10.0 * 20.0))
    assert TOY.sram(32 * 1024, 8) == pytest.approx(20.0 / 8)
    assert TOY.sram(2 * 1024, 64) == pytest.approx(10.0 / 2)  # the root of a quarter
    assert TOY.sram(128 * 1024, 64) == pytest.approx(40.0)
    assert TOY.dram(32) == 650.0


@settings(deadline=None)
@given(st.floats(1.0, 1e8), st.floats(1.0, 1e8))
def test_a_larger_memory_costs_no_less(one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert TOY.sram(small, 8) <= TOY.sram(large, 8) * (1 + 1e-12)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(EnergyTableError, match=r"'toy' lacks shift: add lines for it; it has int_add, int_multiply"):
        TOY.energy("shift", 8)
    with pytest.raises(EnergyTableError, match=r"lacks float_multiply, bitwise"):
        TOY.require(["int_add", "float_multiply", "bitwise"])
    with pytest.raises(EnergyTableError, match=r"lacks dram_read or dram_read_high"):
        TOY.dram(8, "high")
    with pytest.raises(EnergyTableError, match=r"lacks sram_read_<capacity>"):
        EnergyTable("bare", (Entry("int_add", 8, 0.03),)).sram(1024, 8)
    with pytest.raises(EnergyTableError, match=r"sram_read_8: write its capacity with a unit"):
        EnergyTable("bare", (Entry("sram_read_8", 8, 0.03),)).sram(1024, 8)


def test_a_csv_is_read_with_its_units(tmp_path: Path) -> None:
    path = write(tmp_path, "operation,bits,energy_fJ,area_um2\nint_add,8,30,36\nint_multiply,8,200,\n")
    table = EnergyTable.read(path, "a lecture")
    assert table.entries == (Entry("int_add", 8, 0.03, 36.0), Entry("int_multiply", 8, 0.2))
    assert (table.name, table.reference) == ("table", "a lecture")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("operation,bits,energy\nint_add,8,0.03\n", r"column 'energy' has no unit that is known; write energy_pJ"),
        ("operation,bits,energy_J\nint_add,8,0.03\n", r"column 'energy_J' has no unit that is known"),
        ("operation,bits\nint_add,8\n", r"no column of energy; write energy_pJ or energy_fJ"),
        ("operation,bits,energy_pJ,energy_fJ\nint_add,8,1,1\n", r"energy_pJ and energy_fJ: one of them"),
        ("operation,energy_pJ\nint_add,0.03\n", r"no column 'bits'"),
        ("operation,bits,energy_pJ\nint_add,8,dear\n", r"line 2 \(int_add\): energy_pJ is 'dear', not a number"),
        ("operation,bits,energy_pJ\nint_add,8,-1\n", r"energy_pj -1\.0 is not 0 or more"),
        ("operation,bits,energy_pJ\nint_add,8,nan\n", r"not 0 or more"),
        ("operation,bits,energy_pJ\nint_add,0,1\n", r"at least one bit"),
        ("operation,bits,energy_pJ\nint_add,8,1\nint_add,8,2\n", r"stands there twice"),
        ("operation,bits,energy_pJ,area\nint_add,8,1,3\n", r"column 'area' has no unit"),
        ("operation,bits,energy_pJ\nint_add,8\n", r"energy_pJ is None, not a number"),
    ],
)
def test_a_broken_csv_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(EnergyTableError, match=said):
        EnergyTable.read(write(tmp_path, text))


def test_a_missing_csv_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(EnergyTableError, match=r"is missing: give the path of a CSV, '45nm' or '40nm'"):
        EnergyTable.read(tmp_path / "none.csv")
    with pytest.raises(EnergyTableError, match=r"aladdin40nm_adder\.csv is missing: the unit 'int_add'"):
        EnergyTable.aladdin(tmp_path)


@pytest.mark.data
@pytest.mark.skipif(data_root() is None, reason="the data folder is missing")
def test_the_two_tables_that_come_with_the_data() -> None:
    old, new = EnergyTable.named("45nm"), EnergyTable.named("40nm")
    assert old.multiply(8, 8) == 0.2
    assert old.energy("float_multiply", 32) == 3.7
    assert old.dram(64, "high") == 2600.0
    assert old.sram(32 * 1024, 64) == 20.0
    # the rows of 5 ns: a multiplier of 8.63 pJ and 4600 um2, both for 32 x 32 bits
    assert new.multiply(32, 32) == 8.63
    assert new.area("int_multiply", 8) == pytest.approx(4600.0 / 16)
    assert new.energy("register", 1) == 0.009
    assert new.sram(32 * 1024, 64) == old.sram(32 * 1024, 64)
    assert "Aladdin" in new.reference
    assert "Horowitz" in new.reference
    root = data_root()
    assert root is not None
    with pytest.raises(EnergyTableError, match=r"no row for a period of 7 ns; it has 0\.5, 1\.0"):
        EnergyTable.aladdin(root / "energy_tables", period_ns=7)
