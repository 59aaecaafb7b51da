"""Data as every verb reads it: a loader of ``(inputs, target)``, and how the inputs reach the model.

``inputs``: a tensor -> ``model(x)``, a tuple or list -> ``model(*x)``, a mapping -> ``model(**x)``; NumPy arrays become
tensors. A loader can be read any number of times and gives the same samples in the same order each time.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from ._hash import update

Forward = Callable[[Any, Any], Any]
"""The one escape: ``forward(model, inputs) -> output``."""

_LABELS = ("label", "labels", "target", "targets", "y")


class DataError(ValueError):
    """Data in a form that cannot be read: says what came and how to mend it."""


class ModelRunError(RuntimeError):
    """The model raised: says what was passed, the model's signature, and the way out."""


@dataclass(frozen=True)
class Unlabelled:
    """A loader whose items are bare inputs. Reads as items ``(inputs, None)``.

    >>> [target for inputs, target in Unlabelled([torch.zeros(2, 3)])]
    [None]
    """

    loader: Iterable[Any]

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        return ((item, None) for item in self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises its own TypeError


def check_loader(loader: Any, role: str, fixed_order: bool = True, once: bool = False) -> None:
    """Raise :class:`DataError` for what cannot be a loader, before anything is read from it.

    ``role`` names it in the message: calibration, validation, test. ``fixed_order``: refuse one that shuffles.
    ``once``: let a one-shot iterator pass.
    """
    inner = loader.loader if isinstance(loader, Unlabelled) else loader
    if isinstance(inner, (Tensor, np.ndarray)):
        raise DataError(
            f"the {role} loader is itself {describe(inner)}; give batches with their targets: {role}=[(x, y)], "
            "or bare inputs: Unlabelled([x])"
        )
    if isinstance(inner, Mapping):
        raise DataError(
            f"the {role} loader is one mapping, {describe(inner)}; give a list of batches: [(inputs, target)]"
        )
    # a one-shot iterator has __next__; asking iter(loader) instead would start a DataLoader's workers
    if one_shot(inner) and not once:
        raise DataError(
            f"the {role} loader is a one-shot {type(inner).__name__}: it would be empty the second time it is read; "
            f"give a list or a DataLoader: {role}=list(loader)"
        )
    if isinstance(inner, Dataset) and not isinstance(inner, IterableDataset):
        raise DataError(
            f"the {role} loader is a dataset of single samples; give batches: "
            "torch.utils.data.DataLoader(dataset, batch_size=32)"
        )
    if not hasattr(inner, "__iter__") and not hasattr(inner, "__getitem__"):
        raise DataError(
            f"the {role} loader is {describe(inner)}, which cannot be iterated; give a list or a DataLoader"
        )
    if fixed_order and isinstance(inner, DataLoader) and isinstance(inner.sampler, RandomSampler):
        raise DataError(
            f"the {role} loader shuffles, so no two passes could be compared sample by sample; use DataLoader(..., "
            f"shuffle=False), or keep the first batches: {role}=list(itertools.islice(loader, 16))"
        )


def one_shot(loader: Any) -> bool:
    """Whether it is an iterator, which can be read only once.

    >>> one_shot(iter([])), one_shot([])
    (True, False)
    """
    return hasattr(type(loader.loader if isinstance(loader, Unlabelled) else loader), "__next__")


def items(loader: Any, role: str, once: bool = False) -> Iterator[tuple[Any, Any]]:
    """The loader's ``(inputs, target)`` pairs, checked, NumPy arrays as tensors.

    ``role`` (calibration, validation, test) names the loader in messages. ``once``: it may be a one-shot iterator.
    Raises :class:`DataError`.
    """
    check_loader(loader, role, fixed_order=False, once=once)
    return _items(loader, role)


def _items(loader: Any, role: str) -> Iterator[tuple[Any, Any]]:
    labelled = not isinstance(loader, Unlabelled)
    pair = isinstance(loader, (tuple, list)) and len(loader) == 2 and isinstance(loader[0], (Tensor, np.ndarray))
    index = -1
    for index, item in enumerate(loader):
        if labelled:
            problem = _problem(item, pair)
            if problem:
                raise DataError(f"{role} item {index} is {describe(item)}: {problem}")
        inputs, target = item
        where = f"{role} item {index}"
        inputs, target = _tensors(inputs, where), _tensors(target, where)
        _check_inputs(inputs, where)
        if isinstance(target, (int, float)) or (isinstance(target, Tensor) and target.ndim == 0):
            raise DataError(
                f"{where} is {describe((inputs, target))}: a single sample, its target has no batch axis; give "
                "batches: torch.utils.data.DataLoader(dataset, batch_size=32), or "
                "[(x[None], torch.as_tensor([y])) for x, y in loader]"
            )
        yield inputs, target
    if index < 0:
        raise DataError(
            f"the {role} loader is empty: it gave no item. If it gave some before, it can be read only once: "
            f"{role}=list(loader)"
        )


def _problem(item: Any, pair: bool) -> str:
    """What keeps a labelled loader's item from being ``(inputs, target)``, with its mend; "" if nothing does."""
    wanted = "(inputs, target) was expected; "
    if isinstance(item, (Tensor, np.ndarray)):
        if pair:
            return wanted + "inputs and targets were given as the loader itself: write [(x, y)]"
        return wanted + "without targets write Unlabelled(loader)"
    if isinstance(item, Mapping):
        label = next((key for key in _LABELS if key in item), None)
        if label is None:
            return wanted + "without targets write Unlabelled(loader)"
        rest = f"{{k: v for k, v in d.items() if k != {label!r}}}"
        return wanted + f"the target is inside the mapping: write [({rest}, d[{label!r}]) for d in loader]"
    if not isinstance(item, (tuple, list)):
        return wanted + (
            "take it apart, such as [((d.x, d.edge_index), d.y) for d in loader], or use forward= with "
            "[({'data': d}, d.y) for d in loader]"
        )
    if len(item) == 2:
        return ""
    if len(item) == 1:
        return wanted + "without targets write Unlabelled([x for x, in loader])"
    if len(item) == 3:
        return wanted + (
            "write [(x, y) for x, y, _ in loader], or for a model of two inputs [((a, b), y) for a, b, y in loader]"
        )
    return wanted + "write [(tuple(xs), y) for *xs, y in loader] for a model of several inputs"


def _tensors(value: Any, where: str) -> Any:
    """NumPy arrays (also inside tuples, lists and mappings) as tensors of their own; the rest as it came."""
    if isinstance(value, np.ndarray):
        try:
            # a copy in native byte order: torch refuses negative strides, and warns of read-only memory
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise DataError(
                f"{where} has a NumPy array of dtype {value.dtype}, which no tensor can hold: convert it to numbers"
            ) from None
    if isinstance(value, Mapping):
        return {key: _tensors(item, where) for key, item in value.items()} if _holds_array(value.values()) else value
    if isinstance(value, (tuple, list)):
        return tuple(_tensors(item, where) for item in value) if _holds_array(value) else value
    return value


def _holds_array(values: Iterable[Any]) -> bool:
    for value in values:
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
        if isinstance(value, np.ndarray) or _holds_array(inner):
            return True
    return False


def _check_inputs(inputs: Any, where: str) -> None:
    if isinstance(inputs, Tensor):
        return
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise DataError(
            f"{where}: the inputs are {describe(inputs)}; a tensor, a tuple or a mapping was expected. Wrap another "
            "object as ({'data': inputs}, target) and give forward=lambda model, inputs: model(inputs['data'])"
        )
    if isinstance(inputs, Mapping) and not all(isinstance(key, str) for key in inputs):
        raise DataError(
            f"{where}: the inputs are {describe(inputs)}; its keys must be the names of the model's arguments"
        )
    if not inputs:
        raise DataError(f"{where}: the inputs are empty, {describe(inputs)}; there is nothing to run the model on")


def call(model: Any, inputs: Any, forward: Forward | None = None) -> Any:
    """The model's output for one batch of inputs, which are put on the model's device first.

    Raises :class:`ModelRunError` from whatever the model raised; errors that Bitsmith raises itself and exhausted
    memory pass unchanged.
    """
    inputs = to_device(inputs, device_of(model))
    try:
        if forward is not None:
            return forward(model, inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] == __name__.partition(".")[0]:
            raise
        raise ModelRunError(_run_message(model, inputs, forward, error)) from error


def _run_message(model: Any, inputs: Any, forward: Forward | None, error: Exception) -> str:
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)
    if forward is not None:
        passed, hint = f"forward(model, {describe(inputs)})", "look at the forward= that was given"
    else:
        stars = "**" if isinstance(inputs, Mapping) else "*" if isinstance(inputs, (tuple, list)) else ""
        passed = f"model({stars}{describe(inputs)})"
        hint = (
            "a tensor is passed as model(x), a tuple as model(*x), a mapping as model(**x); for anything else give "
            "forward=lambda model, inputs: ..."
        )
    given, wanted = _first_dtype(inputs), next((p.dtype for p in _state(model) if p.is_floating_point()), None)
    if given is not None and wanted is not None and given != wanted and given in (torch.float64, torch.uint8):
        hint = f"the inputs are {_short(given)} and the model is {_short(wanted)}: convert them in the loader. {hint}"
    return (
        f"the model raised {type(error).__name__}: {error}\n"
        f"  signature: {name}.forward{_signature(model)}\n  passed:    {passed}\n  hint:      {hint}"
    )


