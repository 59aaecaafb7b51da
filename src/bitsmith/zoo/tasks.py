"""The real networks' tasks: calibration, validation and test data that never mix, from the data folder.

Each part is fixed by the seed; asking for fewer samples takes the first of that part, so no setting moves a sample from
one part to another. ``tell`` gets a line on each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..data import Unlabelled
from ..metrics import top1
from ..task import Task
from .data import (
    cifar10,
    imagenet_calibration,
    imagenet_val,
    normalise_cifar,
    normalise_imagenet,
    speech_commands,
    sst2,
)
from .text import HEAD_SENTENCES, LENGTH, sst2_train, tokenize

Tell = Callable[[str], object]

Read = Callable[[Any], tuple[Any, Tensor]]

SPEECH_PARTS = {"calibration": 0.1, "validation": 0.3}
"""Shares of the clips of Speech Commands; the others test."""

IMAGENET_VALIDATION = 300
"""Images of ``imagenet_val`` that choose between plans; the other 700 test."""


class Batches:
    """A loader that makes each batch when it is asked for: ``read`` of a slice or of int64 indices [n] gives ``(inputs,
    target)``. With :meth:`take` an evaluation can read it in random order."""

    def __init__(self, samples: int, batch: int, read: Read) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}: must be at least 1")
        self.samples, self.batch, self.read = samples, batch, read

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def take(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """``(inputs, target)`` of these samples."""
        return self.read(np.asarray(indices, np.int64))

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return (
            self.read(slice(start, min(start + self.batch, self.samples)))
            for start in range(0, self.samples, self.batch)
        )


def _count(asked: int | None, there: int, what: str) -> int:
    if asked is not None and not 1 <= asked <= there:
        raise ValueError(f"{asked} {what} were asked for: there are 1 to {there}")
    return there if asked is None else asked


def cifar_task(
    root: str | Path,
    *,
    calibration: int = 256,
    validation: int = 1000,
    test: int | None = None,
    batch: int = 50,
    tell: Tell = print,
) -> Task:
    """The CIFAR ResNets' task. Calibration and validation: different lossless images of the training set; test: the
    1000 of the test set. Raises ``ValueError`` for more images than there are, else as ``cifar10``."""
    data = cifar10(root)
    calibration = _count(calibration, len(data["x_train"]) - 1, "calibration images")
    validation = _count(validation, len(data["x_train"]) - calibration, "validation images")
    test = _count(test, len(data["x_test"]), "test images")
    tell(f"calibration: {calibration} images of CIFAR-10's training set")
    tell(
        f"validation: {validation} other images of the training set. The network was trained on that set, so its "
        "accuracy on them is optimistic; they only choose between plans"
    )
    tell(f"test: {test} images that neither training nor search has read, for the report")

    def part(split: str, start: int, samples: int) -> Batches:
        images, classes = (data[f"{name}_{split}"][start : start + samples] for name in "xy")
        return _labelled(images, classes, batch, normalise_cifar)

    return Task(
        calibration=part("train", 0, calibration),
        validation=part("train", calibration, validation),
        test=part("test", 0, test),
        metric=top1,
        loss=F.cross_entropy,
    )


def _labelled(
    inputs: NDArray[Any], classes: NDArray[np.int64], batch: int, convert: Callable[[NDArray[Any]], NDArray[np.float32]]
) -> Batches:
    def read(chosen: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(convert(inputs[chosen])), torch.from_numpy(classes[chosen])

    return Batches(len(classes), batch, read)


def mobilenet_v1_task(
    root: str | Path,
    *,
    calibration: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    batch: int = 50,
    seed: int = 0,
    tell: Tell = print,
) -> Task:
    """The ImageNet networks' task at 224 px, x / 127.5 - 1. Calibration: up to 256 training images, which have no
    class, so the task has no ``loss``. Validation and test: up to 300 and 700 of the 1000 validation images.

    Raises ``ValueError`` for more images than there are, else as ``imagenet_val``.
    """
    images, labelled = imagenet_calibration(root), imagenet_val(root)
    order = np.random.default_rng(seed).permutation(len(labelled["y"]))
    parts = {"validation": order[:IMAGENET_VALIDATION], "test": order[IMAGENET_VALIDATION:]}
    calibration = _count(calibration, len(images), "calibration images")
    validation = _count(validation, len(parts["validation"]), "validation images")
    test = _count(test, len(parts["test"]), "test images")
    tell(f"calibration: {calibration} images of ImageNet's training set, without classes")
    tell(f"validation: {validation} images of ImageNet's validation set, drawn with seed {seed}; they choose the plan")
    tell(f"test: {test} other images of ImageNet's validation set, which no choice reads. These 1000 are an easy part")

    def part(name: str, samples: int) -> Batches:
        chosen = parts[name][:samples]
        return _labelled(labelled["x"][chosen], labelled["y"][chosen], batch, normalise_imagenet)

    unlabelled = [
        torch.from_numpy(normalise_imagenet(images[start : min(start + batch, calibration)]))
        for start in range(0, calibration, batch)
    ]
    return Task(
        calibration=Unlabelled(unlabelled),
        validation=part("validation", validation),
        test=part("test", test),
        metric=top1,
    )


def ds_cnn_task(
    root: str | Path,
    *,
    calibration: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    batch: int = 100,
    seed: int = 0,
    tell: Tell = print,
) -> Task:
    """DS-CNN's task: the 4890 clips of Speech Commands' test set, split by speaker into a tenth for calibration, three
    tenths for validation, and the rest for test.

    Raises ``ValueError`` for more clips than a part has, else as ``speech_commands``.
    """
    data = speech_commands(root)
    parts = _by_speaker(data["speaker"], seed)
    sizes = {
        name: _count(asked, len(parts[name]), f"{name} clips")
        for name, asked in (("calibration", calibration), ("validation", validation), ("test", test))
    }
    what = {"calibration": "ranges and losses", "validation": "the choice of the plan", "test": "the report"}
    for name, samples in sizes.items():
        people = len(np.unique(data["speaker"][parts[name]]))
        tell(f"{name}: {samples} of {len(parts[name])} clips of {people} speakers, for {what[name]}")
    tell(f"speakers are dealt out with seed {seed}, and none is in two parts; a clip of silence counts as a speaker")

    def part(name: str) -> Batches:
        chosen = parts[name][: sizes[name]]
        return _labelled(data["x"][chosen], data["y"][chosen], batch, np.asarray)

    return Task(
        calibration=part("calibration"),
        validation=part("validation"),
        test=part("test"),
        metric=top1,
        loss=F.cross_entropy,
    )


def _by_speaker(speaker: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Clip numbers of each part, shuffled: whole speakers, dealt out until a part has its share of the clips."""
    rng = np.random.default_rng(seed)
    clips = np.bincount(speaker)
    people = rng.permutation(len(clips))
    share = np.cumsum(clips[people]) / len(speaker)
    first = int(np.searchsorted(share, SPEECH_PARTS["calibration"], side="right"))
    second = int(np.searchsorted(share, sum(SPEECH_PARTS.values()), side="right"))
    groups = {"calibration": people[:first], "validation": people[first:second], "test": people[second:]}
    return {name: rng.permutation(np.flatnonzero(np.isin(speaker, group))) for name, group in groups.items()}


