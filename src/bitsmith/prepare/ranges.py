"""Range methods chosen tensor by tensor and weight by weight, by the error that they cause."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..data import call
from ..model.calibrate import calibrate
from ..model.flow import tensors as tensors_of
from ..model.intercept import instrument
from ..model.network import Network, duplicate, input_names
from ..model.replay import Call
from ..numerics.quantizer import Quantizer
from ..numerics.ranges import limits, qparams
from ..numerics.weights import folded_affine
from ..operations import ACTIVATIONS, OPERATIONS
from ..plan import Plan
from ..site import Format, Range, Record, Site
from ..technique import Cell, Technique
from ._layers import LayerHandler, channel_axis, first_inputs_of, relative_errors

ACTIVATION_RANGES = (Range(), Range("percentile", 99.99), Range("mse"))
WEIGHT_RANGES = (Range(), Range("mse"))
INPUT_RANGES = (*ACTIVATION_RANGES, Range("percentile", 99.5), Range("entropy"))
"""Features of unlike scale in one input (cepstral coefficients) ask for narrower ranges than activations do."""
TOKEN_GAIN = 0.7
"""What another method has to leave of the first one's error at layers of tokens. The error is taken at the readers, and
says nothing of what layers behind them make of it: on MiniLM's validation data clipping looked cheaper than it was."""


def choose_ranges(
    net: Network,
    plan: Plan,
    data: Any,
    candidates: Sequence[Range] = ACTIVATION_RANGES,
    weight_candidates: Sequence[Range] = WEIGHT_RANGES,
    samples: int = 32,
    input_candidates: Sequence[Range] = INPUT_RANGES,
    token_gain: float = TOKEN_GAIN,
) -> Plan:
    """The plan with the range methods that disturb the float network least on the calibration ``data``.

    For every activation tensor and candidate: the squared error of what its readers make of it (behind their
    normalisation and ReLU) when it alone is quantized, as a part of the output's power. Tensors that one technique
    reads share its method: that with the least sum. For every weight the same at its own output. Ties keep the earlier
    candidate; no candidates leave that kind alone. At layers of tokens (linear layers and matrix products with three
    axes or more) another method has to come below ``token_gain`` of the first one's error. For an input of the network
    the error is that of the network's own outputs: what one layer makes of it says too little about what matters in it.

    Two passes of the float network: over all ``data`` for histograms, and over the first ``samples`` samples (at least
    one batch) for errors. Sets the fields ``range``, ``weight_range`` and the range of ``out`` of techniques that have
    them; techniques without stay, and so does what is read together with theirs. A group of the plan whose members
    come to differ is no group any more.
    """
    tensors = _Tensors(plan, net.record)
    quantizers: dict[str, dict[Range, Quantizer]] = defaultdict(dict)
    if candidates:
        wanted = [
            (tensor, dataclasses.replace(fmt, range=method))
            for tensor, fmt in tensors.formats.items()
            for method in candidates
        ]
        statistics = calibrate(net, wanted, data)
        net = net.with_statistics(statistics)  # the inputs' histograms are among them
        for tensor, fmt in wanted:
            scale, zero_point = qparams(*limits(statistics[tensor], fmt), fmt)
            quantizers[tensor][fmt.range] = Quantizer(fmt, scale, zero_point)
    model = duplicate(net.model).eval()
    weights = _weight_cells(net, model, plan, weight_candidates)
    meter = _Meter(net, plan, quantizers, tensors, weights)
    instrument(model, meter, net.modules)
    with torch.no_grad():
        for inputs in first_inputs_of(data, samples):
            call(model, inputs, net.forward)
    chosen = tensors.choose(candidates, meter.tensor_errors, token_gain) if candidates else {}
    for tensor, fmt in tensors.formats.items() if input_candidates else ():
        if tensor.startswith("@") and tensors.alone(tensor):
            chosen[tensor] = _input_range(net, tensor, fmt, input_candidates, data, samples)
    sites = {}
    for name, technique in plan.sites.items():
        site = net.record.sites[name]
        changes: dict[str, Any] = {}
        read = [tensor for tensor in _read(technique, site) if tensor in chosen]
        if read:
            changes["range"] = chosen[read[0]]
        out = getattr(technique, "out", None)
        if isinstance(out, Format) and site.tail in chosen:
            changes["out"] = dataclasses.replace(out, range=chosen[site.tail])
        if name in weights:
            changes["weight_range"] = min(weights[name], key=lambda method: meter.weight_errors[name, method])
        sites[name] = dataclasses.replace(technique, **changes) if changes else technique  # type: ignore[type-var]
    groups = tuple(group for group in plan.groups if len({sites.get(name) for name in group}) == 1)
    return plan.replace(sites=sites, groups=groups)


