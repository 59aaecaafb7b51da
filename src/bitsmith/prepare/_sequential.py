"""Rounding the weights of one layer after another, each on what the layers before it, rounded already, give it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import batch_size, call, items
from ..model.apply import additions_of, build, calibrated
from ..model.intercept import instrument
from ..model.keys import encode_key
from ..model.network import Network, duplicate
from ..model.replay import Call
from ..numerics.weights import folded_affine
from ..plan import Plan
from ..site import Format, Range, Site
from ..technique import Cell, PrepareError
from ._layers import Layer, LayerHandler, fold_factor, folded_weight, layers, tensor_at, watched

LANES = 64
"""At most that many items of a loader are computed side by side."""


@dataclass(frozen=True)
class Matrix:
    """A layer as a matrix product ``y = x weight' + bias`` for each group of its channels.

    ``weight``: (groups, out, in), the normalisation behind it folded in. ``scale``, and ``zero``, the zero points as
    floats: (groups, out, n), n = 1 or one for each of n equal parts of a row; integers are counted from the zero points
    throughout. ``bias``: (groups, out). ``limits``: what the activation behind it clamps to, or
    None. ``format``: of the integers. ``range``: how the technique chooses scales; ``fixed``: an earlier step has.
    """

    layer: Layer
    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor
    limits: tuple[float, float] | None
    format: Format
    range: Range = Range()  # noqa: RUF009  (frozen)
    fixed: bool = False

    @property
    def step(self) -> Tensor:
        """The scale of every weight: (groups, out, in) or (groups, out, 1)."""
        return spread(self.scale, self.weight.shape[-1])

    @property
    def nearest(self) -> Tensor:
        """Integers of rounding to nearest, as floats: (groups, out, in)."""
        return (self.weight / self.step).round_().clamp_(*self.bounds)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest integer of every weight, counted from its zero point: shaped as ``step``."""
        return bounds(self.format, spread(self.zero, self.weight.shape[-1]))


def spread(scale: Tensor, width: int) -> Tensor:
    """Scales of the groups of a row, (..., n), for each of its ``width`` weights; one for the whole row stays."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(width // scale.shape[-1], -1)


def bounds(fmt: Format, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of a format counted from zero points."""
    low, high = fmt.levels
    return low - zero, high - zero


@dataclass(frozen=True)
class Problem:
    """What a layer's integers are chosen by. ``x``: rows of its input now, (groups, rows, in). ``target``: its output
    in the float network at the same positions, before the activation, (groups, rows, out); empty if not asked for."""

    matrix: Matrix
    x: Tensor
    target: Tensor


class Rounded(NamedTuple):
    """``integers`` as floats, counted from the zero points, (groups, out, in); ``scale``, ``zero`` as a matrix has."""

    integers: Tensor
    scale: Tensor
    zero: Tensor


Solve = Callable[[Problem], Rounded]


def round_weights(
    net: Network, plan: Plan, data: Any, samples: int, rows: int, seed: int, asymmetric: bool, solve: Solve, step: str
) -> Network:
    """The network with the weights that ``solve`` chose, each site's on its grid.

    ``samples``: how many are run at most, all side by side; ``rows``: how many of a layer's output positions are looked
    at. Memory: what the model (twice if ``asymmetric``: quantized and float) holds at one site for ``samples``
    samples, and twice ``rows`` x inputs of a layer. Time: one forward of each, plus ``solve``.
    """
    # ranges stay those that the weights are rounded for: what ran here is what is built afterwards
    net = calibrated(net, plan, data)
    statistics = net.record.statistics
    simulated = build(net, plan, data)
    found = dict(_matrices(net, plan, simulated))
    if not found:
        raise PrepareError(
            f"{step}: the plan puts no integer technique at a convolution or linear layer that "
            "is called once and shares its weight with nobody; give such sites one, or leave the step out"
        )
    inputs = list(first_samples(data, samples))
    sizes = [batch_size(item) for item in inputs]
    total = sum(sizes)
    grids: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    with Lanes() as lanes:
        for name in found:
            cell = additions_of(simulated).cells[encode_key(name)]
            assert isinstance(cell, Cell)
            cell.register_forward_pre_hook(_Stop(lanes, name))
        for index, item in enumerate(inputs):
            lanes.add(("quantized", index), simulated, item, net.forward)
        if asymmetric:
            plain = watched(net, found, lanes.see)
            for index, item in enumerate(inputs):
                lanes.add(("float", index), plain, item, net.forward)
        simulated.eval()
        for name, waiting in lanes.run(tuple(found)):
            matrix = found[name]
            site = matrix.layer.site
            generator = torch.Generator().manual_seed(seed)
            ours, theirs = [], []
            for index in range(len(inputs)):
                x = waiting.get(("quantized", index))
                original = waiting.get(("float", index))
                if x is None or (asymmetric and original is None):
                    continue  # the model went another way there
                share = max(1, round(rows * sizes[index] / total))
                at = positions(site, x, share, generator)
                ours.append(patches(site, x, at))
                if original is not None:
                    theirs.append(patches(site, original, at))
            if not ours:
                continue
            target = torch.empty(0)
            if theirs:
                target = torch.baddbmm(matrix.bias[:, None], torch.cat(theirs, 1), matrix.weight.mT)
            rounded = solve(Problem(matrix, torch.cat(ours, 1), target))
            grids[name, matrix.layer.slot] = _write(net, simulated, matrix, rounded)
    unseen = [name for name, matrix in found.items() if (name, matrix.layer.slot) not in grids]
    if unseen:
        raise PrepareError(
            f"{step}: the calibration data never reached {', '.join(unseen[:5])}; give data like the example"
        )
    return net.with_model(net.model, grids).with_statistics(statistics)


