"""Handlers of a recorded network: finding the site of each call, and computing it with the cell of the plan."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from ..operations import BY_FUNCTION, Operation
from . import decompose
from .intercept import InterceptionError, Scope, in_checkpointed_function, where, within
from .network import Network
from .record import inside_of


class Names(ABC):
    """A handler that knows the names of calls. Subclasses of this abstract class say what to do at a watched site."""

    sees_all = False
    immutable: ClassVar[frozenset[str]] = frozenset({"locator", "opened", "record_sites", "watched", "planned"})
    """Attributes that a copy shares with its original."""

    def __init__(self, net: Network) -> None:
        self.locator = net.locator
        self.record_sites = net.record.sites
        parents = {site.parent for site in net.record.sites.values()}
        # composites that run as what they are made of, and the path of their inside
        self.opened = {name: inside_of(key) for key, name in net.locator.names.items() if name in parents}
        self.watched: frozenset[str] = frozenset()
        self.planned: frozenset[tuple[str, str]] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Names:
        replica = copy.copy(self)
        memo[id(self)] = replica
        for name, value in vars(self).items():
            if name not in self.immutable:
                setattr(replica, name, copy.deepcopy(value, memo))
        return replica

    def watch(self, names: Iterable[str]) -> None:
        """The sites at which ``compute`` is called; everything else runs as it is."""
        self.watched = frozenset(names)
        sites = (self.record_sites[name] for name in (*self.watched, *self.opened))
        self.planned = frozenset((site.path, site.kind) for site in sites)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        return None

    def call(self, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operation = BY_FUNCTION[function]
        name = self.locator.find(scope, operation, args, kwargs, self.planned)
        if name is None:
            return function(*args, **kwargs)
        inside = self.opened.get(name)
        if inside is None and name not in self.watched:
            return function(*args, **kwargs)
        if in_checkpointed_function(scope):
            raise InterceptionError(
                f"the site {name!r} is computed in a function that is checkpointed ({where()}): its recomputation "
                "cannot be intercepted and the gradient would be silently wrong; checkpoint a module instead"
            )
        run = function if inside is None else functools.partial(_decomposed, operation, inside)
        if name in self.watched:
            return self.compute(name, Call(operation, function, run), args, kwargs)
        return run(*args, **kwargs)

    def module_call(
        self, path: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if path in self.watched:
            return self.compute_module(path, inner, args, kwargs)
        return inner(*args, **kwargs)

    @abstractmethod
    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One watched call."""

    @abstractmethod
    def compute_module(
        self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """One call of a module that is a site as a whole."""


class Call(NamedTuple):
    """What is called: its row in the table, the function, and what computes it (what a composite is made of)."""

    operation: Operation
    function: Callable[..., Any]
    run: Callable[..., Any]


def _decomposed(operation: Operation, path: str, *args: Any, **kwargs: Any) -> Any:
    return within(path, functools.partial(decompose.run, operation, args, kwargs))
