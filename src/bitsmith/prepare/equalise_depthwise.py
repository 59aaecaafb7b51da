"""Channels of one range before depthwise convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.network import Network
from ..plan import Plan
from ..technique import PrepareError, Step
from ._layers import Layer, channel_axis, layers, observe
from ._links import find_links, move


@dataclass(frozen=True)
class EqualiseDepthwise(Step):
    """A scale per channel for what depthwise convolutions read, moved into the weights on both sides.

    Per-channel activation scales (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2) stop the fusions of integer
    kernels. Where the layer before and the depthwise one meet in a function with ``f(s x) = s f(x)`` the same follows
    without them: output channel i of the first is divided, and input channel i of the second multiplied, by
    ``s_i = r_i / max(r)``; r is the greatest magnitude of the channel on the calibration data. Both layers have a
    weight scale per output channel, which takes ``s_i`` in: nothing is lost there, and all channels fill the range.

    Channels are raised by no more than ``limit``. Links are found as :class:`Equalise` finds them (not over ReLU6);
    the function is kept up to float rounding, and where there is no such layer nothing changes.
    """

    keeps_function: ClassVar[bool] = True
    values_only: ClassVar[bool] = True

    limit: float = 64.0

    def __post_init__(self) -> None:
        if not self.limit > 1.0:
            raise ValueError(f"EqualiseDepthwise(limit={self.limit}): must be above 1")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        if not any(_depthwise(layer) for layer in layers(net.record).values()):
            return net
        links = [link for link in find_links(net)[0] if all(_depthwise(layer) for layer, _ in link.readers)]
        watched = {link.readers[0][0].site.name: link for link in links if link.readers[0][1] == 1}
        ranges: dict[str, Tensor] = {}

        def see(name: str, operands: tuple[Any, ...], output: Any) -> None:
            x = operands[0].detach()
            axis = channel_axis(net.record.sites[name].kind, x.dim())
            seen = x.movedim(axis, 0).flatten(1).abs().amax(1)
            ranges[name] = torch.maximum(ranges[name], seen) if name in ranges else seen

        observe(net, watched, see, data)
        unseen = [name for name in watched if name not in ranges]
        if unseen:
            raise PrepareError(
                f"{self}: the calibration data never reached {', '.join(unseen[:5])}; give data like the example"
            )
        for name, link in watched.items():
            greatest = ranges[name].double().cpu()
            if float(greatest.max()) > 0:
                move(net.model, link, (greatest / greatest.max()).clamp_min(1.0 / self.limit))
        return net.with_model(net.model) if watched else net


def _depthwise(layer: Layer) -> bool:
    """One input channel to a filter; a linear layer has no groups."""
    return layer.groups > 1 and layer.site.weight is not None and layer.site.weight.shape[1] == 1
