"""Winograd after training on the pretrained ResNet-20: against the float network and direct int8, sample by sample."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import data_root
from bitsmith.zoo.tasks import cifar_task
from bitsmith.zoo.weights import load_npz

pytestmark = pytest.mark.data

SAMPLES = 300


@cache
def task() -> bs.Task:
    root = data_root()
    assert root is not None
    return cifar_task(root, validation=SAMPLES, tell=lambda _: None)


@cache
def model() -> nn.Module:
    root = data_root()
    assert root is not None
    return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(x) for x, _ in task().validation])


@cache
def logits(technique: bs.Technique | None, steps: tuple[bs.Step, ...] = ()) -> Tensor:
    """Of the validation images; convolutions that the technique does not fit, and the last layer, in int8."""
    if technique is None:
        return outputs(model())
    sites = {
        name: technique if technique.fits(site) else bs.Int(8, 8)
        for name, site in bs.sites(model(), next(iter(task().calibration))[0]).items()
        if site.kind in ("conv2d", "linear")
    }
    return outputs(bs.apply(model(), bs.Plan(sites, steps), task().calibration))


def divergence(technique: bs.Technique, *steps: bs.Step) -> float:
    """Mean over samples of the Kullback-Leibler divergence from the float network's classes, in nats."""
    ours, float_ = F.log_softmax(logits(technique, steps), 1), F.log_softmax(logits(None), 1)
    return float((float_.exp() * (float_ - ours)).sum(1).mean())


def test_most_layers_fit() -> None:
    sites = bs.sites(model(), next(iter(task().calibration))[0]).values()
    fitting = [site.name for site in sites if site.kind == "conv2d" and bs.Winograd().fits(site)]
    assert len(fitting) == 17  # of 19; two have stride 2


def test_two_outputs_in_8_bits_are_as_good_as_direct_int8() -> None:
    direct, ours = (divergence(t, bs.CorrectBias()) for t in (bs.Int(8, 8), bs.Winograd(2)))
    assert ours < 2 * direct
    correct = [
        (logits(t, (bs.CorrectBias(),)).argmax(1) == torch.cat([y for _, y in task().validation])).double()
        for t in (bs.Int(8, 8), bs.Winograd(2))
    ]
    lost = correct[0] - correct[1]
    assert float(lost.mean()) <= 1.96 * float(lost.std()) / SAMPLES**0.5 + 1e-9


def test_four_outputs_need_16_bits() -> None:
    direct = divergence(bs.Int(8, 8))
    assert divergence(bs.Winograd(4, 16)) < direct
    assert divergence(bs.Winograd(4)) > 20 * direct
    assert divergence(bs.Winograd(4, 32)) < divergence(bs.Winograd(4, 16))
