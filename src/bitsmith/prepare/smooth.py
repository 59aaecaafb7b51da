"""SmoothQuant."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.network import Network
from ..numerics.quantizer import Quantizer
from ..numerics.ranges import qparams
from ..plan import Plan
from ..site import Format
from ..technique import Step
from ._layers import Layer, layers, observe
from ._links import Link, find_links, move, reader_range
from ._multiplied import confirmed, multiply_input

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
_ROWS = 1024  # inputs kept of each group to compare values of alpha
_LEAST = 1e-5  # no factor is smaller: a channel that is nearly silent stays quantizable

_IN_FLOAT = frozenset(("layer_norm", "gelu", "silu", "tanh", "sigmoid", "mish", "elu"))
"""What runtimes compute in float between integer layers: a multiplication behind it breaks no integer chain."""


@dataclass(frozen=True)
class SmoothQuant(Step):
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, eq. 4): outliers move from activations into weights.

    Channel j of what several linear layers read is divided by ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``, and
    input channel j of their weights multiplied by it: X over the calibration data, W over all the readers. The factor
    goes into the layer normalisation in front, or into a linear layer in front: over the weighted mean of an attention
    (values -> output projection), ReLU, or nothing. It is exact and adds no operation.

    ``alpha`` in [0, 1]; None: for each group the value of ``ALPHAS``, or no change, whose simulated output is closest
    to the float one.

    ``multiply``: where nothing in front can take the factor, multiply the layer's input by ``1 / s``, an operation more
    for each layer. So also behind GELU, and behind a normalisation that something else reads as well (the residual
    addition of post-norm blocks, as in BERT). Only behind what is computed in float in any case, and where the layer is
    a module of its own, which gets a buffer ``input_factor``.

    Groups without a reader that the plan gives integer activations are left alone: :meth:`groups` tells which are
    taken, and why others are not. Where there is no group nothing changes.
    """

    keeps_function: ClassVar[bool] = True

    alpha: float | None = 0.5
    multiply: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"SmoothQuant(alpha={self.alpha}): must be in [0, 1], or None to choose it for each group")

    def groups(self, net: Network, plan: Plan) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Which linear layers are smoothed behind each normalisation or layer, and why other ones are not."""
        links, refused = _links(net, plan, self.multiply)
        return {link.source: tuple(layer.site.name for layer, _ in link.readers) for link in links}, refused

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        links, _ = _links(net, plan, self.multiply)
        if not links:
            return net
        for link, seen in zip(links, _observed(net, links, data, self.alpha is None), strict=True):
            if not seen.peaks.isfinite().all():  # calibration says what is not
                continue
            if self.alpha is None:
                factor = _best(net, plan, link, seen)
            else:
                factor = _factor(seen.peaks, _weight_range(net, link), self.alpha)
            if factor is not None:
                move(net.model, link, factor)
                for layer, _ in () if link.scaled else link.readers:
                    multiply_input(net.model.get_submodule(layer.site.path), 1 / factor)
        return net.with_model(net.model)


def _links(net: Network, plan: Plan, multiply: bool) -> tuple[list[Link], dict[str, str]]:
    links, refused = find_links(net)
    kept = []
    refused = {name: why for name, why in refused.items() if net.record.sites[name].kind in ("layer_norm", "linear")}
    for link in links:
        if net.record.sites[link.source].kind not in ("layer_norm", "linear"):
            continue
        if any(layer.site.kind != "linear" or width != 1 for layer, width in link.readers):
            refused[link.source] = "not only linear layers read it, channel by channel"
        elif all(_format(plan, layer) is None for layer, _ in link.readers):
            refused[link.source] = "the plan gives none of its readers integer activations"
        else:
            kept.append(link)
    if multiply:
        kept += _multiplied(net, plan, {layer.site.name for link in kept for layer, _ in link.readers})
    return kept, {name: why for name, why in refused.items() if name not in {link.source for link in kept}}


def _multiplied(net: Network, plan: Plan, taken: Set[str]) -> list[Link]:
    """A link for each tensor whose linear readers get a multiplication: nothing is scaled in front of it."""
    groups: dict[str, list[Layer]] = {}
    for name, layer in layers(net.record).items():
        tensor = net.record.tensors[layer.site.operands[0].tensor]
        source = net.record.sites.get(tensor.producer)
        if layer.site.kind != "linear" or name in taken or _format(plan, layer) is None:
            continue
        if source is not None and source.kind in _IN_FLOAT and not layer.site.operands[0].constant:
            groups.setdefault(source.name, []).append(layer)
    good = confirmed(net, [layer for group in groups.values() for layer in group])
    kept = {source: [layer for layer in group if layer.site.name in good] for source, group in groups.items()}
    return [
        Link(source, source, (), group[0].site.operands[1].shape[1], tuple((layer, 1) for layer in group))
        for source, group in kept.items()
        if group
    ]


def _format(plan: Plan, layer: Layer) -> Format | None:
    technique = plan.get(layer.site.name)
    return technique.reads(layer.site)[0] if technique is not None else None


def _weight_range(net: Network, link: Link) -> Tensor:
    weights = {layer.site.name: net.record.weights[layer.site.name, layer.slot] for layer, _ in link.readers}
    return reader_range(weights, link).double().cpu()


def _factor(peaks: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Eq. 4; 1 for a channel without values or weights."""
    used = (peaks > 0) & (weights > 0)
    one = torch.ones_like(peaks)
    factor = peaks.where(used, one) ** alpha / weights.where(used, one) ** (1 - alpha)
    return factor.clamp_min(_LEAST).where(used, one)


