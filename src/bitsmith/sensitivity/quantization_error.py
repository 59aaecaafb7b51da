"""Quantization error: how far rounding moves a site's weight, or what a site without one reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batch_size, call, first_inputs
from ..model.apply import computer_of
from ..model.network import network
from ..numerics.weights import folded_affine
from ..plan import Plan
from ..prepare._layers import watched
from ..site import Operand, Site, contains
from ..task import Task, evaluating
from ..technique import Cell, Technique, TensorQuantizer
from .base import Meter, Pair, Scores


@dataclass(frozen=True)
class QuantizationError:
    """Relative error of rounding a weight (Schaefer et al. 2023, arXiv:2302.01382, the first of its three
    sensitivities; the normalisation is ours): ``sqrt(mean((Q(w) - w)^2)) / max|w|``, no unit.

    ``Q(w)`` is what the technique's cell hands to the operation, whatever the technique, with a batch normalisation
    folded in on both sides where the cell absorbs one. Weights need no data: one forward of the first calibration batch
    for each technique only shows them.

    A site without a weight (an addition, a product in attention, a pool) gets the same figure of the tensors that it
    reads in the float network on that batch, under the quantizers that it reads them through, summed over operands.
    ``activations``: add that at sites with a weight too. Skipped, with the reason: sites that read nothing in an
    integer format, and weights that no operation is handed as one tensor of their shape.
    """

    activations: bool = False

    def __call__(
        self, model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]
    ) -> Scores:
        meter = Meter()
        found = roundings(task, pairs, simulate, meter)
        reading = {
            pair: rounding.quantizers
            for pair, rounding in found.items()
            if (self.activations or not rounding.has_weight) and any(q is not None for q in rounding.quantizers)
        }
        read = _operand_errors(model, task, reading, meter) if reading else {}
        losses: dict[Pair, float] = {}
        skipped: dict[Pair, str] = {}
        for pair, rounding in found.items():
            if rounding.has_weight and rounding.error is None:
                skipped[pair] = rounding.reason
            elif pair in reading and pair not in read:
                skipped[pair] = "what it reads cannot be seen: it is computed inside a module that is one site"
            elif not rounding.has_weight and pair not in reading:
                skipped[pair] = "it has no weight and reads nothing in an integer format"
            else:
                loss = read.get(pair, 0.0) + (rounding.error.relative if rounding.error is not None else 0.0)
                if math.isfinite(loss):
                    losses[pair] = loss
                else:
                    skipped[pair] = "its quantization error is not finite"
        return Scores(losses, skipped=skipped, spent=meter.spent())


@dataclass(frozen=True)
class WeightError:
    """``relative``: RMS of the error over the greatest ``|w|``. ``squared``: ``||Q(w) - w||^2`` in units of the model's
    own weight: a normalisation that was folded in is divided out again, a channel that it multiplies by 0 counts 0."""

    relative: float
    squared: float


@dataclass(frozen=True)
class Rounding:
    """What a technique does at a site. ``error`` of its weight, or the ``reason`` why there is none. ``quantizers``:
    those that its operands are read through, by position."""

    has_weight: bool
    error: WeightError | None
    reason: str
    quantizers: tuple[TensorQuantizer | None, ...]


def roundings(
    task: Task, pairs: Iterable[Pair], simulate: Callable[[Plan], nn.Module], meter: Meter
) -> dict[Pair, Rounding]:
    """What the techniques do at their sites, by pair in order: one network and one forward of the first calibration
    batch for each technique."""
    pairs = list(pairs)
    found: dict[Pair, Rounding] = {}
    for plan in _plans(pairs):
        net = simulate(plan)
        computer = computer_of(net)
        watches: dict[str, _Watch] = {}
        for name in plan:
            site, cell = computer.record_sites[name], computer.cells[name]
            assert isinstance(cell, Cell)
            if site.weight is not None:
                watches[name] = _Watch(cell, site, site.weight)
        if watches:
            inputs = first_inputs(task.calibration)
            meter.forwards += batch_size(inputs)
            with evaluating(net):
                call(net, inputs, task.forward)
        for name, technique in plan.sites.items():
            cell, watch = computer.cells[name], watches.get(name)
            assert isinstance(cell, Cell)
            error, reason = (None, "it has no weight") if watch is None else (watch.error, watch.reason)
            found[name, technique] = Rounding(watch is not None, error, reason, tuple(cell.quantizers))
    return {pair: found[pair] for pair in pairs}


def _plans(pairs: Sequence[Pair]) -> list[Plan]:
    """As few plans as hold every pair, each of one technique; a module and what is inside it never share one."""
    plans: list[tuple[Technique, dict[str, Technique]]] = []
    for site, technique in pairs:
        for its, sites in plans:
            if its == technique and not any(contains(site, other) or contains(other, site) for other in sites):
                sites[site] = technique
                break
        else:
            plans.append((technique, {site: technique}))
    return [Plan(sites) for _, sites in plans]


class _Watch:
    """Takes the place of a cell's operation and compares the weight that it is handed with the one that the cell got,
    in the cell's first forward."""

    def __init__(self, cell: Cell, site: Site, weight: Operand) -> None:
        self.kind = site.kind
        self.slot, self.argument = site.operands.index(weight), weight.argument
        self.norm = cell.norm
        self.op = cell.op
        self.forwards = 0
        self.weight: Tensor | None = None
        self.error: WeightError | None = None
        self.reason = "its cell hands the operation no weight: what it computes with cannot be seen"
        cell.register_forward_pre_hook(self._before)
        cell.op = self

    def _before(self, cell: nn.Module, operands: tuple[Any, ...]) -> None:
        self.forwards += 1
        self.weight = operands[self.slot] if self.forwards == 1 else None

    def __call__(self, *operands: Any, **rest: Any) -> Any:
        rounded = operands[self.slot] if self.slot < len(operands) else rest.get(self.argument)
        if self.weight is not None and isinstance(rounded, Tensor):
            if self.error is not None:
                self.error, self.weight = None, None
                self.reason = "its cell computes with several weights one after another"
            elif rounded.shape != self.weight.shape:
                self.reason = f"its cell computes with a weight of shape {list(rounded.shape)}, another than its own"
            else:
                self.error = self._compare(self.weight.detach().double(), rounded.detach().double())
        return self.op(*operands, **rest)

    def _compare(self, weight: Tensor, rounded: Tensor) -> WeightError:
        """The error against the weight itself or, if the cell absorbs a normalisation, the weight with that folded in:
        a cell may also apply it behind, so it is the one that the result is nearer to."""
        plain = WeightError(_relative(rounded - weight, weight), float((rounded - weight).square().sum()))
        factor = self._factor(weight)
        if factor is None:
            return plain
        folded = weight * factor
        relative = _relative(rounded - folded, folded)
        if plain.relative < relative:
            return plain
        own = torch.where(factor == 0, 0.0, (rounded - folded) / factor)
        return WeightError(relative, float(own.square().sum()))

    def _factor(self, weight: Tensor) -> Tensor | None:
        """What the absorbed normalisation multiplies the weight by, shaped to broadcast along it."""
        if not self.norm:
            return None
        module: Any = self.norm[0]
        factor, _ = folded_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        axis = 1 if self.kind.startswith("conv_transpose") else 0
        if weight.shape[axis] != len(factor):  # a grouped transposed convolution
            return None
        along = [1] * weight.dim()
        along[axis] = -1
        return factor.detach().double().reshape(along)