def _input_range(net: Network, tensor: str, fmt: Format, candidates: Sequence[Range], data: Any, samples: int) -> Range:
    """The method for one input with the least error at the network's outputs."""
    wanted = [(tensor, dataclasses.replace(fmt, range=method)) for method in candidates]
    statistics = calibrate(net, wanted, data)[tensor]
    quantizers = [Quantizer(f, *qparams(*limits(statistics, f), f)) for _, f in wanted]
    model = duplicate(net.model).eval()
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    with torch.no_grad():
        for inputs in first_inputs_of(data, samples):
            given = input_names(net.model, inputs).get(tensor.removeprefix("@"))
            if given is None:
                continue
            exact = [y.clone() for y in tensors_of(call(model, inputs, net.forward)) if y.is_floating_point()]
            for index, quantizer in enumerate(quantizers):
                rounded = quantizer(given)
                changed = tree_map(lambda t, new=rounded, old=given: new if t is old else t, inputs)
                made = [y for y in tensors_of(call(model, changed, net.forward)) if y.is_floating_point()]
                errors[index] += sum(float(relative_errors(a, b).sum()) for a, b in zip(made, exact, strict=True))
    return candidates[int(errors.argmin())]


def _read(technique: Technique, site: Site) -> dict[str, Format]:
    """The tensors that the technique reads in an integer format."""
    formats = technique.reads(site)
    return {operand.tensor: fmt for operand, fmt in zip(site.operands, formats, strict=True) if fmt is not None}


class _Tensors:
    """The quantized tensors of a plan whose method may be chosen, and which of them must agree."""

    def __init__(self, plan: Plan, record: Record) -> None:
        self.formats: dict[str, Format] = {}
        self.leader: dict[str, str] = {}
        self.tokens: set[str] = set()
        fixed: set[str] = set()
        for name, technique in plan.sites.items():
            site = record.sites[name]
            read = _read(technique, site)
            for tensor, fmt in read.items():
                if self.formats.setdefault(tensor, fmt) != fmt:  # two formats of one tensor: as the plan says
                    fixed.add(tensor)
                self._join(next(iter(read)), tensor)
                if site.kind in ("linear", "matmul") and len(site.operands[0].shape) > 2:
                    self.tokens.add(tensor)
            out = technique.writes(site)
            if out is not None and self.formats.setdefault(site.tail, out) != out:
                fixed.add(site.tail)
            if not isinstance(getattr(technique, "range", None), Range):
                fixed.update(read)
            if out is not None and not isinstance(getattr(technique, "out", None), Format):
                fixed.add(site.tail)
        held = {self._find(tensor) for tensor in fixed}
        self.formats = {tensor: fmt for tensor, fmt in self.formats.items() if self._find(tensor) not in held}

    def _find(self, tensor: str) -> str:
        while (above := self.leader.get(tensor, tensor)) != tensor:
            tensor = above
        return tensor

    def alone(self, tensor: str) -> bool:
        """Whether no other tensor must have its method."""
        return all(self._find(other) != self._find(tensor) for other in self.formats if other != tensor)

    def _join(self, one: str, other: str) -> None:
        self.leader[self._find(other)] = self._find(one)

    def choose(
        self, candidates: Sequence[Range], errors: Mapping[tuple[str, Range], float], token_gain: float
    ) -> dict[str, Range]:
        """The candidate with the least sum over the tensors that must agree, by tensor. Where one of these is of
        tokens, the first one unless the sum is below ``token_gain`` of its own."""
        sums: dict[tuple[str, Range], float] = defaultdict(float)
        for tensor in self.formats:
            for method in candidates:
                sums[self._find(tensor), method] += errors.get((tensor, method), 0.0)
        careful = {self._find(tensor) for tensor in self.tokens if tensor in self.formats}
        best = {}
        for leader in {self._find(tensor) for tensor in self.formats}:
            if leader in careful:
                sums[leader, candidates[0]] *= token_gain
            best[leader] = min(candidates, key=lambda method: sums[leader, method])
        return {tensor: best[self._find(tensor)] for tensor in self.formats}


