"""NNCF's accuracy control on the ONNX model: see :mod:`benchmarks.peers.nncf_accuracy_control`."""

from __future__ import annotations

from .common import Result, Run, main
from .nncf_accuracy_control import tune


def on_onnx(run: Run) -> Result:
    return tune(run, onnx=True)


if __name__ == "__main__":
    main("nncf_accuracy_control_onnx", "nncf", on_onnx)
