"""Where a factor per channel can move from one layer into the next without changing what the network computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import call
from ..model.intercept import instrument
from ..model.network import Network, duplicate
from ..model.replay import Call
from ..site import Record, Site
from ._layers import Layer, LayerHandler, channel_axis, layers, tensor_at

_CROSSED: Mapping[str, int] = {
    **dict.fromkeys(("relu", "leaky_relu", "mean"), 0),
    **dict.fromkeys((f"avg_pool{n}d" for n in (1, 2, 3)), 0),
    **dict.fromkeys((f"adaptive_avg_pool{n}d" for n in (1, 2, 3)), 0),
    # the values of an attention: each output channel is a weighted mean of one of theirs
    "matmul": 1,
    "scaled_dot_product_attention": 2,
}
"""``f(s x) = s f(x)`` for s > 0 in each channel of that operand. Not of ReLU6, GELU, sigmoid, ..."""


@dataclass(frozen=True)
class Link:
    """Channels that ``source`` makes and only ``readers`` see, with nothing but homogeneous functions in between.

    ``source``: a layer or a layer normalisation. ``at``: the site whose output is scaled (its batch normalisation if
    it has one). ``scaled``: state-dict keys of what is divided to scale it, along the first axis; () if the readers'
    inputs are multiplied instead.
    ``readers``: the layers, each with the neighbouring inputs that one channel becomes (flattened positions).
    """

    source: str
    at: str
    scaled: tuple[str, ...]
    channels: int
    readers: tuple[tuple[Layer, int], ...]


def find_links(net: Network) -> tuple[list[Link], dict[str, str]]:
    """The links in execution order, confirmed on the recorded example; and why other layers and normalisations with
    readers of their own have none, by site name."""
    record, found = net.record, layers(net.record)
    keys = norm_keys(net)
    links: list[Link] = []
    refused: dict[str, str] = {}
    for name, site in record.sites.items():
        try:
            links.append(_link(record, site, found, keys))
        except _NoLinkError as reason:
            if str(reason):
                refused[name] = str(reason)
    links, failed = _confirmed(net, links)
    return links, {**refused, **dict.fromkeys(failed, "its channels do not arrive at its readers as they left")}


class _NoLinkError(Exception):
    """Why a site starts no link; no reason where none could be expected."""


def _link(record: Record, site: Site, found: Mapping[str, Layer], keys: Mapping[str, tuple[str, ...]]) -> Link:
    if site.name in found:
        layer = found[site.name]
        at, channels = site.name, site.operands[1].shape[0]
        if site.fold is not None:
            at, scaled = site.fold.site, keys.get(site.fold.site, ())
            if not scaled:
                raise _NoLinkError("the normalisation behind it has no weight of its own to scale")
        else:
            scaled = tuple(key for key in (layer.key, layer.bias) if key)
            if site.bias and not layer.bias:
                raise _NoLinkError("its bias is used elsewhere too")
    elif site.kind == "layer_norm" and site.calls == 1:
        at, channels, scaled = site.name, site.out_shapes[0][-1], keys.get(site.name, ())
        if not scaled:
            raise _NoLinkError("it has no weight of its own to scale")
    else:
        raise _NoLinkError
    readers = {layer.site.name: layer for layer in _readers(record, record.sites[at].writes[0], found)}
    sized = []
    for layer in readers.values():
        inputs = _inputs(layer)
        if inputs % channels:
            raise _NoLinkError(f"{layer.site.name} reads {inputs} channels, not a multiple of {channels}")
        sized.append((layer, inputs // channels))
    return Link(site.name, at, scaled, channels, tuple(sized))


def _readers(record: Record, tensor: str, found: Mapping[str, Layer]) -> Iterator[Layer]:
    info = record.tensors[tensor]
    if info.is_output:
        raise _NoLinkError("it is an output of the model")
    for name in info.readers:
        site = record.sites.get(name)
        if site is None:
            raise _NoLinkError("it is read outside of any site")
        at = [index for index, operand in enumerate(site.operands) if operand.tensor == tensor and not operand.constant]
        if name in found and at == [0]:
            yield found[name]
        elif at == [_CROSSED.get(_homogeneous(site), -1)] and site.calls == 1 and len(site.writes) == 1:
            yield from _readers(record, site.writes[0], found)
        else:
            raise _NoLinkError(f"{name} ({site.kind}) reads it too")


def _homogeneous(site: Site) -> str:
    if site.kind == "clamp" and site.arguments.get("min") == 0 and site.arguments.get("max") is None:
        return "relu"
    if site.kind == "leaky_relu" and site.arguments.get("negative_slope", 0.01) < 0:
        return ""
    return site.kind


def _inputs(layer: Layer) -> int:
    return layer.site.operands[layer.slot].shape[1] * layer.groups


# -- scaling -----------------------------------------------------------------------------------------------------------


def source_range(weights: Mapping[str, Tensor], link: Link) -> Tensor:
    """The greatest magnitude among the source's (folded) weights for each of its channels: (C,)."""
    return weights[link.source].abs().flatten(1).amax(1)


def reader_range(weights: Mapping[str, Tensor], link: Link) -> Tensor:
    """The greatest magnitude of the readers' (folded) weights for each channel of the link: (C,)."""
    found = []
    for layer, width in link.readers:
        weight = weights[layer.site.name]
        per_input = weight.abs().reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(2).amax(2)
        found.append(per_input.reshape(link.channels, width).amax(1))
    return torch.stack(found).amax(0)


