"""A small residual network, data it was fitted to, and tasks: what the tests of the verbs share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs

Batch = tuple[Tensor, Tensor]


class Small(nn.Module):
    """Three convolutions with a residual addition on [n, 3, 12, 12], four classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.right = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm(self.left(x)))
        x = F.relu(self.right(y) + x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def batches(count: int, size: int = 16, seed: int = 1) -> list[Batch]:
    """Noise with one of four patches bright; the class is the patch."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        y = torch.randint(0, 4, (size,), generator=generator)
        x = 0.7 * torch.randn(size, 3, 12, 12, generator=generator)
        for i, label in enumerate(y.tolist()):
            x[i, label % 3, 6 * (label // 2) :, 6 * (label % 2) :] += 1.5
        found.append((x, y))
    return found


class Pool:
    """Batches that a list holds, sample by sample: what studies draw from."""

    batch = 16

    def __init__(self, parts: list[Batch]) -> None:
        self.x, self.y = (torch.cat(values) for values in zip(*parts, strict=True))
        self.samples = self.total = len(self.y)

    def take(self, indices: Sequence[int]) -> Batch:
        return self.x[list(indices)], self.y[list(indices)]

    def __iter__(self) -> Iterator[Batch]:
        return iter(zip(self.x.split(self.batch), self.y.split(self.batch), strict=True))


def small(width: int = 8, seed: int = 0, steps: int = 60) -> Small:
    """A trained :class:`Small` in eval; the same one every time, a copy for each caller."""
    return copy.deepcopy(_trained(width, seed, steps))


@functools.cache
def _trained(width: int, seed: int, steps: int) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Small(width)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for x, y in batches(steps, seed=seed):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def task(test: Any = True, **changes: Any) -> bs.Task:
    """32 samples to calibrate, 64 to validate, 64 to test."""
    parts: dict[str, Any] = {
        "calibration": batches(2, seed=2),
        "validation": batches(4, seed=3),
        "test": (batches(4, seed=4) if test is True else test) or None,
        "metric": bs.metrics.top1,
        "loss": F.cross_entropy,
    }
    return bs.Task(**{**parts, **changes})
