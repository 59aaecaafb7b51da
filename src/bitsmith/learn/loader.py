"""The training data as one endless stream, with its own random numbers and a place that can be found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ..data import DataError, Unlabelled, items, one_shot


def endless(loader: Iterable[Any], role: str = "training") -> Iterator[tuple[Any, Any]]:
    """The loader's items, from its start again at its end."""
    while True:
        yield from items(loader, role)


@dataclass(frozen=True)
class Position:
    """A place in the stream: ``taken`` items of a pass over the loader that began with the random state ``start``, and
    its own generators with ``own``; ``read`` items in all."""

    read: int
    taken: int
    start: Tensor
    own: tuple[Tensor, ...] = ()


class Stream:
    """The items of a loader, from its start again at its end; of ``share=(rank, world)`` those at ``rank``,
    ``rank + world``, ...

    While the loader works it has torch's global CPU generator for itself, seeded with ``seed``: what it draws (the
    order, augmentation) depends neither on what the network draws nor on the process, and a place is found again by
    reading the pass anew from its start. A ``DataLoader``'s own generators are set back for that. For messages:
    ``by_step`` items are read by step, of ``steps``.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        seed: int,
        *,
        share: tuple[int, int] = (0, 1),
        steps: int = 0,
        by_step: int = 1,
    ) -> None:
        self.loader, self.share, self.steps, self.by_step = loader, share, steps, by_step
        inner = loader.loader if isinstance(loader, Unlabelled) else loader
        if isinstance(inner, DataLoader) and isinstance(inner.sampler, DistributedSampler) and share[1] > 1:
            raise DataError(
                "the training loader's DistributedSampler gives each process a part already, and finetune would divide "
                "that again: leave the sampler out; each process reads the loader and takes every "
                f"{share[1]}th of its items"
            )
        self._state = torch.Generator().manual_seed(seed).get_state()
        self._iterator: Iterator[tuple[Any, Any]] | None = None
        self._generators = _generators(inner) if isinstance(inner, DataLoader) else []
        self._read = self._taken = 0
        self._start_here()

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self

    def __next__(self) -> tuple[Any, Any]:
        rank, world = self.share
        while self._read % world != rank:
            self._one()
        return self._one()

    def finish_round(self) -> None:
        """Read on to where the turn of rank 0 comes, so that the position is the same in every process."""
        while self._read % self.share[1]:
            self._one()

    @property
    def position(self) -> Position:
        return Position(self._read, self._taken, self._start, self._own)

    def seek(self, position: Position) -> None:
        """Go there, in a stream that nothing was read from. Raises ``DataError`` if the loader ends before."""
        self._state = position.start
        for generator, state in zip(self._generators, position.own, strict=True):
            generator.set_state(state)
        self._start_here()
        for _ in range(position.taken):
            if self._drawn(self._begun()) is None:
                raise DataError(
                    f"the training loader gave {self._taken} items, and the checkpoint was made after {position.taken} "
                    "of this pass: it must give the same items as then"
                )
            self._taken += 1
        self._read = position.read

    def _one(self) -> tuple[Any, Any]:
        item = self._drawn(self._begun())
        if item is None:
            if one_shot(self.loader):
                raise self._ended("it can be read only once")
            self._iterator, self._taken = None, 0
            self._start_here()
            try:
                item = self._drawn(self._begun())
            except DataError as error:
                raise self._ended(f"read again it said: {error}") from None
            assert item is not None  # an empty pass is an error of items()
        self._read += 1
        self._taken += 1
        return item

    def _start_here(self) -> None:
        """A pass begins with the random states as they are."""
        self._start, self._own = self._state, tuple(generator.get_state() for generator in self._generators)

    def _begun(self) -> Iterator[tuple[Any, Any]]:
        if self._iterator is None:
            self._iterator = items(self.loader, "training", once=True)
        return self._iterator

    def _drawn(self, iterator: Iterator[tuple[Any, Any]]) -> tuple[Any, Any] | None:
        """The next item, or None at the end, under the loader's own random numbers."""
        outer = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            return next(iterator, None)
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(outer)

    def _ended(self, why: str) -> DataError:
        enough = self._read // self.by_step
        return DataError(
            f"the training loader ended after {self._read} items, which is enough for {enough} of {self.steps} steps: "
            f"{why}. Give a list or a DataLoader, which start again"
        )


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators that a loader was made with, each once."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    held = (getattr(part, "generator", None) for part in (loader, loader.sampler, loader.batch_sampler, sampler))
    return [*{id(one): one for one in held if isinstance(one, torch.Generator)}.values()]
