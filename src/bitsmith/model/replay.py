"""Handlers of a recorded network: finding the site of each call, and computing it with the cell of the plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..operations import BY_FUNCTION
from ..site import Site
from . import decompose
from .intercept import InterceptionError, Scope, in_checkpointed_function, where, within
from .network import Network
from .record import provisional


class Names(ABC):
    """A handler that knows the names of calls. Subclasses of this abstract class say what to do at a watched site."""

    sees_all = False

    def __init__(self, net: Network) -> None:
        self.locator = net.locator
        self.composites = {
            (site.path, site.kind)
            for site in net.record.sites.values()
            if site.role == "composite" and any(s.parent == site.name for s in net.record.sites.values())
        }
        self.record_sites = net.record.sites
        self.watched: frozenset[str] = frozenset()
        self.planned: frozenset[tuple[str, str]] = frozenset()

    def watch(self, names: Iterable[str]) -> None:
        """The sites at which ``compute`` is called; everything else runs as it is."""
        self.watched = frozenset(names)
        sites = (self.record_sites[name] for name in self.watched)
        self.planned = frozenset((site.path, site.kind) for site in sites) | frozenset(self.composites)

    def begin(self) -> None:
        return None

    def call(self, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operation = BY_FUNCTION[function]
        name = self.locator.find(scope, operation.kind, self.planned)
        if name is None:
            return function(*args, **kwargs)
        if name in self.watched:
            if in_checkpointed_function(scope):
                raise InterceptionError(
                    f"the site {name!r} is computed in a function that is checkpointed ({where()}): its recomputation "
                    "cannot be intercepted and the gradient would be silently wrong; checkpoint a module instead"
                )
            return self.compute(name, scope, function, args, kwargs)
        if (scope.path, operation.kind) in self.composites and self.record_sites[name].role == "composite":
            site = self.record_sites[name]
            inner = provisional((site.path, site.kind, self._index(name, site))).replace(":", ".")
            return within(inner, lambda: decompose.run(operation, args, kwargs))
        return function(*args, **kwargs)

    def _index(self, name: str, site: Site) -> int:
        return next(i for (p, k, i), n in self.locator.names.items() if n == name and (p, k) == (site.path, site.kind))

    def module_call(self, path: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if path in self.watched:
            return self.compute_module(path, inner, args, kwargs)
        return inner(*args, **kwargs)

    @abstractmethod
    def compute(
        self, name: str, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """One watched call."""

    @abstractmethod
    def compute_module(self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call of a module that is a site as a whole."""
