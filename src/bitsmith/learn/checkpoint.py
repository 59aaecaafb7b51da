"""A training on disk: one safetensors file that is whole or absent, and no pickle in it.

Tensors stand under their names, everything else as JSON in the file's metadata. A checksum by tensor tells a file that
was damaged from one that can be gone on from.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import atomic_write
from .loop import TrainingError

SCHEMA = 1
KIND = "bitsmith.checkpoint"


@dataclass
class Checkpoint:
    """``call``: what the training was asked to do, as text by name. ``tensors``: by name. ``values``: numbers, strings,
    lists and mappings; tensors inside them (an optimizer's state) are moved to ``tensors`` by :meth:`hold`.
    """

    call: Mapping[str, str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def hold(self, name: str, value: Any) -> None:
        """Take in a nested value under ``name``. Raises :class:`TrainingError` for what no such file can hold."""
        self.values[name] = _packed(value, name, self.tensors)

    def held(self, name: str) -> Any:
        """What :meth:`hold` took in: the same types, tuples and integer keys included."""
        return _unpacked(self.values[name], self.tensors)

    def hold_all(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take in named tensors."""
        self.tensors.update({f"{name}/{key}": tensor for key, tensor in tensors.items()})

    def all_held(self, name: str) -> dict[str, Tensor]:
        """What :meth:`hold_all` took in."""
        return {
            key.removeprefix(f"{name}/"): tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}/")
        }

    def save(self, path: Path) -> None:
        """Write the file under another name and rename it: whenever the process dies, the last one stays whole."""
        from safetensors.torch import save_file

        # copies, since the format refuses tensors that share memory
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(self.tensors.items())
        }
        about = {
            "kind": KIND,
            "schema": SCHEMA,
            "call": dict(self.call),
            "values": self.values,
            "checks": {name: _check(tensor) for name, tensor in tensors.items()},
        }
        text = json.dumps(about, allow_nan=False)
        metadata = {"bitsmith": text, "check": str(zlib.crc32(text.encode()))}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read such a file. Raises :class:`TrainingError` for any other and for a damaged one."""
        from safetensors import SafetensorError, safe_open

        mend = f"delete {path} to begin again, or put an earlier copy there"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                text = metadata.get("bitsmith", "null")
                about = json.loads(text)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise TrainingError(
                f"{path} cannot be read as a checkpoint, it is cut off or damaged ({error}): {mend}"
            ) from None
        if not isinstance(about, dict) or about.get("kind") != KIND:
            raise TrainingError(f"{path} is a safetensors file but no checkpoint of a training: give another path")
        if about.get("schema") != SCHEMA:
            raise TrainingError(
                f"{path} has checkpoint schema {about.get('schema')!r}, this version reads {SCHEMA}: go on with the "
                f"version of Bitsmith that wrote it, or {mend}"
            )
        damaged = sorted(
            ({"its header"} if metadata.get("check") != str(zlib.crc32(text.encode())) else set())
            | {name for name, tensor in tensors.items() if about["checks"].get(name) != _check(tensor)}
            | (about["checks"].keys() - tensors.keys())
        )
        if damaged:
            raise TrainingError(f"{path} is damaged: {', '.join(damaged[:3])} is not what was written; {mend}")
        return cls(about["call"], tensors, about["values"])

    def check_call(self, call: Mapping[str, str], path: Path) -> None:
        """Raise :class:`TrainingError` with what differs where the file belongs to another training."""
        different = [
            f"{name} was {self.call.get(name, 'not given')}, now {call.get(name, 'not given')}"
            for name in dict.fromkeys([*call, *self.call])
            if self.call.get(name) != call.get(name)
        ]
        if different:
            rest = f"; and {len(different) - 5} more" if len(different) > 5 else ""
            raise TrainingError(
                f"{path} is the checkpoint of another training: {'; '.join(different[:5])}{rest}. Give the same "
                f"arguments to go on with it, or another checkpoint= (or delete {path.name}) to begin anew"
            )


def _check(tensor: Tensor) -> int:
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _packed(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as strict JSON; tensors go to ``tensors`` under the path that leads to them."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"$tensor": where}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Mapping):
        pairs = [
            [_packed(key, where, tensors), _packed(item, f"{where}/{key}", tensors)] for key, item in value.items()
        ]
        return {"$mapping": pairs}
    if isinstance(value, (list, tuple)):
        items = [_packed(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TrainingError(
        f"checkpoint=: {where} is a {type(value).__name__}, which a file without pickle cannot hold; take another "
        "optimizer or schedule, or train without a checkpoint"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$float":
        return float(content)
    if kind == "$tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