class _Seen:
    """What the readers of one group get: extremes of each channel (float64), and rows at an even stride."""

    def __init__(self, channels: int, keep: bool) -> None:
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.high = -self.low
        self.keep, self.stride, self.rows = keep, 1, torch.zeros(0, channels)

    @property
    def peaks(self) -> Tensor:
        return torch.maximum(self.high, -self.low)

    def update(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float().cpu()
        low, high = x.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low.double()), torch.maximum(self.high, high.double())
        if not self.keep:
            return
        self.rows = torch.cat([self.rows, x[:: self.stride]])
        while len(self.rows) > 2 * _ROWS:
            self.rows, self.stride = self.rows[::2].clone(), 2 * self.stride


def _observed(net: Network, links: list[Link], data: Any, keep: bool) -> list[_Seen]:
    first = [link.readers[0][0].site.name for link in links]
    seen = {name: _Seen(link.channels, keep) for name, link in zip(first, links, strict=True)}

    def see(name: str, operands: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name].update(operands[0])

    observe(net, seen, see, data)
    return list(seen.values())


def _best(net: Network, plan: Plan, link: Link, seen: _Seen) -> Tensor | None:
    """The factor whose simulated outputs are closest to the float ones; None if no change is."""
    weights = _weight_range(net, link)
    planned = [layer for layer, _ in link.readers if layer.site.name in plan.sites]
    best, chosen = _error(net, plan, planned, seen, torch.ones_like(weights)), None
    for alpha in ALPHAS:
        factor = _factor(seen.peaks, weights, alpha)
        error = _error(net, plan, planned, seen, factor)
        if error < best:
            best, chosen = error, factor
    return chosen


def _error(net: Network, plan: Plan, planned: list[Layer], seen: _Seen, factor: Tensor) -> float:
    """Squared error of the planned readers' outputs, each as a part of its power, with the factor moved."""
    total = 0.0
    low, high = float((seen.low / factor).min()), float((seen.high / factor).max())
    x = (seen.rows / factor).float()
    for layer in planned:
        name, technique = layer.site.name, plan.sites[layer.site.name]
        weight = net.record.weights[name, layer.slot].float().cpu()
        scaled = (weight * factor).float()
        record = dataclasses.replace(net.record, weights={**net.record.weights, (name, layer.slot): scaled})
        cell = technique.build(layer.site, record, torch.Generator().manual_seed(0)).eval()
        fmt = _format(plan, layer)
        quantizer = None if fmt is None else Quantizer(fmt, *qparams(low, high, fmt))
        cell.attach((quantizer, None), (quantizer is not None, False))
        with torch.no_grad():
            wanted = seen.rows @ weight.T
            got: Tensor = cell(x, scaled)
        total += float((got - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))
    return total
