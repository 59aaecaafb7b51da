"""The networks of the study, in float and under a plan of binary layers, and the data that they learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.zoo.data import cifar10, mnist, normalise_cifar

WIDTH = 512
CHANNELS = (24, 48, 48)


def mlp(width: int = WIDTH, inputs: int = 784, *, binary: bool) -> nn.Sequential:
    """Three hidden layers, each behind a batch normalisation: the MLP of BinaryConnect (arXiv:1511.00363), narrower.

    ``binary``: nothing stands before the layers whose inputs' signs are taken; else a hard tanh. Both have equal keys.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for source in (inputs, width, width):
        layers += [nn.Linear(source, width, bias=False), nn.BatchNorm1d(width), _between(binary)]
    return nn.Sequential(*layers, nn.Linear(width, 10, bias=False), nn.BatchNorm1d(10))


def convnet(*, binary: bool) -> nn.Sequential:
    """Three 3x3 convolutions with pooling and a linear layer, for 32x32 pixels."""
    layers: list[nn.Module] = []
    source = 3
    for channels in CHANNELS:
        layers += [nn.Conv2d(source, channels, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(channels), _between(binary)]
        source = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * source, 10, bias=False), nn.BatchNorm1d(10))


def _between(binary: bool) -> nn.Module:
    return nn.Identity() if binary else nn.Hardtanh()


def square_hinge(output: Tensor, target: Tensor) -> Tensor:
    """``mean(max(0, 1 - t y)^2)`` with t = 1 for the class and -1 for the others."""
    wanted = 2.0 * nn.functional.one_hot(target, output.shape[1]) - 1.0
    return torch.relu(1.0 - wanted * output).square().mean()


CLIPPINGS: Mapping[str, str | float] = {"no clipping": "never", "from the start": "always", "from half": 0.5}
"""Of gradients and of weights, both at once."""


def plan(net: nn.Module, example: Tensor, clipping: str, error_rate: float = 0.0) -> bs.Plan:
    """Every layer with weights binary; the first reads what it is given, the others its sign."""
    when = CLIPPINGS[clipping]
    sites = [name for name, site in bs.sites(net, example).items() if site.weight is not None and site.macs]
    return bs.Plan(
        {
            name: bs.Binary("none", bool(place), False, when, when, error_rate)  # type: ignore[arg-type]
            for place, name in enumerate(sites)
        }
    )


@dataclass(frozen=True)
class Data:
    """Images [n, ...] float32 and classes [n] int64, by split."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drawn with repetition."""
        chosen = torch.randint(len(self.train[1]), (size,), generator=generator)
        return self.train[0][chosen], self.train[1][chosen]

    def permuted(self, seed: int) -> Data:
        """The same pixels in another order; seed 0 keeps theirs."""
        count = self.train[0][0].numel()
        order = (
            torch.arange(count) if not seed else torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        )
        parts = [(x.flatten(1)[:, order], y) for x, y in (self.train, self.validation, self.test)]
        return Data(*parts)


def mnist_data(root: Path, held_out: int = 5000) -> Data:
    """Pixels from -1 to 1; the last ``held_out`` training images validate."""
    arrays = mnist(root)
    x, test = (torch.from_numpy(arrays[name].astype(np.float32) / 127.5 - 1) for name in ("x_train", "x_test"))
    y = torch.from_numpy(arrays["y_train"])
    return Data(
        (x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:]), (test, torch.from_numpy(arrays["y_test"]))
    )


def cifar_data(root: Path, held_out: int = 1000) -> Data:
    """The 4000 lossless training images, of which the last ``held_out`` validate, and the 1000 of the test."""
    arrays = cifar10(root)
    x, test = (torch.from_numpy(normalise_cifar(arrays[name])) for name in ("x_train", "x_test"))
    y = torch.from_numpy(arrays["y_train"])
    return Data(
        (x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:]), (test, torch.from_numpy(arrays["y_test"]))
    )
