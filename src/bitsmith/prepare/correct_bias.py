"""Bias correction by measured means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data import call
from ..model.apply import build, calibrated
from ..model.flow import tensors
from ..model.network import Network, duplicate
from ..numerics.weights import folded_affine
from ..plan import Plan
from ..technique import Cell, Step
from ._floats import float_batches
from ._layers import (
    Layer,
    channel_axis,
    layers,
    per_channel,
    relative_errors,
    tensor_at,
    watched_cells,
)
from ._links import norm_keys

_COMPARED = 4
"""One of so many samples is seen once more, to compare."""


@dataclass(frozen=True)
class CorrectBias(Step):
    """Empirical bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2; measured as in its appendix D).

    For every layer of the plan the mean over samples and positions of float output minus simulated output, per output
    channel and before the activation, is added to its bias (to that of the batch normalisation behind it, if it folds).
    Both networks see the same batches of at most ``samples`` calibration samples in all. The simulated one is corrected
    while it runs, so each layer is measured behind layers that are corrected already, in one pass.

    Means of few samples are uncertain: the correction of each channel is shrunk by ``t / (t + v)``, with v the variance
    of its mean over the samples and t that of the true corrections of the layer (empirical Bayes; Efron and Morris
    1973, doi:10.1080/01621459.1973.10481350). With one sample nothing can be known, and nothing is corrected.

    A mean over positions can mislead: that of sentences counts their padding. So the corrections are kept only if the
    simulated outputs of the whole network come closer to the float ones, as a part of each sample's power, on the first
    quarter of the samples.

    Ranges stay those of the network before: a correction answers the rounding that they cause. So it belongs behind
    the other steps. Layers are left alone that have no bias and no module of torch's own that could get one.
    """

    values_only: ClassVar[bool] = True

    samples: int = 256

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"CorrectBias(samples={self.samples}): a mean with its uncertainty needs at least 2")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        places = _places(net, plan)
        if not places:
            return net
        net = calibrated(net, plan, data)
        statistics = net.record.statistics
        model, simulation = duplicate(net.model), build(net, plan, data).eval()
        for name, shift in _shifts(net, simulation, data, places, self.samples).items():
            _add(model, places[name], shift)
        corrected = net.with_model(model).with_statistics(statistics)
        candidates = simulation, build(corrected, plan, data).eval()
        before, after = _output_errors(net, candidates, data, max(self.samples // _COMPARED, 2))
        return corrected if after < before else net


@dataclass(frozen=True)
class _Place:
    """Where the correction of a layer goes: ``key`` holds the bias behind everything that is linear, or its module
    gets one."""

    layer: Layer
    key: str
    folded: bool


def _places(net: Network, plan: Plan) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    norms = norm_keys(net)
    for name, layer in layers(net.record).items():
        if name not in plan.sites:
            continue
        site = layer.site
        keys = norms.get(site.fold.site, ()) if site.fold is not None else ()
        if len(keys) == 2:
            found[name] = _Place(layer, keys[1], True)
        elif layer.bias:
            found[name] = _Place(layer, layer.bias, False)
        elif not site.bias and _can_get_bias(net.model, layer):
            found[name] = _Place(layer, "", False)
    return found


def _can_get_bias(model: nn.Module, layer: Layer) -> bool:
    """Whether the layer is a module of torch's own, whose forward passes its ``bias`` on."""
    module = model.get_submodule(layer.site.path)
    plain = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return plain and layer.key == f"{layer.site.path}.weight" and module.bias is None


@dataclass
class _Sums:
    """Differences seen so far, per channel: how many samples, their sum and their sum of squares, float64."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, difference: Tensor) -> None:
        difference = difference.double()
        self.count += len(difference)
        self.total = self.total + difference.sum(0)
        self.squares = self.squares + difference.square().sum(0)

    def shrunk(self) -> Tensor:
        """The mean of each channel, shrunk by its own uncertainty against the spread of all."""
        mean = self.total / self.count
        if self.count < 2:
            return torch.zeros_like(mean)
        variance = (self.squares / self.count - mean.square()).clamp_min(0) / (self.count - 1)
        spread = (mean.square() - variance).mean().clamp_min(0)
        whole = spread + variance
        return mean * torch.where(whole > 0, spread / whole.where(whole > 0, torch.ones_like(whole)), 0.0)


def _shifts(
    net: Network, simulation: nn.Module, data: Any, places: Mapping[str, _Place], samples: int
) -> dict[str, Tensor]:
    """The correction of each layer's output, behind the normalisation that folds into it."""
    sums = {name: _Sums() for name in places}
    affine = {name: folded_affine(*net.record.folds[name]) for name in places if name in net.record.folds}
    means: dict[str, Tensor] = {}

    def correct(name: str, cell: Cell, operands: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name not in means:  # the float network went another way
            return output
        site = places[name].layer.site
        factor, shift = affine.get(name, (None, None))
        got, wanted = per_channel(output, site).double(), means.pop(name).double()
        if factor is not None and shift is not None:
            wanted = wanted * factor + shift
            got = got if cell.norm else got * factor + shift
        sums[name].add(wanted - got)
        found = sums[name].shrunk()
        if factor is not None and not cell.norm:
            found = _before(found, factor)
        axis = channel_axis(site.kind, output.dim())
        return output + found.to(output).reshape(-1, *([1] * (output.dim() - 1 - axis)))

    with watched_cells(simulation, places, correct):
        for batch in float_batches(net, data, samples):
            means.clear()
            means.update(batch.means)
            with torch.no_grad():
                call(simulation, batch.inputs, net.forward)
    return {
        name: _before(found.shrunk(), affine[name][0]) if name in affine and not places[name].folded else found.shrunk()
        for name, found in sums.items()
        if found.count
    }


def _before(shift: Tensor, factor: Tensor) -> Tensor:
    """What must be added in front of a normalisation for ``shift`` to come out behind it; 0 for a dead channel."""
    used = factor != 0
    return torch.where(used, shift / factor.where(used, torch.ones_like(factor)), 0.0)


def _output_errors(net: Network, simulations: Sequence[nn.Module], data: Any, samples: int) -> list[float]:
    """How far the outputs of each simulation lie from the float ones of ``net``: squared error / power, the sum over
    samples and outputs."""
    errors = [0.0] * len(simulations)
    for batch in float_batches(net, data, samples):
        for index, simulation in enumerate(simulations):
            with torch.no_grad():
                got = [x for x in tensors(call(simulation, batch.inputs, net.forward)) if x.is_floating_point()]
            pairs = zip(got, batch.outputs, strict=True)
            errors[index] += sum(float(relative_errors(a, b).sum()) for a, b in pairs)
    return errors


def _add(model: nn.Module, place: _Place, shift: Tensor) -> None:
    if not place.key:
        weight = tensor_at(model, place.layer.key)
        module = model.get_submodule(place.layer.site.path)
        module.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        return
    tensor = tensor_at(model, place.key)
    with torch.no_grad():
        tensor.add_(shift.to(tensor))
