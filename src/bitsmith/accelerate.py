"""The accelerate verb: native kernels in an int8 file that any tool made, where they are measured faster."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._files import atomic_write, check_writable
from .export.rewrite import rewritten
from .export.winograd import Candidate, Levels, Packed, convolutions, name_of, with_kernels
from .numerics import winograd as algorithm
from .numerics.taps import TapObserver, TapStatistics
from .plan import Plan
from .targets._openvino_kernels import missing
from .targets.base import Array, Artifact, Target, TargetError, Timing
from .targets.openvino import OpenVino
from .technique import No

if TYPE_CHECKING:
    import onnx

SAMPLES = 8
"""Of synthetic data, where none is given."""

OPTIONS = ((2, 8), (4, 16))
"""(tile, bits of the taps) that need no training."""
WORTH = 0.95
"""The share of a convolution's time that its replacement may take: its counter misses what another node costs."""
LEAST_DB = 3.0
"""Below this SQNR to the file's own outputs, half of their power is noise: nothing is written."""


class AccelerateError(ValueError):
    """A file that cannot be accelerated: says what is missing."""


@dataclass(frozen=True)
class Layer:
    """One convolution of the file. ``ms``: as it was. ``options``: (tile, bits) -> ms with the kernel. ``chosen``: the
    one that is used, or None. ``reason``: why the kernel cannot compute it."""

    name: str
    ms: float
    options: Mapping[tuple[int, int], float]
    chosen: tuple[int, int] | None
    reason: str = ""


