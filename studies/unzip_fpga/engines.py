"""The engines that are compared, and the layers that each of them computes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bitsmith.model.network import network
from bitsmith.targets import Design, Layer, UnzipFpga
from bitsmith.zoo.resnet import resnet18, resnet34, resnet50
from bitsmith.zoo.squeezenet import squeezenet1_0

NETWORKS = {"ResNet-18": resnet18, "ResNet-34": resnet34, "ResNet-50": resnet50, "SqueezeNet": squeezenet1_0}
GB_S, BANDWIDTHS = 4.2, (1.0, 0.5, 0.25, 0.125)
BUDGET = UnzipFpga(Design(1, 1, 1), dsps=900, bram_kib=2452.5, gb_s=GB_S, clock_mhz=150.0)
"""A Zynq 7045 (the ZC706 board): 900 DSPs and 545 block memories of 36 Kib."""
RATIOS = (1.0, 0.75, 0.5, 0.25)
KEPT = (0.88, 0.82, 0.72, 0.56)
SEGMENT = 16
"""Channels of a pointwise kernel that share their codes: a power of 2, as codes have. Ours, not the paper's."""


@dataclass(frozen=True)
class Engine:
    """A way to store weights and the engine for it. ``ratio``: of generated weights; ``kept``: of channels;
    ``selective``: idle units help; ``free``: ratios are raised in layers where that costs at most 1 %; ``keeps``: a
    layer's weights stay on the chip if they fit; ``held``: the design is the best one at bandwidth 1x, and stays as the
    bandwidth falls; ``pointwise``: kernels of 1 are generated too, from codes over ``SEGMENT`` channels."""

    name: str
    ratio: float | None = None
    kept: float = 1.0
    selective: bool = False
    free: bool = False
    keeps: bool = False
    held: bool = False
    pointwise: bool = False


DENSE = Engine("dense")
HELD = Engine("dense, design of 1x", held=True)
ENGINES: tuple[Engine, ...] = (
    DENSE,
    HELD,
    Engine("dense, selective", selective=True),
    Engine("dense, keeps weights", selective=True, keeps=True),
    *(Engine(f"pruned, {kept:.0%} of channels", kept=kept) for kept in KEPT),
    Engine("generated, ratio 0.5, not selective", ratio=0.5),
    Engine("generated, ratio 0.5", ratio=0.5, selective=True),
    Engine("generated, ratio 0.25", ratio=0.25, selective=True),
    Engine("generated, ratio 0.25, raised for 1 %", ratio=0.25, selective=True, free=True),
    Engine("generated, ratio 0.25, keeps weights", ratio=0.25, selective=True, keeps=True),
    Engine("generated, ratio 0.25, pointwise too", ratio=0.25, selective=True, pointwise=True),
    *(Engine(f"generated, ratio {r:g}, design of 1x", ratio=r, selective=True, held=True) for r in (0.5, 0.25)),
)


@dataclass(frozen=True)
class Shape:
    """A layer with multiplications, as recorded."""

    name: str
    positions: int
    channels: int
    kernel: int
    outputs: int
    inputs: int


