"""SystolicArray: operands march through a grid of multiply-accumulate units; filling and draining it take cycles."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..site import Site
from ..technique import No, Technique
from ._accelerator import Modelled, bits_of, plain_settings, product_of
from ._formulas import FREE
from .digital import DigitalAccelerator
from .energy_table import EnergyTable


@dataclass(frozen=True)
class SystolicArray(Modelled):
    """A systolic array (Kung and Leiserson 1979) with SCALE-Sim's cycles (Samajdar et al. 2018, arXiv:1811.02883).

    A product of M positions, N outputs and depth K is folded onto ``rows`` R and ``columns`` C; each fold takes
    ``2 R + C + T - 2`` cycles. ``output``: sums stay, M on rows, N on columns, T = K. ``weight``: K on rows, N on
    columns, T = M. ``input``: K on rows, M on columns, T = N. External transfer overlaps with computing, as in
    :class:`DigitalAccelerator`, whose energy, area and other fields these are; narrow operands are no faster.

    >>> round(SystolicArray.fold_cycles(4, 4, 10))
    20
    """

    name: ClassVar[str] = "systolic"

    table: EnergyTable | str = "45nm"
    rows: int = 32
    columns: int = 32
    dataflow: Literal["output", "weight", "input"] = "weight"
    clock_mhz: float = 500.0
    buffer_kib: float = 256.0
    dram_gb_s: float = 12.8
    bits: int = 8
    float_rate: float = 1.0
    accumulator: int = 32
    dram: Literal["low", "high"] = "low"
    sram_um2_per_bit: float | None = None
    transform_weights: bool = False

    def __post_init__(self) -> None:
        if self.dataflow not in ("output", "weight", "input"):
            raise ValueError(f"SystolicArray(dataflow={self.dataflow!r}): must be 'output', 'weight' or 'input'")
        object.__setattr__(self, "table", self.chip.table)

    @functools.cached_property
    def chip(self) -> DigitalAccelerator:
        """The same units and memories: energy, traffic and area."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dataflow"}
        return DigitalAccelerator(**fields, dataflow="output" if self.dataflow == "output" else "weight")

    @staticmethod
    def fold_cycles(rows: int, columns: int, steps: int) -> int:
        """Cycles of one fold: ``steps`` operands enter at every edge, skewed, and the results leave by the rows."""
        return 2 * rows + columns + steps - 2

    def cycles(self, site: Site, technique: Technique) -> float:
        """Of one call."""
        product, widths = product_of(site, technique), bits_of(site, technique)
        if product is None:
            return self.chip.cycles(site, technique)
        m, n, k = product.positions, product.outputs, product.depth
        on_rows, on_columns, steps = {"output": (m, n, k), "weight": (k, n, m), "input": (k, m, n)}[self.dataflow]
        folds = math.ceil(on_rows / self.rows) * math.ceil(on_columns / self.columns)
        if widths.floating:
            passes = 1.0 / self.float_rate
        else:
            passes = float(math.ceil(widths.activation / self.bits) * math.ceil(widths.weight / self.bits))
        computing = product.groups * folds * self.fold_cycles(self.rows, self.columns, steps) * passes
        return max(computing, self.chip.transform_cycles(site, technique))

    def precision(self, site: Site, technique: Technique) -> str | No:
        return self.chip.precision(site, technique)

    def cost(self, site: Site, technique: Technique) -> float | None:
        if site.kind in FREE:
            return 0.0
        seconds = self.cycles(site, technique) / (self.clock_mhz * 1e6)
        moved = self.chip.traffic(site, technique).dram / 8 / (self.dram_gb_s * 1e9)
        return site.calls * max(seconds, moved) * 1e3

    def site_energy(self, site: Site, technique: Technique) -> float | None:
        return self.chip.site_energy(site, technique)

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        return self.chip.conversion_cost(numel, produced, consumed)

    def conversion_energy(self, numel: int, produced: str, consumed: str) -> float | None:
        return self.chip.conversion_energy(numel, produced, consumed)

    def site_area(self, site: Site, technique: Technique) -> float | None:
        return self.chip.site_area(site, technique)

    def fixed_area(self) -> float | None:
        return self.chip.fixed_area()

    def settings(self) -> dict[str, object]:
        inner = self.chip.settings()
        return {"target": self.name, "source": self.source, **plain_settings(self)} | {
            name: inner[name] for name in ("table", "entries")
        }

    def assumptions(self) -> tuple[str, ...]:
        _, *rest = self.chip.assumptions()
        return (
            f"modelled, not measured: a systolic array of {self.rows} x {self.columns} at {self.clock_mhz:g} MHz, "
            f"{self.dataflow} stationary; a fold takes 2 R + C + T - 2 cycles, and folds do not overlap",
            *rest,
        )

    def references(self) -> tuple[str, ...]:
        return (
            "cycles of a fold: Samajdar et al. 2018, SCALE-Sim, arXiv:1811.02883; Kung and Leiserson 1979",
            *self.chip.references(),
        )
