"""What is trained: networks, forms, data, one training, and what it computes with."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.zoo.cifar_resnet import Block, CifarResNet
from bitsmith.zoo.weights import read_npz

from .._images import Augmented, jpeg_training
from .._resnet20 import task_of
from .._workers import Reopened

CONV, ADDER = "convolution", "adder"
SIGN, PLAIN_RATE = "adder, sign gradient", "adder, no adaptive rate"
FORMS: Mapping[str, bs.Adder | None] = {
    CONV: None,
    ADDER: bs.Adder(),
    SIGN: bs.Adder("sign"),
    PLAIN_RATE: bs.Adder(rate=None),
}
PRECISIONS = (8, 6, 5, 4)
SCALES: tuple[Literal["shared", "separate"], ...] = ("shared", "separate")

Split = Literal["validation", "test"]
MOMENTUM, DECAY = 0.9, 5e-4
"""Of SGD, as published; the rate falls along half a cosine."""
CALIBRATION = 256
"""Training images that ranges are taken from."""
ROUNDED = 2000
"""Test images that rounded networks are compared on."""


@dataclass(frozen=True)
class Cell:
    """One trained network."""

    data: str
    form: str
    seed: int
    steps: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.data}, {self.form}, seed {self.seed}"


class SmallResNet(nn.Module):
    """ResNet-8 for one channel of 28x28, 16, 32 and 64 channels on maps of 14, 7 and 4: [n, 1, 28, 28] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class Bed(Reopened, ABC):
    """One task and its network."""

    name: str
    network: str
    batch: int

    @abstractmethod
    def model(self) -> nn.Module: ...

    @abstractmethod
    def loader(self) -> Any:
        """Training batches, drawn anew in each reading by torch's global generator."""

    @abstractmethod
    def held(self, split: Split) -> list[tuple[Tensor, Tensor]]: ...

    def key(self, cell: Cell, split: Split) -> dict[str, Any]:
        package = Path(bs.__file__).parent
        sources = ("numerics/adder.py", "techniques/adder.py")
        code = hash_files([Path(__file__), *(package / source for source in sources)])
        return {**vars(cell), "network": self.network, "split": split, "code": code, "torch": torch.__version__}

    def record(self, cell: Cell, split: Split) -> dict[str, Any]:
        """Accuracy, that of integers rounded after training, and the arithmetic of one inference."""
        model = self.started(cell)
        data = self.held(split)
        sites = bs.sites(model, data[0][0][:1])
        net = trained(self, bs.apply(model, plan_of(cell.form, sites), [(data[0][0][:8], None)]), cell)
        found: dict[str, Any] = {
            "accuracy": accuracy(net, data),
            "samples": sum(len(y) for _, y in data),
            "rounded": {},
            "macs": sum(site.macs for site in sites.values()),
            "adder_macs": sum(sites[name].macs for name in inner(sites)) if cell.form != CONV else 0,
        }
        if split == "test" and cell.form in (CONV, ADDER):
            model.load_state_dict({key: net.state_dict()[key] for key in model.state_dict()})
            found["rounded"] = self.rounded(model.eval(), cell.form, sites, data)
        return found

    def rounded(
        self, model: nn.Module, form: str, sites: Mapping[str, bs.Site], data: list[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """Accuracy on the first samples by bits and scales of the inner layers, rounded after training; the first and
        the last layer stay in float."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            seen = Calibration(self.loader(), CALIBRATION)
        some = data[: max(1, ROUNDED // len(data[0][1]))]
        found = {"float": accuracy(bs.apply(model, plan_of(form, sites), seen), some)}
        for bits in PRECISIONS:
            for scales in SCALES:
                technique = bs.Adder(precision=bits, scales=scales) if form == ADDER else bs.Int(bits, bits)
                if form == ADDER or scales == "separate":  # a product has always two
                    net = bs.apply(model, bs.Plan(dict.fromkeys(inner(sites), technique)), seen)
                    if form == ADDER:
                        net = ranged(net, seen)
                    found[f"{bits} {scales}"] = accuracy(net, some)
        return found

    def started(self, cell: Cell) -> nn.Module:
        """As torch initialises it; filters of adders normal of deviation 1, as in the paper's code."""
        with torch.random.fork_rng():
            torch.manual_seed(cell.seed)
            model = self.model()
            if cell.form != CONV:
                for name in inner(bs.sites(model, self.held("validation")[0][0][:1])):
                    nn.init.normal_(model.get_parameter(f"{name}.weight"))
        return model


class Fashion(Bed):
    """Fashion-MNIST: the last 2000 training images choose rates, the 10000 test images test."""

    name, network, batch = "Fashion-MNIST", "ResNet-8 on 28x28", 64
    training, validation = 50_000, 2000

    def __init__(self, root: Path) -> None:
        arrays = read_npz(root / "fashion_mnist" / "fashion_mnist.npz")
        kept = arrays["x_train"][: self.training]
        mean, deviation = kept.mean() / 255, kept.std() / 255

        def part(name: str, rows: slice) -> tuple[Tensor, Tensor]:
            x = ((arrays[f"x_{name}"][rows].astype(np.float32) / 255 - mean) / deviation).astype(np.float32)
            return torch.from_numpy(x)[:, None], torch.from_numpy(arrays[f"y_{name}"][rows].astype(np.int64))

        self.parts = {
            "training": part("train", slice(self.training)),
            "validation": part("train", slice(-self.validation, None)),
            "test": part("test", slice(None)),
        }

    def model(self) -> nn.Module:
        return SmallResNet()

    def loader(self) -> Any:
        return Shuffled(*self.parts["training"], self.batch)

    def held(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        x, y = self.parts[split]
        return list(zip(x.split(500), y.split(500), strict=True))


class Cifar(Bed):
    """CIFAR-10: lossy images train, turned over and shifted; 1000 lossless training images choose, 1000 test."""

    name, network, batch = "CIFAR-10", "ResNet-8", 128

    def __init__(self, root: Path, depth: int = 8) -> None:
        self.root, self.depth, self.network = root, depth, f"ResNet-{depth}"
        self.task = task_of(root)
        self._source: Any = None

    def model(self) -> nn.Module:
        return CifarResNet(self.depth)

    def loader(self) -> Any:
        if self._source is None:
            self._source = jpeg_training(self.root, self.batch)
        return Augmented(self._source, self.batch)

    def held(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        return list(self.task.validation if split == "validation" else self.task.test)


class Shuffled:
    """Batches in an order that torch's global generator draws anew in each reading."""

    def __init__(self, x: Tensor, y: Tensor, batch: int) -> None:
        self.x, self.y, self.batch = x, y, batch

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y))
        for start in range(0, len(self) * self.batch, self.batch):
            rows = order[start : start + self.batch]
            yield self.x[rows], self.y[rows]


class Calibration:
    """The first batches of a loader, the same in every reading, ``count`` images or a few more."""

    def __init__(self, loader: Any, count: int) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        for batch in loader:
            self.batches.append(batch)
            if sum(len(y) for _, y in self.batches) >= count:
                return

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def inner(sites: Mapping[str, bs.Site]) -> list[str]:
    """Every convolution but the first: those that become adders; the last layer is linear."""
    return [name for name, site in sites.items() if site.kind == "conv2d"][1:]


def plan_of(form: str, sites: Mapping[str, bs.Site]) -> bs.Plan:
    technique = FORMS[form]
    return bs.Plan() if technique is None else bs.Plan(dict.fromkeys(inner(sites), technique))


def trained(bed: Bed, net: nn.Module, cell: Cell) -> nn.Module:
    def optimizer(parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, cell.rate, MOMENTUM, weight_decay=DECAY)

    return bs.finetune(
        net.train(),
        bed.loader(),
        F.cross_entropy,
        steps=cell.steps,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR,
        freeze_norms=False,
        seed=cell.seed,
    )


def accuracy(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in data)
    return right / sum(len(y) for _, y in data)


def ranged(net: nn.Module, seen: Calibration) -> nn.Module:
    """The ranges of adders from these batches: a training at a rate of 0, normalisations as they are."""
    return bs.finetune(net, seen, F.cross_entropy, steps=len(seen.batches), lr=0.0)


# -- energy ------------------------------------------------------------------------------------------------------------


def energies(root: Path) -> dict[tuple[str, int], float]:
    """pJ of an operation by name and bits: Horowitz, ISSCC 2014, 45 nm, 0.9 V."""
    with (root / "energy_tables" / "horowitz_45nm.csv").open(encoding="utf-8", newline="") as file:
        return {(row["operation"], int(row["bits"])): float(row["energy_pJ"]) for row in csv.DictReader(file)}


def microjoules(record: Mapping[str, Any], pj: Mapping[tuple[str, int], float], integers: bool) -> float:
    """Modelled: the arithmetic of one inference alone, no memory. A multiply-accumulate is a product and a sum, an
    adder's a difference and a sum; of 8-bit integers the sum has 32 bits."""
    total = pj["int_add", 32] if integers else pj["float_add", 32]
    product = pj["int_multiply", 8] if integers else pj["float_multiply", 32]
    difference = pj["int_add", 8] if integers else pj["float_add", 32]
    added = record["adder_macs"]
    return float((record["macs"] - added) * (product + total) + added * (difference + total)) / 1e6
