"""The two tasks: what begins, what trains, and what is measured on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import bitsmith as bs
from bitsmith._files import atomic_write
from bitsmith._hash import hash_files, hash_json
from bitsmith.zoo.weights import read_npz

from .._guided import RESULTS
from .._images import Augmented
from .._resnet20 import network, task_of
from .._workers import Job, Reopened
from .forms import DENSE, NARROW, SCRATCH, Cell, operations, plan_of, stored

Split = Literal["validation", "test"]
BATCH = 64
SHIFT = 5
"""Frames (of 20 ms) by which a training clip is shifted at most."""
CHANNELS = (32, 32, 48, 64)
"""Of the keyword network's convolutions."""
SHARES = {"training": 0.6, "validation": 0.15}
"""Of the clips, whole speakers each; the others test."""
TECHNIQUES = ("ovsf", "sparse", "int_", "palette")
START_RATE = 2e-3
"""Adam's, of networks that begin with random weights."""


class Bed(Reopened, ABC):
    """One task: data, a dense network to begin with for each seed, and its training."""

    name: str
    teacher = False
    files: tuple[Path, ...] = ()

    def __init__(self) -> None:
        self._dense: dict[int, nn.Module] = {}

    @abstractmethod
    def loader(self) -> Any:
        """Training batches, drawn anew in each reading by torch's global generator."""

    @abstractmethod
    def held(self, split: Split) -> list[tuple[Tensor, Tensor]]: ...

    @abstractmethod
    def begun(self, seed: int) -> nn.Module:
        """The dense network that every form of that seed begins with."""

    def starts(self, seeds: int) -> list[Job]:
        """What is to be trained before any form is put in; nothing where weights are published."""
        return []

    def fresh(self, seed: int, ratio: float) -> tuple[nn.Module, int]:
        """A network of random weights, of channels that make about ``ratio`` of the bytes, and the steps that the
        dense start of the others took."""
        raise NotImplementedError(f"{self.name} has no training from the start")

    def key(self, cell: Cell, split: Split) -> dict[str, Any]:
        package = Path(bs.__file__).parent
        sources = ("numerics/ovsf.py", "numerics/palette.py", *(f"techniques/{name}.py" for name in TECHNIQUES))
        here = [Path(__file__), Path(__file__).parent / "forms.py"]
        code = hash_files([*here, *(package / source for source in sources)])
        return {**vars(cell), "split": split, "code": code, "torch": torch.__version__}

    def record(self, cell: Cell, split: Split) -> dict[str, Any]:
        """Accuracy on the split before and after the training, and what the network stores and computes."""
        steps = cell.steps
        if cell.form in (NARROW, SCRATCH):
            model, more = self.fresh(cell.seed, cell.ratio if cell.form == NARROW else 1.0)
            steps += more
        else:
            if cell.seed not in self._dense:
                self._dense[cell.seed] = self.begun(cell.seed)
            model = self._dense[cell.seed]
        data = self.held(split)
        example = data[0][0][:1]
        sites = bs.sites(model, example)
        plan = plan_of(cell, sites)
        net = bs.apply(model, plan, [(data[0][0][:8], None)], seed=cell.seed)
        before = accuracy(net, data)
        net = self.trained(net, steps, cell.rate, cell.seed, model if self.teacher else None)
        bytes_, part = stored(plan, sites, sum(p.numel() for p in model.parameters()))
        additions, macs = operations(plan, sites)
        return {
            "accuracy": accuracy(net, data),
            "before": before,
            "samples": sum(len(y) for _, y in data),
            "bytes": bytes_,
            "part": part,
            "additions": additions,
            "macs": macs,
        }

    def trained(
        self, net: nn.Module, steps: int, rate: float, seed: int, teacher: nn.Module | None = None
    ) -> nn.Module:
        """Adam, a rate that falls along half a cosine, cross-entropy and with a teacher its divergence."""
        return bs.finetune(
            net.train(),
            self.loader(),
            F.cross_entropy,
            steps=steps,
            lr=rate,
            teacher=teacher,
            seed=seed,
            freeze_norms=False,
        )


def accuracy(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data)
    return right / sum(len(y) for _, y in data)


