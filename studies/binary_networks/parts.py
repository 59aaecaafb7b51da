"""Bit errors, tasks in a row, and a pretrained ResNet-20: what one record of each part holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.weights import load_npz

from .nets import Data, plan
from .train import BATCH, Setting, accuracy, applied, fit, float_network, made

RATES = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.2)
"""Bit error rates."""
MEMORIES = 5
"""Draws of the errors at each rate."""
TRAINED_WITH = 0.1
"""The bit error rate of the network that is trained with errors."""


def bit_errors(setting: Setting, data: Data) -> dict[str, Any]:
    """Test accuracies [rate][memory] of a network that was trained without errors, and of one that was with them."""
    state = float_network(setting, data).state_dict()
    found: dict[str, Any] = {}
    for name, rate in (("without", 0.0), ("with", TRAINED_WITH)):
        net = applied(setting, data, state, rate)
        optimizer = torch.optim.Adam(net.parameters(), setting.rate)
        fit(net, data, optimizer, setting.steps, setting.seed + 1)
        found[name] = [memories(setting, net, data, wrong) for wrong in RATES]
    return found


def memories(setting: Setting, net: nn.Module, data: Data, rate: float) -> list[float]:
    """The latent weights of ``net`` in other memories, each with its own errors."""
    bare = made(setting.network, setting.seed, binary=True)
    bare.load_state_dict({key: net.state_dict()[key] for key in bare.state_dict()})
    bare.eval()
    x, y = data.train[0][:BATCH], data.train[1][:BATCH]
    wanted = plan(bare, x, setting.clipping, rate)
    return [
        accuracy(bs.apply(bare, wanted, [(x, y)], seed=memory), data.test) for memory in range(MEMORIES if rate else 1)
    ]


def in_a_row(setting: Setting, data: Data, m: float, tasks: int) -> dict[str, Any]:
    """Test accuracies [after task][of task up to it] of one network that learns permutations of the pixels in turn.

    Normalisations belong to a task: their parameters and statistics are those that it ended with.
    """
    net = applied(setting, data.permuted(0), None)
    kept: list[dict[str, Tensor]] = []
    found: list[list[float]] = []
    places = [data.permuted(setting.seed * tasks + k if k else 0) for k in range(tasks)]
    for k, place in enumerate(places):
        optimizer = bs.Metaplastic(net.parameters(), lr=setting.rate, m=m)
        fit(net, place, optimizer, setting.steps, setting.seed + 100 * k, loss=F.cross_entropy)
        kept.append(_normalisations(net))
        row = []
        for one, state in zip(places, kept, strict=False):
            net.load_state_dict(state, strict=False)
            row.append(accuracy(net, one.test))
        net.load_state_dict(kept[-1], strict=False)
        found.append(row)
    return {"accuracy": found}


def _normalisations(net: nn.Module) -> dict[str, Tensor]:
    names = {name for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    return {key: value.clone() for key, value in net.state_dict().items() if key.rpartition(".")[0] in names}


def pretrained(data: Data, root: Path, scaling: str, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """ResNet-20 from its published weights, the 3x3 convolutions but the first binary, inputs in float: top-1 before
    and after ``steps`` of 50 images towards the float network's output."""
    model = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
    x, y = data.train[0][:BATCH], data.train[1][:BATCH]
    layers = [n for n, site in bs.sites(model, x).items() if site.kind == "conv2d" and site.weight and n != "conv1"]
    wanted = bs.Plan(dict.fromkeys(layers, bs.Binary(scaling)))  # type: ignore[arg-type]
    net = bs.apply(model, wanted, [(x, y)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [data.batch(50, generator) for _ in range(steps)]
    # the statistics of the batch normalisations are those of float weights
    tuned = bs.finetune(net, batches, steps=steps, teacher=model, lr=rate, freeze_norms=False, seed=seed)
    settled = refreshed(tuned, batches[:20])
    return {
        "float": accuracy(model, data.test),
        "before": accuracy(net, data.test),
        "after": accuracy(settled, data.test),
        "validation": accuracy(settled, data.validation),
    }


def refreshed(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """With the normalisations' statistics collected again: means over these batches."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
    net.train()
    with torch.no_grad():
        for x, _ in batches:
            net(x)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    return net.eval()
