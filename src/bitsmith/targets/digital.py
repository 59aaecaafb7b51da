"""DigitalAccelerator: an array of multiply-accumulate units, a buffer and external memory, costed from a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..site import Site
from ..technique import No, Technique
from ._accelerator import (
    Bits,
    Modelled,
    around,
    bits_of,
    check_positive,
    moved_bits,
    plain_settings,
    product_of,
    stored_width,
)
from ._formulas import FREE, value_bytes
from .energy_table import EnergyTable
from .storage import Connections, StorageFormat, best_format, controller_pj, density_of, stored_bits

REQUIRED = ("int_add", "int_multiply")
FLOATS = ("float_add", "float_multiply")


@dataclass(frozen=True)
class Traffic:
    """What one call of a site moves, in bits: ``buffer`` through the on-chip buffer, ``dram`` over the external bus;
    ``stored``: its weights in their storage form."""

    buffer: float
    dram: float
    stored: float


@dataclass(frozen=True)
class DigitalAccelerator(Modelled):
    """A spatial accelerator with a memory hierarchy: registers in ``rows`` x ``columns`` units, one buffer, DRAM.

    Energy is counted as Eyeriss's and Timeloop's models do (Chen et al. 2016, ISCA; Parashar et al. 2019, ISPASS):
    operations and accesses of each level times the table's energy of one. Latency is the longest of computing and
    external transfer, which overlap: ``max(cycles / clock_mhz, bits / dram_gb_s)``.

    ``table``: an :class:`~bitsmith.targets.EnergyTable`, ``"45nm"``, ``"40nm"``, or the path of a CSV. ``bits``: width
    of the integer units; wider operands take several passes, narrower ones save energy, not cycles. ``float_rate``:
    multiply-accumulates in float for each in integers; 0: it has no float units (then nothing stays in float).
    ``accumulator``: bits of sums. ``dataflow``: ``weight`` (weights stay in the array, sums pass on) or ``output``.
    ``buffer_kib``: KiB = 2^10 bytes, shared by all operands. ``dram``: end of the table's range.
    ``storage``: of the weights that a technique leaves at less than full density; ``best``: the smallest.
    ``zeros``: whether multiplications with a zero weight cost as others (``compute``), no energy (``gate``), or no
    energy and no cycles (``skip``). ``weights_on_chip``: all weights of the network lie in a memory of their own, of
    ``weight_kib`` for the energy of an access; its area grows with the plan's weights. ``sram_um2_per_bit``: of both
    memories; without it, and without areas in the table, the target has no area.

    Techniques with matrix products of their own (Winograd's, a product by tap) are computed as those. Their transforms
    run beside the array, ``columns`` values a cycle, and pass the buffer. ``transform_weights``: memory holds the
    site's weights in 16 bits, and the transformed ones are made of them at each call; else these are stored.
    """

    name: ClassVar[str] = "digital"

    table: EnergyTable | str = "45nm"
    rows: int = 16
    columns: int = 16
    clock_mhz: float = 200.0
    buffer_kib: float = 128.0
    dram_gb_s: float = 3.2
    bits: int = 8
    float_rate: float = 1.0
    accumulator: int = 32
    dataflow: Literal["weight", "output"] = "weight"
    dram: Literal["low", "high"] = "low"
    storage: StorageFormat | Literal["best"] = "dense"
    zeros: Literal["compute", "gate", "skip"] = "compute"
    weights_on_chip: bool = False
    weight_kib: float = 256.0
    sram_um2_per_bit: float | None = None
    transform_weights: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.table, str):
            object.__setattr__(self, "table", EnergyTable.named(self.table))
        least = {"rows": 1, "columns": 1, "bits": 1, "accumulator": 1, "float_rate": 0}
        tiny = dict.fromkeys(("clock_mhz", "buffer_kib", "dram_gb_s", "weight_kib"), 1e-6)
        check_positive("DigitalAccelerator", self, {**least, **tiny})
        if self.dataflow not in ("weight", "output") or self.zeros not in ("compute", "gate", "skip"):
            raise ValueError(f"DigitalAccelerator(dataflow={self.dataflow!r}, zeros={self.zeros!r}): no such choice")
        if self.storage not in ("dense", "bitmap", "index", "run-length", "best"):
            raise ValueError(
                f"DigitalAccelerator(storage={self.storage!r}): must be dense, bitmap, index, run-length or best; "
                "a convolution's weights are shared in all of them, as in the functional form"
            )
        if self.zeros == "skip" and self.storage == "dense":
            raise ValueError("DigitalAccelerator(zeros='skip'): needs a storage that knows where the weights are")
        self._energies.require((*REQUIRED, *(FLOATS if self.float_rate else ())))
        self._energies.sram(1024.0, 1.0)
        self._energies.dram(1.0, self.dram)

    @property
    def _energies(self) -> EnergyTable:
        assert isinstance(self.table, EnergyTable)
        return self.table

    # -- one site ----------------------------------------------------------------------------------------------------

    def precision(self, site: Site, technique: Technique) -> str | No:
        if technique.form(site) not in ("float", "dialect") and technique.operations(site) is None:
            return No(f"this model has no formula for the operation {technique.form(site)!r}")
        widths = bits_of(site, technique)
        if widths.floating:
            name = "float32" if widths.activation == 32 else "bfloat16"
            if site.kind in FREE:
                return name
            needed = () if not self.float_rate else ("float_add",) if site.macs == 0 else FLOATS
            lacking = [operation for operation in needed if not self._energies.has(operation, widths.activation)]
            if lacking:
                return No(f"the energy table {self._energies.name!r} has no {lacking[0]} at {widths.activation} bits")
            if self.float_rate or site.macs == 0:
                return name
            return No("this accelerator has no float units: give DigitalAccelerator(float_rate=...)")
        return f"int{max(widths.activation, widths.weight)}"

    def cost(self, site: Site, technique: Technique) -> float | None:
        if site.kind in FREE:
            return 0.0
        seconds = self.cycles(site, technique) / (self.clock_mhz * 1e6)
        moved = self.traffic(site, technique).dram / 8 / (self.dram_gb_s * 1e9)
        return site.calls * max(seconds, moved) * 1e3

    def site_energy(self, site: Site, technique: Technique) -> float | None:
        if site.kind in FREE:
            return 0.0
        traffic = self.traffic(site, technique)
        table, capacity = self._energies, self.buffer_kib * 2**10
        total = table.sram(capacity, traffic.buffer) + table.dram(traffic.dram, self.dram)
        if self.weights_on_chip:
            total += table.sram(self.weight_kib * 2**10, traffic.stored)
        total += self._arithmetic(site, technique) / site.calls
        total += self._registers(site, technique) + self._controller(site, technique)
        return site.calls * total * 1e-9

    def cycles(self, site: Site, technique: Technique) -> float:
        """Of one call in the array. A product is cut into tiles of the array's size, and partial tiles take as long."""
        product, widths = product_of(site, technique), bits_of(site, technique)
        if product is None:
            return math.ceil(max((math.prod(s) for s in site.out_shapes), default=0) / self.columns)
        g, m, n, k = product.groups, product.positions, product.outputs, product.depth
        if self.dataflow == "weight":
            tiles, steps = math.ceil(k / self.rows) * math.ceil(n / self.columns), m
        else:
            tiles, steps = math.ceil(m / self.rows) * math.ceil(n / self.columns), k
        if widths.floating:
            passes = 1.0 / self.float_rate if self.float_rate else 0.0
        else:
            passes = float(math.ceil(widths.activation / self.bits) * math.ceil(widths.weight / self.bits))
        left = density_of(technique) if self.zeros == "skip" else 1.0
        return max(g * tiles * steps * passes * left, self.transform_cycles(site, technique))

    def transform_cycles(self, site: Site, technique: Technique) -> float:
        """Of one call, beside the array: of what a technique transforms on the way into its own products and back."""
        return math.ceil(around(site, technique, self.accumulator, self.transform_weights).values / self.columns)

    def stored(self, site: Site, technique: Technique) -> float:
        """Bits of the site's weights, in their storage form, scales included."""
        weight = site.weight
        if weight is None:
            return 0.0
        own = technique.products(site)
        if own is not None and self.transform_weights:
            scales = technique.bits(site) - own.count * own.depth * own.outputs * own.bits
            return 16.0 * weight.numel + scales
        if density_of(technique) == 1.0:
            return technique.bits(site)
        connections = self._connections(site, technique)
        return stored_bits(self._form(connections), connections)

    def traffic(self, site: Site, technique: Technique) -> Traffic:
        """Bits that one call moves.

        External: what does not fit in half the buffer is streamed. With W bits of weights, A of activations and B of
        half a buffer: ``min(W + A ceil(W / B), A + W ceil(A / B))``, and the output once; activations stay in the
        buffer if inputs and outputs together fit in B, those that enter the network are read. The buffer is written
        with what comes in and read for what goes out, each word of an input is read once for all columns, each weight
        once for all positions (``output``: for all rows), and sums that a deep product leaves unfinished are written
        and read (``weight``). A technique with products of its own moves its transformed values and its sums as
        well.
        """
        read, written = moved_bits(site, technique)
        weights, half = self.stored(site, technique), self.buffer_kib * 2**10 * 8 / 2
        entering = sum(
            operand.numel * 8 * (value_bytes("float") if operand.floating else 8.0)
            for operand in site.operands
            if operand.tensor.startswith("@")
        )
        if read + written <= half:
            outside, activations = min(entering, read), 0.0
        else:
            outside, activations = read, written
        held = 0.0 if self.weights_on_chip else weights
        if activations == 0.0 or outside == 0.0:
            inward = held + outside
        else:
            inward = min(held + outside * max(1, math.ceil(held / half)), outside + held * math.ceil(outside / half))
        dram = inward + activations
        product = product_of(site, technique)
        if product is None:
            return Traffic(read + written + dram, dram, weights)
        widths = bits_of(site, technique)
        g, m, n, k = product.groups, product.positions, product.outputs, product.depth
        fetched = g * m * k * math.ceil(n / self.columns) * widths.activation
        sums = 0.0
        again = 1
        if self.dataflow == "weight":
            sums = 2.0 * (math.ceil(k / self.rows) - 1) * g * m * n * self.accumulator
        else:
            again = math.ceil(m / self.rows)
        loaded = 0.0 if self.weights_on_chip else weights * again
        beside = around(site, technique, self.accumulator, self.transform_weights).bits
        return Traffic(fetched + loaded + sums + beside + written + dram, dram, weights)

    def _arithmetic(self, site: Site, technique: Technique) -> float:
        """pJ of all calls' operations."""
        widths, table = bits_of(site, technique), self._energies
        if site.macs == 0:
            # pooling and additions: one addition for each value that is read
            added = site.calls * sum(o.numel for o in site.operands if o.floating and not o.constant)
            return added * self._add(widths)
        counted = technique.operations(site) or {"multiply": site.macs, "add": site.macs}
        left = 1.0 if self.zeros == "compute" else density_of(technique)
        unknown = set(counted) - {"multiply", "add", "subtract", "bitwise", "scale"}
        if unknown:
            raise ValueError(f"{technique} counts {', '.join(sorted(unknown))}, which this model has not")
        narrow = max(widths.activation, widths.weight)
        if widths.floating:
            each = {"multiply": table.energy("float_multiply", narrow), "add": self._add(widths)}
            each["subtract"] = each["add"]
        else:
            each = {"multiply": table.multiply(widths.activation, widths.weight), "add": self._add(widths)}
            each["subtract"] = table.energy("int_add", narrow)
        if "bitwise" in counted:
            each["bitwise"] = table.energy("bitwise" if table.has("bitwise") else "int_add", 1)
        each["scale"] = table.multiply(16, 16) + table.energy("int_add", self.accumulator)
        own = technique.products(site)
        if own is not None and self.transform_weights:
            counted = {**counted, "add": counted["add"] + site.calls * own.weight_additions}
        return left * math.fsum(count * each[name] for name, count in counted.items())

    def _add(self, widths: Bits) -> float:
        if not widths.floating:
            return self._energies.energy("int_add", self.accumulator)
        if not self.float_rate:
            return self._energies.energy("int_add", self.accumulator)
        return self._energies.energy("float_add", widths.activation)

    def _registers(self, site: Site, technique: Technique) -> float:
        """pJ of one call: both factors read, the sum read and written, for each multiply-accumulate."""
        if not self._energies.has("register"):
            return 0.0
        widths = bits_of(site, technique)
        total = widths.activation if widths.floating else self.accumulator
        bits = widths.activation + widths.weight + 2 * total
        left = 1.0 if self.zeros == "compute" else density_of(technique)
        own = technique.products(site)
        macs = site.macs / site.calls if own is None else own.macs
        return left * macs * bits * self._energies.energy("register", 1)

    def _controller(self, site: Site, technique: Technique) -> float:
        """pJ of one call to find the weights that are left."""
        if site.weight is None or density_of(technique) == 1.0:
            return 0.0
        connections = self._connections(site, technique)
        return controller_pj(self._form(connections), connections, self._energies)

    def _connections(self, site: Site, technique: Technique) -> Connections:
        assert site.weight is not None
        rows = site.weight.shape[0]
        columns = max(1, site.weight.numel // rows)
        return Connections(rows, columns, density_of(technique), stored_width(site, technique))

    def _form(self, connections: Connections) -> StorageFormat:
        return best_format(connections) if self.storage == "best" else self.storage

    # -- changes of format, area, words ------------------------------------------------------------------------------

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        """One value a column and cycle."""
        return 0.0 if produced == consumed else math.ceil(numel / self.columns) / (self.clock_mhz * 1e3)

    def conversion_energy(self, numel: int, produced: str, consumed: str) -> float | None:
        """One multiplication and one addition a value, read from and written to the buffer."""
        if produced == consumed:
            return 0.0
        table, bits = self._energies, 8 * (value_bytes(produced) + value_bytes(consumed))
        if "float" in (produced, consumed) and self.float_rate:
            each = table.energy("float_multiply", 32) + table.energy("float_add", 32)
        else:
            each = table.multiply(self.accumulator, self.accumulator) + table.energy("int_add", self.accumulator)
        return numel * (each + table.sram(self.buffer_kib * 2**10, bits)) * 1e-9

    def site_area(self, site: Site, technique: Technique) -> float | None:
        """The memory that its weights take, where all weights lie on the chip; else it adds nothing."""
        if self.fixed_area() is None:
            return None
        if not self.weights_on_chip or self.sram_um2_per_bit is None:
            return 0.0
        return self.stored(site, technique) * self.sram_um2_per_bit * 1e-6

    def fixed_area(self) -> float | None:
        """Units and buffer; None without areas in the table or ``sram_um2_per_bit``."""
        table = self._energies
        units = [table.area("int_multiply", self.bits), table.area("int_add", self.accumulator)]
        if self.float_rate:
            shares = (table.area("float_multiply", 32), table.area("float_add", 32))
            units += [None if area is None else self.float_rate * area for area in shares]
        if self.sram_um2_per_bit is None or any(area is None for area in units):
            return None
        array = self.rows * self.columns * math.fsum(area for area in units if area is not None)
        return (array + self.buffer_kib * 2**10 * 8 * self.sram_um2_per_bit) * 1e-6

    def settings(self) -> dict[str, object]:
        return {"target": self.name, "source": self.source, **plain_settings(self), "table": self._energies.name} | {
            "entries": [
                f"{e.operation} {e.bits}: {e.energy_pj:g} pJ" + (f", {e.area_um2:g} um2" if e.area_um2 else "")
                for e in self._energies.entries
            ]
        }

    def assumptions(self) -> tuple[str, ...]:
        table = self._energies
        held = "weights stay in the array" if self.dataflow == "weight" else "sums stay in the array"
        said = [
            f"modelled, not measured: {self.rows} x {self.columns} units at {self.clock_mhz:g} MHz, {held}; computing "
            "and external transfer overlap; the buffer feeds the array without stalls",
            f"buffer of {self.buffer_kib:g} KiB; DRAM {self.dram_gb_s:g} GB/s at the {self.dram} end of the table",
            "widths between the table's: additions in proportion, multiplications to the product of both widths; a "
            "write costs as a read",
            "normalisation and ReLU-like functions are fused and free; leakage and the clock are left out",
        ]
        if self.weights_on_chip:
            said.append(f"all weights lie on the chip and are read as from {self.weight_kib:g} KiB")
        if not table.has("register"):
            said.append(f"the table {table.name} has no registers: those in the units cost nothing")
        made = "made of 16-bit weights at each call" if self.transform_weights else "stored"
        said.append(
            f"Winograd: a product by tap; transforms beside the array, {self.columns} values a cycle, through the "
            f"buffer, their constants shifts, their units without area; transformed weights {made}"
        )
        if self.float_rate:
            said.append(f"float units beside the integer ones, at {self.float_rate:g} times their rate")
        if self.storage != "dense" or self.zeros != "compute":
            said.append(f"weights left by pruning are stored as {self.storage}; products with a zero: {self.zeros}")
        return tuple(said)

    def references(self) -> tuple[str, ...]:
        return (
            f"energy table: {self._energies.reference or self._energies.name}",
            "accesses of a memory hierarchy: Chen et al. 2016, Eyeriss, ISCA, doi:10.1109/ISCA.2016.40; "
            "Parashar et al. 2019, Timeloop, ISPASS, doi:10.1109/ISPASS.2019.00042",
        )