class Cifar(Bed):
    """ResNet-20 with its published weights; lossless images, turned over and shifted; the network itself teaches."""

    name = "CIFAR-10"
    teacher = True

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.task = root, task_of(root)

    def loader(self) -> Any:
        return Augmented(self.task.calibration, BATCH)

    def held(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        return list(self.task.validation if split == "validation" else self.task.test)

    def begun(self, seed: int) -> nn.Module:
        return network(self.root)


class Keywords(Bed):
    """Twelve classes of Speech Commands, log-mel, split by speaker; a convnet that is trained here."""

    name = "keywords"

    def __init__(self, root: Path, steps: int) -> None:
        super().__init__()
        arrays = read_npz(root / "speech_commands" / "test_logmel49x40.npz")
        parts = dealt(arrays["speaker"])
        x = arrays["x"].astype(np.float32) * 0.08 - 14.0
        mean, deviation = x[parts["training"]].mean(), x[parts["training"]].std()
        x = ((x - mean) / deviation)[:, None]
        self.parts = {
            name: (torch.from_numpy(x[rows]), torch.from_numpy(arrays["y"][rows])) for name, rows in parts.items()
        }
        self.steps = steps

    def key(self, cell: Cell, split: Split) -> dict[str, Any]:
        return {**super().key(cell, split), "start": self.steps}

    def start(self, seed: int) -> tuple[dict[str, Any], Path]:
        """What the dense network of a seed depends on, and where it is kept for all processes."""
        key = {"steps": self.steps, "seed": seed, "code": hash_files([Path(__file__)]), "torch": torch.__version__}
        return key, RESULTS / "models" / f"keywords-{hash_json(key)[:16]}.pt"

    def starts(self, seeds: int) -> list[Job]:
        return [
            (self.start(seed)[0], f"{self.name}, dense start, seed {seed}", partial(self.made, seed))
            for seed in range(seeds)
        ]

    def made(self, seed: int) -> dict[str, float]:
        """Train the dense network of a seed and keep it."""
        model, steps = self.fresh(seed, 1.0)
        model = self.trained(model, steps, START_RATE, seed).eval()
        atomic_write(self.start(seed)[1], lambda temporary: torch.save(model.state_dict(), temporary))
        return {"accuracy": accuracy(model, self.held("validation"))}

    def loader(self) -> Any:
        return Clips(*self.parts["training"])

    def held(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        x, y = self.parts[split]
        return list(zip(x.split(200), y.split(200), strict=True))

    def begun(self, seed: int) -> nn.Module:
        _, path = self.start(seed)
        if not path.is_file():
            self.made(seed)
        model, _ = self.fresh(seed, 1.0)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def fresh(self, seed: int, ratio: float) -> tuple[nn.Module, int]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return keyword_network(math.sqrt(ratio)), self.steps


class Clips:
    """Batches in an order drawn anew, each clip shifted in time, the mean (0) behind."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y))
        for start in range(0, len(self) * BATCH, BATCH):
            rows = order[start : start + BATCH]
            padded = F.pad(self.x[rows], (0, 0, SHIFT, SHIFT))
            starts = torch.randint(0, 2 * SHIFT + 1, (BATCH,)).tolist()
            frames = self.x.shape[2]
            moved = [one[:, first : first + frames] for one, first in zip(padded, starts, strict=True)]
            yield torch.stack(moved), self.y[rows]


def keyword_network(width: float = 1.0) -> nn.Sequential:
    """[n, 1, 49, 40] -> [n, 12]: four convolutions of 3x3, normalisation and ReLU behind each, the mean, a linear
    layer. ``width``: of the channels."""
    channels = [max(4, round(width * count)) for count in CHANNELS]
    layers: list[nn.Module] = []
    before = 1
    for count, stride in zip(channels, (2, 2, 1, 2), strict=True):
        layers += [nn.Conv2d(before, count, 3, stride, 1, bias=False), nn.BatchNorm2d(count), nn.ReLU()]
        before = count
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 12))


def dealt(speaker: NDArray[Any], seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Clip numbers of each part: whole speakers, dealt out until a part has its share. A clip of silence has a speaker
    of its own."""
    rng = np.random.default_rng(seed)
    people, clips = np.unique(speaker, return_counts=True)
    order = rng.permutation(len(people))
    share = np.cumsum(clips[order]) / len(speaker)
    first, second = (int(np.searchsorted(share, end)) for end in np.cumsum(list(SHARES.values())))
    groups = {"training": order[:first], "validation": order[first:second], "test": order[second:]}
    return {name: np.flatnonzero(np.isin(speaker, people[group])) for name, group in groups.items()}


__all__ = ["DENSE", "Bed", "Cifar", "Keywords", "accuracy", "dealt", "keyword_network"]
