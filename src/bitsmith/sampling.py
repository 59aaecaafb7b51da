"""An evaluation set in random order, sample by sample: what certainty before its end rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from .data import Unlabelled, batch_size, items


@dataclass(frozen=True)
class Shuffled:
    """A loader's samples by position. ``order``: int64 [samples], a random permutation; ``chunk``: samples a batch."""

    source: _Source
    order: NDArray[np.int64]
    chunk: int

    @property
    def total(self) -> int:
        return len(self.order)

    def batch(self, first: int, count: int) -> tuple[Any, Any]:
        """``(inputs, target)`` of the samples ``first`` to ``first + count`` of the random order."""
        return self.source.take([int(index) for index in self.order[first : first + count]])


def shuffled(loader: Any, seed: int) -> Shuffled | None:
    """The samples of a loader in random order, drawn without replacement; nothing is copied but one batch at a time.

    A list of batches of one shape (however many samples each), a ``DataLoader`` over a dataset of single samples, in
    order, or a loader with ``samples``, ``batch`` (both int) and ``take(indices) -> (inputs, target)``. None for
    others: their samples can only be read one after the other.
    """
    source: _Source | None = None
    if isinstance(loader, DataLoader):
        source = _Samples.of(loader)
    elif isinstance(loader, Sequence) or (isinstance(loader, Unlabelled) and isinstance(loader.loader, Sequence)):
        source = _Batches.of(loader)
    elif isinstance(loader, RandomAccess):
        source = _Read(loader, loader.samples, loader.batch)
    if source is None:
        return None
    order = np.random.default_rng(seed).permutation(source.total)
    return Shuffled(source, order, source.chunk)


@runtime_checkable
class RandomAccess(Protocol):
    """A loader that can give any of its ``samples``; ``batch``: how many it gives at a time."""

    samples: int
    batch: int

    def take(self, indices: Sequence[int]) -> tuple[Any, Any]: ...


class _Source(Protocol):
    """``total`` samples, ``chunk`` of them a batch of the loader."""

    total: int
    chunk: int

    def take(self, indices: Sequence[int]) -> tuple[Any, Any]: ...


class _Batches:
    """A list of batches that are in memory already."""

    def __init__(self, batches: Sequence[tuple[Any, Any]], sizes: Sequence[int]) -> None:
        self.batches, self.sizes = batches, sizes
        self.total, self.chunk = sum(sizes), max(sizes)
        self.places = [(batch, k) for batch, size in enumerate(sizes) for k in range(size)]

    @classmethod
    def of(cls, loader: Any) -> _Batches | None:
        batches = list(items(loader, "validation"))
        sizes = [batch_size(inputs) for inputs, _ in batches]
        forms = {_form(batch, size) for batch, size in zip(batches, sizes, strict=True)}
        return None if len(forms) != 1 or None in forms else cls(batches, sizes)

    def take(self, indices: Sequence[int]) -> tuple[Any, Any]:
        places = [self.places[index] for index in indices]
        inputs, target = _joined([_picked(self.batches[batch], k) for batch, k in places])
        return inputs, target


class _Samples:
    """A map-style dataset behind a ``DataLoader``."""

    def __init__(self, loader: DataLoader[Any], total: int, chunk: int) -> None:
        self.loader, self.total, self.chunk = loader, total, chunk

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> _Samples | None:
        if not isinstance(loader.sampler, SequentialSampler) or loader.batch_size is None or loader.drop_last:
            return None
        total = len(loader.dataset)  # type: ignore[arg-type]  # a sequential sampler asked for it too
        if not total:
            return None
        found = cls(loader, total, loader.batch_size)
        try:
            found.take([0, total // 2, total - 1])
        except (RuntimeError, TypeError, KeyError):
            return None  # samples of unlike shape go together in the loader's own order only
        return found

    def take(self, indices: Sequence[int]) -> tuple[Any, Any]:
        collate = self.loader.collate_fn
        return next(items([collate([self.loader.dataset[index] for index in indices])], "validation"))


class _Read:
    """A loader that can give any of its samples."""

    def __init__(self, loader: RandomAccess, total: int, chunk: int) -> None:
        self.loader, self.total, self.chunk = loader, total, chunk

    def take(self, indices: Sequence[int]) -> tuple[Any, Any]:
        return next(items([self.loader.take(indices)], "validation"))


def _form(value: Any, size: int) -> Any:
    """Shapes and types without the samples' axis; None if something cannot be cut into samples."""
    if isinstance(value, Tensor):
        return (tuple(value.shape[1:]), value.dtype) if value.ndim and len(value) == size else None
    if isinstance(value, Mapping):
        parts = [(key, _form(item, size)) for key, item in value.items()]
        return None if any(part is None for _, part in parts) else tuple(parts)
    if isinstance(value, (tuple, list)):
        found = [_form(item, size) for item in value]
        return None if any(part is None for part in found) else tuple(found)
    return value is None or None


def _picked(value: Any, index: int) -> Any:
    if isinstance(value, Tensor):
        return value[index : index + 1]
    if isinstance(value, Mapping):
        return {key: _picked(item, index) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_picked(item, index) for item in value)
    return value


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {key: _joined([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([value[k] for value in values]) for k in range(len(first)))
    return first
