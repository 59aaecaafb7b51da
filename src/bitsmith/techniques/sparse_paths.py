"""SparsePaths: layers that are sparse from the start, connected along quasi-random paths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..model.network import Forward, Network, network
from ..numerics import paths as sequence
from ..plan import Plan
from ..prepare._layers import layers, tensor_at
from ..site import Record, Site, UnknownSiteError
from ..technique import Cell, No, PrepareError, Step, Technique
from ._masked import MaskedCell, refusal

_MIXING = ("conv", "linear", "matmul", "baddbmm", "einsum", "cat", "embedding", "module")
"""Operations behind which channels are other ones; the others (additions, norms, activations, pooling) keep them."""


@dataclass(frozen=True)
class SparsePaths(Technique):
    """Connections along quasi-random paths (Keller and Van Keirsbilck 2021, arXiv:2103.03543).

    ``paths`` paths go through the network; path ``i`` visits neuron (of a convolution: channel) ``floor(n x)`` of a
    layer of n, where x is the layer's component of point ``i`` of a sequence. ``components`` are those of the site's
    input and output; a site whose input is another one's output has the other's second as its first.
    :func:`~bitsmith.sparse_paths` numbers them. Paths that share an edge are coalesced to one weight (one kernel). Each
    weight of a path has a sign by a coin. ``generator``: scrambled Sobol' points, or ``random`` ones as a control.
    ``seed`` scrambles or draws them; all sites of a network have the same.

    With widths that are powers of two every block of so many paths permutes the neurons, so that all have equally many
    paths in and out. Weights stay where they were; those off the paths have no effect and get no gradient. ``signs``
    ``fixed``: each weight keeps its sign, and the parameter gives the magnitude. Begin with
    :class:`~bitsmith.InitialisePaths` and train: an untrained network is of no use.

    >>> SparsePaths(512, components=(2, 3)).components
    (2, 3)
    """

    needs_training: ClassVar[bool] = True

    paths: int = 1024
    components: tuple[int, int] = (0, 1)
    seed: int = 0
    generator: Literal["sobol", "random"] = "sobol"
    signs: Literal["free", "fixed"] = "free"

    def __post_init__(self) -> None:
        if not isinstance(self.paths, int) or self.paths < 1:
            raise ValueError(f"SparsePaths(paths={self.paths!r}): at least 1")
        object.__setattr__(self, "components", tuple(self.components))
        last = sequence.COMPONENTS - 1
        if len(set(self.components)) != 2 or not all(0 <= c <= last for c in self.components):
            raise ValueError(f"SparsePaths(components={self.components}): two different ones, from 0 to {last}")
        if self.generator not in ("sobol", "random"):
            raise ValueError(f"SparsePaths(generator={self.generator!r}): must be 'sobol' or 'random'")
        if self.signs not in ("free", "fixed"):
            raise ValueError(f"SparsePaths(signs={self.signs!r}): must be 'free' or 'fixed'")

    def fits(self, site: Site) -> bool | No:
        reason = refusal(site)
        if reason:
            return No(reason)
        groups = int(site.arguments.get("groups", 1))
        if groups != 1:
            return No(f"it has {groups} groups; paths go from any channel to any other")
        return True

    def edges(self, site: Site) -> sequence.Edges:
        """The connections of a site that it fits: between its input and output channels."""
        assert site.weight is not None
        outputs, inputs, *kernel = site.weight.shape
        taps = math.prod(kernel)
        return sequence.edges(self.paths, inputs, outputs, self.components, self.seed, self.generator, taps)

    def left(self, site: Site) -> torch.Tensor:
        """The sign of every weight that is left, 0 elsewhere: int8, of the weight's shape."""
        assert site.weight is not None
        shape = site.weight.shape
        return self.edges(site).signs(shape[0], shape[1]).reshape(shape)

    def weights(self, site: Site) -> int:
        """How many weights the site has left."""
        return self.edges(site).sign.numel()

    def bits(self, site: Site) -> float:
        """Weights on the paths in float32. Sobol' points are computed from a generator matrix and a shift for each
        of the two components; random ones are charged as the index of every edge."""
        if not self.fits(site):  # stored as it was
            return super().bits(site)
        assert site.weight is not None
        places = site.weight.shape[0] * site.weight.shape[1]
        if self.generator == "sobol":
            indices = 2.0 * sequence.DIGITS * (sequence.DIGITS + 1)
        else:
            indices = float(len(self.edges(site)) * math.ceil(math.log2(places)))
        return 32.0 * self.weights(site) + indices

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return MaskedCell(site, self.left(site), self.signs == "fixed")