def _signature(model: Any) -> str:
    try:
        return str(inspect.signature(model.forward if isinstance(model, nn.Module) else model))
    except (TypeError, ValueError):
        return "(...)"


def _state(model: Any) -> Iterator[Tensor]:
    if isinstance(model, nn.Module):
        yield from model.parameters()
        yield from model.buffers()


def device_of(model: Any) -> torch.device | None:
    """The device of the model's first parameter or buffer; None if it has neither."""
    return next((tensor.device for tensor in _state(model)), None)


def to_device(value: Any, device: torch.device | None) -> Any:
    """Tensors, also inside tuples, lists and mappings, on that device; the same object if nothing has to move."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device) for key, item in value.items()}
        return moved if any(moved[key] is not value[key] for key in moved) else value
    if isinstance(value, (tuple, list)):
        parts = [to_device(item, device) for item in value]
        return tuple(parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside tuples, lists, mappings and objects with ``.logits``, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "logits"):
        yield from tensors_in(value.logits)


def _first_dtype(inputs: Any) -> torch.dtype | None:
    return next((tensor.dtype for tensor in tensors_in(inputs)), None)


def batch_size(inputs: Any) -> int:
    """Samples in one batch of inputs: the first axis of the first tensor that has axes."""
    for tensor in tensors_in(inputs):
        if tensor.ndim:
            return int(tensor.shape[0])
    raise DataError(f"the inputs hold no tensor with a batch axis: {describe(inputs)}")


def first_inputs(loader: Any, role: str = "calibration") -> Any:
    """The inputs of the loader's first item, to record the model with."""
    inputs, _ = next(items(loader, role))
    return inputs


