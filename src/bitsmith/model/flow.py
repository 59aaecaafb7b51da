"""Who made which tensor, held by weak reference: one run creates far more tensors than it keeps ids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Identity(Generic[T]):
    """Marks tensors; a mark is lost when the tensor dies or is changed in place by somebody unknown."""

    def __init__(self) -> None:
        self._marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def mark(self, tensor: Tensor, value: T) -> None:
        self._marks[tensor] = (value, _version(tensor))

    def of(self, tensor: Tensor) -> T | None:
        found = self._marks.get(tensor)  # type: ignore[no-untyped-call]
        if found is None or found[1] != _version(tensor):
            return None
        value: T = found[0]
        return value


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and output objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.utils.rnn.PackedSequence):
        yield value.data
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif _is_plain_object(value):
        for item in vars(value).values():
            if isinstance(item, (Tensor, tuple, list)):
                yield from tensors(item)


def replaced(value: Any, by: Iterator[Tensor]) -> Any:
    """``value`` with every tensor that :func:`tensors` finds replaced by the next of ``by``."""
    if isinstance(value, Tensor):
        return next(by)
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return value._replace(data=next(by))
    if isinstance(value, (tuple, list)):
        made = [replaced(item, by) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, Mapping):
        other = copy.copy(value)
        for key, item in value.items():
            other[key] = replaced(item, by)  # type: ignore[index]  # outputs are mutable mappings
        return other
    if _is_plain_object(value):
        other = copy.copy(value)
        for name, item in vars(value).items():
            if isinstance(item, (Tensor, tuple, list)):
                object.__setattr__(other, name, replaced(item, by))  # frozen dataclasses too
        return other
    return value


def _is_plain_object(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type)
        and type(value).__module__.partition(".")[0] not in ("torch", "builtins")
    )
