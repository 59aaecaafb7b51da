"""Real data for tests, benchmarks and studies: found through ``BITSMITH_DATA``, never shipped and never downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .weights import read_npz

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)

_CIFAR_SHAPES = {"x_train": (32, 32, 3), "y_train": (), "x_test": (32, 32, 3), "y_test": ()}


def data_root() -> Path | None:
    """The data folder, or None where there is none.

    ``BITSMITH_DATA`` if it is set (only there then), otherwise ``../shared/data`` beside the working directory or
    beside the repository that this file lies in.
    """
    given = os.environ.get("BITSMITH_DATA")
    if given:
        places = [Path(given).expanduser()]
    else:
        repository = Path(__file__).resolve().parents[3]
        places = [base.parent / "shared" / "data" for base in (Path.cwd(), repository)]
    return next((place.resolve() for place in places if place.is_dir()), None)


def cifar10(root: str | Path) -> dict[str, NDArray[Any]]:
    """The lossless CIFAR-10 images under ``root``: ``x_train`` (n, 32, 32, 3) and ``x_test`` as uint8 in RGB order,
    ``y_train`` (n,) and ``y_test`` as int64 classes 0 to 9.

    Raises ``FileNotFoundError`` without the file, ``WeightsError`` for a damaged one, ``ValueError`` for other content.
    """
    path = Path(root) / "cifar10" / "cifar10_lossless.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; set BITSMITH_DATA to the folder that holds cifar10/")
    arrays = read_npz(path)
    for name, shape in _CIFAR_SHAPES.items():
        if name not in arrays or arrays[name].shape[1:] != shape or arrays[name].dtype.kind not in "iu":
            found = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "nothing"
            raise ValueError(
                f"{path}: {name} must be integers of shape (n, {', '.join(map(str, shape))}), found {found}"
            )
    for split in ("train", "test"):
        if len(arrays[f"x_{split}"]) != len(arrays[f"y_{split}"]):
            raise ValueError(f"{path}: x_{split} and y_{split} differ in length")
    return {name: arrays[name].astype(np.uint8 if name[0] == "x" else np.int64) for name in _CIFAR_SHAPES}


def normalise_cifar(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, 32, 32, 3) uint8 -> (n, 3, 32, 32) float32: (x / 255 - mean) / std with the ImageNet mean and deviation,
    as the published CIFAR ResNet weights (akamaster/pytorch_resnet_cifar10) expect it.

    >>> normalise_cifar(np.zeros((2, 32, 32, 3), np.uint8)).shape
    (2, 3, 32, 32)
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (n, height, width, 3), got {images.dtype} {images.shape}")
    mean, deviation = np.array(CIFAR_MEAN, np.float32), np.array(CIFAR_STD, np.float32)
    normalised = (images.astype(np.float32) / np.float32(255) - mean) / deviation
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32)
