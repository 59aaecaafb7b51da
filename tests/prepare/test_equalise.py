"""Cross-layer equalisation: eq. 11 by hand, the function preserved, and where it must not reach."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.network import Network, network
from bitsmith.prepare._links import find_links
from bitsmith.prepare.equalise import Equalise


def prepared(model: nn.Module, x: Any, step: bs.Step | None = None) -> Network:
    return (step or Equalise()).prepare(network(copy.deepcopy(model), x), bs.Plan(), [(x, None)])


def pairs(model: nn.Module, x: Any) -> dict[str, list[str]]:
    return {link.source: [layer.site.name for layer, _ in link.readers] for link in find_links(network(model, x))[0]}


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights of channels that differ by orders of magnitude, and statistics of normalisations that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
            else:
                spread = torch.randn(tensor.shape[:1], generator=generator).exp()
                rows = spread.reshape(-1, *([1] * (tensor.dim() - 1)))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * rows / math.sqrt(tensor[0].numel()))
    return model.eval()


class Separable(nn.Module):
    """A convolution, a depthwise and a pointwise one, with normalisations, as in MobileNet."""

    def __init__(self, width: int = 6, affine: bool = True, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, affine=affine)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.BatchNorm2d(width)
        self.point = nn.Conv2d(width, 2 * width, 1)
        self.grouped = nn.Conv2d(2 * width, 4, 3, groups=2)
        self.head = nn.Linear(4 * 2 * 2, 5)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = self.act(self.norm2(self.depth(x)))
        x = self.act(self.grouped(F.max_pool2d(self.act(self.point(x)), 2)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_one_pair_is_eq_11() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 0)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    net = prepared(model, x).model
    one, two = model[0].weight.double(), model[2].weight.double()
    for i in range(3):
        r1, r2 = one[i].abs().max(), two[:, i].abs().max()
        s = (r1 * r2).sqrt() / r2
        torch.testing.assert_close(net[0].weight[i].double(), one[i] / s, rtol=1e-6, atol=0)  # type: ignore[index]
        torch.testing.assert_close(net[0].bias[i].double(), model[0].bias[i].double() / s, rtol=1e-6, atol=0)  # type: ignore[index]
        torch.testing.assert_close(net[2].weight[:, i].double(), two[:, i] * s, rtol=1e-6, atol=0)  # type: ignore[index]
    assert torch.equal(net[2].bias, model[2].bias)  # type: ignore[index]


def test_a_normalisation_carries_the_factor() -> None:
    model = randomised(Separable(), 3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    net = prepared(model, x).model.state_dict()
    before = model.state_dict()
    for key in ("stem.weight", "depth.bias", "norm1.running_mean", "norm1.running_var"):
        assert torch.equal(net[key], before[key]), key
    s = before["norm1.weight"] / net["norm1.weight"]
    assert bool((s > 0).all())
    torch.testing.assert_close(net["norm1.bias"] * s, before["norm1.bias"])
    # the depthwise layer's own scaling of its outputs sits in norm2, so only s is on its weight
    torch.testing.assert_close(net["depth.weight"], before["depth.weight"] * s.reshape(-1, 1, 1, 1))


def test_both_sides_end_with_the_same_ranges() -> None:
    model = randomised(Separable(), 4)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    net = prepared(model, x, Equalise(iterations=200)).model

    def folded(conv: Any, norm: Any) -> Tensor:
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (conv.weight * factor.reshape(-1, 1, 1, 1)).abs()

    stem, depth = folded(net.stem, net.norm1), folded(net.depth, net.norm2)
    point, grouped = net.point.weight.abs(), net.grouped.weight.abs()  # type: ignore[union-attr,operator]
    torch.testing.assert_close(stem.amax((1, 2, 3)), depth.amax((1, 2, 3)), rtol=0.02, atol=0)
    torch.testing.assert_close(depth.amax((1, 2, 3)), point.amax((0, 2, 3)), rtol=0.02, atol=0)
    # each group of the grouped layer reads half of the channels
    reads = torch.cat([grouped[:2].amax((0, 2, 3)), grouped[2:].amax((0, 2, 3))])
    torch.testing.assert_close(point.amax((1, 2, 3)), reads, rtol=0.02, atol=0)
    # one channel becomes four inputs of the linear layer
    head = net.head.weight.abs().reshape(5, 4, 4).amax((0, 2))  # type: ignore[union-attr,operator]
    torch.testing.assert_close(grouped.amax((1, 2, 3)), head, rtol=0.02, atol=0)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.sampled_from([2, 4, 6]), activation=st.sampled_from([nn.ReLU, nn.LeakyReLU])
)
def test_the_function_is_preserved(seed: int, width: int, activation: type[nn.Module]) -> None:
    model = randomised(Separable(width, activation=activation), seed)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed + 1))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    net = prepared(model, x)
    with torch.no_grad():
        expected, got = model(x), net.model(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert net.model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    again = prepared(model, x).model.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in net.model.state_dict().items())


def test_channels_without_weights_stay() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 5)
    with torch.no_grad():
        model[0].weight[0] = 0.0  # type: ignore[index]
        model[2].weight[:, 1] = 0.0  # type: ignore[index]
    net = prepared(model, torch.ones(2, 4)).model
    assert torch.equal(net[0].weight[:2], model[0].weight[:2])  # type: ignore[index]
    assert torch.equal(net[0].bias[:2], model[0].bias[:2])  # type: ignore[index]
    assert not torch.equal(net[0].weight[2], model[0].weight[2])  # type: ignore[index]


class Between(nn.Module):
    """Two layers and something in between."""

    def __init__(self, function: Any, width: int = 4) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.two(self.function(self.one(x)))
        return made


@pytest.mark.parametrize(
    ("function", "crossed"),
    [
        (F.relu, True),
        (lambda x: x.clamp(min=0), True),
        (lambda x: F.leaky_relu(x, 0.2), True),
        (lambda x: F.avg_pool2d(F.relu(x), 2), True),
        (lambda x: F.max_pool2d(x, 2), True),
        (lambda x: x.flip(3), True),
        (F.relu6, False),
        (F.hardtanh, False),
        (F.gelu, False),
        (F.silu, False),
        (lambda x: x.clamp(max=1.0), False),
        (lambda x: x.flip(1), False),
        (lambda x: x.transpose(1, 3), False),
        (lambda x: F.channel_shuffle(x, 2), False),
        (lambda x: x + x.mean(), False),
        (torch.exp, False),
    ],
)
def test_what_it_reaches_across(function: Any, crossed: bool) -> None:
    model = randomised(Between(function), 6)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    assert pairs(model, x) == ({"one": ["two"]} if crossed else {})
    with torch.no_grad():
        torch.testing.assert_close(prepared(model, x).model(x), model(x), rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.one, self.two, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        x = x + self.right(F.relu(self.left(x)))
        y = F.relu(self.head(x))
        return self.one(x) + self.two(x), y


def test_additions_and_outputs_end_a_pair() -> None:
    model = randomised(Residual(), 8)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))
    assert pairs(model, x) == {"left": ["right"]}
    _, refused = find_links(network(model, x))
    assert refused["stem"] == ":add (add) reads it too"
    assert refused["head"] == "it is an output of the model"


class Fire(nn.Module):
    """Two layers read one (SqueezeNet); a tied weight; a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.twice, self.tied, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.other = nn.Conv2d(8, 8, 1)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        x = F.relu(self.twice(F.relu(self.twice(x))))
        made: Tensor = self.last(F.relu(self.other(F.relu(self.tied(x)))))
        return made