@dataclass
class _Sums:
    """Of one operand over the calls of its site: squared error, greatest magnitude, how many numbers."""

    squares: float = 0.0
    peak: float = 0.0
    count: int = 0

    def add(self, error: Tensor, x: Tensor) -> None:
        self.squares += float(error.square().sum())
        self.peak = max(self.peak, float(x.abs().max())) if x.numel() else self.peak
        self.count += x.numel()

    @property
    def relative(self) -> float:
        if not self.squares or not self.count:
            return 0.0
        return math.sqrt(self.squares / self.count) / self.peak if self.peak else math.inf


def _relative(error: Tensor, x: Tensor) -> float:
    sums = _Sums()
    sums.add(error, x)
    return sums.relative


@dataclass
class _Reader:
    """How one pair reads: its quantizers, and the sums of each operand that has one."""

    quantizers: tuple[TensorQuantizer | None, ...]
    sums: dict[int, _Sums] = field(default_factory=dict)

    def see(self, operands: Sequence[Tensor]) -> None:
        for index, (x, quantizer) in enumerate(zip(operands, self.quantizers, strict=False)):
            if quantizer is not None:
                exact = x.detach().double()
                self.sums.setdefault(index, _Sums()).add(quantizer(x).detach().double() - exact, exact)


def _operand_errors(
    model: nn.Module, task: Task, reading: Mapping[Pair, tuple[TensorQuantizer | None, ...]], meter: Meter
) -> dict[Pair, float]:
    """The error of what each pair reads in the float network, summed over its operands; unseen pairs are left out."""
    inputs = first_inputs(task.calibration)
    net = network(model, inputs, forward=task.forward, names=dict.fromkeys(site for site, _ in reading))
    readers: dict[str, dict[Pair, _Reader]] = {}
    for pair, quantizers in reading.items():
        if pair[0] in net.record.sites:
            readers.setdefault(pair[0], {})[pair] = _Reader(quantizers)

    def see(name: str, operands: tuple[Tensor, ...], output: Tensor) -> None:
        for reader in readers[name].values():
            reader.see(operands)

    meter.forwards += batch_size(inputs)
    with torch.no_grad():
        call(watched(net, readers, see), inputs, net.forward)
    every = {pair: reader for those in readers.values() for pair, reader in those.items()}
    return {pair: sum(sums.relative for sums in reader.sums.values()) for pair, reader in every.items() if reader.sums}
