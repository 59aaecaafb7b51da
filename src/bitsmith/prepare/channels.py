"""PruneChannels: channels that go, and the smaller network that is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batch_size, call, first_inputs, tensors_in
from ..model.network import Forward, Network, duplicate, network
from ..numerics.weights import folded_affine
from ..plan import Plan
from ..technique import PrepareError, Step
from ._channels import ChannelGroup, channel_groups
from ._layers import layers, tensor_at
from ._sequential import Lanes, first_samples, patches, paused, positions


@dataclass(frozen=True)
class PruneChannels(Step):
    """Channels are removed by group, as the data flow ties them: what is left is a smaller network of the same modules.

    ``density``: the part of each group's channels that is left; ``left``: (group, how many) where another number is, by
    the names of :func:`~bitsmith.groups_of_channels`. ``divisor``: numbers by density become multiples of it. Those go
    whose weights are smallest: by the Euclidean norm over all layers that write the channel (Li et al. 2017,
    arXiv:1608.08710), a normalisation behind folded in.

    ``samples``: with so many calibration samples, what the layers that read the channels lose is taken back by least
    squares, layer by layer (He et al. 2017, arXiv:1707.06168, eq. 3): from ``rows`` output positions X of the input,
    ``W <- W H[:, left] H[left, left]^-1`` with ``H = X' X + damp mean(diag) I``. 0: weights stay as they are.

    The smaller network is compared on the example with the whole one whose readers ignore the channels; one that
    computes something else, as where code counts channels, is a ``PrepareError``. So is a group that must stay.
    """

    density: float = 1.0
    left: tuple[tuple[str, int], ...] = ()
    divisor: int = 1
    samples: int = 0
    rows: int = 16384
    damp: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", tuple((str(name), int(count)) for name, count in self.left))
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"PruneChannels(density={self.density}): must be above 0 and at most 1")
        for name in ("divisor", "rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"PruneChannels({name}={getattr(self, name)!r}): must be a whole number, 1 or more")
        if not isinstance(self.samples, int) or self.samples < 0:
            raise ValueError(f"PruneChannels(samples={self.samples!r}): must be a whole number, 0 or more")
        if not self.damp > 0:
            raise ValueError(f"PruneChannels(damp={self.damp}): must be above 0")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        groups = channel_groups(net.record)
        kept = {name: strongest(net, groups[name], count) for name, count in self.counts(groups).items()}
        if not kept:
            raise PrepareError("PruneChannels: the network has no channels that may go, or all of them were to stay")
        chosen = {groups[name].name: (groups[name], index) for name, index in kept.items()}
        model = net.model
        if self.samples:
            self._restore(net, chosen, data)
        return net.with_model(
            removed(Network(model, net.record, net.locator, net.forward, example=net.example), chosen)
        )

    def counts(self, groups: Mapping[str, ChannelGroup]) -> dict[str, int]:
        """How many channels are left, by group, of those that shrink."""
        found = {}
        for name, group in groups.items():
            if self.density < 1.0 and not group.locked:
                count = max(self.divisor, round(self.density * group.channels / self.divisor) * self.divisor)
                found[name] = min(count, group.channels)
        for name, count in self.left:
            if name not in groups:
                raise PrepareError(f"PruneChannels: no group is called {name!r}; the groups: {', '.join(groups)}")
            if groups[name].locked:
                raise PrepareError(f"PruneChannels: the channels of {name!r} must stay: {groups[name].locked}")
            if not 1 <= count <= groups[name].channels:
                raise PrepareError(
                    f"PruneChannels: {name!r} has {groups[name].channels} channels, {count} cannot be left"
                )
            found[name] = count
        return {name: count for name, count in found.items() if count < groups[name].channels}

    def _restore(self, net: Network, chosen: Mapping[str, tuple[ChannelGroup, Tensor]], data: Any) -> None:
        """New weights for the layers that read what goes, in ``net.model``."""
        own = layers(net.record)
        reads = {
            reader: (index, each) for group, index in chosen.values() for reader, each in group.readers if reader in own
        }
        inputs = list(first_samples(data, self.samples))
        sizes = [batch_size(item) for item in inputs]
        share = [max(1, round(self.rows * size / sum(sizes))) for size in sizes]
        with Lanes() as lanes:
            narrow = paused(net, reads, lanes)
            for index, item in enumerate(inputs):
                lanes.add(("narrow", index), narrow, item, net.forward)
            for name, waiting in lanes.run([name for name in net.record.sites if name in reads]):
                layer = own[name]
                generator = torch.Generator().manual_seed(self.seed)
                rows = torch.cat(
                    [
                        patches(layer.site, x, positions(layer.site, x, share[at], generator))[0]
                        for (_, at), x in sorted(waiting.items())
                    ]
                )
                kept, each = reads[name]
                weight = tensor_at(net.model, layer.key).detach()
                columns = index_of(kept, each * math.prod(weight.shape[2:]))
                solved = least_squares(weight.flatten(1), rows, columns, self.damp).reshape(weight.shape)
                with torch.no_grad():
                    for model in (net.model, narrow):
                        tensor_at(model, layer.key).copy_(solved)


def prune_channels(
    model: nn.Module, step: PruneChannels, calibration: Any, *, forward: Forward | None = None
) -> nn.Module:
    """The smaller network by itself: an ordinary model without a plan, which can be given one, or trained.

    ``calibration``: a loader of ``(inputs, target)``; its first inputs are the example. The model is not changed.
    Raises as the step does.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> prune_channels(net, PruneChannels(0.5), [(torch.zeros(1, 3, 8, 8), None)])[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    net = network(duplicate(model), first_inputs(calibration), forward=forward)
    return step.prepare(net, Plan(), calibration).model


def groups_of_channels(model: nn.Module, example: Any, *, forward: Forward | None = None) -> Mapping[str, ChannelGroup]:
    """The groups of channels of a model, by name: which layers write and read them, and why some must stay.

    ``example``: inputs as in a loader's item. The model is not changed.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(g.name, g.channels, g.readers, g.locked) for g in groups_of_channels(net, torch.zeros(1, 3, 8, 8)).values()]
    [('0', 8, (('2', 1),), ''), ('2', 4, (), 'it is an output of the network')]
    """
    return channel_groups(network(model, example, forward=forward).record)


def strongest(net: Network, group: ChannelGroup, count: int) -> Tensor:
    """The ``count`` channels of largest norm over the layers that write them, ascending."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for name in group.writers:
        weight = net.record.weights[name, 1].detach().double().flatten(1)
        size = weight.square().sum(1)
        if name in net.record.folds:
            factor, _ = folded_affine(*net.record.folds[name])
            size = size * factor.double().square()
        total += size.cpu()
    return total.topk(count).indices.sort().values


def least_squares(weight: Tensor, x: Tensor, columns: Tensor, damp: float) -> Tensor:
    """The weight (out, in) that is 0 but on ``columns`` and gives nearest to what ``weight`` gives on the rows of x."""
    hessian = (x.mT @ x).double()
    diagonal = hessian.diagonal()
    diagonal += damp * torch.where(diagonal.mean() > 0, diagonal.mean(), 1.0)
    found = torch.linalg.solve(hessian[columns][:, columns], hessian[columns] @ weight.double().mT).mT
    solved = torch.zeros_like(weight)
    solved[:, columns] = found.to(weight.dtype)
    return solved


def index_of(kept: Tensor, each: int) -> Tensor:
    """Places of channels in an axis on which each has ``each`` in a row.

    >>> index_of(torch.tensor([0, 2]), 2).tolist()
    [0, 1, 4, 5]
    """
    return (kept[:, None] * each + torch.arange(each)).flatten()


def removed(net: Network, chosen: Mapping[str, tuple[ChannelGroup, Tensor]]) -> nn.Module:
    """A copy of the network's model without the other channels of the groups, checked on its example.

    ``chosen``: by group, which channels are left, ascending. Raises ``PrepareError`` where it computes something else
    than the whole model whose readers ignore those channels.
    """
    own = layers(net.record)
    masked, small = duplicate(net.model), duplicate(net.model)
    for group, kept in chosen.values():
        for name in (*group.writers, *group.through):
            _cut(small, own[name].key, 0, kept)
            if own[name].bias:
                _cut(small, own[name].bias, 0, kept)
        for path in group.norms:
            for part in ("weight", "bias", "running_mean", "running_var"):
                if isinstance(getattr(net.model.get_submodule(path), part, None), Tensor):
                    _cut(small, f"{path}.{part}", 0, kept)
        for name, each in group.readers:
            places = index_of(kept, each)
            _cut(small, own[name].key, 1, places)
            ignored = torch.ones(net.record.sites[name].operands[1].shape[1], dtype=torch.bool)
            ignored[places] = False
            with torch.no_grad():
                tensor_at(masked, own[name].key)[:, ignored] = 0
        _count(small, group, own)
    try:
        same = _alike(masked, small, net)
    except Exception as error:
        raise PrepareError(f"PruneChannels: without these channels the model does not run: {error}") from error
    if not same:
        raise PrepareError(
            "PruneChannels: without these channels the model computes something else, so its code moves or counts them "
            f"({', '.join(chosen)}); leave such groups whole: PruneChannels(left=((group, channels), ...))"
        )
    return small


def _alike(masked: nn.Module, small: nn.Module, net: Network) -> bool:
    outputs = []
    for model in (masked, small):
        with torch.no_grad():
            outputs.append(
                [x for x in tensors_in(call(model.eval(), net.example, net.forward)) if x.is_floating_point()]
            )
        for path, module in net.model.named_modules():
            model.get_submodule(path).training = module.training
    return len(outputs[0]) == len(outputs[1]) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= 1e-3 * float(a.abs().max().clamp_min(1e-6))
        for a, b in zip(*outputs, strict=True)
    )


def _cut(model: nn.Module, key: str, axis: int, kept: Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    old: Tensor = getattr(module, name)
    new = old.detach().index_select(axis, kept.to(old.device)).clone()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        module.register_buffer(name, new, persistent=name not in module._non_persistent_buffers_set)


def _count(model: nn.Module, group: ChannelGroup, own: Mapping[str, Any]) -> None:
    """Let the modules say how many channels they have."""
    for name in (*group.writers, *group.through, *(reader for reader, _ in group.readers)):
        module = model.get_submodule(own[name].key.rpartition(".")[0])
        weight = tensor_at(model, own[name].key)
        groups = weight.shape[0] if name in group.through else int(getattr(module, "groups", 1))
        counts = {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * groups, "groups": groups}
        counts |= {"out_features": weight.shape[0], "in_features": weight.shape[1]}
        _tell(module, counts)
    for path in group.norms:
        module = model.get_submodule(path)
        sizes: Sequence[Any] = [getattr(module, part, None) for part in ("weight", "running_mean")]
        size = next((len(tensor) for tensor in sizes if isinstance(tensor, Tensor)), None)
        if size is not None:
            _tell(module, {"num_features": size})


def _tell(module: nn.Module, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, count)
