"""Optimize the pretrained CIFAR ResNet-20 for ONNX Runtime and OpenVINO.

    python examples/resnet20.py [--target onnxruntime|openvino|both] [--drop 0.01] [-o out/]

Needs the real data and weights: the folder in BITSMITH_DATA, or ../shared/data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import parser, run
from torch import nn

import bitsmith as bs
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.tasks import cifar_task
from bitsmith.zoo.weights import load_npz


def main(argv: Sequence[str] | None = None) -> int:
    """0: every target met the budget. 1: one did not (its closest plan is saved). 2: there is no data."""
    options = parser("the pretrained CIFAR ResNet-20", "images", 256, 1000, 1000).parse_args(argv)

    def load(root: Path) -> tuple[nn.Module, bs.Task]:
        model = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
        counts = {"calibration": options.calibration, "validation": options.validation, "test": options.test}
        return model, cifar_task(root, **counts)

    return run("CIFAR ResNet-20", options, load)


if __name__ == "__main__":
    raise SystemExit(main())