def minilm_task(
    root: str | Path,
    *,
    calibration: int = 256,
    validation: int = 500,
    test: int | None = None,
    length: int = LENGTH,
    batch: int = 32,
    tell: Tell = print,
) -> Task:
    """MiniLM's task on SST-2, each sentence padded to ``length`` tokens. Calibration and validation: training
    sentences that the head was not fitted on; test: the 872 of the dev set.

    Raises ``ValueError`` for more sentences than there are, ``ModuleNotFoundError`` without ``bitsmith[text]``, else
    as ``sst2``.
    """
    texts, classes = sst2_train(root)
    texts, classes = texts[HEAD_SENTENCES:], classes[HEAD_SENTENCES:]
    dev_texts, dev_classes = sst2(root)["dev"]
    calibration = _count(calibration, len(texts) - 1, "calibration sentences")
    validation = _count(validation, len(texts) - calibration, "validation sentences")
    test = _count(test, len(dev_texts), "test sentences")
    tell(f"calibration: {calibration} training sentences and phrases of SST-2, padded to {length} tokens")
    tell(
        f"validation: {validation} others. The head was fitted on none of them, but on {HEAD_SENTENCES} more, some of "
        "the same film reviews, so the accuracy on them is optimistic; they only choose between plans"
    )
    tell(f"test: {test} sentences of the dev set, which neither the fit nor the search has read, for the report")

    def part(sentences: list[str], labels: NDArray[np.int64]) -> Batches:
        inputs, target = tokenize(sentences, length), torch.from_numpy(labels)
        return Batches(len(labels), batch, lambda chosen: ({k: v[chosen] for k, v in inputs.items()}, target[chosen]))

    stop = calibration + validation
    return Task(
        calibration=part(texts[:calibration], classes[:calibration]),
        validation=part(texts[calibration:stop], classes[calibration:stop]),
        test=part(dev_texts[:test], dev_classes[:test]),
        metric=top1,
        loss=F.cross_entropy,
    )