@dataclass(frozen=True)
class InitialisePaths(Step):
    """Deterministic weights to begin training with (Keller and Van Keirsbilck 2021, arXiv:2103.03543).

    At every site with :class:`SparsePaths`: the weight's sign times ``sqrt(gain / fan-in)``, the fan-in being the
    layer's mean number of weights by output (He et al. 2015, arXiv:1502.01852, eq. 10, for ReLU: gain 2); 0 off the
    paths; biases 0. Raises ``PrepareError`` where the plan has no such site or a weight is shared.
    """

    values_only: ClassVar[bool] = True

    gain: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.gain < math.inf:
            raise ValueError(f"InitialisePaths(gain={self.gain}): must be above 0 and finite")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        found = {name: t for name, t in plan.sites.items() if isinstance(t, SparsePaths)}
        if not found:
            raise PrepareError("InitialisePaths: no site of the plan has SparsePaths(...)")
        own = layers(net.record)
        for name, technique in found.items():
            if name not in own:
                raise PrepareError(f"InitialisePaths: {name!r} has no weight of its own: it is shared or computed")
            layer = own[name]
            weight = tensor_at(net.model, layer.key)
            size = math.sqrt(self.gain * weight.shape[0] / technique.weights(layer.site))
            with torch.no_grad():
                weight.copy_(size * technique.left(layer.site))
                if layer.bias:
                    tensor_at(net.model, layer.bias).zero_()
        return net.with_model(net.model)


def sparse_paths(
    model: torch.nn.Module,
    example: Any,
    *,
    paths: int,
    seed: int = 0,
    generator: Literal["sobol", "random"] = "sobol",
    signs: Literal["free", "fixed"] = "free",
    sites: Iterable[str] | None = None,
    forward: Forward | None = None,
) -> Plan:
    """A plan whose sites share one set of paths: :class:`SparsePaths` at each, begun by :class:`InitialisePaths`.

    ``example``: inputs as in a loader's item. ``sites``: names; None: every convolution and linear layer that it fits.
    A tensor's channels have one component of the sequence. Additions, normalisations, activations and pooling keep
    them, so that a path goes on behind a residual sum with the same channels; layers are numbered in order of
    execution. Raises ``UnknownSiteError``, or ``ValueError`` for a site that it does not fit.

    >>> net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> plan = sparse_paths(net, torch.zeros(1, 16), paths=32)
    >>> {name: technique.components for name, technique in plan.sites.items()}
    {'0': (0, 1), '2': (1, 2)}
    """
    record = network(model, example, forward=forward).record
    blank = SparsePaths(paths, (0, 1), seed, generator, signs)
    if sites is None:
        chosen = [name for name, site in record.sites.items() if blank.fits(site)]
        if not chosen:
            raise ValueError("sparse_paths: the model has no convolution and no linear layer that paths fit")
    else:
        chosen = list(sites)
        for name in chosen:
            if name not in record.sites:
                raise UnknownSiteError(name, record.sites)
            verdict = blank.fits(record.sites[name])
            if isinstance(verdict, No):
                raise ValueError(f"sparse_paths: {name!r}: {verdict}")
    components = _components(record)
    plan = Plan(
        {
            name: SparsePaths(paths, components[name], seed, generator, signs)
            for name in record.sites  # in order of execution
            if name in set(chosen)
        },
        (InitialisePaths(),),
    )
    plan.check(record)
    return plan


def _components(record: Record) -> Mapping[str, tuple[int, int]]:
    """Of the input and the output of every site with a weight as second operand, by name."""
    parent: dict[str, str] = {}

    def root(tensor: str) -> str:
        parent.setdefault(tensor, tensor)
        while parent[tensor] != tensor:
            tensor = parent[tensor]
        return tensor

    for site in record.sites.values():
        if _keeps_channels(site):
            same = [root(tensor) for tensor in (*(o.tensor for o in site.activations), *site.writes)]
            for tensor in same[1:]:
                parent[root(tensor)] = root(same[0])
    numbers: dict[str, int] = {}
    found = {}
    for site in record.sites.values():
        if refusal(site):
            continue
        before, behind = root(site.operands[0].tensor), root(site.writes[0])
        first = numbers.setdefault(before, len(numbers))
        # a sum of a layer's input and its output: equal components would connect each channel to itself alone
        second = numbers.setdefault(behind if behind != before else f"{site.name} inside", len(numbers))
        found[site.name] = first, second
    return found


def _keeps_channels(site: Site) -> bool:
    if site.kind.startswith("conv") and not site.kind.startswith("conv_transpose"):
        weight = site.weight  # depthwise
        return weight is not None and site.arguments.get("groups", 1) == weight.shape[0] > 1 == weight.shape[1]
    return site.role != "composite" and not site.kind.startswith(_MIXING)
