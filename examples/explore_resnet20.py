"""The pretrained CIFAR ResNet-20 for the command line; the data folder is found through BITSMITH_DATA.

    file=examples/explore_resnet20.py
    bitsmith explore $file:build --data $file:task --target $file:chip \\
        --accuracy-drop 1 --objective energy --techniques all --train 20 -o out/

The same with --target onnxruntime, openvino, $file:systolic or $file:unzip (which has no energy: --objective latency).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

import bitsmith as bs
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import data_root
from bitsmith.zoo.tasks import cifar_task
from bitsmith.zoo.weights import load_npz


def _root() -> Path:
    root = data_root()
    if root is None:
        raise FileNotFoundError("the data folder is missing: set BITSMITH_DATA")
    return root


def build() -> nn.Module:
    """The network with its published weights."""
    return load_npz(resnet20(), _root() / "cifar10_models" / "resnet20.npz").eval()


def task() -> bs.Task:
    """256 training images calibrate, 500 others choose, the 1000 lossless test images are forwarded once."""
    return cifar_task(_root(), calibration=256, validation=500, batch=50)


def chip() -> bs.targets.DigitalAccelerator:
    """16 x 16 units and 128 KiB in 45 nm; pruned weights are stored in the smallest form, zeros are gated."""
    return bs.targets.DigitalAccelerator("45nm", storage="best", zeros="gate")


def systolic() -> bs.targets.SystolicArray:
    """32 x 32 units, weight stationary."""
    return bs.targets.SystolicArray("45nm")


def unzip() -> bs.targets.UnzipFpga:
    """An engine of a Zynq 7045 at a quarter of its bandwidth; the design is an ordinary one, not searched."""
    return bs.targets.UnzipFpga(bs.targets.Design(512, 13, 64, 64), bram_kib=2452.5, gb_s=1.05)