def digest(loader: Any, role: str = "calibration") -> str:
    """SHA-256 (hex) of all items in order: bytes, shapes and dtypes of inputs and targets. Reads the loader once."""
    hasher = hashlib.sha256()
    for index, item in enumerate(items(loader, role)):
        try:
            update(hasher, item)
        except TypeError as error:
            raise DataError(f"{role} item {index}, {describe(item)}: {error}") from None
    return hasher.hexdigest()


def describe(value: Any, depth: int = 3) -> str:
    """Types, shapes and dtypes in one line.

    >>> describe((torch.zeros(8, 3), {"mask": torch.ones(8, dtype=torch.bool)}))
    '(Tensor[8, 3] float32, {mask: Tensor[8] bool})'
    """
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} {_short(value.dtype)}"
    if isinstance(value, np.ndarray):
        return f"ndarray{list(value.shape)} {value.dtype}"
    if isinstance(value, (tuple, list, Mapping)) and depth == 0:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        parts = [f"{key}: {describe(item, depth - 1)}" for key, item in list(value.items())[:8]]
        return "{" + ", ".join(parts + ["..."] * (len(value) > 8)) + "}"
    if isinstance(value, (tuple, list)):
        parts = [describe(item, depth - 1) for item in value[:8]]
        inside = ", ".join(parts + ["..."] * (len(value) > 8)) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"{type(value).__name__} {value[:20]!r}" if isinstance(value, str) else type(value).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
