"""What is trained: the networks, how they are connected, and one training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.zoo.weights import read_npz

DENSE, SOBOL, RANDOM, PRUNED = "dense", "Sobol' paths", "random paths", "dense, then pruned"
FIXED, NORMAL = "Sobol' paths, signs fixed", "Sobol' paths, random start"
"""The forms. Random paths are as many as give Sobol's number of weights; pruned keeps as many in each layer. All but
:data:`DENSE` and :data:`NORMAL` begin with constant magnitudes (pruned: with what was trained)."""

Form = str
Split = Literal["validation", "test"]
TRAINING, HELD_OUT = 20_000, slice(50_000, None)
"""Training images, the first ones; and the last ones, which choose rates."""
BATCH = 128
FILES = {"MNIST": "mnist", "Fashion-MNIST": "fashion_mnist"}


@dataclass(frozen=True)
class Images:
    """``x`` float32 (n, 1, 28, 28), by the mean and the deviation of the training images; ``y`` int64 classes."""

    x: Tensor
    y: Tensor


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        _Mean(),
        nn.Linear(64, 10),
    )


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"MLP": mlp, "convolutional": convolutional}


@dataclass(frozen=True)
class Cell:
    """One trained network. ``paths``: of the Sobol' network that its weights are counted by; 0: dense."""

    data: str
    network: str
    form: Form
    paths: int
    seed: int
    epochs: int
    rate: float

    @property
    def name(self) -> str:
        paths = f", {self.paths} paths" if self.paths else ""
        return f"{self.data}, {self.network}, {self.form}{paths}, seed {self.seed}"

    @property
    def sparsity(self) -> str:
        """How weights are pruned: whole kernels in the convolutional network, as paths leave them."""
        return "weight" if self.network == "MLP" else "kernel"


