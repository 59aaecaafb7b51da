"""ZigZag: a second opinion on a digital accelerator, from a mapping that is searched layer by layer."""

from __future__ import annotations

import functools
import importlib
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..site import Site
from ..technique import No, Technique
from ._accelerator import Modelled, Product, bits_of, product_of
from ._formulas import FREE
from .base import TargetError
from .digital import DigitalAccelerator

_MISSING = 'ZigZag is not installed: pip install "bitsmith[zigzag]"'


class _MappingError(Exception):
    """ZigZag's own words."""


@dataclass(frozen=True)
class ZigZag(Modelled):
    """A digital accelerator by ZigZag (Mei et al. 2021, IEEE Trans. Computers 70:8, doi:10.1109/TC.2021.3059962).

    ``chip``: the accelerator; its array, registers, buffer and DRAM, and the energies of its table, are written as
    ZigZag's hardware. A 2D convolution is one, other layers are matrix products; channels lie on the rows, filters on
    the columns. ZigZag searches the order of the loops (``loops`` factors at most) for the least energy-delay product.
    Groups of a convolution are costed one after the other. What multiplies
    nothing, and changes of format, cost what ``chip`` says. Weights are dense; pruned ones are refused.

    Raises ``ModuleNotFoundError`` with the line that installs it where ``zigzag-dse`` is missing, and
    :class:`TargetError` for a layer that ZigZag finds no mapping for.
    """

    name: ClassVar[str] = "zigzag"

    chip: DigitalAccelerator | None = None
    loops: int = 6

    def __post_init__(self) -> None:
        if self.chip is None:
            object.__setattr__(self, "chip", DigitalAccelerator())
        if self.own.dataflow != "weight" or self.own.weights_on_chip:
            raise ValueError("ZigZag(chip=...): weights must stay in the array and come from DRAM (dataflow='weight')")
        if self.loops < 1:
            raise ValueError(f"ZigZag(loops={self.loops}): must be 1 or more")

    @property
    def own(self) -> DigitalAccelerator:
        """The accelerator."""
        assert self.chip is not None
        return self.chip

    def precision(self, site: Site, technique: Technique) -> str | No:
        from .storage import density_of

        if density_of(technique) < 1.0 or technique.operations(site) is not None:
            return No("ZigZag is asked for dense multiply-accumulates only")
        return self.own.precision(site, technique)

    def searched(self, site: Site, technique: Technique) -> tuple[float, float] | None:
        """(pJ, cycles) of one call by ZigZag, None where nothing is multiplied."""
        product, widths = product_of(site), bits_of(site, technique)
        if product is None:
            return None
        bits = widths.activation, widths.weight, widths.output
        try:
            pj, cycles = _searched(self.own, self.loops, _shape(site, product), bits, widths.floating)
        except _MappingError as error:
            raise TargetError(f"ZigZag finds no mapping for {site.name!r}: {error}") from None
        return product.groups * pj, product.groups * cycles

    def cost(self, site: Site, technique: Technique) -> float | None:
        found = None if site.kind in FREE else self.searched(site, technique)
        if found is None:
            return self.own.cost(site, technique)
        return site.calls * found[1] / (self.own.clock_mhz * 1e3)

    def site_energy(self, site: Site, technique: Technique) -> float | None:
        found = None if site.kind in FREE else self.searched(site, technique)
        return self.own.site_energy(site, technique) if found is None else site.calls * found[0] * 1e-9

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        return self.own.conversion_cost(numel, produced, consumed)

    def conversion_energy(self, numel: int, produced: str, consumed: str) -> float | None:
        return self.own.conversion_energy(numel, produced, consumed)

    def site_area(self, site: Site, technique: Technique) -> float | None:
        return self.own.site_area(site, technique)

    def fixed_area(self) -> float | None:
        return self.own.fixed_area()

    def settings(self) -> dict[str, Any]:
        inner = {"chip": self.own.settings(), "loops": self.loops, "zigzag": _version()}
        return {"target": self.name, "source": self.source, **inner}

    def assumptions(self) -> tuple[str, ...]:
        first, *_ = self.own.assumptions()
        return (
            f"{first} (of what is no layer)",
            f"layers by ZigZag {_version()}: each alone, all operands from and to DRAM, loops ordered for the least "
            "energy-delay product; partial use of the array and the buses as ZigZag models them",
            "channels on the rows of the array, filters on its columns; groups of a convolution one after the other",
            "a buffer access costs by the bit, whatever the width of the bus; scales of quantized weights are left out",
        )

    def references(self) -> tuple[str, ...]:
        return (
            "layers: Mei et al. 2021, ZigZag, IEEE Trans. Computers 70:8, doi:10.1109/TC.2021.3059962",
            *self.own.references(),
        )


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("zigzag-dse")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(_MISSING, name="zigzag") from None


