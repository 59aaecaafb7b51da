"""Channels that go together: the groups, the smaller network against the masked one, least squares, what must stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.prepare.channels import least_squares
from bitsmith.technique import PrepareError


class Net(nn.Module):
    """A residual sum of three writers, a depthwise convolution, a flattened map and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.back = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1)
        self.depth, self.depth_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Linear(12, 6), nn.Linear(6, 12)
        self.last, self.head = nn.Conv2d(12, 5, 1), nn.Linear(5 * 16, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
        nn.init.ones_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(torch.relu(self.inner(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        x = torch.relu(self.depth_norm(self.depth(x)))
        x = x * gate[:, :, None, None]
        logits: Tensor = self.head(torch.relu(self.last(x)).flatten(1))
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def pruned(model: nn.Module, x: Tensor, **options: object) -> nn.Module:
    return bs.apply(model, bs.Plan({}, (bs.PruneChannels(**options),)), [(x, None)])  # type: ignore[arg-type]


class Plain(nn.Module):
    """Without the gate, whose reshaped tensor is on other axes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        part = self.net
        x = torch.relu(part.norm(part.stem(x)))
        x = x + part.back(torch.relu(part.inner(x)))
        x = torch.relu(part.depth_norm(part.depth(x)))
        logits: Tensor = part.head(torch.relu(part.last(x)).flatten(1))
        return logits


def test_residual_additions_tie_channels() -> None:
    groups = bs.groups_of_channels(Plain(), X)
    tied = groups["net.stem"]
    assert tied.writers == ("net.stem", "net.back")
    assert tied.through == ("net.depth",)
    assert tied.norms == ("net.norm", "net.depth_norm")
    assert tied.readers == (("net.inner", 1), ("net.last", 1))
    assert groups["net.last"].readers == (("net.head", 16),)
    assert {name for name, group in groups.items() if not group.locked} == {"net.stem", "net.inner", "net.last"}
    assert groups["net.head"].locked == "it is an output of the network"


@given(st.integers(1, 12), st.integers(1, 10), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_what_is_left_computes_what_the_masked_network_does(stem: int, inner: int, last: int) -> None:
    model = Plain()
    counts = {"net.stem": stem, "net.inner": inner, "net.last": last}
    if counts == {"net.stem": 12, "net.inner": 10, "net.last": 5}:
        return
    small = pruned(model, X, left=tuple(counts.items()))
    assert small.get_parameter("net.stem.weight").shape == (stem, 3, 3, 3)
    assert small.get_parameter("net.back.weight").shape == (stem, inner, 3, 3)
    assert small.get_parameter("net.depth.weight").shape == (stem, 1, 3, 3)
    assert small.get_parameter("net.last.weight").shape == (last, stem, 1, 1)
    assert small.get_parameter("net.head.weight").shape == (4, last * 16)
    masked = Plain().double()
    part = masked.net
    factor = {n: (b.weight / (b.running_var + b.eps).sqrt()).detach() for n, b in (("stem", part.norm),)}  # type: ignore[operator]
    norms = {
        "stem": (part.stem.weight.square().sum((1, 2, 3)) * factor["stem"] ** 2)
        + part.back.weight.square().sum((1, 2, 3)),
        "inner": part.inner.weight.square().sum((1, 2, 3)),
        "last": part.last.weight.square().sum((1, 2, 3)),
    }
    gone = {
        name: np.argsort(size.detach().numpy())[: len(size) - counts[f"net.{name}"]].copy()
        for name, size in norms.items()
    }
    with torch.no_grad():
        part.inner.weight[:, gone["stem"]] = 0
        part.last.weight[:, gone["stem"]] = 0
        part.back.weight[:, gone["inner"]] = 0
        part.head.weight.view(4, 5, 16)[:, gone["last"]] = 0
        torch.testing.assert_close(small(X), masked(X.double()).float(), rtol=1e-4, atol=1e-5)


def test_modules_say_how_many_channels_they_have_and_train() -> None:
    model = Plain()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = pruned(model, X, density=0.5, divisor=2)
    assert (small.net.stem.out_channels, small.net.depth.groups, small.net.norm.num_features) == (6, 6, 6)  # type: ignore[union-attr]
    assert (small.net.inner.in_channels, small.net.head.in_features) == (6, 32)  # type: ignore[union-attr]
    data, first = [(X, torch.randint(0, 4, (8,)))], small.get_parameter("net.stem.weight").clone()
    trained = bs.finetune(small, data, nn.functional.cross_entropy, steps=3, seed=0)
    assert not torch.equal(trained.get_parameter("net.stem.weight"), first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_techniques_stand_on_what_is_left_and_files_are_smaller(tmp_path: Path) -> None:
    model, target = Plain(), bs.targets.OnnxRuntime(threads=1)
    plan = bs.Plan(dict.fromkeys(("net.inner", "net.back"), bs.Palette(2)), (bs.PruneChannels(0.5),))
    assert bs.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    small = bs.apply(model, plan, [(X, None)]).eval()
    artifact = bs.export(small, target, tmp_path / "small.onnx", X, batch=8)
    whole = bs.export(model, target, tmp_path / "whole.onnx", X, batch=8)
    assert artifact.bytes < whole.bytes
    with torch.no_grad():
        np.testing.assert_allclose(target.run(artifact, [X.numpy()])[0], small(X).numpy(), rtol=1e-3, atol=1e-4)
    broken = bs.Plan({"net.inner": bs.Palette(2, group=10)}, (bs.PruneChannels(left=(("net.inner", 7),)),))
    with pytest.raises(ValueError, match="groups of 10"):
        bs.apply(model, broken, [(X, None)])


def test_least_squares_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    weight, left = rng.normal(size=(5, 12)), [0, 3, 4, 9]
    found = least_squares(torch.tensor(weight), torch.tensor(x), torch.tensor(left), 1e-9).numpy()
    wanted = np.zeros_like(weight)
    wanted[:, left] = np.linalg.lstsq(x[:, left], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_reconstruction_brings_the_output_nearer() -> None:
    torch.manual_seed(1)
    model, x = Plain(), torch.randn(64, 3, 4, 4)
    plain = pruned(model, x, density=0.7)
    restored = pruned(model, x, density=0.7, samples=64)
    with torch.no_grad():
        errors = [float((net(x) - model(x)).square().mean()) for net in (restored, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_what_must_stay_says_why() -> None:
    groups = bs.groups_of_channels(net(), X)
    assert "view" in groups["excite"].locked or "known" in groups["stem"].locked
    with pytest.raises(PrepareError, match="must stay"):
        pruned(Plain(), X, left=(("net.head", 2),))
    with pytest.raises(PrepareError, match="no group is called"):
        pruned(Plain(), X, left=(("net.stern", 2),))
    with pytest.raises(PrepareError, match="12 channels"):
        pruned(Plain(), X, left=(("net.stem", 13),))
    with pytest.raises(PrepareError, match="no channels"):
        pruned(nn.Linear(3, 4), torch.zeros(2, 3), density=0.5)
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    twice = nn.Sequential(shared[0], shared[1], shared[0], shared[2])
    assert bs.groups_of_channels(twice, torch.zeros(1, 3, 4, 4))["3"].locked
    for options in ({"density": 0.0}, {"density": 1.5}, {"divisor": 0}, {"samples": -1}, {"rows": 0}, {"damp": 0.0}):
        with pytest.raises(ValueError, match="PruneChannels"):
            bs.PruneChannels(**options)  # type: ignore[arg-type]


class Counts(nn.Module):
    """Its code reverses channels between two convolutions, which no site shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.c = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).flip(1)))  # type: ignore[no-any-return]


def test_code_that_moves_channels_is_found_out() -> None:
    with pytest.raises(PrepareError, match="computes something else"):
        pruned(Counts(), X, left=(("a", 3),))
    assert pruned(Counts(), X, left=(("b", 2),)).get_parameter("c.weight").shape == (2, 2, 1, 1)