def test_several_readers_share_one_factor_and_shared_weights_are_left_alone() -> None:
    model = randomised(Fire(), 10)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(11))
    assert pairs(model, x) == {"squeeze": ["a", "b"]}
    net = prepared(model, x).model
    r1 = model.squeeze.weight.abs().amax((1, 2, 3))  # type: ignore[union-attr,operator]
    r2 = torch.maximum(model.a.weight.abs().amax((0, 2, 3)), model.b.weight.abs().amax((0, 2, 3)))  # type: ignore[union-attr,operator]
    ratio = net.a.weight / model.a.weight  # type: ignore[union-attr,operator]
    torch.testing.assert_close(ratio[0, :, 0, 0], (r1 / r2).sqrt(), rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_to_equalise_changes_nothing() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 3)), 12)
    assert torch.equal(prepared(model, torch.ones(2, 4)).model[0].weight, model[0].weight)  # type: ignore[index]
    bare = randomised(Separable(affine=False), 13)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert "stem" not in pairs(bare, x)
    with torch.no_grad():
        torch.testing.assert_close(prepared(bare, x).model(x), bare(x), rtol=1e-4, atol=1e-5)


def test_it_stands_in_a_plan() -> None:
    model = randomised(Separable(), 14)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    plan = bs.Plan({"point": bs.Int(8, 8)}, (Equalise(iterations=5),))
    assert bs.Plan.from_json(plan.to_json()) == plan
    assert "arXiv:1906.04721" in plan.cite()[0]
    net = bs.apply(model, plan, [(x, torch.zeros(4))])
    assert not torch.equal(net.state_dict()["point.weight"], model.state_dict()["point.weight"])
    with pytest.raises(ValueError, match="iterations=0"):
        Equalise(iterations=0)