def hardware(chip: DigitalAccelerator, bits: tuple[int, int, int], floating: bool) -> dict[str, Any]:
    """A chip as ZigZag's description: registers, buffer and DRAM, in that order; energies in pJ by the bit."""
    from .energy_table import EnergyTable

    table = chip.table
    assert isinstance(table, EnergyTable)
    activation, weight, _ = bits
    total = activation if floating else chip.accumulator
    register = table.energy("register", 1) if table.has("register") else 0.0
    sram, dram = table.sram(chip.buffer_kib * 2**10, 1.0), table.dram(1.0, chip.dram)
    if floating:
        mac = table.energy("float_multiply", activation) + table.energy("float_add", activation)
    else:
        mac = table.multiply(activation, weight) + table.energy("int_add", chip.accumulator)
    # inputs pass by: their registers are counted with the operation
    mac += activation * register
    wide = chip.rows * chip.columns * 32  # the buffer feeds the array without stalls
    bus = max(8, round(chip.dram_gb_s * 8e3 / chip.clock_mhz))
    everything = ["I1", "I2", "O"]
    memories = {
        "weights": _memory(
            weight,
            register * weight,
            ["I2"],
            [_port("r_port_1", "read", weight, "I2, tl"), _port("w_port_1", "write", weight, "I2, fh")],
            [],
        ),
        "sums": _memory(
            total,
            register * total,
            ["O"],
            [
                _port("r_port_1", "read", total, "O, tl"),
                _port("r_port_2", "read", total, "O, th"),
                _port("w_port_1", "write", total, "O, fh"),
                _port("w_port_2", "write", total, "O, fl"),
            ],
            ["D1"],
        ),
        "buffer": _memory(
            int(chip.buffer_kib * 2**13),
            sram * wide,
            everything,
            [
                _port("r_port_1", "read", wide, "I1, tl", "I2, tl", "O, tl", "O, th", least=1),
                _port("w_port_1", "write", wide, "I1, fh", "I2, fh", "O, fh", "O, fl", least=1),
            ],
            ["D1", "D2"],
        ),
        "dram": _memory(
            10**13,
            dram * bus,
            everything,
            [_port("rw_port_1", "read_write", bus, *(f"{o}, {way}" for o, ways in _WAYS for way in ways), least=1)],
            ["D1", "D2"],
        ),
    }
    array = {"unit_energy": mac, "unit_area": 0, "dimensions": ["D1", "D2"], "sizes": [chip.rows, chip.columns]}
    return {"name": "bitsmith", "memories": memories, "operational_array": array}


_WAYS = (("I1", ("fh", "tl")), ("I2", ("fh", "tl")), ("O", ("fh", "tl", "fl", "th")))


def _memory(
    size: int, cost: float, operands: list[str], ports: list[dict[str, Any]], served: list[str]
) -> dict[str, Any]:
    costs = {"size": size, "r_cost": cost, "w_cost": cost, "area": 0, "latency": 1}
    return {**costs, "operands": operands, "ports": ports, "served_dimensions": served}


def _port(name: str, kind: str, width: int, *ways: str, least: int | None = None) -> dict[str, Any]:
    widths = {"bandwidth_min": least or width, "bandwidth_max": width}
    return {"name": name, "type": kind, **widths, "allocation": list(ways)}


@dataclass(frozen=True)
class _Shape:
    """Loops of one group: their names and sizes, and of a convolution stride, dilation, input size and padding by axis,
    the vertical one first."""

    loops: tuple[tuple[str, int], ...]
    axes: tuple[tuple[int, int, int, tuple[int, int]], ...] = ()


