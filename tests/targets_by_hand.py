"""A small energy table and a small layer, for tests that work out by hand what a modelled target says."""

from __future__ import annotations

from bitsmith.site import Operand, Site
from bitsmith.targets import EnergyTable, Entry

TABLE = EnergyTable(
    "toy",
    (
        Entry("int_add", 32, 0.1, 200.0),
        Entry("int_multiply", 8, 0.2, 600.0),
        Entry("float_add", 32, 0.9, 2000.0),
        Entry("float_multiply", 32, 3.7, 3000.0),
        Entry("register", 1, 0.01, 6.0),
        Entry("sram_read_8KiB", 64, 10.0),
        Entry("dram_read_low", 64, 1300.0),
        Entry("dram_read_high", 64, 2600.0),
    ),
    "made up",
)


def linear(batch: int, inputs: int, outputs: int, calls: int = 1, tensor: str = "before") -> Site:
    operands = (
        Operand("input", tensor, (batch, inputs), "float32"),
        Operand("weight", "fc<1", (outputs, inputs), "float32", constant=True, key="fc.weight"),
    )
    macs = batch * inputs * outputs * calls
    return Site("fc", "linear", "fc", "integer", operands, ("fc",), ((batch, outputs),), calls=calls, macs=macs)