def first_samples(data: Any, samples: int) -> Iterator[Any]:
    """The inputs of a loader's first items, ``samples`` samples at most (but one item) and ``LANES`` items."""
    seen = 0
    for count, (inputs, _) in enumerate(items(data, "calibration")):
        if count and (seen + batch_size(inputs) > samples or count == LANES):
            return
        seen += batch_size(inputs)
        yield inputs


def _matrices(net: Network, plan: Plan, simulated: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """The layers that can be rounded, in execution order."""
    for name, layer in layers(net.record).items():
        if name not in plan.sites:
            continue
        cell = additions_of(simulated).cells[encode_key(name)]
        scale, zero = (getattr(cell, f"weight_{kind}", None) for kind in ("scale", "zero_point"))
        fmt = getattr(cell, "format", None)
        if all(isinstance(it, Tensor) for it in (scale, zero)) and isinstance(cell, Cell) and isinstance(fmt, Format):
            yield name, _matrix(net, layer, cell, fmt, getattr(plan[name], "weight_range", Range()))


def _matrix(net: Network, layer: Layer, cell: Cell, fmt: Format, range: Range) -> Matrix:
    record, name = net.record, layer.site.name
    weight = folded_weight(record, layer)
    out = weight.shape[0]
    bias = record.biases.get(name, torch.zeros(out)).detach().float()
    if cell.norm:
        factor, shift = folded_affine(*record.folds[name])
        bias = bias * factor + shift
    shape = (layer.groups, out // layer.groups, -1)

    def by_row(values: Tensor) -> Tensor:
        rows = values if values.dim() == 2 else values.reshape(-1, 1).expand(out, 1)
        return rows.reshape(shape).float().clone()

    return Matrix(
        layer,
        weight.reshape(shape),
        by_row(cell.get_buffer("weight_scale")),
        by_row(cell.get_buffer("weight_zero_point")),
        bias.reshape(shape[:2]),
        _limits(net, layer.site),
        fmt,
        range,
        (name, layer.slot) in record.grids,
    )


def _limits(net: Network, site: Site) -> tuple[float, float] | None:
    """What the activation that is fused behind the site clamps to."""
    for name in site.epilogue:
        member = net.record.sites[name]
        given = member.arguments
        if member.kind == "relu":
            return 0.0, float("inf")
        if member.kind == "relu6":
            return 0.0, 6.0
        if member.kind in ("hardtanh", "clamp"):
            low = given.get("min_val", given.get("min", -1.0 if member.kind == "hardtanh" else None))
            high = given.get("max_val", given.get("max", 1.0 if member.kind == "hardtanh" else None))
            return -float("inf") if low is None else float(low), float("inf") if high is None else float(high)
    return None


def _write(net: Network, simulated: nn.Module, matrix: Matrix, rounded: Rounded) -> tuple[Tensor, Tensor]:
    """Put a layer's weights on their grid, in the model and in its running simulation; the grid as the cell has it."""
    integers, scale, zero = rounded
    layer = matrix.layer
    parameter = tensor_at(net.model, layer.key)
    folded = integers.double() * spread(scale, integers.shape[-1]).double()
    weight = folded.reshape(parameter.shape)
    factor = fold_factor(net.record, layer.site.name)
    if factor is not None:
        # a channel that is multiplied by 0 keeps its weights: any integers but 0 would be lost there
        along = factor.double().reshape(-1, *[1] * (weight.dim() - 1))
        weight = torch.where(along == 0, parameter.double(), weight / along)
    cell = additions_of(simulated).cells[encode_key(layer.site.name)]
    grid = cell.get_buffer("weight_scale"), cell.get_buffer("weight_zero_point")
    with torch.no_grad():
        parameter.copy_(weight)
        tensor_at(simulated, layer.key).copy_(parameter)
        for kept, values in zip(grid, (scale, zero), strict=True):
            kept.copy_(values.reshape(kept.shape) if kept.dim() else values.flatten()[0])
    return grid[0].clone(), grid[1].clone()


# -- rows of a layer's input -------------------------------------------------------------------------------------


def positions(site: Site, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different output positions of all samples of ``x``, or all of them: flat indices, sorted."""
    available = x.numel() // x.shape[-1] if site.kind == "linear" else x.shape[0] * _places(site, x)[0].shape[0]
    if count >= available:
        return torch.arange(available)
    return torch.randperm(available, generator=generator)[:count].sort().values


def patches(site: Site, x: Tensor, at: Tensor) -> Tensor:
    """What the weight of each group is multiplied by at the given output positions: (groups, len(at), in)."""
    x = x.detach().float()
    if site.kind == "linear":
        return x.reshape(-1, x.shape[-1])[at][None]
    inside, padded = _places(site, x)
    x = nn.functional.pad(x, padded).flatten(2)
    sample, place = at // inside.shape[0], at % inside.shape[0]
    taken = x[sample[:, None], :, inside[place]]  # (rows, kernel, channels)
    groups = int(site.arguments.get("groups", 1))
    return taken.transpose(1, 2).reshape(len(at), groups, -1).transpose(0, 1).contiguous()


def _places(site: Site, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Flat places in one padded channel, (output positions, kernel positions), and the padding for ``pad``."""
    weight = site.weight
    assert weight is not None
    kernel, dims = weight.shape[2:], len(weight.shape) - 2
    stride, dilation = (_each(site.arguments.get(name, 1), dims) for name in ("stride", "dilation"))
    padding = site.arguments.get("padding", 0)
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    sizes = [n + a + b for n, (a, b) in zip(x.shape[2:], sides, strict=True)]
    flat = torch.zeros(1, 1, dtype=torch.long)
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        starts = torch.arange(0, size - d * (k - 1), s)
        here = starts[:, None] + d * torch.arange(k)
        flat = (flat[:, None, :, None] * size + here[None, :, None, :]).reshape(len(flat) * len(starts), -1)
    return flat, tuple(n for pair in reversed(sides) for n in pair)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == dims else (_one(value),) * dims


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)


# -- several forwards side by side -------------------------------------------------------------------------------

LaneKey = tuple[str, int]


class _Cancelled(BaseException):
    """Unwinds a forward that nobody needs any more."""


class _Lane:
    """One forward in a thread of its own that runs only while :meth:`resume` waits for it."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.at: tuple[str, Tensor] | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        self.go.acquire()
        try:
            if not self.cancelled:
                with torch.no_grad():
                    self.run()
        except _Cancelled:
            pass
        except BaseException as error:
            self.error = error
        self.at = None
        self.back.release()

    def stop(self, name: str, x: Tensor) -> None:
        """Called by the forward: wait at a site until resumed."""
        self.at = name, x
        self.back.release()
        self.go.acquire()
        if self.cancelled:
            raise _Cancelled

    def resume(self) -> None:
        """Let it run to its next stop, or to its end; raises what it raised."""
        if self.thread.ident is None:
            self.thread.start()
        self.at = None
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error


class Lanes:
    """Forwards that advance from site to site together."""

    def __init__(self) -> None:
        self.lanes: dict[LaneKey, _Lane] = {}

    def add(self, key: LaneKey, model: nn.Module, inputs: Any, forward: Any) -> None:
        self.lanes[key] = _Lane(lambda: call(model, inputs, forward))

    def stop(self, name: str, x: Tensor) -> None:
        current = threading.current_thread()
        next(lane for lane in self.lanes.values() if lane.thread is current).stop(name, x)

    def see(self, name: str, operands: tuple[Tensor, ...], output: Tensor) -> None:
        """Stop a float network at a site (as :func:`~._layers.watched` calls)."""
        self.stop(name, operands[0])

    def run(self, order: Sequence[str]) -> Iterator[tuple[str, Mapping[LaneKey, Tensor]]]:
        """Each site in turn, and the inputs of those that wait at it."""
        rank = {name: index for index, name in enumerate(order)}
        for lane in self.lanes.values():
            lane.resume()
        while any(lane.at for lane in self.lanes.values()):
            first = min((lane.at[0] for lane in self.lanes.values() if lane.at), key=rank.__getitem__)
            here = {key: lane for key, lane in self.lanes.items() if lane.at and lane.at[0] == first}
            yield first, {key: lane.at[1] for key, lane in here.items() if lane.at}
            for lane in here.values():
                lane.resume()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self.lanes.values():
            lane.cancelled = True
            if lane.thread.is_alive():
                lane.go.release()
                lane.thread.join()


class _Stop:
    """Forward pre-hook of a simulated site's cell."""

    def __init__(self, lanes: Lanes, name: str) -> None:
        self.lanes, self.name = lanes, name

    def __call__(self, cell: nn.Module, operands: tuple[Any, ...]) -> None:
        assert isinstance(cell, Cell)
        self.lanes.stop(self.name, cell.read(0, operands[0]))


class _Pause(LayerHandler):
    """Stops a float network before each of some layers, whose weights may change while it waits."""

    def __init__(self, net: Network, lanes: Lanes, names: Iterable[str]) -> None:
        super().__init__(net)
        self.lanes = lanes
        self.watch(names)

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operands, _ = call.operation.split(args, kwargs)
        self.lanes.stop(name, operands[0])
        return call.run(*args, **kwargs)


def paused(net: Network, names: Iterable[str], lanes: Lanes) -> nn.Module:
    """A copy of the float network, in eval, that waits in its lane before it computes each of those sites."""
    replica = duplicate(net.model).eval()
    instrument(replica, _Pause(net, lanes, names), net.modules)
    return replica
