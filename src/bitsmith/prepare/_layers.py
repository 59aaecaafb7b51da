"""What prepare steps share: the layers whose weights they may change, and what passes through them."""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batch_size, call, items
from ..model.apply import additions_of
from ..model.intercept import instrument
from ..model.keys import encode_key
from ..model.network import Network, duplicate
from ..model.replay import Call, Names
from ..numerics.weights import folded_affine
from ..site import Record, Site
from ..technique import Cell

KINDS = ("conv1d", "conv2d", "conv3d", "linear")
"""Operations with the weight as second operand, output channels first."""


@dataclass(frozen=True)
class Layer:
    """A site whose weight is a parameter that nothing else reads: a step may change it.

    ``slot``: operand index of the weight. ``key``: its state-dict key. ``bias``: that of the bias, "" if it has none
    or one that it shares.
    """

    site: Site
    slot: int
    key: str
    bias: str

    @property
    def groups(self) -> int:
        return int(self.site.arguments.get("groups", 1))


def layers(record: Record) -> dict[str, Layer]:
    """The layers by site name, in execution order: convolutions and linear layers that run once per forward with a
    weight of their own, tied to no other site and not computed from other parameters."""
    used = Counter(key for site in record.sites.values() for operand in site.operands for key in operand.parameters)
    used.update(key for site in record.sites.values() for key in site.bias)
    found = {}
    for name, site in record.sites.items():
        if site.kind not in KINDS or site.calls != 1 or len(site.operands) != 2:
            continue
        weight = site.operands[1]
        if not weight.constant or not weight.floating or not weight.key or used[weight.key] > 1:
            continue
        bias = site.bias[0] if len(site.bias) == 1 and used[site.bias[0]] == 1 else ""
        found[name] = Layer(site, 1, weight.key, bias)
    return found


def tensor_at(model: nn.Module, key: str) -> Tensor:
    """The parameter or buffer under a state-dict key, to be changed in place."""
    path, _, name = key.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), name)
    return found


def fold_factor(record: Record, name: str) -> Tensor | None:
    """What a batch normalisation that folds into a site multiplies each output channel by, shape (O,); or None."""
    return folded_affine(*record.folds[name])[0] if name in record.folds else None


def folded_weight(record: Record, layer: Layer) -> Tensor:
    """The weight with the normalisation behind it folded in: what is put on the grid, output channels first."""
    weight = record.weights[layer.site.name, layer.slot].detach().float()
    factor = fold_factor(record, layer.site.name)
    return weight if factor is None else weight * factor.reshape(-1, *([1] * (weight.dim() - 1)))


Seen = Callable[[str, tuple[Tensor, ...], Tensor], Tensor | None]
"""``(site, operands, output)``; what it returns takes the output's place, None keeps it. What it wants to hold it must
clone: operations in place may write there."""


class LayerHandler(Names, ABC):
    """A handler that looks at operations only. Subclasses of this abstract class say what to do at each."""

    def compute_module(
        self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return inner(*args, **kwargs)


class _Watcher(LayerHandler):
    """The handler that shows calls of a float network."""

    def __init__(self, net: Network, names: Iterable[str], see: Seen) -> None:
        super().__init__(net)
        self.see = see
        self.watch(names)

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operands, _ = call.operation.split(args, kwargs)
        output = call.run(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        replaced = self.see(name, tuple(t for t in operands if isinstance(t, Tensor)), output)
        return output if replaced is None else replaced


def watched(net: Network, names: Iterable[str], see: Seen) -> nn.Module:
    """A copy of the float network, in eval, that shows every call at those sites to ``see``."""
    replica = duplicate(net.model).eval()
    instrument(replica, _Watcher(net, names, see), net.modules)
    return replica


@contextmanager
def watched_cells(
    simulation: nn.Module, names: Iterable[str], see: Callable[[str, Cell, tuple[Tensor, ...], Tensor], Tensor | None]
) -> Iterator[None]:
    """The same for an applied network: ``see(site, cell, operands, output)`` at those planned sites, while it is open.

    Operands come as the cell gets them; ``cell.read(i, operand)`` is what it computes with. The output is that before
    the activation (behind a normalisation if the cell absorbs it), not yet quantized.
    """
    cells = additions_of(simulation).cells

    def hooked(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(cell: nn.Module, operands: tuple[Any, ...], output: Any) -> Any:
            assert isinstance(cell, Cell)
            return see(name, cell, operands, output) if isinstance(output, Tensor) else None

        return hook

    handles = [cells[encode_key(name)].register_forward_hook(hooked(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def per_channel(x: Tensor, site: Site) -> Tensor:
    """An output of a layer as (samples, channels), averaged over positions; float32.

    >>> import torch
    >>> from bitsmith.site import Site
    >>> site = Site("c", "conv2d", "c", "integer", (), ("c",), ((2, 3, 4, 4),))
    >>> per_channel(torch.ones(2, 3, 4, 4), site).shape
    torch.Size([2, 3])
    """
    axis = channel_axis(site.kind, x.dim())
    x = x.movedim(axis, -1)
    if x.dim() == 1:
        x = x[None]
    return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


def channel_axis(kind: str, dims: int) -> int:
    """The axis of the channels in an input or output of a layer: the last of a linear one, else that before the
    ``n`` positions of an n-dimensional convolution."""
    return dims - 1 if kind == "linear" else dims - 1 - int(kind[-2])


def observe(net: Network, names: Iterable[str], see: Seen, data: Any) -> None:
    """Run the float network over the calibration data, showing those sites' calls to ``see``."""
    replica = watched(net, names, see)
    with torch.no_grad():
        for inputs, _ in items(data, "calibration"):
            call(replica, inputs, net.forward)


def first_inputs_of(data: Any, samples: int) -> Iterator[Any]:
    """The inputs of the first calibration batches that hold so many samples together; at least one batch."""
    seen = 0
    for inputs, _ in items(data, "calibration"):
        yield inputs
        seen += batch_size(inputs)
        if seen >= samples:
            return


def relative_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared error / power of every sample (entry of the first axis), float64: (n,).

    Summed over all samples instead, a few large ones would decide. A silent sample says little: its power counts as a
    thousandth of the mean.
    """
    error, power = (
        torch.linalg.vector_norm(x.reshape(len(x) if x.dim() else 1, -1), dim=1).double().square()
        for x in (got - wanted, wanted)
    )
    relative: Tensor = error / power.clamp_min(1e-3 * float(power.mean())).clamp_min(1e-30)
    return relative
