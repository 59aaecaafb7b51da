"""One training of a binary network: a loop of its own over an applied plan, and what it looks at on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bitsmith as bs

from .nets import Data, convnet, mlp, plan, square_hinge

BATCH = 100
LAST = 0.01
"""Of the first rate, at the end of an exponential decay."""
LOOKS = 15
"""Times that a training looks at the validation images."""
SEEN = {"mlp": 1000, "convnet": 250}
"""Validation images that a look takes; the result takes all."""

NETWORKS: Mapping[str, Callable[..., nn.Sequential]] = {"mlp": mlp, "convnet": convnet}

OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9),
    "RMSprop": lambda parameters, rate: torch.optim.RMSprop(parameters, rate),
    "Adam": lambda parameters, rate: torch.optim.Adam(parameters, rate),
}

SCRATCH, FLOAT = "scratch", "float"


@dataclass(frozen=True)
class Setting:
    """One network of the study. ``start``: "scratch", or "float" for the weights of a float network that Adam trained
    for ``float_steps`` at ``float_rate``."""

    network: str
    optimizer: str
    clipping: str
    start: str
    seed: int
    steps: int
    rate: float
    float_steps: int = 0
    float_rate: float = 1e-3

    @property
    def name(self) -> str:
        how = f"{self.optimizer}, {self.clipping}, {self.start}, {self.steps} steps at {self.rate:g}"
        return f"{self.network}, {how}, seed {self.seed}"


def made(network: str, seed: int, *, binary: bool) -> nn.Sequential:
    """A network that was not trained; the same weights for both kinds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NETWORKS[network](binary=binary)


def accuracy(net: nn.Module, split: tuple[Tensor, Tensor], most: int | None = None) -> float:
    """In eval; the mode stays."""
    mode, right, (x, y) = net.training, 0, split
    x, y = x[:most], y[:most]
    net.eval()
    with torch.no_grad():
        for one, target in zip(x.split(500), y.split(500), strict=True):
            right += int((net(one).argmax(1) == target).sum())
    net.train(mode)
    return right / len(y)


def float_network(setting: Setting, data: Data) -> nn.Module:
    """The float network that a binary one begins from."""
    net = made(setting.network, setting.seed, binary=False)
    optimizer = OPTIMIZERS["Adam"](list(net.parameters()), setting.float_rate)
    fit(net, data, optimizer, setting.float_steps, setting.seed + 1000)
    return net


def applied(setting: Setting, data: Data, state: Mapping[str, Tensor] | None, error_rate: float = 0.0) -> nn.Module:
    """The binary network, from the weights of ``state`` if there are any."""
    net = made(setting.network, setting.seed, binary=True)
    if state is not None:
        net.load_state_dict(dict(state))
    x, y = data.train[0][:BATCH], data.train[1][:BATCH]
    return bs.apply(net.eval(), plan(net, x, setting.clipping, error_rate), [(x, y)], seed=setting.seed)


def fit(
    net: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    look: Callable[[int, float, float], None] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = square_hinge,
    batch: int = BATCH,
) -> None:
    """Train in place. ``look(steps done, loss, part of the signs that the last step turned)``, so often as
    :data:`LOOKS` says."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST ** (1 / steps))
    cells = [module for module in net.modules() if isinstance(module, bs.Cell)]
    weights = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    every = max(1, steps // LOOKS)
    net.train()
    for done in range(steps):
        for cell in cells:
            cell.step(done, steps)
        x, y = data.batch(batch, generator)
        found = loss(net(x), y)
        optimizer.zero_grad()
        found.backward()
        looked = look is not None and (done + 1) % every == 0
        before = [weight.detach() >= 0 for weight in weights] if looked else []
        optimizer.step()
        schedule.step()
        if look is not None and looked:
            turned = sum(int((was != (now >= 0)).sum()) for was, now in zip(before, weights, strict=True))
            look(done + 1, float(found.detach()), turned / sum(weight.numel() for weight in weights))
    for cell in cells:
        cell.settle()
    net.eval()


def trained(
    setting: Setting, data: Data, state: Mapping[str, Tensor] | None
) -> tuple[nn.Module, list[tuple[int, float, float, float]], dict[str, Tensor], int]:
    """The network after its last step; the looks (steps, loss, validation accuracy, signs turned); the best look's
    state and step."""
    net = applied(setting, data, state)
    optimizer = OPTIMIZERS[setting.optimizer](list(net.parameters()), setting.rate)
    looks: list[tuple[int, float, float, float]] = []
    best: dict[str, Any] = {"accuracy": -1.0}

    def look(done: int, loss: float, turned: float) -> None:
        seen = accuracy(net, data.validation, SEEN[setting.network])
        looks.append((done, loss, seen, turned))
        if seen > best["accuracy"]:
            best.update(accuracy=seen, step=done, state=copy.deepcopy(net.state_dict()))

    fit(net, data, optimizer, setting.steps, setting.seed + 1, look)
    return net, looks, best["state"], best["step"]


def record(setting: Setting, data: Data, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What the tables tell of one training. The test images are forwarded once, by the last network."""
    net, looks, best, step = trained(setting, data, state)
    test, last = accuracy(net, data.test), accuracy(net, data.validation)
    net.load_state_dict(best)
    return {
        "looks": [[done, *(float(f"{value:.4g}") for value in rest)] for done, *rest in looks],
        "last": last,
        "best": accuracy(net, data.validation),
        "best step": step,
        "test": test,
    }


def reached(record: Mapping[str, Any], wanted: float) -> int | None:
    """Steps until a look saw that validation accuracy; None: never.

    >>> reached({"looks": [[10, 1.0, 0.5, 0.1], [20, 0.5, 0.91, 0.1]]}, 0.9)
    20
    """
    return next((done for done, _, seen, _ in record["looks"] if seen >= wanted), None)
