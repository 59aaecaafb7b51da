"""Training images of CIFAR-10, lossless or JPEG: drawn anew in each epoch, turned over and shifted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitsmith.sampling import RandomAccess
from bitsmith.zoo.data import normalise_cifar
from bitsmith.zoo.tasks import Batches

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of CIFAR-10's numbers."""

ARCHIVE = Path("cifar10") / "cifar10_jpeg_60k.tar.xz"
SHIFT = 4
"""Pixels by which a training image is shifted at most, as in He et al. 2015, arXiv:1512.03385, section 4.2."""


class Augmented:
    """Batches of ``batch`` samples in an order that torch's global generator draws anew each time it is read; what is
    left over at the end is left out. Each image is turned over with probability 1/2 and shifted."""

    def __init__(self, source: RandomAccess, batch: int) -> None:
        if source.samples < batch:
            raise ValueError(f"{source.samples} samples: fewer than a batch of {batch}")
        self.source, self.batch = source, batch

    def __len__(self) -> int:
        return self.source.samples // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.source.samples)
        for start in range(0, len(self) * self.batch, self.batch):
            images, target = self.source.take(order[start : start + self.batch].tolist())
            yield augmented(images), target


def augmented(images: Tensor) -> Tensor:
    """[n, c, h, w] of the same shape: each turned over or not, and shifted by at most :data:`SHIFT` pixels, the mean
    colour (0) behind."""
    count, _, height, width = images.shape
    turned = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    padded = torch.nn.functional.pad(turned, (SHIFT,) * 4)
    starts = torch.randint(0, 2 * SHIFT + 1, (count, 2)).tolist()
    return torch.stack(
        [one[:, top : top + height, left : left + width] for one, (top, left) in zip(padded, starts, strict=True)]
    )


def jpeg_training(root: Path, batch: int) -> Batches:
    """The 50,000 training images of CIFAR-10 as lossy JPEG. The archive's test images are never looked at: 1000 of
    them are, lossless, what every network here is tested on. About 20 s."""
    from PIL import Image

    images: list[NDArray[Any]] = []
    classes: list[int] = []
    with tarfile.open(root / ARCHIVE) as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[0] != "train" or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            with Image.open(io.BytesIO(file.read())) as image:
                images.append(np.asarray(image.convert("RGB")))
            classes.append(CLASSES.index(parts[1]))
    pixels, target = np.stack(images), np.array(classes, np.int64)

    def read(chosen: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(normalise_cifar(pixels[chosen])), torch.from_numpy(target[chosen])

    return Batches(len(target), batch, read)
