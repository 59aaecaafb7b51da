"""Energy and area of operations and memories, as tables that hardware models read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .._files import data_root

ARITHMETIC = ("int_add", "int_multiply", "float_add", "float_multiply", "shift", "bitwise", "register")
"""Names without a size. ``register``: one access. Memories: ``sram_read_<capacity>``, ``dram_read_low``, ..."""

_QUADRATIC = ("int_multiply",)
_LINEAR = ("int_add", "shift", "bitwise", "register")
_UNITS = {"energy_pJ": 1.0, "energy_fJ": 1e-3, "energy_nJ": 1e3}
_AREAS = {"area_um2": 1.0, "area_mm2": 1e6}
_CAPACITIES = {"B": 1, "KiB": 2**10, "MiB": 2**20}

HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014, as commonly quoted (45 nm, 0.9 V)"
ALADDIN = "40 nm tables of Aladdin (Shao et al. 2014, ISCA), as Accelergy (Wu et al. 2019, ICCAD) ships them"
_ALADDIN_FILES: Mapping[str, tuple[str, int]] = {
    "adder": ("int_add", 32),
    "multiplier": ("int_multiply", 32),
    "fp_sp_adder": ("float_add", 32),
    "fp_sp_multiplier": ("float_multiply", 32),
    "shifter": ("shift", 32),
    "bitwise": ("bitwise", 32),
    "reg": ("register", 1),
}
_LATENCY, _DYNAMIC, _AREA = "latency(ns)", "dynamic energy(pJ)", "area(um^2)"


class EnergyTableError(ValueError):
    """A table that lacks an operation, a unit or a number: says which, where, and what would do."""


@dataclass(frozen=True)
class Entry:
    """One ``operation`` on operands of ``bits``: ``energy_pj``, and ``area_um2`` of one unit where it is known.

    Of a memory, ``bits`` is the width of one access, and ``area_um2`` that of the whole memory.
    """

    operation: str
    bits: int
    energy_pj: float
    area_um2: float | None = None

    def __post_init__(self) -> None:
        if not self.operation or self.bits < 1:
            raise EnergyTableError(f"Entry({self.operation!r}, {self.bits}): an operation of at least one bit")
        for name, value in (("energy_pj", self.energy_pj), ("area_um2", self.area_um2)):
            if value is not None and not 0.0 <= value < math.inf:
                raise EnergyTableError(f"{self.operation} at {self.bits} bits: {name} {value} is not 0 or more")


@dataclass(frozen=True)
class EnergyTable:
    """What operations and memory accesses cost in one technology. pJ (10^-12 J) and um2.

    A width that the table has not is taken from the narrowest entry that is wider, else from the widest: additions,
    shifts and registers in proportion to the bits, multiplications to the product of both factors' bits. Floats are not
    scaled. An on-chip memory lies on the straight line, in logarithms, between the two nearest capacities; outside of
    the table its energy goes with the root of the capacity.

    >>> table = EnergyTable("toy", (Entry("int_multiply", 8, 0.2), Entry("sram_read_8KiB", 64, 10.0)), "made up")
    >>> round(table.multiply(4, 8), 3), round(table.sram(32 * 1024, 64), 3)
    (0.1, 20.0)
    """

    name: str
    entries: tuple[Entry, ...]
    reference: str = ""

    def __post_init__(self) -> None:
        seen: set[tuple[str, int]] = set()
        for entry in self.entries:
            key = entry.operation, entry.bits
            if key in seen:
                raise EnergyTableError(f"{self.name}: {entry.operation} at {entry.bits} bits stands there twice")
            seen.add(key)

    # -- reading -----------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: str | Path, reference: str = "") -> EnergyTable:
        """A CSV with the columns ``operation``, ``bits``, ``energy_pJ`` (or ``energy_fJ``, ``energy_nJ``) and, where
        they are known, ``area_um2`` (or ``area_mm2``).

        Raises :class:`EnergyTableError` for a column without a unit, and for a line that is not complete.
        """
        path = Path(path)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                columns, rows = list(reader.fieldnames or ()), list(reader)
        except FileNotFoundError:
            raise EnergyTableError(f"{path} is missing: give the path of a CSV, '45nm' or '40nm'") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise EnergyTableError(f"{path} is not a CSV of text ({error})") from None
        energy = _column(path, columns, "energy", _UNITS)
        area = _column(path, columns, "area", _AREAS) if any(name.startswith("area") for name in columns) else None
        for name in ("operation", "bits"):
            if name not in columns:
                raise EnergyTableError(f"{path} has no column {name!r}; it has {', '.join(columns) or 'nothing'}")
        entries = []
        for line, row in enumerate(rows, 2):
            where = f"{path}, line {line} ({row['operation'] or 'no operation'})"
            known = area is not None and bool((row[area] or "").strip())
            entries.append(
                Entry(
                    (row["operation"] or "").strip(),
                    round(_number(row["bits"], "bits", where)),
                    _number(row[energy], energy, where) * _UNITS[energy],
                    _number(row[area], area, where) * _AREAS[area] if known and area is not None else None,
                )
            )
        return cls(path.stem, tuple(entries), reference or str(path.name))

    @classmethod
    def named(cls, name: str, folder: str | Path | None = None) -> EnergyTable:
        """``45nm`` (Horowitz 2014), ``40nm`` (Aladdin's arithmetic with its areas, at a period of 5 ns, and Horowitz's
        memories), or the path of a CSV.

        ``folder``: of the two tables' files; by default ``energy_tables`` under ``BITSMITH_DATA``.
        """
        if name not in ("45nm", "40nm"):
            return cls.read(name)
        place = _folder(folder)
        horowitz = cls.read(place / "horowitz_45nm.csv", HOROWITZ)
        if name == "45nm":
            return cls("45nm", horowitz.entries, HOROWITZ)
        return cls.aladdin(place).merged(horowitz, "40nm")

    @classmethod
    def aladdin(cls, folder: str | Path, period_ns: float = 5.0) -> EnergyTable:
        """The 40 nm tables of a folder (``aladdin40nm_<unit>.csv``), at the row of that clock period in ns.

        Adders and multipliers there are of 32 bits, a register of one.
        """
        entries = []
        for unit, (operation, bits) in _ALADDIN_FILES.items():
            path = Path(folder) / f"aladdin40nm_{unit}.csv"
            if not path.exists():
                raise EnergyTableError(f"{path} is missing: the unit {operation!r} comes from it")
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            for name in (_LATENCY, _DYNAMIC, _AREA):
                if not rows or name not in rows[0]:
                    raise EnergyTableError(f"{path} has no column {name!r}")
            periods = {_number(row[_LATENCY], _LATENCY, str(path)): row for row in rows}
            if period_ns not in periods:
                raise EnergyTableError(
                    f"{path} has no row for a period of {period_ns} ns; it has {', '.join(map(str, sorted(periods)))}"
                )
            row = periods[period_ns]
            energy, area = (_number(row[name], name, str(path)) for name in (_DYNAMIC, _AREA))
            entries.append(Entry(operation, bits, energy, area))
        return cls("aladdin40nm", tuple(entries), f"{ALADDIN}, period {period_ns:g} ns")

    def merged(self, other: EnergyTable, name: str) -> EnergyTable:
        """This table with those operations of another that it has not."""
        have = {entry.operation for entry in self.entries}
        added = tuple(entry for entry in other.entries if entry.operation not in have)
        gained = ", ".join(dict.fromkeys(entry.operation for entry in added))
        reference = f"{self.reference}; {gained}: {other.reference}" if added else self.reference
        return EnergyTable(name, self.entries + added, reference)

    # -- questions -----------------------------------------------------------------------------------------------------

    def has(self, operation: str, bits: int | None = None) -> bool:
        """Whether the operation stands there, at ``bits`` where they are given."""
        return any(entry.operation == operation and bits in (None, entry.bits) for entry in self.entries)

    def energy(self, operation: str, bits: int) -> float:
        """pJ of one operation on operands of ``bits``."""
        entry = self._entry(operation, bits)
        return entry.energy_pj * _scale(operation, entry.bits, bits, bits)

    def area(self, operation: str, bits: int) -> float | None:
        """um2 of one unit, scaled as its energy; None where the table does not say."""
        entry = self._entry(operation, bits)
        return None if entry.area_um2 is None else entry.area_um2 * _scale(operation, entry.bits, bits, bits)

    def multiply(self, bits: int, other: int) -> float:
        """pJ of one product of integers of ``bits`` and ``other`` bits."""
        entry = self._entry("int_multiply", max(bits, other))
        return entry.energy_pj * _scale("int_multiply", entry.bits, bits, other)

    def sram(self, capacity: float, bits: float) -> float:
        """pJ to read ``bits`` of an on-chip memory of ``capacity`` bytes; a write is taken to cost the same."""
        points = self._memories()
        if not points:
            raise self._lacking("sram_read_<capacity>, such as sram_read_32KiB,")
        if capacity <= 0:
            raise EnergyTableError(f"{self.name}: a memory of {capacity} bytes")
        low = max((point for point in points if point[0] <= capacity), default=None)
        high = min((point for point in points if point[0] >= capacity), default=None)
        if low is None or high is None:
            size, per_bit = points[0] if low is None else points[-1]
            return bits * per_bit * math.sqrt(capacity / size)
        if low[0] == high[0]:
            return bits * low[1]
        share = math.log(capacity / low[0]) / math.log(high[0] / low[0])
        return bits * math.exp((1 - share) * math.log(low[1]) + share * math.log(high[1]))

    def dram(self, bits: float, end: str = "low") -> float:
        """pJ to read or write ``bits`` of external memory; ``end``: ``low`` or ``high``, of the table's range."""
        for name in (f"dram_read_{end}", "dram_read"):
            if self.has(name):
                entry = next(entry for entry in self.entries if entry.operation == name)
                return bits * entry.energy_pj / entry.bits
        raise self._lacking(f"dram_read or dram_read_{end}")

    def require(self, operations: Iterable[str]) -> None:
        """Raise :class:`EnergyTableError` that names every one of these that is missing."""
        missing = [name for name in operations if not self.has(name)]
        if missing:
            raise self._lacking(", ".join(missing))

    def _memories(self) -> list[tuple[float, float]]:
        """(bytes, pJ a bit) of every on-chip memory, by size."""
        found = []
        for entry in self.entries:
            if entry.operation.startswith("sram_read_"):
                capacity = self._capacity(entry.operation.removeprefix("sram_read_"))
                found.append((capacity, entry.energy_pj / entry.bits))
        return sorted(found)

    def _capacity(self, text: str) -> float:
        digits = text.rstrip("KMiB")
        unit = text[len(digits) :]
        if not digits.isdecimal() or unit not in _CAPACITIES:
            raise EnergyTableError(
                f"{self.name}: sram_read_{text}: write its capacity with a unit, such as sram_read_32KiB"
            )
        return float(int(digits) * _CAPACITIES[unit])

    def _entry(self, operation: str, bits: int) -> Entry:
        """The entry that answers for ``bits``."""
        entries = sorted((e for e in self.entries if e.operation == operation), key=lambda e: e.bits)
        if not entries:
            raise self._lacking(operation)
        if operation not in _QUADRATIC + _LINEAR:
            exact = next((entry for entry in entries if entry.bits == bits), None)
            if exact is None:
                widths = ", ".join(str(entry.bits) for entry in entries)
                raise EnergyTableError(
                    f"the energy table {self.name!r} has {operation} at {widths} bits, not at {bits}: add a line for it"
                )
            return exact
        return next((entry for entry in entries if entry.bits >= bits), entries[-1])

    def _lacking(self, what: str) -> EnergyTableError:
        have = ", ".join(dict.fromkeys(entry.operation for entry in self.entries)) or "nothing"
        return EnergyTableError(f"the energy table {self.name!r} lacks {what}: add lines for it; it has {have}")


def _scale(operation: str, entry: int, bits: int, other: int) -> float:
    if operation in _QUADRATIC:
        return bits * other / entry**2
    return bits / entry if operation in _LINEAR else 1.0


def _folder(given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    root = data_root()
    if root is None:
        raise EnergyTableError("the energy tables are not here: set BITSMITH_DATA, or give the path of a CSV")
    return root / "energy_tables"


def _column(path: Path, columns: Iterable[str], what: str, units: Mapping[str, float]) -> str:
    """The one column of energies (or areas), with its unit."""
    names = list(columns)
    found = [name for name in names if name in units]
    if len(found) == 1:
        return found[0]
    if found:
        raise EnergyTableError(f"{path} has {' and '.join(found)}: one of them is enough")
    close = [name for name in names if name.lower().startswith(what)]
    if close:
        raise EnergyTableError(f"{path}: column {close[0]!r} has no unit that is known; write {' or '.join(units)}")
    raise EnergyTableError(f"{path} has no column of {what}; write {' or '.join(units)}")


def _number(text: str | None, column: str, where: str) -> float:
    try:
        value = float((text or "").strip())
    except ValueError:
        raise EnergyTableError(f"{where}: {column} is {text!r}, not a number") from None
    return value
