"""Real data for tests, benchmarks and studies: found through ``BITSMITH_DATA``, never shipped and never downloaded."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import data_root as data_root
from .weights import read_npz

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)

_CIFAR_SHAPES = {"x_train": (32, 32, 3), "y_train": (), "x_test": (32, 32, 3), "y_test": ()}


def present(root: str | Path, folder: str, name: str) -> Path:
    """``root/folder/name``; raises ``FileNotFoundError`` with what to set where it is missing."""
    path = Path(root) / folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; set BITSMITH_DATA to the folder that holds {folder}/")
    return path


def _check(path: Path, arrays: dict[str, NDArray[Any]], name: str, shape: tuple[int, ...], kinds: str) -> None:
    """Raise ``ValueError`` unless ``arrays[name]`` has shape (n, *shape) and a dtype of one of the NumPy ``kinds``."""
    if name not in arrays or arrays[name].shape[1:] != shape or arrays[name].dtype.kind not in kinds:
        found = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "nothing"
        wanted = {"iu": "integers", "f": "floats", "U": "text"}[kinds]
        raise ValueError(f"{path}: {name} must be {wanted} of shape (n, {', '.join(map(str, shape))}), found {found}")


def cifar10(root: str | Path) -> dict[str, NDArray[Any]]:
    """The lossless CIFAR-10 images under ``root``: ``x_train`` (n, 32, 32, 3) and ``x_test`` as uint8 in RGB order,
    ``y_train`` (n,) and ``y_test`` as int64 classes 0 to 9.

    Raises ``FileNotFoundError`` without the file, ``WeightsError`` for a damaged one, ``ValueError`` for other content.
    """
    path = present(root, "cifar10", "cifar10_lossless.npz")
    arrays = read_npz(path)
    for name, shape in _CIFAR_SHAPES.items():
        _check(path, arrays, name, shape, "iu")
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


def mnist(root: str | Path) -> dict[str, NDArray[Any]]:
    """The MNIST digits under ``root``: ``x_train`` (n, 28, 28) and ``x_test`` as uint8, ``y_train`` (n,) and ``y_test``
    as int64 classes 0 to 9: 60,000 images to train, and 3000 of the 10,000 of the test. Raises as :func:`cifar10`."""
    path = present(root, "mnist", "mnist.npz")
    arrays = read_npz(path)
    for split in ("train", "test"):
        _check(path, arrays, f"x_{split}", (28, 28), "iu")
        _check(path, arrays, f"y_{split}", (), "iu")
        if len(arrays[f"x_{split}"]) != len(arrays[f"y_{split}"]):
            raise ValueError(f"{path}: x_{split} and y_{split} differ in length")
    names = ("x_train", "y_train", "x_test", "y_test")
    return {name: arrays[name].astype(np.uint8 if name[0] == "x" else np.int64) for name in names}


def imagenet_val(root: str | Path, size: int = 224) -> dict[str, NDArray[Any]]:
    """1000 images of ImageNet's validation set: ``x`` (1000, size, size, 3) uint8 RGB, the centre of 227x227 pixels,
    and ``y`` (1000,) int64 classes 0 to 999, in the order of ``labels.csv``.

    They are easier than the whole validation set by 8 to 14 points: compare models on them, but quote no accuracy on
    them as ImageNet's. Raises ``FileNotFoundError``, ``ValueError`` for labels of another form or images that are
    smaller than ``size``, ``ModuleNotFoundError`` without Pillow.
    """
    path = present(root, "imagenet_val", "labels.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows[:1] != [["file", "class_index"]] or not all(len(row) == 2 and row[1].isdecimal() for row in rows[1:]):
        raise ValueError(f"{path}: expected the columns file,class_index and an integer class in each row")
    images = [_centre(present(root, "imagenet_val", f"images/{name}"), size) for name, _ in rows[1:]]
    return {"x": np.stack(images), "y": np.array([int(label) for _, label in rows[1:]], np.int64)}


def imagenet_calibration(root: str | Path, size: int = 224) -> NDArray[np.uint8]:
    """256 images of ImageNet's training set, (256, size, size, 3) uint8 RGB, the centre of 256x256 pixels, by name.

    They have no class index: for calibration only. Raises as :func:`imagenet_val`.
    """
    folder = present(root, "imagenet_calibration", "images")
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no .jpg file; set BITSMITH_DATA to the folder with the images")
    return np.stack([_centre(path, size) for path in paths])


def _centre(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("images are read with Pillow, which is not installed: pip install pillow") from None
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    if top < 0 or left < 0:
        raise ValueError(f"{path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, {size}x{size} were asked for")
    return pixels[top : top + size, left : left + size]


def normalise_imagenet(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float32: x / 127.5 - 1, as Keras' MobileNet expects it.

    >>> normalise_imagenet(np.full((2, 32, 32, 3), 255, np.uint8))[0, 0, 0, 0]
    np.float32(1.0)
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (n, height, width, 3), got {images.dtype} {images.shape}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - np.float32(1)


def speech_commands(root: str | Path) -> dict[str, NDArray[Any]]:
    """The 12-class test set of Speech Commands v0.02 as MFCC: ``x`` (n, 1, 49, 10) float32, ``y`` (n,) int64,
    ``classes`` (12,), ``speaker`` (n,) int64, equal for clips of one person.

    The speaker is the one in the file's name, also of clips of the class _unknown_; a clip of silence has its own.
    Raises as :func:`cifar10`.
    """
    path = present(root, "speech_commands", "test_mfcc49x10.npz")
    arrays = read_npz(path)
    for name, shape, kinds in (("x", (49, 10), "f"), ("y", (), "iu"), ("classes", (), "U"), ("files", (), "U")):
        _check(path, arrays, name, shape, kinds)
    if not len(arrays["x"]) == len(arrays["y"]) == len(arrays["files"]):
        raise ValueError(f"{path}: x, y and files differ in length")
    people = []
    for file in arrays["files"].tolist():
        person = re.search(r"(?:^|[/_])([0-9a-f]{8})_nohash_", file)
        people.append(person[1] if person else file)
    _, speaker = np.unique(people, return_inverse=True)
    return {
        "x": arrays["x"].astype(np.float32)[:, None],
        "y": arrays["y"].astype(np.int64),
        "classes": arrays["classes"],
        "speaker": speaker.astype(np.int64),
    }


def sst2(root: str | Path) -> dict[str, tuple[list[str], NDArray[np.int64]]]:
    """GLUE's SST-2 (Socher et al. 2013): ``train`` and ``dev``, each the texts and their classes, 1 for positive.

    ``train`` holds phrases of its sentences as well, and some of them twice. Raises ``FileNotFoundError``,
    ``ValueError`` for a line of another form.
    """
    found = {}
    for split in ("train", "dev"):
        path = present(root, "sst2", f"{split}.tsv")
        lines = path.read_text(encoding="utf-8").split("\n")[1:]  # a text may hold other line ends of Unicode
        rows = [line.split("\t") for line in lines if line]
        for number, row in enumerate(rows, 2):
            if len(row) != 2 or row[0] not in ("0", "1"):
                raise ValueError(f"{path}:{number}: expected 0 or 1, a tabulator, and the text")
        found[split] = ([row[1].strip() for row in rows], np.array([int(row[0]) for row in rows], np.int64))
    return found


def cora(root: str | Path) -> dict[str, NDArray[Any]]:
    """The citation graph Cora with the split of Yang et al. 2016, arXiv:1603.08861: ``x`` (2708, 1433) float32 with
    rows that sum to 1, ``y`` (2708,) int64 classes 0 to 6, ``edge_index`` (2, 10556) int64 with both directions of
    every edge, and the node numbers ``train`` (140,), ``val`` (500,), ``test`` (1000,).

    Raises as :func:`cifar10`.
    """
    path = present(root, "graphs", "cora.npz")
    arrays = read_npz(path)
    _check(path, arrays, "x", (1433,), "iu")
    for name in ("y", "train", "val", "test"):
        _check(path, arrays, name, (), "iu")
    edges = arrays.get("edge_index", np.zeros(0))
    nodes = len(arrays["x"])
    if (
        edges.ndim != 2
        or len(edges) != 2
        or edges.dtype.kind not in "iu"
        or not 0 <= edges.min() <= edges.max() < nodes
    ):
        raise ValueError(f"{path}: edge_index must be integers of shape (2, edges) from 0 to {nodes - 1}")
    words = arrays["x"].astype(np.float32)
    total = np.maximum(words.sum(1, keepdims=True), 1)
    rest = {name: arrays[name].astype(np.int64) for name in ("y", "edge_index", "train", "val", "test")}
    return {"x": words / total, **rest}
