"""UnzipFpga: an FPGA engine that generates a layer's weights from few coefficients while it computes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..site import Record, Site
from ..technique import No, Technique
from ..techniques.float_ import Float
from ._accelerator import Modelled, bits_of, check_positive, moved_bits, product_of
from ._formulas import FREE
from .storage import density_of

_ACCUMULATOR_BYTES = 4


class DesignError(ValueError):
    """A budget below the smallest design: says what that one takes."""


@dataclass(frozen=True)
class Layer:
    """One layer as the engine sees it: ``positions`` P of the output, a depth N of channels x kernel, ``outputs`` C.

    ``inputs``: values of the input feature map. ``value_bytes``: of an activation. ``weight_bytes``: of all stored
    weights or coefficients. ``codes``: coefficients that make up each weight (J); 0: the weights are read as they are.

    >>> Layer.of_convolution(64, 64, 3, 56, 56, ratio=0.5).codes
    5
    """

    positions: int
    depth: int
    outputs: int
    inputs: int
    weight_bytes: float
    value_bytes: float = 2.0
    codes: int = 0
    groups: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        if min(self.positions, self.depth, self.outputs, self.inputs, self.groups) < 1 or self.codes < 0:
            raise ValueError(f"{self}: every size must be 1 or more")

    @property
    def macs(self) -> int:
        return self.groups * self.positions * self.depth * self.outputs

    @classmethod
    def of_convolution(
        cls,
        channels: int,
        filters: int,
        kernel: int,
        height: int,
        width: int,
        *,
        stride: int = 1,
        ratio: float | None = None,
        value_bytes: float = 2.0,
        name: str = "",
    ) -> Layer:
        """A convolution with [height, width] outputs. ``ratio`` in (0, 1]: ``ceil(ratio kernel^2)`` codes by kernel,
        whose coefficients are stored; None: its weights are. A kernel of 1 has nothing to generate."""
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio={ratio}: must be above 0 and at most 1")
        codes = math.ceil(ratio * kernel**2) if ratio is not None and kernel > 1 else 0
        stored = channels * filters * (codes or kernel**2) * value_bytes
        inputs = channels * height * width * stride**2
        return cls(height * width, channels * kernel**2, filters, inputs, stored, value_bytes, codes, 1, name)


@dataclass(frozen=True)
class Design:
    """Tile sizes: ``rows`` T_R positions, ``depth`` T_P inputs of a dot product, ``columns`` T_C outputs at once;
    ``lanes`` M of the weights generator."""

    rows: int
    depth: int
    columns: int
    lanes: int = 0

    @property
    def dsps(self) -> int:
        """One for each multiply-accumulate unit, and one for each lane."""
        return self.depth * self.columns + self.lanes

    def buffers(self, value_bytes: float = 2.0) -> float:
        """Bytes on the chip: inputs and weights of a step, and a tile of sums, each twice, to work on one and move the
        other."""
        step = (self.rows * self.depth + self.depth * self.columns) * value_bytes
        return 2.0 * (step + self.rows * self.columns * _ACCUMULATOR_BYTES)


@dataclass(frozen=True)
class LayerCost:
    """Cycles of one layer: ``compute``, ``generate`` and ``transfer`` of all tiles, and ``total``, where the slowest of
    the three decides for each tile, with the first transfer of the layer."""

    compute: float
    generate: float
    transfer: float
    total: float
    bytes: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "generate": self.generate, "transfer": self.transfer}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class UnzipFpga(Modelled):
    """The engine of unzipFPGA (Venieris, Fernandez-Marques and Lane 2021, FCCM, arXiv:2103.05600), as derived here.

    The published performance model is not repeated here; this one has the same parts. A layer is cut in
    ``ceil(P / T_R) ceil(C / T_C)`` tiles; a tile computes in ``T_R ceil(N / T_P)`` cycles, generates its weights in
    ``ceil(J N T_C / M)``, and moves its inputs, weights and outputs over one external bus. The three overlap. Inputs
    are moved once for each column of tiles, weights once for each row of tiles; a layer's coefficients once, if they
    fit beside the buffers, and with ``keeps_weights`` its weights too. ``selective``: in the last column of tiles idle
    units take rows of the same tile.

    ``dsps``, ``bram_kib`` (KiB = 2^10 bytes), ``gb_s`` (GB/s = 10^9 bytes), ``clock_mhz``: the budget. ``design``: the
    tile sizes. ``value_bytes``: of the engine's own fixed-point format, in which what a plan leaves in float is
    computed. A technique with a ``ratio`` is generated; so many codes make up a weight, and its ``bits`` are moved.
    """

    name: ClassVar[str] = "unzip_fpga"

    design: Design = Design(64, 16, 32, 128)
    dsps: int = 900
    bram_kib: float = 2180.0
    gb_s: float = 4.2
    clock_mhz: float = 150.0
    value_bytes: float = 2.0
    selective: bool = True
    keeps_weights: bool = False

    def __post_init__(self) -> None:
        least = dict.fromkeys(("bram_kib", "gb_s", "clock_mhz", "value_bytes"), 1e-9)
        check_positive("UnzipFpga", self, {"dsps": 1, **least})
        d = self.design
        if min(d.rows, d.depth, d.columns) < 1 or d.lanes < 0:
            raise ValueError(f"UnzipFpga({d}): tile sizes must be 1 or more")
        if d.dsps > self.dsps or d.buffers(self.value_bytes) > self.bram_kib * 2**10:
            raise DesignError(
                f"{d} takes {d.dsps} DSPs and {d.buffers(self.value_bytes) / 2**10:.1f} KiB; "
                f"the budget has {self.dsps} and {self.bram_kib:g}"
            )

    # -- layers ------------------------------------------------------------------------------------------------------

    def layer_cost(self, layer: Layer) -> LayerCost:
        """Cycles of one layer. Raises :class:`DesignError` for weights to generate without a lane."""
        if layer.codes and not self.design.lanes:
            raise DesignError(f"{layer.name or 'a layer'} has weights to generate, and {self.design} no lanes")
        d = self.design
        rows, depth, columns, lanes = (np.array([float(v)]) for v in (d.rows, d.depth, d.columns, d.lanes))
        found = _cycles(layer, rows, depth, columns, lanes, self._machine())
        return LayerCost(*(float(part[0]) for part in found))

    def total_ms(self, layers: Sequence[Layer]) -> float:
        """Milliseconds of all layers in turn."""
        return sum(self.layer_cost(layer).total for layer in layers) / (self.clock_mhz * 1e3)

    def best(self, layers: Sequence[Layer]) -> UnzipFpga:
        """The fastest design for these layers within this budget, by trying all that fit: every pair of T_P and T_C,
        T_R in powers of two, lanes in powers of two and all DSPs that are left. Equals: fewer DSPs.

        Raises :class:`DesignError` if no design fits.
        """
        if not layers:
            raise ValueError("best(): give at least one layer")
        generates = any(layer.codes for layer in layers)
        grid = _designs(self.dsps, generates)
        rows, depth, columns, lanes = grid
        step = (rows * depth + depth * columns) * self.value_bytes
        fits = 2.0 * (step + rows * columns * _ACCUMULATOR_BYTES) <= self.bram_kib * 2**10
        if not fits.any():
            least = Design(1, 1, 1, 1 if generates else 0)
            raise DesignError(
                f"no design fits {self.dsps} DSPs and {self.bram_kib:g} KiB: the smallest takes {least.dsps} DSPs and "
                f"{least.buffers(self.value_bytes) / 2**10:.3f} KiB"
            )
        rows, depth, columns, lanes = (part[fits] for part in grid)
        total = np.zeros(len(rows))
        alike = Counter(dataclasses.replace(layer, name="") for layer in layers)
        for layer, count in alike.items():
            total += count * _cycles(layer, rows, depth, columns, lanes, self._machine())[3]
        ties = np.flatnonzero(total <= total.min() * (1 + 1e-12))
        index = int(ties[np.argmin((depth * columns + lanes)[ties])])
        design = Design(int(rows[index]), int(depth[index]), int(columns[index]), int(lanes[index]))
        return dataclasses.replace(self, design=design)

    def layers_of(self, record: Record, plan: Mapping[str, Technique] | None = None) -> list[Layer]:
        """The layers with multiplications of a recorded network, as the plan computes them."""
        chosen = plan or {}
        found = [self.layer_of(site, chosen.get(name, Float())) for name, site in record.sites.items()]
        return [layer for layer in found if layer is not None]

    def layer_of(self, site: Site, technique: Technique) -> Layer | None:
        """One call of a site; None where it multiplies nothing."""
        product = product_of(site)
        if product is None:
            return None
        widths = bits_of(site, technique)
        value = self.value_bytes if widths.floating else widths.activation / 8
        codes, stored = _codes(site, technique), 0.0
        if site.weight is not None:
            bits = technique.bits(site)
            if widths.floating:
                # the engine has no floats: what is stored in float32 is moved in its own format
                kernel = math.prod(site.weight.shape[2:])
                values = site.weight.numel * (codes / kernel if codes else density_of(technique))
                places = max(0.0, bits - 32.0 * values)
                bits = places + min(bits - places, 8.0 * self.value_bytes * values)
            stored = bits / 8
        read, _ = moved_bits(site, Float())
        return Layer(
            positions=product.positions,
            depth=product.depth,
            outputs=product.outputs,
            inputs=max(1, round(read / 32 / product.groups)),
            weight_bytes=stored / product.groups,
            value_bytes=value,
            codes=codes,
            groups=product.groups,
            name=site.name,
        )

    # -- the target --------------------------------------------------------------------------------------------------

    def precision(self, site: Site, technique: Technique) -> str | No:
        if technique.form(site) not in ("float", "dialect") and ratio_of(technique) is None:
            return No(f"this engine has no formula for the operation {technique.form(site)!r}")
        if _codes(site, technique) and not self.design.lanes:
            return No(f"{self.design} has no lanes to generate weights")
        widths = bits_of(site, technique)
        # check_target and reports read the precision of the plan; the engine computes floats in fixed point
        return "float32" if widths.floating else f"int{max(widths.activation, widths.weight)}"

    def cost(self, site: Site, technique: Technique) -> float | None:
        if site.kind in FREE:
            return 0.0
        layer = self.layer_of(site, technique)
        if layer is not None:
            return site.calls * self.layer_cost(layer).total / (self.clock_mhz * 1e3)
        moved = sum(moved_bits(site, technique)) / 8
        return site.calls * moved / (self.gb_s * 1e6)

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        """Nothing: values pass the format on their way to the bus."""
        return 0.0

    def _machine(self) -> tuple[float, float, bool, bool]:
        """Bytes a cycle, bytes on the chip, ``selective``, ``keeps_weights``."""
        return self.gb_s * 1e9 / (self.clock_mhz * 1e6), self.bram_kib * 2**10, self.selective, self.keeps_weights

    def settings(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "design"}
        return {"target": self.name, "source": self.source, **own, "design": dataclasses.asdict(self.design)}

    def assumptions(self) -> tuple[str, ...]:
        d = self.design
        return (
            f"modelled, not measured: T_R {d.rows}, T_P {d.depth}, T_C {d.columns}, {d.lanes} lanes, "
            f"{self.clock_mhz:g} MHz; {d.dsps} of {self.dsps} DSPs, {self.bram_kib:g} KiB on the chip, "
            f"{self.gb_s:g} GB/s for all transfers",
            "computing, generating and moving overlap tile by tile; a multiply-accumulate unit is one DSP, a lane too",
            "inputs are moved once for each column of tiles, weights for each row of tiles; coefficients "
            f"{'and weights ' if self.keeps_weights else ''}once a layer, where they fit on the chip",
            f"what stays in float is computed and moved in fixed point of {8 * self.value_bytes:g} bits; additions and "
            "pooling cost their transfers, normalisation and ReLU-like functions nothing",
            "the performance model is Bitsmith's own: the published one was not available",
        )

    def references(self) -> tuple[str, ...]:
        return ("engine: Venieris, Fernandez-Marques and Lane 2021, unzipFPGA, FCCM, arXiv:2103.05600",)


def ratio_of(technique: Technique) -> float | None:
    """The ``ratio`` of a technique whose weights are generated, None of any other."""
    ratio = getattr(technique, "ratio", None)
    return float(ratio) if isinstance(ratio, (int, float)) and 0.0 < ratio <= 1.0 else None


def _codes(site: Site, technique: Technique) -> int:
    ratio, weight = ratio_of(technique), site.weight
    if ratio is None or weight is None or len(weight.shape) < 3:
        return 0
    kernel = math.prod(weight.shape[2:])
    return math.ceil(ratio * kernel) if kernel > 1 else 0


Grid = NDArray[np.float64]


def _cycles(
    layer: Layer, rows: Grid, depth: Grid, columns: Grid, lanes: Grid, machine: tuple[float, float, bool, bool]
) -> tuple[Grid, Grid, Grid, Grid, Grid]:
    """Compute, generate, transfer and total cycles, and bytes moved, of one layer under many designs at once."""
    per_cycle, capacity, selective, keeps = machine
    value, stored = layer.value_bytes, layer.weight_bytes
    down, across = np.ceil(layer.positions / rows), np.ceil(layer.outputs / columns)
    steps, ways = np.ceil(layer.depth / depth), np.maximum(lanes, 1.0)
    buffers = 2.0 * ((rows * depth + depth * columns) * value + rows * columns * _ACCUMULATOR_BYTES)
    kept = stored <= capacity - buffers if keeps or layer.codes else np.zeros_like(rows)
    again = np.where(kept, down, 1.0)  # what is kept is moved once, for all rows of tiles
    compute, generate, moved, total = (np.zeros_like(rows) for _ in range(4))
    last_rows, last_columns = layer.positions - (down - 1) * rows, layer.outputs - (across - 1) * columns
    for tall, high in ((rows, down - 1), (last_rows, np.ones_like(rows))):
        for wide, many in ((columns, across - 1), (last_columns, np.ones_like(rows))):
            shared = np.floor(columns / wide) if selective else np.ones_like(wide)
            work = np.ceil(tall / shared) * steps
            made = np.ceil(layer.codes * layer.depth * wide / ways)
            inputs = layer.inputs * value * tall / layer.positions
            carried = inputs + stored * wide / layer.outputs / again + tall * wide * value
            count = high * many
            compute += count * work
            generate += count * made
            moved += count * carried
            total += count * np.maximum(np.maximum(work, made), carried / per_cycle)
    tall, wide = np.minimum(rows, layer.positions), np.minimum(columns, layer.outputs)
    first = layer.inputs * value * tall / layer.positions + stored * wide / layer.outputs
    g = float(layer.groups)
    return g * compute, g * generate, g * moved / per_cycle, g * total + first / per_cycle, g * moved


@functools.cache
def _designs(dsps: int, generates: bool) -> tuple[Grid, Grid, Grid, Grid]:
    """Every design of at most so many DSPs."""
    tiles = [2**k for k in range(13)]
    found: list[tuple[int, int, int, int]] = []
    for depth in range(1, dsps + 1):
        for columns in range(1, dsps // depth + 1):
            left = dsps - depth * columns
            if generates:
                lanes = sorted({2**k for k in range(left.bit_length()) if 2**k <= left} | ({left} if left else set()))
            else:
                lanes = [0]
            found += [(rows, depth, columns, way) for way in lanes for rows in tiles]
    table = np.array(found, dtype=np.float64).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]
