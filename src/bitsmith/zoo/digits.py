"""The demo's network and data: a residual CNN on scikit-learn's handwritten digits, which need no download.

The 1797 images are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI Machine
Learning Repository, CC BY 4.0): 8x8 pixels with values 0 to 16. They are enlarged to 32x32 by repeating pixels, so
that the network is large enough for its time to be a computation and not an overhead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .weights import seeded

SIZE = 32
"""Height and width of the network's input."""

SPLIT = {"test": 360, "validation": 360, "calibration": 128}
"""Images of each part; the others train."""

_SHIFT = 3  # pixels of random shift while training: less than one pixel of the 8x8 original

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class DigitsNet(nn.Module):
    """Input (n, 1, 32, 32) float, as :func:`normalise` gives it; output (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64), Block(64, 64), Block(64, 64))
        self.layer2 = nn.Sequential(Block(64, 128, stride=2), Block(128, 128), Block(128, 128))
        self.layer3 = nn.Sequential(Block(128, 128, stride=2), Block(128, 128))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm(self.stem(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.head(out)
        return logits


def digits_net(seed: int = 0) -> DigitsNet:
    """An untrained network; the same seed gives the same weights, and the global generator is left as it was."""
    with seeded(seed):
        return DigitsNet()


def normalise(images: NDArray[Any]) -> NDArray[np.float32]:
    """(n, 8, 8) with values 0 to 16 -> (n, 1, 32, 32) float32 with values -1 to 1, every pixel repeated 4x4 times.

    >>> normalise(np.full((3, 8, 8), 16)).shape, float(normalise(np.zeros((1, 8, 8))).max())
    ((3, 1, 32, 32), -1.0)
    """
    if images.ndim != 3 or images.shape[1:] != (8, 8):
        raise ValueError(f"images must be (n, 8, 8), got {images.shape}")
    factor = SIZE // 8
    enlarged = images.astype(np.float32).repeat(factor, axis=1).repeat(factor, axis=2)
    return (enlarged / np.float32(8) - np.float32(1))[:, None]


def digits_task_arrays(seed: int = 0) -> dict[str, Split]:
    """The digits in four disjoint parts ``train`` (949), ``calibration`` (128), ``validation`` (360), ``test`` (360).

    Each is (inputs (n, 1, 32, 32) float32, classes (n,) int64); every part has the classes in almost equal shares.
    Training reads ``train`` only and a search ``calibration`` and ``validation`` only, so ``test`` is seen by neither.
    Raises ``ModuleNotFoundError`` without scikit-learn.
    """
    images, classes = _load()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(classes))
    # deal the classes out in turn: any run of consecutive images then holds them in equal shares
    turn = np.empty(len(order), np.int64)
    for label in np.unique(classes):
        members = classes[order] == label
        turn[members] = np.arange(members.sum())
    order = order[np.argsort(turn, kind="stable")]
    inputs = normalise(images)
    parts: dict[str, Split] = {}
    start = 0
    for name, size in (*SPLIT.items(), ("train", len(order) - sum(SPLIT.values()))):
        chosen = order[start : start + size]
        parts[name] = (inputs[chosen], classes[chosen])
        start += size
    return parts


def _load() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the digits come with scikit-learn, which is not installed ({error.name} is missing): "
            'pip install "bitsmith[demo]"'
        ) from None
    digits = load_digits()
    return np.asarray(digits.images, np.float64), np.asarray(digits.target, np.int64)


def train(
    model: nn.Module,
    inputs: NDArray[np.float32],
    classes: NDArray[np.int64],
    *,
    epochs: int = 6,
    batch: int = 32,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """A trained copy of ``model``, in evaluation mode; ``model`` itself is untouched.

    ``inputs`` (n, 1, 32, 32), ``classes`` (n,). Adam under a one-cycle schedule (Smith and Topin 2017,
    arXiv:1708.07120) with cross-entropy and random shifts. ``progress(epoch, epochs, mean loss)`` after each epoch,
    counted from 1. Raises ``ValueError`` for arguments that cannot train.
    """
    if len(inputs) != len(classes):
        raise ValueError(f"{len(inputs)} inputs but {len(classes)} classes")
    if epochs < 1 or not 2 <= batch <= len(inputs):
        raise ValueError(f"epochs={epochs}, batch={batch}: at least 1 epoch, and 2 to {len(inputs)} images a batch")
    model = copy.deepcopy(model).train()
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(inputs).contiguous(memory_format=torch.channels_last), torch.from_numpy(classes)
    # the last, incomplete batch is left out: its batch statistics would be noise
    steps = len(x) // batch
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=rng)
        total = 0.0
        for chosen in order[: steps * batch].view(steps, batch):
            loss = F.cross_entropy(model(_shifted(x[chosen], rng)), y[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item()
        if progress is not None:
            progress(epoch + 1, epochs, total / steps)
    return model.eval()


def _shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """The batch moved by up to ``_SHIFT`` pixels, the background (-1) coming in."""
    dy, dx = torch.randint(0, 2 * _SHIFT + 1, (2,), generator=rng).tolist()
    padded = F.pad(x, (_SHIFT,) * 4, value=-1.0)
    return padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]


@torch.no_grad()
def accuracy(model: nn.Module, inputs: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Fraction of ``inputs`` that the model, as it stands (train or eval mode), puts into their class."""
    hits = 0
    for start in range(0, len(inputs), 128):
        predicted = model(torch.from_numpy(inputs[start : start + 128])).argmax(1).numpy()
        hits += int(np.count_nonzero(predicted == classes[start : start + 128]))
    return hits / len(classes)
