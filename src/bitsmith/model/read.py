"""``load``: a network from a file as an ordinary module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(path: str | Path, *, trusted: bool = False) -> nn.Module:
    """The network in an ``.onnx`` file, or with ``trusted=True`` in a ``.pt2`` file, in evaluation mode.

    ONNX: float32, opset 13 to 22, weights inside or in files beside it. The network takes the graph's inputs by
    position or name and returns one tensor, or a tuple if the graph has several outputs; its outputs equal ONNX
    Runtime's. Each node that computes is one child, named after its output; ``net.onnx_names`` keeps the names of the
    file. Which operators are read: docs/onnx_operators.md.

    A ``.pt2`` file (``torch.export.save``) is unpickled by torch, which may run whatever code is in it: say
    ``trusted=True`` only for files that you or somebody you trust wrote.

    Raises ``OnnxError`` or ``ExportedError``, both a ``ValueError``, with what is wrong, where, and what to do.
    """
    from .exported import load_exported
    from .onnx_graph.build import build
    from .onnx_graph.errors import OnnxFileError
    from .onnx_graph.reader import read_graph

    path = Path(path)
    if path.suffix == ".pt2":
        return load_exported(path, trusted=trusted)
    if path.suffix != ".onnx":
        raise OnnxFileError(
            f"{path}: give a file that ends in .onnx or .pt2. Weights alone (.pt, .npz, .safetensors) are no network: "
            "build it in Python and load them into it"
        )
    return build(read_graph(path))
