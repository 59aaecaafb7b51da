"""Cross-layer equalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.network import Network
from ..plan import Plan
from ..technique import Step
from ._layers import folded_weight, layers
from ._links import find_links, move, reader_range, scale_inputs, source_range

_DONE = 1e-3  # greatest change of a factor's logarithm in a round that still counts as one


@dataclass(frozen=True)
class Equalise(Step):
    """Cross-layer equalisation (Nagel et al. 2019, arXiv:1906.04721, section 4.1, eq. 11).

    Between two layers that meet in a function with ``f(s x) = s f(x)``, output channel i of the first is divided by
    ``s_i = sqrt(r1_i r2_i) / r2_i`` and input channel i of the second multiplied by it, so that both have the range
    ``sqrt(r1_i r2_i)``; r is the greatest magnitude of a channel's weights, batch normalisation folded in (its weight
    and bias carry the factor). Repeated over all pairs until nothing moves, at most ``iterations`` times.

    A pair is a convolution or linear layer (also grouped and depthwise) and all that read it, over ReLU, leaky ReLU,
    average and maximum pooling, flattening, or as the values of an attention; not over a residual addition, and not
    over functions that are not homogeneous: ReLU6, hardtanh, GELU, SiLU, sigmoid. Channels without weights on one side
    stay. The function is kept up to float rounding; where no pair is found nothing changes.
    """

    keeps_function: ClassVar[bool] = True
    values_only: ClassVar[bool] = True

    iterations: int = 20

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"Equalise(iterations={self.iterations}): must be 1 or more")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        found = layers(net.record)
        links = [link for link in find_links(net)[0] if link.source in found]
        if not links:
            return net
        names = {link.source for link in links} | {layer.site.name for link in links for layer, _ in link.readers}
        weights = {name: folded_weight(net.record, found[name]).double().cpu() for name in names}
        total = [torch.ones(link.channels, dtype=torch.float64) for link in links]
        for _ in range(self.iterations):
            change = 0.0
            for index, link in enumerate(links):
                factor = _factor(source_range(weights, link), reader_range(weights, link))
                weights[link.source] /= factor.reshape(-1, *([1] * (weights[link.source].dim() - 1)))
                for layer, width in link.readers:
                    name = layer.site.name
                    weights[name] = scale_inputs(weights[name], layer, factor.repeat_interleave(width))
                total[index] *= factor
                change = max(change, float(factor.log().abs().max()))
            if change < _DONE:
                break
        for link, factor in zip(links, total, strict=True):
            move(net.model, link, factor)
        return net.with_model(net.model)


def _factor(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 11; 1 for a channel that one side does not use."""
    used = (first > 0) & (second > 0)
    return torch.where(used, (first / second.where(used, torch.ones(()))).sqrt(), torch.ones((), dtype=first.dtype))