@dataclass(frozen=True)
class Accelerated:
    """``before``, ``after``: whole networks, timed interleaved. ``sqnr_db``: of the outputs, the original's being the
    signal, on ``samples`` inputs, which were ``given`` or random numbers. ``artifact``: the new file."""

    artifact: Artifact
    layers: tuple[Layer, ...]
    before: Timing
    after: Timing
    sqnr_db: float
    samples: int
    given: bool

    @property
    def replaced(self) -> int:
        """How many convolutions are computed by the kernels."""
        return sum(layer.chosen is not None for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times as fast as before."""
        return self.before.ms / self.after.ms


def accelerate(
    source: str | Path,
    out: str | Path,
    data: Iterable[Any] | Mapping[str, Array] | None = None,
    *,
    target: OpenVino | None = None,
    options: Sequence[tuple[int, int]] = OPTIONS,
    rounds: int = 40,
) -> Accelerated:
    """Replace the 3x3 convolutions of an int8 ONNX file by Winograd kernels where these are measured faster.

    ``source``: a file with QuantizeLinear and DequantizeLinear, of fixed shapes, by any tool. ``out``: the new ONNX
    file; the rest of the graph is as it was. ``data``: for the ranges of the taps and the comparison: batches as the
    file's inputs have them (an array, a tuple or a mapping of arrays), or one array or mapping of samples, cut into
    batches of the file's size; None: random numbers. ``options``: (tile, bits of
    the taps) to try, as of :class:`~bitsmith.Winograd`. ``target``: OpenVINO and its threads.

    Where nothing is gained beyond the spread of the times the new file is the old one. Raises :class:`AccelerateError`
    for a file that nothing can be done with or whose outputs would be lost (:data:`LEAST_DB`), and ``TargetError``
    where the kernels are missing.
    """
    import onnx
    import onnx_ir as ir

    target = target or OpenVino(kernels=True)
    source, out = Path(source), Path(out)
    if out.suffix != ".onnx":
        raise AccelerateError(f"{out}: the accelerated network is written as .onnx")
    check_writable(out.parent)
    model = _read(source)
    found = [(name_of(node), what) for node, what in convolutions(ir.from_proto(model).graph)]
    able = {name: what for name, what in found if isinstance(what, Candidate)}
    reasons = {name: str(what) for name, what in found if isinstance(what, No)}
    if able and (lacking := missing()) is not None:
        raise TargetError(f"{source} has convolutions that could be faster, but {lacking}")
    batches = _batches(model, data)
    statistics = _taps(model, able, options, batches)
    with tempfile.TemporaryDirectory(prefix="bitsmith-") as folder:
        base = target.save(model, Path(folder) / "base.xml", {name: [name] for name, _ in found}, {}, Plan())
        before = target.site_times(base, rounds).sites
        times: dict[str, dict[tuple[int, int], float]] = {name: {} for name in able}
        for k, option in enumerate(options if able else ()):
            made = _replaced(model, dict.fromkeys(able, option), statistics)
            names = {name: [f"{name}.Winograd"] for name in able}
            tried = target.save(made, Path(folder) / f"{k}.xml", names, {}, Plan())
            for name, ms in target.site_times(tried, rounds).sites.items():
                times[name][option] = ms
        chosen = {name: min(of, key=lambda option: of[option]) for name, of in times.items() if of}
        chosen = {name: option for name, option in chosen.items() if times[name][option] < WORTH * before[name]}
        result = _replaced(model, chosen, statistics)
        ours = target.save(result, Path(folder) / "ours.xml", {}, {}, Plan())
        first, second = target.measure([base, ours], rounds)
        if chosen and first.ms - second.ms <= first.spread + second.spread:
            chosen, result, ours, second = {}, model, base, first
        agreement = _agreement(target, base, ours, batches)
        if chosen and not agreement >= LEAST_DB:
            raise AccelerateError(
                f"{source}: with {len(chosen)} convolutions replaced the outputs agree with the file's to "
                f"{agreement:.1f} dB only, below {LEAST_DB:g} dB; nothing was written. Ranges come from the data: give "
                "samples of what the network is for, or fewer options"
            )
    path = atomic_write(out, lambda temporary: onnx.save(result, str(temporary)))
    artifact = Artifact(
        path=path,
        format="onnx",
        nodes={name: (f"{name}.Winograd",) if name in chosen else (name,) for name, _ in found},
        values={},
        inputs=ours.inputs,
        outputs=ours.outputs,
        batch=ours.batch,
        target=target.name,
        versions=ours.versions,
    )
    artifact.save()
    layers = tuple(
        Layer(name, before.get(name, 0.0), times.get(name, {}), chosen.get(name), reasons.get(name, ""))
        for name, _ in found
    )
    return Accelerated(artifact, layers, first, second, agreement, sum(len(b[0]) for b in batches), data is not None)


def _read(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    except FileNotFoundError:
        raise AccelerateError(f"{path} does not exist") from None
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise AccelerateError(f"{path} is no ONNX file ({first or type(error).__name__})") from None
    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise AccelerateError(
            f"{path} has no DequantizeLinear: it is not quantized in the QDQ form; quantize it first, with "
            "bitsmith quantize or another tool"
        )
    for value in _inputs(model):
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if not all(sizes):
            raise AccelerateError(
                f"{path}: input {value.name!r} has no fixed shape ({sizes}, 0 is open): layout changes around the "
                "kernels are then not free; give it one, such as with onnxruntime.tools.make_dynamic_shape_fixed"
            )
    return model


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What is fed, without the weights that old files list as well."""
    fed = {value.name for value in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in fed]


