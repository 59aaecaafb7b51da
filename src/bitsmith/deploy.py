"""The export verb: an applied network as the file that a target runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ._files import check_writable
from .targets.base import Artifact, Target


def export(net: nn.Module, target: Target, path: str | Path, example: Any, batch: int | None = 1) -> Artifact:
    """Write an applied network (or a plain model, as float) as the file that ``target`` runs, and its map beside it.

    ``example``: inputs as in a loader's item. ``batch``: the batch size of the file; None keeps the example's. The
    file appears under its name only when it is whole. Raises ``ExportError`` with the operation that stops it.
    """
    path = Path(path)
    check_writable(path.parent)
    return target.export(net, path, example, batch)
