"""Optimize the pretrained keyword spotter DS-CNN S for ONNX Runtime and OpenVINO.

    python examples/ds_cnn.py [--target onnxruntime|openvino|both] [--drop 0.01] [-o out/]

Needs the real data and weights: the folder in BITSMITH_DATA, or ../shared/data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import parser, run
from torch import nn

import bitsmith as bs
from bitsmith.zoo.ds_cnn import pretrained_ds_cnn
from bitsmith.zoo.tasks import ds_cnn_task


def main(argv: Sequence[str] | None = None) -> int:
    """0: every target met the budget. 1: one did not (its closest plan is saved). 2: there is no data."""
    options = parser("the pretrained DS-CNN S", "clips", 256, 1465, 2936).parse_args(argv)

    def load(root: Path) -> tuple[nn.Module, bs.Task]:
        counts = {"calibration": options.calibration, "validation": options.validation, "test": options.test}
        return pretrained_ds_cnn(root), ds_cnn_task(root, **counts)

    return run("DS-CNN S", options, load)


if __name__ == "__main__":
    raise SystemExit(main())
