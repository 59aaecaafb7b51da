"""The pretrained CIFAR ResNet-20, and the images that train, choose and test, of the studies that train it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bitsmith.task import Task
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.tasks import cifar_task
from bitsmith.zoo.weights import load_npz

TRAINING, VALIDATION = 3000, 1000
"""Lossless training images that train and calibrate, and those that only settings are chosen on."""


def task_of(root: Path) -> Task:
    return cifar_task(root, calibration=TRAINING, validation=VALIDATION, batch=100, tell=lambda line: None)


def network(root: Path) -> nn.Module:
    return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
