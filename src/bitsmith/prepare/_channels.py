"""Which channels must shrink together: decided from the data flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..operations import ACTIVATIONS
from ..site import Operand, Record, Site
from ._layers import KINDS, layers

_SMOOTH = ("leaky_relu", "elu", "silu", "gelu", "hardswish", "hardsigmoid", "softplus", "mish", "sigmoid", "tanh")
_POOLS = (
    "avg_pool",
    "adaptive_avg_pool",
    "max_pool",
    "adaptive_max_pool",
    "mean",
    "interpolate",
    "upsample",
    "dropout",
)
_ELEMENTWISE = ("add", "sub", "mul")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that many layers have in common: all of them lose one, or none does.

    ``name``: the first layer that writes them. ``channels``: how many. ``writers``: layers whose output they are, more
    than one where residual additions tie them. ``through``: depthwise convolutions on the way, ``norms`` the modules of
    normalisations. ``readers``: (layer, how many inputs of it each channel is). ``locked``: why they must stay; "" if
    they may go.
    """

    name: str
    channels: int
    writers: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    readers: tuple[tuple[str, int], ...] = ()
    locked: str = ""


def channel_groups(record: Record) -> dict[str, ChannelGroup]:
    """The groups of a recorded network by name, in execution order, those that are locked included."""
    return _Flow(record).groups()


@dataclass(frozen=True)
class _Value:
    """A tensor's channels: whose (a site's name), on which axis of which shape, how many."""

    space: str
    axis: int
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[self.axis]


class _Flow:
    def __init__(self, record: Record) -> None:
        self.record, self.own = record, layers(record)
        self.parent: dict[str, str] = {}
        self.locked: dict[str, str] = {}
        self.values: dict[str, _Value] = {}
        self.counts: dict[str, int] = {}
        self.writers: dict[str, list[str]] = {}
        self.through: dict[str, list[str]] = {}
        self.norms: dict[str, list[str]] = {}
        self.readers: dict[str, list[tuple[str, int]]] = {}
        for site in record.sites.values():
            self._pass(site)
        for tensor in record.outputs:
            self._lock(self.values.get(tensor), "it is an output of the network")

    def groups(self) -> dict[str, ChannelGroup]:
        members: dict[str, list[str]] = {}
        for space in self.counts:
            members.setdefault(self._root(space), []).append(space)
        found = {}
        for spaces in members.values():
            reasons = [self.locked[space] for space in spaces if space in self.locked]

            def joined(table: Mapping[str, list[str]], spaces: list[str] = spaces) -> tuple[str, ...]:
                return tuple(dict.fromkeys(name for space in spaces for name in table.get(space, ())))

            readers = tuple(dict.fromkeys(reader for space in spaces for reader in self.readers.get(space, ())))
            group = ChannelGroup(
                spaces[0],
                self.counts[spaces[0]],
                joined(self.writers),
                joined(self.through),
                joined(self.norms),
                readers,
                reasons[0] if reasons else "",
            )
            found[group.name] = group
        return found

    # -- one site ------------------------------------------------------------------------------------------------------

    def _pass(self, site: Site) -> None:
        if site.calls != 1:
            return self._stop(site, f"{site.name} is called {site.calls} times")
        if site.kind in KINDS:
            return self._layer(site)
        if site.kind == "batch_norm":
            value = self._read(site, site.operands[0])
            if value is None or not site.path or len(site.operands) > 1:
                return self._stop(site, f"{site.name} normalises with parameters that no module has")
            self.norms.setdefault(value.space, []).append(site.path)
            return self._write(site, value)
        if site.kind in _ELEMENTWISE:
            return self._elementwise(site)
        if site.kind in ACTIVATIONS or site.kind in _SMOOTH or site.kind.startswith(_POOLS):
            value = self._read(site, site.operands[0])
            if len(site.operands) == 1 and value is not None:
                return self._write(site, value)
        return self._stop(site, f"{site.name} ({site.kind}) may mix channels")

    def _layer(self, site: Site) -> None:
        layer = self.own.get(site.name)
        last = site.kind == "linear"
        axis = len(site.out_shapes[0]) - 1 if last else len(site.out_shapes[0]) - 1 - int(site.kind[-2])
        if layer is None:
            return self._stop(site, f"{site.name} shares its weight or computes it")
        weight = layer.site.operands[1]
        source = self._read(site, site.operands[0], flat=last)
        if layer.groups != 1:
            if source is None or not layer.groups == weight.shape[0] == source.channels or weight.shape[1] != 1:
                return self._stop(site, f"{site.name} has {layer.groups} groups of channels")
            self.through.setdefault(source.space, []).append(site.name)
            return self._write(site, source)
        if source is not None:
            given = site.operands[0].shape
            at = len(given) - 1 if last else axis
            if given[at] % source.channels or (not last and source.axis != axis):
                self._lock(source, f"{site.name} reads them on another axis")
            else:
                self.readers.setdefault(source.space, []).append((site.name, given[at] // source.channels))
        self.counts[site.name] = weight.shape[0]
        self.writers[site.name] = [site.name]
        if layer.bias == "" and site.bias:
            self.locked[site.name] = f"{site.name} shares its bias"
        self.values[site.writes[0]] = _Value(site.name, axis, site.out_shapes[0])
        return None

    def _elementwise(self, site: Site) -> None:
        if any(o.constant and o.numel > 1 for o in site.operands):
            return self._stop(site, f"{site.name} reads a parameter of several numbers")
        out = site.out_shapes[0]
        found = []
        for operand in site.activations:
            value = self._read(site, operand)
            if value is None or len(operand.shape) != len(out):
                return self._stop(site, f"{site.name} reads a tensor whose channels are not known")
            if value.channels == out[value.axis]:
                found.append(value)
            elif value.channels != 1:
                return self._stop(site, f"{site.name} reads another number of channels")
        if not found or len({value.axis for value in found}) > 1:
            return self._stop(site, f"{site.name} reads channels on several axes")
        for value in found[1:]:
            self.parent[self._root(value.space)] = self._root(found[0].space)
        return self._write(site, found[0])

    # -- values --------------------------------------------------------------------------------------------------------

    def _read(self, site: Site, operand: Operand, flat: bool = False) -> _Value | None:
        """The channels of an operand, behind the views before it; None, and they stay, where these moved them."""
        value = self.values.get(operand.tensor)
        if value is None:
            return None
        shape, axis = operand.shape, value.axis
        if len(shape) == len(value.shape) and shape[axis] == value.channels and (not flat or axis == len(shape) - 1):
            return _Value(value.space, axis, shape)
        whole = axis == 1 and len(shape) == 2 and len(value.shape) > 2
        if whole and (shape[1] == value.channels or (flat and shape[1] % value.channels == 0)):
            return _Value(value.space, 1, (shape[0], value.channels))
        self._lock(value, f"{site.name} reads a view of them")
        return None

    def _write(self, site: Site, value: _Value) -> None:
        shape = site.out_shapes[0]
        same = len(shape) == len(value.shape) or (value.axis == 1 and len(shape) == 2)
        if len(site.writes) == 1 and same and shape[value.axis] == value.channels:
            self.values[site.writes[0]] = _Value(value.space, value.axis, shape)
        else:
            self._lock(value, f"{site.name} changes their number or place")

    def _stop(self, site: Site, why: str) -> None:
        for operand in site.activations:
            self._lock(self.values.get(operand.tensor), why)

    def _lock(self, value: _Value | None, why: str) -> None:
        if value is not None:
            self.locked.setdefault(value.space, why)

    def _root(self, space: str) -> str:
        while (above := self.parent.get(space, space)) != space:
            space = above
        return space