def _batches(model: onnx.ModelProto, data: Iterable[Any] | Mapping[str, Array] | None) -> list[tuple[Array, ...]]:
    """The inputs of every batch, in the graph's order."""
    import onnx

    inputs = _inputs(model)
    shapes = [tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in inputs]
    types = [onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in inputs]
    if data is None:
        draw = np.random.default_rng(0)
        count = -(-SAMPLES // max(shapes[0][0] if shapes[0] else 1, 1))
        return [
            tuple(
                draw.standard_normal(shape).astype(kind) if np.issubdtype(kind, np.floating) else np.zeros(shape, kind)
                for shape, kind in zip(shapes, types, strict=True)
            )
            for _ in range(count)
        ]
    if isinstance(data, np.ndarray):
        data = {inputs[0].name: data}
    if isinstance(data, Mapping):
        data = _cut(data, shapes[0][0] if shapes[0] else 1)
    found = []
    for k, item in enumerate(data):
        if isinstance(item, Mapping) and (lacking := [value.name for value in inputs if value.name not in item]):
            raise AccelerateError(
                f"item {k} of the data lacks {', '.join(lacking)}; it has {', '.join(map(str, item)) or 'nothing'}"
            )
        given = [item[value.name] for value in inputs] if isinstance(item, Mapping) else item
        parts = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        arrays = tuple(np.asarray(part, dtype=kind) for part, kind in zip(parts, types, strict=False))
        if [array.shape for array in arrays] != shapes:
            raise AccelerateError(
                f"item {k} of the data has shapes {[array.shape for array in arrays]}, the file wants {shapes}"
            )
        found.append(arrays)
    if not found:
        raise AccelerateError("the data are empty")
    return found


def _cut(samples: Mapping[str, Array], size: int) -> list[dict[str, Array]]:
    """Whole batches; what is left over is left out."""
    count = min((len(array) for array in samples.values()), default=0) // size
    return [{name: array[k * size : (k + 1) * size] for name, array in samples.items()} for k in range(count)]


Taps = dict[tuple[str, int], TapStatistics]
"""(convolution, tile) -> what its input looks like behind the transform, in units of the input's integers."""


def _taps(
    model: onnx.ModelProto,
    able: Mapping[str, Candidate],
    options: Sequence[tuple[int, int]],
    batches: Sequence[tuple[Array, ...]],
) -> Taps:
    """What the data show behind the input transforms: the integers are read from ONNX Runtime, without fusions."""
    import onnx
    import onnxruntime as ort

    if not able:
        return {}
    tensors = {str(what.x.value.name): what.x for what in able.values()}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for name, levels in tensors.items():
        kind = onnx.TensorProto.INT8 if levels.signed else onnx.TensorProto.UINT8
        kind = kind if levels.grid is None else onnx.TensorProto.FLOAT
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(probe.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found: Taps = {
        (name, tile): TapObserver(tile, (3, 3), what.pads).start()
        for name, what in able.items()
        for tile in dict.fromkeys(tile for tile, _ in options)
    }
    for batch in batches:
        integers = dict(zip(tensors, session.run(None, dict(zip(names, batch, strict=True))), strict=True))
        for (name, _), statistics in found.items():
            x = able[name].x
            shown = torch.from_numpy(integers[str(x.value.name)].astype(np.float32))
            statistics.update(shown - x.zero if x.grid is None else torch.round(shown / x.scale))
    return found


def _replaced(model: onnx.ModelProto, chosen: Mapping[str, tuple[int, int]], statistics: Taps) -> onnx.ModelProto:
    def pack(what: Candidate) -> Packed:
        tile, bits = chosen[what.name]
        return packed(what, bits, statistics[what.name, tile])

    return rewritten(model, with_kernels(list(chosen), pack)) if chosen else model


def packed(what: Candidate, bits: int, taps: TapStatistics) -> Packed:
    """The taps of a convolution's weights on their grids, with the scales that its input needs."""
    assert isinstance(what.weight, np.ndarray)
    tile = taps.observer.tile
    g = algorithm.transforms(tile).tensors(torch.float64)[2]
    real = algorithm.transformed_weight(torch.from_numpy(what.weight), g, g)
    low, high = algorithm.tap_bounds(algorithm.input_matrix(tile, (3, 3)), *_ends(what.x))
    tap = taps.tiling.mean_tap
    scaling = algorithm.fixed_point(real, taps.extremes * taps.beyond, taps.power, (low, high), tap, bits)
    real = real * scaling.steps[:, None]
    units = algorithm.weight_steps(real, scaling.bound, bits)
    u = torch.round(real / units[:, :, None]).to(torch.int8 if bits == 8 else torch.int16)
    algorithm.check_accumulator(u, scaling, tap, what.name)
    us = (units * what.x.scale).float()
    mul, offset = (values.to(torch.int16).numpy() for values in (scaling.mul, scaling.offset))
    return Packed(tile, bits, u.numpy(), mul, offset, us.numpy())


def _ends(x: Levels) -> tuple[int, int]:
    """Least and greatest integer less the zero point."""
    least, greatest = (-128, 127) if x.signed else (0, 255)
    return least - x.zero, greatest - x.zero


def _agreement(target: Target, base: Artifact, ours: Artifact, batches: Sequence[tuple[Array, ...]]) -> float:
    """SQNR in dB of all outputs."""
    first, second = target.opened(base), target.opened(ours)
    power = error = 0.0
    for batch in batches:
        for expected, found in zip(first(batch), second(batch), strict=True):
            signal = expected.astype(np.float64)
            power += float(np.square(signal).sum())
            error += float(np.square(found.astype(np.float64) - signal).sum())
    return math.inf if error == 0 else 10 * math.log10(power / error) if power else -math.inf
