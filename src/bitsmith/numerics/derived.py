"""What was computed from tensors, kept for as long as none of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """Holds the last value and what it was computed from (held too, so that no other tensor takes the same place)."""

    def __init__(self) -> None:
        self._sources: Sequence[Tensor] = ()
        self._state: list[Any] = []
        self.value: T | None = None

    def of(self, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """The kept value where the sources are the same tensors, unchanged; else ``compute()``.

        Nothing is kept while a gradient or a graph needs what lies between, or under inference mode, whose tensors have
        no version to tell whether they changed.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return compute()
        state = [(t._version, t.data_ptr(), t.dtype) for t in sources]
        same = self.value is not None and self._state == state and len(self._sources) == len(sources)
        if not same or any(a is not b for a, b in zip(self._sources, sources, strict=True)):
            self.value, self._sources, self._state = compute(), tuple(sources), state
        assert self.value is not None
        return self.value

    def clear(self) -> None:
        """Forget the value."""
        self._sources, self._state, self.value = (), [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[Any]], tuple[()]]:
        return Derived, ()