def shapes(name: str, size: int = 224) -> list[Shape]:
    """The layers of a network on one image of that size."""
    record = network(NETWORKS[name](), torch.zeros(1, 3, size, size)).record
    found = []
    for site in record.sites.values():
        weight = site.weight
        if weight is None or site.macs == 0 or len(weight.shape) < 2:
            continue
        assert site.arguments.get("groups", 1) == 1, site.name
        kernel = math.prod(weight.shape[2:])
        inputs = math.prod(site.operands[0].shape)
        found.append(Shape(site.name, site.macs // weight.numel, weight.shape[1], kernel, weight.shape[0], inputs))
    return found


def layers(found: Sequence[Shape], engine: Engine, ratios: Mapping[str, float] | None = None) -> list[Layer]:
    """The layers as an engine computes them, 2 bytes a value. The first layer's inputs and the last one's outputs stay
    as they are; kernels of 1 (but for ``pointwise``), and the first layer, have nothing to generate."""
    made = []
    for index, shape in enumerate(found):
        channels = shape.channels if index == 0 else max(1, round(shape.channels * engine.kept))
        last = index == len(found) - 1
        outputs = shape.outputs if last else max(1, round(shape.outputs * engine.kept))
        ratio = engine.ratio if ratios is None else ratios.get(shape.name, engine.ratio)
        # of so many weights each that share their codes
        length = shape.kernel if shape.kernel > 1 else SEGMENT if engine.pointwise and not last else 0
        codes = math.ceil(ratio * length) if ratio is not None and length and index > 0 else 0
        stored = 2.0 * channels * outputs * shape.kernel * (codes / length if codes else 1.0)
        inputs = max(1, round(shape.inputs * channels / shape.channels))
        made.append(
            Layer(shape.positions, channels * shape.kernel, outputs, inputs, stored, 2.0, codes, name=shape.name)
        )
    return made


def modelled(found: Sequence[Shape], engine: Engine, bandwidth: float) -> dict[str, object]:
    """The best design of an engine for these layers at a share of the bandwidth, and what it takes."""
    budget = dataclasses.replace(BUDGET, gb_s=GB_S * bandwidth, selective=engine.selective)
    budget = dataclasses.replace(budget, keeps_weights=engine.keeps)
    chosen = layers(found, engine)
    searched = dataclasses.replace(budget, gb_s=GB_S) if engine.held else budget
    best = dataclasses.replace(designed(tuple(chosen), searched), gb_s=budget.gb_s)
    if engine.free:
        chosen = layers(found, engine, raised(found, engine, best))
    costs = [best.layer_cost(layer) for layer in chosen]
    bound = {part: sum(cost.bound == part for cost in costs) for part in ("compute", "generate", "transfer")}
    return {
        "ms": best.total_ms(chosen),
        "mb_moved": sum(cost.bytes for cost in costs) / 1e6,
        "mb_weights": sum(weights_moved(best, layer) for layer in chosen) / 1e6,
        "mb_stored": sum(layer.weight_bytes for layer in chosen) / 1e6,
        "gmacs": sum(layer.macs for layer in chosen) / 1e9,
        "dsps": best.design.dsps,
        "design": dataclasses.asdict(best.design),
        "bound": bound,
    }


@functools.cache
def designed(chosen: tuple[Layer, ...], budget: UnzipFpga) -> UnzipFpga:
    """The best design, searched once."""
    return budget.best(chosen)


def weights_moved(best: UnzipFpga, layer: Layer) -> float:
    """Bytes of weights, or of their coefficients, that a layer moves."""
    without = dataclasses.replace(layer, weight_bytes=0.0)
    return best.layer_cost(layer).bytes - best.layer_cost(without).bytes


def shares(found: Sequence[Shape]) -> dict[str, float]:
    """Millions of weights, and the shares of them that kernels of 1 and the last layer hold."""
    counts = [shape.channels * shape.kernel * shape.outputs for shape in found]
    whole = sum(counts)
    pointwise = sum(n for n, shape in zip(counts[:-1], found[:-1], strict=True) if shape.kernel == 1)
    return {"millions": whole / 1e6, "pointwise": pointwise / whole, "last": counts[-1] / whole}


def raised(found: Sequence[Shape], engine: Engine, best: UnzipFpga) -> dict[str, float]:
    """The largest ratio of each layer that takes the design at most 1 % longer than the least."""
    assert engine.ratio is not None
    chosen = {}
    for shape, least in zip(found, layers(found, engine), strict=True):
        limit = best.layer_cost(least).total * 1.01
        for ratio in RATIOS:
            tried = next(one for one in layers(found, engine, {shape.name: ratio}) if one.name == shape.name)
            if ratio == engine.ratio or best.layer_cost(tried).total <= limit:
                chosen[shape.name] = ratio
                break
    return chosen
