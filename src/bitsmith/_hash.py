"""Content hashes: the same bytes give the same key on every machine, whatever the paths and the dates."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_FLOAT = "$float"


class Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...


def to_plain(value: Any) -> Any:
    """``value`` as strict JSON: tuples become lists, NumPy scalars become numbers, NaN and infinities become
    ``{"$float": "nan"}``. Anything else is a ``TypeError`` that names it.

    >>> to_plain({"drop": float("inf"), "shape": (1, 2)})
    {'drop': {'$float': 'inf'}, 'shape': [1, 2]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: str(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT:
                raise TypeError(f"{key!r} cannot be a key in JSON here: use other strings")
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: use numbers, strings, lists and mappings")


def from_plain(value: Any) -> Any:
    """The inverse of :func:`to_plain`, except that tuples stay lists."""
    if isinstance(value, dict):
        return float(value[_FLOAT]) if set(value) == {_FLOAT} else {k: from_plain(v) for k, v in value.items()}
    return [from_plain(item) for item in value] if isinstance(value, list) else value


def canonical(value: Any) -> str:
    """One JSON text per value: keys sorted, no spaces.

    >>> canonical({"b": 1, "a": (2.0, None)})
    '{"a":[2.0,null],"b":1}'
    """
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def update(hasher: Hasher, value: Any) -> None:
    """Feed a value into a hash: tensors and arrays by dtype, shape and bytes; containers with their structure.

    Raises ``TypeError`` for a type without a stable content.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of Python objects has no stable bytes: convert it to numbers")
        hasher.update(f"A{value.dtype.str}{value.shape};".encode())
        hasher.update(np.ascontiguousarray(value).data if value.size else b"")
    elif isinstance(value, Tensor):
        _update_tensor(hasher, value)
    elif isinstance(value, Mapping):
        hasher.update(f"M{len(value)};".encode())
        for key in sorted(value, key=str):
            update(hasher, str(key))
            update(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        hasher.update(f"L{len(value)};".encode())
        for item in value:
            update(hasher, item)
    elif isinstance(value, (set, frozenset)):
        update(hasher, sorted(map(repr, value)))
    elif isinstance(value, bytes):
        hasher.update(f"B{len(value)};".encode() + value)
    elif isinstance(value, np.generic):
        update(hasher, np.asarray(value))
    elif value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        text = f"{type(value).__name__}:{value!r}".encode()
        hasher.update(f"V{len(text)};".encode() + text)
    else:
        raise TypeError(f"{type(value).__name__} has no content that can be hashed: use tensors, numbers and strings")


def _update_tensor(hasher: Hasher, tensor: Tensor) -> None:
    if tensor.is_meta or is_lazy(tensor):
        raise TypeError("a meta or lazy tensor has no values yet: load the weights or run the model once")
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    hasher.update(f"T{tensor.dtype}{tuple(tensor.shape)};".encode())
    flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def hash_state(module: nn.Module) -> str:
    """SHA-256 (hex) of all parameters and buffers, also those outside ``state_dict()``: names, dtypes, shapes, bytes.

    Which names share one tensor counts too: tied and untied weights of equal value differ.
    """
    hasher = hashlib.sha256()
    first: dict[int, str] = {}
    state = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(state, key=lambda pair: pair[0]):
        update(hasher, name)
        owner = first.setdefault(id(tensor), name)
        try:
            update(hasher, owner if owner != name else tensor)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
    return hasher.hexdigest()


def hash_source(thing: type | Callable[..., Any]) -> str:
    """SHA-256 (hex) of the source *file* that defines a class or function: content only, neither path nor date.

    What was typed at a prompt has no file: then its own source, or else its bytecode.
    """
    thing = inspect.unwrap(thing)
    try:
        file = inspect.getsourcefile(thing)
        if file is not None and Path(file).is_file():
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (TypeError, OSError):
        pass  # a built-in, or a module without a file
    return hash_function(thing)


def hash_function(function: Any) -> str:
    """SHA-256 (hex) of what a callable computes: its source, or without one its bytecode; what it closes over, its
    defaults, the arguments of a ``partial``, the fields of a callable object.

    Functions that it calls by global name are not followed.
    """
    hasher = hashlib.sha256()
    _update_function(hasher, function, set())
    return hasher.hexdigest()


def _update_function(hasher: Hasher, value: Any, seen: set[int]) -> None:
    if id(value) in seen:
        return
    if callable(value) or hasattr(value, "__dict__"):
        seen.add(id(value))
    if isinstance(value, partial):
        _update_function(hasher, value.func, seen)
        for item in (*value.args, *(part for pair in sorted(value.keywords.items()) for part in pair)):
            _update_function(hasher, item, seen)
    elif isinstance(value, types.MethodType):
        _update_function(hasher, value.__func__, seen)
        _update_function(hasher, value.__self__, seen)
    elif isinstance(value, types.FunctionType):
        source = _source(value)
        # two lambdas on one line share that line
        if source is None or value.__name__ == "<lambda>":
            _update_code(hasher, value.__code__)
        update(hasher, source)
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        for item in (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            _update_function(hasher, item, seen)
    elif isinstance(value, type):
        source = _source(value)
        update(hasher, source if source is not None else value.__qualname__)
        if source is None:
            for item in vars(value).values():
                if isinstance(item, types.FunctionType):
                    _update_function(hasher, item, seen)
    elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
        update(hasher, getattr(value, "__qualname__", value.__name__))
    elif isinstance(value, nn.Module):
        _update_function(hasher, type(value), seen)
        update(hasher, [hash_state(value), repr(value)])
    elif isinstance(value, (list, tuple)):
        update(hasher, len(value))
        for item in value:
            _update_function(hasher, item, seen)
    elif isinstance(value, Mapping):
        _update_function(hasher, [part for key in sorted(value, key=str) for part in (str(key), value[key])], seen)
    else:
        try:
            update(hasher, value)
        except TypeError:
            update(hasher, getattr(value, "__name__", ""))
            _update_function(hasher, type(value), seen)
            _update_function(hasher, dict(getattr(value, "__dict__", {})), seen)


def _source(thing: Any) -> str | None:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return None


def _update_code(hasher: Hasher, code: types.CodeType) -> None:
    update(hasher, [code.co_code, list(code.co_names)])
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _update_code(hasher, constant)
        else:
            update(hasher, repr(constant))


def technique_key(technique: Any) -> dict[str, Any]:
    """What identifies a technique (a frozen dataclass) in a store: class name, all fields, hash of its source file."""
    return {**_fields(technique), "source": hash_source(type(technique))}


def _fields(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _fields(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, "fields": fields}
    if isinstance(value, (list, tuple)):
        return [_fields(item) for item in value]
    return to_plain(value)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of the content of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
