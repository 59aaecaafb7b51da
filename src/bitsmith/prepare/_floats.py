"""What the float network makes of the first calibration batches: computed once for all plans of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._hash import hash_state, update
from ..data import call
from ..model.flow import tensors
from ..model.network import Network
from ._layers import first_inputs_of, layers, per_channel, watched

_KEPT = 2**27
"""So many bytes are kept at most; what is beyond is computed anew each time."""


@dataclass(frozen=True)
class FloatBatch:
    """``means``: of each layer's output, by site: (samples, channels), averaged over positions, before the activation.
    ``outputs``: the floating tensors that the network returns."""

    inputs: Any
    means: Mapping[str, Tensor]
    outputs: tuple[Tensor, ...]


def float_batches(net: Network, data: Any, samples: int) -> Iterator[FloatBatch]:
    """The first batches of a calibration loader that hold so many samples together; at least one."""
    names = tuple(layers(net.record))
    kept: dict[str, FloatBatch] = net.memo.setdefault(("float batches", hash_state(net.model), names), {})
    reference = None
    means: dict[str, Tensor] = {}

    def remember(name: str, operands: tuple[Tensor, ...], output: Tensor) -> None:
        means[name] = per_channel(output, net.record.sites[name]).clone()

    for inputs in first_inputs_of(data, samples):
        hasher = hashlib.sha256()
        update(hasher, inputs)
        key = hasher.hexdigest()
        found = kept.get(key)
        if found is None:
            reference = watched(net, names, remember) if reference is None else reference
            means.clear()
            with torch.no_grad():
                outputs = tensors(call(reference, inputs, net.forward))
            found = FloatBatch(None, dict(means), tuple(x.clone() for x in outputs if x.is_floating_point()))
            if sum(map(_bytes, (*kept.values(), found))) <= _KEPT:
                kept[key] = found
        yield FloatBatch(inputs, found.means, found.outputs)


def _bytes(batch: FloatBatch) -> int:
    return sum(tensor.nbytes for tensor in (*batch.means.values(), *batch.outputs))
