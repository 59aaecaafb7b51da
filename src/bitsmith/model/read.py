"""Networks from files as ordinary modules that Bitsmith sees into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def read(path: str | Path, *, trusted: bool = False) -> nn.Module:
    """The float network in an ``.onnx`` or ``.pt2`` file: :func:`bitsmith.load` without those that are quantized, which
    raise ``QuantizedError``."""
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
