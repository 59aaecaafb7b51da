"""A model prepared to be seen: recorded, and ready to be rebuilt under any plan."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..data import call
from ..site import Record, Site, UnknownSiteError, contains
from .intercept import CHILD, InterceptionError, instrument
from .locate import Locator
from .record import Recorder, record

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_HOLDING = ("module", "multi_head_attention_forward")  # sites that read weights of layers inside, unseen

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Network:
    """A model (never changed), what one forward pass of it showed, and how its calls are named in replay.

    ``expand``: site names given inside composites or as whole modules, which decided what was recorded. ``memo``: what
    was computed of the model alone and may be asked for again, by keys that say of which content.
    """

    model: nn.Module
    record: Record
    locator: Locator = field(repr=False)
    forward: Forward | None = None
    expand: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()
    example: Any = field(default=None, repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def with_model(
        self, model: nn.Module, grids: Mapping[tuple[str, int], tuple[Tensor, Tensor]] | None = None
    ) -> Network:
        """The same network with other weights, recorded anew; statistics of the old ones are dropped.

        ``grids``: (site, operand) -> (scale, zero point) of a weight that is on its grid now, of the shape that the
        technique there gives them; what earlier steps fixed is kept, and the importance of weights.
        """
        again = network(model, self.example, forward=self.forward, names=self.expand)
        kept, importance = {**self.record.grids, **(grids or {})}, self.record.importance
        return replace(again, record=replace(again.record, grids=kept, importance=importance))

    def with_statistics(self, statistics: Mapping[str, Any]) -> Network:
        return replace(self, record=replace(self.record, statistics=statistics))

    def without(self, keys: Set[Any]) -> Network:
        """The same network without some of the statistics that it has."""
        return self.with_statistics({key: found for key, found in self.record.statistics.items() if key not in keys})


def network(
    model: nn.Module,
    inputs: Any,
    *,
    forward: Forward | None = None,
    names: Iterable[str] = (),
    inside: bool = False,
) -> Network:
    """Record one forward pass of ``inputs`` through a copy of ``model``.

    ``names``: sites that will be asked for; composites are seen inside where one of them lies inside, and a name that
    is a module's path makes that module one site. ``inside=True`` shows the inside of every composite.

    Raises ``ModelRunError`` if the model fails on the inputs, ``InterceptionError`` if nothing can be seen,
    ``UnknownSiteError`` for a module among ``names`` that is never called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module, not {type(model).__name__}")
    if CHILD in dict(model.named_children()):
        raise InterceptionError(
            "this model already carries a plan (it came from bitsmith.apply); give the original model"
        )
    wanted = frozenset(names)
    plain = _record(model, inputs, forward, (lambda name: True) if inside else (lambda name: False), ())
    missing = {name for name in wanted if name not in plain.record.sites}
    if not missing:
        return replace(plain, expand=wanted)
    paths = dict(model.named_modules())
    modules = tuple(sorted(name for name in missing if name in paths and name))
    again = _record(
        model, inputs, forward, lambda name: inside or any(contains(name, wish) for wish in missing), modules
    )
    uncalled = [name for name in modules if name not in again.record.sites]
    if uncalled:
        raise UnknownSiteError(uncalled[0], again.record.sites, uncalled=True)
    return replace(again, expand=wanted)


def warn_unreached(net: Network) -> None:
    """Warn of convolutions, linear layers and embeddings whose weights no recorded site reads, by their paths."""
    keys = {
        key
        for site in net.record.sites.values()
        for keys in (site.bias, *(operand.parameters for operand in site.operands))
        for key in keys
    }
    parameters = dict(net.model.named_parameters(remove_duplicate=False))
    read = {id(parameters[key]) for key in keys if key in parameters}
    whole = [site.path for site in net.record.sites.values() if site.kind in _HOLDING]
    idle = [
        path
        for path, module in net.model.named_modules()
        if isinstance(module, _LAYERS)
        and not any(id(parameter) in read for parameter in module.parameters())
        and not any(path == outer or path.startswith(f"{outer}.") for outer in whole)
    ]
    if idle:
        warnings.warn(
            f"the calibration data never reached {', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''}: what is not "
            "seen stays in float; give data whose first item goes through every layer that is used",
            stacklevel=3,
        )


def _record(
    model: nn.Module, inputs: Any, forward: Forward | None, inside: Callable[[str], bool], modules: tuple[str, ...]
) -> Network:
    replica = duplicate(model)
    locator = Locator(stateless=_stateless(replica))
    recorder = Recorder(replica, locator, inside)
    instrument(replica, recorder, modules)
    found = record(replica, recorder, lambda: call(replica, inputs, forward), input_names(model, inputs))
    return Network(model, found, locator, forward, modules=modules, example=inputs)


def _stateless(model: nn.Module) -> frozenset[str]:
    """Paths of modules that hold nothing: no parameter, buffer or child."""
    return frozenset(
        path
        for path, module in model.named_modules()
        if path and not (module._parameters or module._buffers or module._modules)
    )


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy; a model that cannot be copied is an error that says why."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InterceptionError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); Bitsmith never changes your "
            "model, so it needs copy.deepcopy(model) to work: keep only leaf tensors and plain values on modules"
        ) from error


def input_names(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The input tensors under the names of the forward's parameters, or ``input``, ``input1``, ..."""
    if isinstance(inputs, Mapping):
        return {str(name): value for name, value in inputs.items() if isinstance(value, Tensor)}
    given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        parameters = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    names = parameters[: len(given)] + [f"input{i}" for i in range(len(parameters), len(given))]
    return {name: value for name, value in zip(names, given, strict=False) if isinstance(value, Tensor)}


def sites(
    model: nn.Module, example: Any, *, forward: Forward | None = None, inside: bool = False
) -> Mapping[str, Site]:
    """The sites of a model in execution order, by name, with the data flow between them.

    ``example``: inputs as in a loader's item: a tensor -> ``m(x)``, a tuple -> ``m(*x)``, a mapping -> ``m(**x)``.
    ``inside=True`` also lists what composites (attention, LSTM) are made of. The model is not changed.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> [(s.name, s.kind, s.macs) for s in sites(net, torch.zeros(2, 4)).values()]
    [('0', 'linear', 24), ('1', 'relu', 0)]
    """
    return network(model, example, forward=forward, inside=inside).record.sites
