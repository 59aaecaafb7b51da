"""How the weights of a layer are stored, what finding them costs, and where one form overtakes another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..technique import Technique
from .energy_table import EnergyTable

StorageFormat = Literal["dense", "bitmap", "index", "run-length", "functional"]
FORMATS: tuple[StorageFormat, ...] = get_args(StorageFormat)


@dataclass(frozen=True)
class Connections:
    """The connections of one layer: ``rows`` of ``columns`` places, ``density`` of them taken, ``bits`` a weight.

    A linear layer has as many rows as inputs and as many columns as outputs. Where connections share their weights, as
    a convolution's do, ``shared`` is how many different weights there are; None: every connection has its own.

    >>> Connections.of_convolution(channels=16, filters=32, kernel=3, height=8, width=8, bits=8).shared
    4608
    """

    rows: int
    columns: int
    density: float
    bits: int
    shared: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or self.bits < 1 or (self.shared is not None and self.shared < 1):
            raise ValueError(f"{self}: sizes and bits must be 1 or more")
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"{self}: density must be 0 to 1")

    @classmethod
    def of_convolution(
        cls, channels: int, filters: int, kernel: int, height: int, width: int, bits: int
    ) -> Connections:
        """A convolution of stride 1 on [channels, height, width], borders kept: each input reaches ``kernel`` x
        ``kernel`` places of every filter, of all outputs; those beyond the border count."""
        sources, places = channels * height * width, filters * height * width
        reached = min(filters * kernel * kernel, places)
        return cls(sources, places, reached / places, bits, channels * filters * kernel * kernel)

    @property
    def taken(self) -> float:
        """How many connections there are."""
        return self.density * self.rows * self.columns

    @property
    def address_bits(self) -> int:
        """Bits that name one column: at least one."""
        return max(1, math.ceil(math.log2(self.columns)))


def stored_bits(form: StorageFormat, connections: Connections, run_bits: int = 4) -> float:
    """Bits that a form takes: ``dense`` F b a row, ``bitmap`` F + d F b, ``index`` d F (ceil(log2 F) + b),
    ``run-length`` the expected tokens of ``run_bits`` + b bits, ``functional`` the different weights alone.

    F columns, b bits, d the density. A token holds a run of 0 to 2^r - 1 empty places and one weight; a longer run
    takes tokens whose weight is 0. Connections at random have d F / (1 - (1 - d)^(2^r)) tokens in a row. How such
    forms compare was studied for spiking networks (arXiv:2003.11639); the formulas are Bitsmith's own.

    >>> row = Connections(rows=1, columns=256, density=0.25, bits=4)
    >>> [stored_bits(form, row) for form in ("dense", "bitmap", "index")]
    [1024.0, 512.0, 768.0]
    """
    _known(form)
    c, places = connections, connections.rows * connections.columns
    if form == "dense":
        return float(places * c.bits)
    if form == "bitmap":
        return places + c.taken * c.bits
    if form == "index":
        return c.taken * (c.address_bits + c.bits)
    if form == "run-length":
        return run_tokens(c, run_bits) * (run_bits + c.bits)
    return float((c.taken if c.shared is None else c.shared) * c.bits)


def run_tokens(connections: Connections, run_bits: int = 4) -> float:
    """The expected tokens of a run-length form, all rows together.

    >>> run_tokens(Connections(1, 256, 1.0, 8))
    256.0
    """
    if run_bits < 1:
        raise ValueError(f"run_bits={run_bits}: must be 1 or more")
    if connections.density == 0.0:
        return connections.rows * connections.columns / 2.0**run_bits
    if connections.density == 1.0:
        return connections.taken
    # 1 - (1 - d)^(2^r), exact for small d
    ends = -math.expm1(2.0**run_bits * math.log1p(-connections.density))
    return connections.taken / ends


def encode_runs(taken: Sequence[bool], run_bits: int = 4) -> int:
    """How many tokens one row takes: counted, not expected.

    >>> encode_runs([False] * 20 + [True], run_bits=4)
    2
    """
    tokens, run = 0, 0
    for place in taken:
        if place or run == 2**run_bits - 1:
            tokens, run = tokens + 1, 0
        else:
            run += 1
    return tokens


def controller_pj(form: StorageFormat, connections: Connections, table: EnergyTable, run_bits: int = 4) -> float:
    """pJ to find every connection of the layer once.

    ``dense``: one addition of an address a place. ``bitmap``: one test of a bit a place, one addition a connection.
    ``index``: one addition a connection. ``run-length``: one addition a token. ``functional``: two additions, for both
    axes, a connection. Additions are of as many bits as name a column. Bitsmith's own count, not a published one.
    """
    _known(form)
    c, places = connections, connections.rows * connections.columns
    add = table.energy("int_add", c.address_bits)
    if form == "dense":
        return places * add
    if form == "bitmap":
        # a table without bitwise operations has one bit of an addition
        test = table.energy("bitwise", 1) if table.has("bitwise") else table.energy("int_add", 1)
        return places * test + c.taken * add
    if form == "index":
        return c.taken * add
    if form == "run-length":
        return run_tokens(c, run_bits) * add
    return 2.0 * c.taken * add


def storage_pj(
    form: StorageFormat, connections: Connections, table: EnergyTable, run_bits: int = 4, on_chip: float | None = None
) -> float:
    """pJ to read the layer once and find its connections, from a memory just large enough.

    ``on_chip``: bytes of the memory, if it is another one. The functional form reads a weight for each connection,
    because it keeps none of them: its memory is small, its reads are many.
    """
    c = connections
    bits = stored_bits(form, c, run_bits)
    read = c.taken * c.bits if form == "functional" else bits
    capacity = max(bits / 8.0, 1.0) if on_chip is None else on_chip
    return table.sram(capacity, read) + controller_pj(form, c, table, run_bits)


def crossovers(columns: int, bits: int, run_bits: int = 4) -> dict[tuple[StorageFormat, StorageFormat], float]:
    """The densities at which two forms take the same room: below, the first is smaller.

    In closed form: bitmap and dense 1 - 1/b, index and dense b / (a + b), index and bitmap 1 / a with a =
    ceil(log2 F); run-length against both by bisection. A pair that never changes places is left out.

    >>> crossovers(256, 4)[("index", "bitmap")]
    0.125
    """
    address = Connections(1, columns, 1.0, bits).address_bits
    found: dict[tuple[StorageFormat, StorageFormat], float] = {
        ("bitmap", "dense"): 1.0 - 1.0 / bits,
        ("index", "dense"): bits / (address + bits),
        ("index", "bitmap"): 1.0 / address,
    }

    def gap(density: float, other: StorageFormat) -> float:
        c = Connections(1, columns, density, bits)
        return stored_bits("run-length", c, run_bits) - stored_bits(other, c, run_bits)

    for other in ("dense", "bitmap", "index"):
        grid = [10 ** (-4 + 4 * k / 400) for k in range(401)]
        for low, high in itertools.pairwise(grid):
            if gap(low, other) < 0.0 <= gap(high, other) or gap(low, other) > 0.0 >= gap(high, other):
                smaller = gap(low, other) < 0.0
                for _ in range(60):
                    middle = (low + high) / 2
                    if (gap(middle, other) < 0.0) == smaller:
                        low = middle
                    else:
                        high = middle
                found["run-length" if smaller else other, other if smaller else "run-length"] = low
                break
    return {pair: density for pair, density in found.items() if 0.0 < density < 1.0}


def best_format(connections: Connections, run_bits: int = 4) -> StorageFormat:
    """The smallest of the forms that hold any weights: dense, bitmap, index, run-length.

    >>> best_format(Connections(1, 256, 0.05, 8)), best_format(Connections(1, 256, 1.0, 8))
    ('index', 'dense')
    """
    forms: tuple[StorageFormat, ...] = ("dense", "bitmap", "index", "run-length")
    return min(forms, key=lambda form: stored_bits(form, connections, run_bits))


def density_of(technique: Technique) -> float:
    """The part of the weights that a technique leaves: its ``density``, or what ``sparsity`` leaves; else all."""
    density, sparsity = getattr(technique, "density", None), getattr(technique, "sparsity", None)
    if isinstance(density, (int, float)):
        return min(max(float(density), 0.0), 1.0)
    if isinstance(sparsity, (int, float)):
        return min(max(1.0 - float(sparsity), 0.0), 1.0)
    return 1.0


def _known(form: str) -> None:
    if form not in FORMATS:
        raise ValueError(f"storage {form!r}: must be one of {', '.join(FORMATS)}")