def scale_inputs(weight: Tensor, layer: Layer, factor: Tensor) -> Tensor:
    """The weight with each input channel multiplied by its factor, shape (inputs,)."""
    rows = factor.reshape(layer.groups, 1, weight.shape[1], *([1] * (weight.dim() - 2)))
    return (weight.reshape(layer.groups, -1, *weight.shape[1:]) * rows).reshape(weight.shape)


def move(model: nn.Module, link: Link, factor: Tensor) -> None:
    """Divide each channel of the source by its factor and multiply the readers' inputs by it, in place."""
    factor = factor.double()
    with torch.no_grad():
        for key in link.scaled:
            tensor = tensor_at(model, key)
            tensor.copy_(tensor.double() / factor.reshape(-1, *([1] * (tensor.dim() - 1))).to(tensor.device))
        for layer, width in link.readers:
            tensor = tensor_at(model, layer.key)
            spread = factor.repeat_interleave(width).to(tensor.device)
            tensor.copy_(scale_inputs(tensor.double(), layer, spread))


# -- looking -----------------------------------------------------------------------------------------------------------


class _Keys(LayerHandler):
    """Which parameters each normalisation is called with."""

    def __init__(self, net: Network, model: nn.Module) -> None:
        super().__init__(net)
        self.keys = {id(tensor): key for key, tensor in model.named_parameters()}
        self.found: dict[str, tuple[str, ...]] = {}
        self.watch(name for name, site in net.record.sites.items() if site.kind in ("batch_norm", "layer_norm"))

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = call.operation.bind(args, kwargs)
        tensors = [t for t in (given.get("weight"), given.get("bias")) if t is not None]
        keys = tuple(self.keys.get(id(t), "") for t in tensors)
        self.found[name] = keys if given.get("weight") is not None and all(keys) else ()
        return call.run(*args, **kwargs)


def norm_keys(net: Network) -> dict[str, tuple[str, ...]]:
    """State-dict keys of the weight (and bias) of every normalisation; () where it has none of its own. Found once for
    all plans of a network: steps change no structure."""
    known, of = net.memo.setdefault("norm keys", {}), tuple(net.record.sites)
    if of not in known:
        known[of] = _norm_keys(net)
    found: dict[str, tuple[str, ...]] = known[of]
    return found


def _norm_keys(net: Network) -> dict[str, tuple[str, ...]]:
    model = duplicate(net.model).eval()
    handler = _Keys(net, model)
    _run(net, model, handler)
    uses = Counter(key for keys in handler.found.values() for key in keys)
    uses.update(key for site in net.record.sites.values() for operand in site.operands for key in operand.parameters)
    return {
        name: keys
        for name, keys in handler.found.items()
        if net.record.sites[name].calls == 1 and all(uses[key] == 1 for key in keys)
    }


class _Probe(LayerHandler):
    """Puts a factor on each channel of every source, takes it off again at the readers, and sums what these see.

    A layout that changes in between (channels shuffled, flattened another way) gives other sums.
    """

    def __init__(self, net: Network, links: Sequence[Link], factors: Sequence[Tensor]) -> None:
        super().__init__(net)
        self.sources = {link.at: (link, factor) for link, factor in zip(links, factors, strict=True)}
        self.readers = {
            layer.site.name: (layer, factor.repeat_interleave(width))
            for link, factor in zip(links, factors, strict=True)
            for layer, width in link.readers
        }
        self.sums: dict[str, Tensor] = {}
        self.watch({*self.sources, *self.readers})

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operands, rest = call.operation.split(args, kwargs)
        if name in self.readers:
            layer, factor = self.readers[name]
            x = operands[0] / _along(factor, operands[0], layer.site.kind)
            axis = channel_axis(layer.site.kind, x.dim())
            self.sums[name] = x.double().abs().movedim(axis, 0).flatten(1).sum(1)
            operands = (x, *operands[1:])
            output = call.operation.compute(*operands, **rest)
        else:
            output = call.run(*args, **kwargs)
        if name in self.sources:
            link, factor = self.sources[name]
            kind = self.record_sites[link.source].kind
            output = output * _along(factor, output, "linear" if kind == "layer_norm" else kind)
        return output


def _confirmed(net: Network, links: Sequence[Link]) -> tuple[list[Link], list[str]]:
    """The links whose channels arrive as they left, and the sources of the others."""
    if not links:
        return [], []
    generator = torch.Generator().manual_seed(0)
    plain = [torch.ones(link.channels) for link in links]
    # factors that differ for every channel, so that no exchange of channels goes unseen
    mixed = [
        torch.linspace(-2, 2, n).exp()[torch.randperm(n, generator=generator)] for n in (len(ones) for ones in plain)
    ]
    sums = []
    for factors in (plain, mixed):
        model = duplicate(net.model).eval()
        probe = _Probe(net, links, factors)
        _run(net, model, probe)
        sums.append(probe.sums)
    expected, got = sums
    kept: list[Link] = []
    failed: list[str] = []
    for link in links:
        names = [layer.site.name for layer, _ in link.readers]
        same = all(
            bool(expected[name].any())
            and bool(expected[name].isfinite().all())  # calibration says what is not
            and torch.allclose(expected[name], got[name], rtol=1e-4, atol=1e-6 * float(expected[name].max()))
            for name in names
        )
        if same:
            kept.append(link)
        else:
            failed.append(link.source)
    return kept, failed


def _run(net: Network, model: nn.Module, handler: LayerHandler) -> None:
    instrument(model, handler, net.modules)
    with torch.no_grad():
        call(model, net.example, net.forward)


def _along(factor: Tensor, x: Tensor, kind: str) -> Tensor:
    axis = channel_axis(kind, x.dim())
    return factor.to(x).reshape(-1, *([1] * (x.dim() - 1 - axis)))