def _weight_cells(
    net: Network, model: nn.Module, plan: Plan, candidates: Sequence[Range]
) -> dict[str, dict[Range, Cell]]:
    """For every weight with a choice, the cell of each candidate: weights on their grid, activations in float."""
    found: dict[str, dict[Range, Cell]] = {}
    for name, technique in plan.sites.items():
        site = net.record.sites[name]
        if site.weight is None or not isinstance(getattr(technique, "weight_range", None), Range):
            continue
        if (name, site.operands.index(site.weight)) in net.record.grids:
            continue  # a step has fixed its scales
        for method in candidates:
            one = dataclasses.replace(technique, weight_range=method)  # type: ignore[type-var]
            cell = one.build(site, net.record, torch.Generator().manual_seed(0)).eval()
            norm = (model.get_submodule(site.fold.module),) if site.fold is not None and cell.folds else ()
            cell.attach((None,) * len(site.operands), (False,) * len(site.operands), norm)
            found.setdefault(name, {})[method] = cell
    return found


class _Meter(LayerHandler):
    """Computes every planned site once more for each candidate, and adds up how far the outputs lie from the float
    ones. ``tensor_errors``, ``weight_errors``: (tensor or site, method) -> squared error / power, summed over readers.
    """

    def __init__(
        self,
        net: Network,
        plan: Plan,
        quantizers: Mapping[str, Mapping[Range, Quantizer]],
        tensors: _Tensors,
        weights: Mapping[str, Mapping[Range, Cell]],
    ) -> None:
        super().__init__(net)
        self.quantizers, self.weights = quantizers, weights
        self.finish = {name: _finish(net.record, net.record.sites[name]) for name in plan.sites}
        self.read: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name, technique in plan.sites.items():
            site = net.record.sites[name]
            for index, fmt in enumerate(technique.reads(site)):
                if fmt is not None and site.operands[index].tensor in tensors.formats:
                    self.read[name].append((index, site.operands[index].tensor))
        everywhere = {tensor for found in self.read.values() for _, tensor in found}
        # what nobody reads in integers is judged where it is written
        self.written = {
            net.record.tensors[tensor].producer: tensor for tensor in tensors.formats if tensor not in everywhere
        }
        self.sums: dict[tuple[str, str, Range], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.watch({*self.read, *self.written, *weights})

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given, rest = call.operation.split(args, kwargs)
        rest.pop("inplace", None)
        wanted: Tensor | None = None
        if name in self.read or name in self.weights:
            finish = self.finish[name]
            wanted = finish(call.operation.compute(*given, **rest), False)
            where = [position for position, value in enumerate(given) if isinstance(value, Tensor)]
            for index, tensor in self.read.get(name, ()):
                for method, quantizer in self.quantizers[tensor].items():
                    other = list(given)
                    other[where[index]] = quantizer(given[where[index]])
                    self._add(name, tensor, method, finish(call.operation.compute(*other, **rest), False), wanted)
            for method, cell in self.weights.get(name, {}).items():
                self._add(name, "", method, finish(cell(*given, **rest), bool(cell.norm)), wanted)
        output = call.run(*args, **kwargs)
        if name in self.written:
            tensor = self.written[name]
            for method, quantizer in self.quantizers[tensor].items():
                self._add(name, tensor, method, quantizer(output), output)
        return output

    def _add(self, name: str, tensor: str, method: Range, got: Tensor, wanted: Tensor) -> None:
        found = self.sums[name, tensor, method]
        errors = relative_errors(got, wanted)
        found[0] += float(errors.sum())
        found[1] += len(errors)

    @property
    def tensor_errors(self) -> dict[tuple[str, Range], float]:
        errors: dict[tuple[str, Range], float] = defaultdict(float)
        for (_, tensor, method), (error, count) in self.sums.items():
            if tensor:
                errors[tensor, method] += error / count
        return errors

    @property
    def weight_errors(self) -> dict[tuple[str, Range], float]:
        return {(name, method): error for (name, tensor, method), (error, _) in self.sums.items() if not tensor}


def _finish(record: Record, site: Site) -> Callable[[Tensor, bool], Tensor]:
    """What follows a site before anybody reads it: the normalisation that folds (unless the flag says that it is in
    already) and the ReLU-like function."""
    affine = folded_affine(*record.folds[site.name]) if site.name in record.folds else None
    ends = [record.sites[name] for name in site.epilogue if record.sites[name].kind in ACTIVATIONS]

    def finish(x: Tensor, folded: bool) -> Tensor:
        if affine is not None and not folded:
            shape = [1] * x.dim()
            shape[channel_axis(site.kind, x.dim())] = -1
            x = x * affine[0].reshape(shape) + affine[1].reshape(shape)
        for end in ends:
            rest = {key: value for key, value in end.arguments.items() if key != "inplace"}
            x = OPERATIONS[end.kind].compute(x, **rest)
        return x

    return finish
