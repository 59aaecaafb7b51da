"""The tensors of a network that trains: taken out, kept, put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def tensors_of(net: nn.Module) -> State:
    """All parameters and buffers by name, also those outside ``state_dict()``, each once: the tensors themselves."""
    return {name: tensor.detach() for name, tensor in (*net.named_parameters(), *net.named_buffers())}


def copied(net: nn.Module, into: State | None = None) -> State:
    """A copy of :func:`tensors_of`, in the memory of ``into`` where it fits."""
    found: State = {}
    for name, tensor in tensors_of(net).items():
        old = None if into is None else into.get(name)
        same = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
        found[name] = old.copy_(tensor) if old is not None and same else tensor.clone()
    return found


def put(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy such values into the network, whose parameters stay the same objects.

    Through ``load_state_dict``, so that a module that keeps something beside its buffers (a quantizer its scale) is
    told. Raises ``KeyError`` for other names.
    """
    own = tensors_of(net)
    if own.keys() != values.keys():
        raise KeyError(f"the network has other tensors: {', '.join(sorted(own.keys() ^ values.keys())[:5])}")
    stored = net.state_dict().keys() & values.keys()
    net.load_state_dict({name: values[name] for name in stored}, strict=False)
    with torch.no_grad():
        for name in own.keys() - stored:
            own[name].copy_(values[name])


@contextmanager
def with_values(net: nn.Module, values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The network holds these values inside, and its own again afterwards; None: it stays as it is."""
    if values is None:
        yield
        return
    kept = copied(net)
    put(net, values)
    try:
        yield
    finally:
        put(net, kept)