def _shape(site: Site, product: Product) -> _Shape:
    """A 2D convolution as it is, anything else as its matrix product."""
    weight = site.weight
    plain = site.kind == "conv2d" and weight is not None and len(weight.shape) == 4
    if not plain or weight is None:
        return _Shape((("B", product.positions), ("K", product.outputs), ("C", product.depth)))
    batch, _, height, width = site.out_shapes[0]
    _, channels, *kernel = weight.shape
    stride, dilation = (_pair(site.arguments.get(name, 1)) for name in ("stride", "dilation"))
    axes = []
    for k, size in enumerate((height, width)):
        given = site.operands[0].shape[2 + k]
        missing = max(0, (size - 1) * stride[k] + (kernel[k] - 1) * dilation[k] + 1 - given)
        axes.append((stride[k], dilation[k], given, (missing // 2, missing - missing // 2)))
    loops = (("B", batch), ("K", product.outputs), ("C", channels), ("OY", height), ("OX", width))
    return _Shape((*loops, ("FY", kernel[0]), ("FX", kernel[1])), tuple(axes))


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[-1])) if isinstance(value, (tuple, list)) else (int(value), int(value))


@functools.lru_cache(maxsize=4096)
def _searched(
    chip: DigitalAccelerator, loops: int, shape: _Shape, bits: tuple[int, int, int], floating: bool
) -> tuple[float, float]:
    """(pJ, cycles) of one group of a layer."""
    activation, weight, written = bits
    layer: dict[str, Any] = {
        "id": 0,
        "name": "layer",
        "operator_type": "Conv" if shape.axes else "Gemm",
        "equation": "O[b][k]+=I[b][c]*W[c][k]",
        "loop_dims": [name for name, _ in shape.loops],
        "loop_sizes": [size for _, size in shape.loops],
        "operand_precision": {
            "O": activation if floating else chip.accumulator,
            "O_final": written,
            "W": weight,
            "I": activation,
        },
        "operand_source": {"I": 0, "W": 0},
    }
    if shape.axes:
        layer["equation"] = "O[b][k][oy][ox]+=W[k][c][fy][fx]*I[b][c][iy][ix]"
        layer["dimension_relations"] = [
            f"i{axis}={stride}*o{axis}+{dilation}*f{axis}"
            for axis, (stride, dilation, _, _) in zip("yx", shape.axes, strict=True)
        ]
        layer["pr_loop_dims"] = ["IY", "IX"]
        layer["pr_loop_sizes"] = [size for _, _, size, _ in shape.axes]
        layer["padding"] = [list(padding) for _, _, _, padding in shape.axes]
    mapping = {
        "name": "default",
        "spatial_mapping": {"D1": [f"C, {chip.rows}"], "D2": [f"K, {chip.columns}"]},
        "memory_operand_links": {"O": "O", "W": "I2", "I": "I1"},
    }
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(_MISSING, name="zigzag") from None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ZigZag and what it imports
        paths = {name: str(Path(folder) / f"{name}.yaml") for name in ("accelerator", "mapping")}
        for name, content in (("accelerator", hardware(chip, bits, floating)), ("mapping", [mapping])):
            # the order of the memories is that of the hierarchy
            Path(paths[name]).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return _run(layer, paths, folder, loops)


def _run(layer: dict[str, Any], paths: dict[str, str], folder: str, loops: int) -> tuple[float, float]:
    """ZigZag's own stages, without those that write files."""

    def of(module: str, name: str) -> Any:
        try:
            return getattr(importlib.import_module(f"zigzag.{module}"), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{_MISSING} ({error})", name="zigzag") from None

    least = of("stages.results.reduce_stages", "MinimalEDPStage")
    stages = [
        of("stages.parser.workload_parser", "WorkloadParserStage"),
        of("stages.parser.accelerator_parser", "AcceleratorParserStage"),
        of("stages.results.reduce_stages", "SumStage"),
        of("stages.workload_iterator", "WorkloadStage"),
        least,
        of("stages.mapping.spatial_mapping_generation", "SpatialMappingGeneratorStage"),
        least,
        of("stages.mapping.temporal_mapping_generator_stage", "TemporalMappingGeneratorStage"),
        of("stages.evaluation.cost_model_evaluation", "CostModelStage"),
    ]
    logger = logging.getLogger("zigzag")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        main = of("stages.main", "MainStage")(
            list_of_callables=stages,
            workload=[layer],
            **paths,
            dump_folder=folder,
            loma_lpf_limit=loops,
            loma_show_progress_bar=False,
            nb_mappings_generated=3,
            enable_mix_spatial_mapping_generation=False,
            access_same_data_considered_as_no_access=True,
            temporal_mapping_type=of("mapping.temporal_mapping", "TemporalMappingType")("uneven"),
        )
        ((found, _),) = main.run()
    except of("opt.loma.engine", "NoValidLoopOrderingFoundException") as error:
        raise _MappingError(str(error).splitlines()[0]) from None
    finally:
        logger.setLevel(level)
    return float(found.energy_total), float(found.latency_total2)
