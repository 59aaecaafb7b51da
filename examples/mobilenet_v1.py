"""Optimize the pretrained ImageNet MobileNetV1 (width 0.75, 224 px) for ONNX Runtime and OpenVINO.

    python examples/mobilenet_v1.py [--target onnxruntime|openvino|both] [--drop 0.01] [-o out/]

Needs the real data and weights: the folder in BITSMITH_DATA, or ../shared/data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import parser, run
from torch import nn

import bitsmith as bs
from bitsmith.zoo.mobilenet import pretrained_mobilenet_v1
from bitsmith.zoo.tasks import mobilenet_v1_task


def main(argv: Sequence[str] | None = None) -> int:
    """0: every target met the budget. 1: one did not (its closest plan is saved). 2: there is no data."""
    options = parser("the pretrained MobileNetV1 0.75", "images", 128, 300, 700).parse_args(argv)

    def load(root: Path) -> tuple[nn.Module, bs.Task]:
        counts = {"calibration": options.calibration, "validation": options.validation, "test": options.test}
        return pretrained_mobilenet_v1(root), mobilenet_v1_task(root, **counts)

    return run("MobileNetV1 0.75", options, load)


if __name__ == "__main__":
    raise SystemExit(main())