class Bed:
    """The data, and dense networks that are pruned to several sizes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dense: dict[Cell, nn.Module] = {}

    @functools.cache  # noqa: B019  (one bed for each run)
    def images(self, data: str) -> dict[str, Images]:
        arrays = read_npz(self.root / FILES[data] / f"{FILES[data]}.npz")
        mean, deviation = arrays["x_train"].mean() / 255, arrays["x_train"].std() / 255

        def part(name: str, rows: slice) -> Images:
            x = (arrays[f"x_{name}"][rows].astype(np.float32) / 255 - mean) / deviation
            y = arrays[f"y_{name}"][rows].astype(np.int64)
            return Images(torch.from_numpy(x.astype(np.float32))[:, None], torch.from_numpy(y))

        return {
            "training": part("train", slice(TRAINING)),
            "validation": part("train", HELD_OUT),
            "test": part("test", slice(None)),
        }

    def key(self, cell: Cell, split: Split) -> dict[str, Any]:
        package = Path(bs.__file__).parent
        sources = ["numerics/paths.py", "techniques/sparse_paths.py", "techniques/sparse.py", "techniques/_masked.py"]
        code = hash_files([Path(__file__), *(package / source for source in sources)])
        return {**vars(cell), "split": split, "code": code, "torch": torch.__version__}

    def record(self, cell: Cell, split: Split) -> dict[str, Any]:
        """Accuracy on the split, and what the network has: weights (biases left out) and paths."""
        images = self.images(cell.data)
        example = images["training"].x[:2]
        if cell.form == PRUNED:
            net, plan = self._pruned(cell, images["training"], example)
        else:
            model = started(cell)
            plan = plan_of(cell, model, example)
            net = bs.apply(model, plan, [(example, None)])
        loss = train(net, images["training"], cell)
        held = images[split]
        with torch.no_grad():
            logits = torch.cat([net.eval()(x) for x in held.x.split(1000)])
        right = float((logits.argmax(1) == held.y).double().mean())
        sites = bs.sites(NETWORKS[cell.network](), example)
        paths = next((t.paths for t in plan.sites.values() if isinstance(t, bs.SparsePaths)), 0)
        return {
            "accuracy": right,
            "samples": len(held.y),
            "weights": sum(left(plan, sites).values()),
            "paths": paths,
            "loss": loss,
            "bytes": sum(plan[name].bits(site) / 8 for name, site in sites.items() if name in plan.sites),
        }

    def _pruned(self, cell: Cell, training: Images, example: Tensor) -> tuple[nn.Module, bs.Plan]:
        origin = Cell(cell.data, cell.network, DENSE, 0, cell.seed, cell.epochs, cell.rate)
        if origin not in self._dense:
            self._dense = {origin: started(origin)}
            train(self._dense[origin], training, origin)
        model = self._dense[origin]
        sites = bs.sites(model, example)
        wanted = left(paths_like(cell, model, example), sites)
        sparsity: Any = cell.sparsity
        plan = bs.Plan({name: bs.Sparse(n / count(sites[name]), sparsity) for name, n in wanted.items()})
        return bs.apply(model, plan, [(example, None)]), plan


def count(site: bs.Site) -> int:
    assert site.weight is not None
    return site.weight.numel


def left(plan: bs.Plan, sites: Mapping[str, bs.Site]) -> dict[str, int]:
    """Weights of each layer under the plan."""
    found = {}
    for name, site in sites.items():
        if site.weight is None:
            continue
        technique = plan.get(name)
        if isinstance(technique, bs.SparsePaths):
            found[name] = technique.weights(site)
        elif isinstance(technique, bs.Sparse):
            found[name] = round(technique.density * count(site))
        else:
            found[name] = count(site)
    return found


def started(cell: Cell) -> nn.Module:
    """The network as torch initialises it; with normal weights by the fan-in that paths leave for :data:`NORMAL`."""
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        model = NETWORKS[cell.network]()
        if cell.form == NORMAL:
            example = torch.zeros(2, 1, 28, 28)
            sites = bs.sites(model, example)
            for name, weights in left(paths_like(cell, model, example), sites).items():
                layer = model.get_submodule(name)
                with torch.no_grad():
                    layer.weight.normal_(std=math.sqrt(2 * layer.weight.shape[0] / weights))  # type: ignore[union-attr,operator,arg-type]
                    layer.bias.zero_()  # type: ignore[union-attr,operator]
    return model


def paths_like(cell: Cell, model: nn.Module, example: Tensor) -> bs.Plan:
    """The Sobol' network that the cell is counted by."""
    return bs.sparse_paths(model, example, paths=cell.paths, seed=cell.seed)


def plan_of(cell: Cell, model: nn.Module, example: Tensor) -> bs.Plan:
    if cell.form == DENSE:
        return bs.Plan()
    plan = paths_like(cell, model, example)
    if cell.form == SOBOL:
        return plan
    if cell.form == NORMAL:
        return plan.replace(prepare=())
    if cell.form == FIXED:
        return bs.sparse_paths(model, example, paths=cell.paths, seed=cell.seed, signs="fixed")
    sites = bs.sites(model, example)
    wanted = sum(left(plan, sites).values())

    def random_paths(paths: int) -> bs.Plan:
        return bs.sparse_paths(model, example, paths=paths, seed=cell.seed, generator="random")

    def enough(paths: int) -> bool:
        return sum(left(random_paths(paths), sites).values()) >= wanted

    return random_paths(least(enough, cell.paths // 2))


def least(enough: Callable[[int], bool], low: int) -> int:
    """The least number above ``low`` that is enough; more always is."""
    high = low + 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def train(net: nn.Module, images: Images, cell: Cell) -> float:
    """Adam with a rate that falls along half a cosine; the mean loss of the last hundred steps. Changes ``net``."""
    steps = cell.epochs * (len(images.y) // BATCH)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], cell.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(cell.seed)
    losses: list[float] = []
    net.train()
    for _ in range(cell.epochs):
        for rows in torch.randperm(len(images.y), generator=draw).split(BATCH):
            if len(rows) < BATCH:
                continue
            loss = F.cross_entropy(net(images.x[rows]), images.y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    last = losses[-100:]
    return sum(last) / len(last)
