"""Naming calls: (module path, operation, source position) -> site name, stable from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..operations import Operation
from . import intercept
from .intercept import InterceptionError, Position, Scope

NOT_A_SITE = -1
"""The index of a position where the operation is bookkeeping."""


@dataclass
class Locator:
    """What recording learned about positions, used again in replay.

    ``positions``: per (path, kind), position -> index by first appearance. ``names``: (path, kind, index) -> name.
    ``sequences``: per path, the recorded (kind, index) of one execution, for compiled replay, where no frame exists.
    ``places``: file and line of each, for messages. ``stateless``: paths of modules without parameters, buffers and
    children. One such module (a ReLU) often serves at several places of its caller: each place is a site.
    """

    positions: dict[tuple[str, str], dict[Position, int]] = field(default_factory=dict)
    names: dict[tuple[str, str, int], str] = field(default_factory=dict)
    sequences: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    places: dict[tuple[str, str, int], str] = field(default_factory=dict)
    stateless: frozenset[str] = frozenset()

    def enter(self, path: str, kind: str, computes: bool) -> int:
        """The index of the current call while recording; a new position gets the next index.

        ``computes=False``: bookkeeping (a scalar beside a tensor, constants), remembered as ``NOT_A_SITE``.
        """
        known = self.positions.setdefault((path, kind), {})
        here = intercept.position(outer=path in self.stateless)
        index = known.get(here, NOT_A_SITE)
        if index == NOT_A_SITE and computes:
            index = sum(i != NOT_A_SITE for i in known.values())
        known[here] = index
        self.places.setdefault((path, kind, index), intercept.where())
        return index

    def finish(self, containers: Iterable[str]) -> None:
        """Give every position its name. ``containers``: paths in which other modules with sites executed."""
        inside = set(containers)
        own: dict[str, int] = {}
        for (path, _), known in self.positions.items():
            own[path] = own.get(path, 0) + sum(i != NOT_A_SITE for i in known.values())
        for (path, kind), known in self.positions.items():
            for index in known.values():
                if index == NOT_A_SITE:
                    continue
                if path and own[path] == 1 and path not in inside:
                    name = path
                else:
                    name = f"{path}:{kind}" + (f".{index}" if index else "")
                self.names[path, kind, index] = name

    def find(
        self,
        scope: Scope,
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        planned: frozenset[tuple[str, str]],
    ) -> str | None:
        """The name of the current call in replay.

        None if nothing is planned for that operation in that module. A call that cannot be told apart from a planned
        site is an error that shows both.
        """
        path, kind = scope.path, operation.kind
        order = scope.sequence
        scope.sequence += 1
        if (path, kind) not in planned:
            return None
        known = self.positions[path, kind]
        if torch.compiler.is_dynamo_compiling():
            here = intercept.compiled_position(outer=path in self.stateless)
            if here is None:
                return self._by_order(scope, kind, known, order)
        else:
            here = intercept.position(outer=path in self.stateless)
        index = known.get(here)
        if index is None:
            if not operation.on_tensors(args, kwargs):
                return None
            recorded = ", ".join(self.places[path, kind, i] for i in known.values())
            raise InterceptionError(
                f"a call of {kind!r} in module {path or '(root)'!r} at {intercept.where()} was not seen while "
                f"recording, where {kind!r} was called at {recorded}; record with an example (and mode) that takes "
                "this branch too"
            )
        return self.names.get((path, kind, index))

    def __deepcopy__(self, memo: dict[int, Any]) -> Locator:
        return self  # nothing changes it once the recording is finished

    def _by_order(self, scope: Scope, kind: str, known: dict[Position, int], order: int) -> str | None:
        # where compiled code shows no frames, the recorded order tells positions apart
        path = scope.path
        if len(known) == 1:
            return self.names.get((path, kind, next(iter(known.values()))))
        sequence = self.sequences.get(path, [])
        if order < len(sequence) and sequence[order][0] == kind:
            return self.names.get((path, kind, sequence[order][1]))
        raise InterceptionError(
            f"under torch.compile the calls of module {path or '(root)'!r} come in another order than recorded: "
            f"call {order} is {kind!r}, recorded was {sequence[order : order + 1]}; run this module in eager mode"
        )
