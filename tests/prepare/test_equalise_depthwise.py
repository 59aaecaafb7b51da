"""Channels of one range before depthwise convolutions: the function preserved, the ranges equal, the noise less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.network import network
from bitsmith.prepare.equalise_depthwise import EqualiseDepthwise


def separable(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """conv-norm-act-depthwise-act-pointwise, with channels of very unlike range."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        activation(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        activation(),
        nn.Conv2d(8, 4, 1),
    ).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.logspace(-1.5, 0, 8))
        net[1].bias.copy_(0.1 * torch.logspace(-1.5, 0, 8))
        net[3].weight.div_(torch.logspace(-1.5, 0, 8).reshape(-1, 1, 1, 1))
    return net


def batches() -> list[tuple[Tensor, None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 10, 10, generator=generator), None) for _ in range(2)]


def test_channels_get_one_range_and_the_function_stays() -> None:
    model, data = separable(), batches()
    before = copy.deepcopy(model.state_dict())
    net = EqualiseDepthwise().prepare(network(copy.deepcopy(model), data[0][0]), bs.Plan(), data)
    with torch.no_grad():
        for x, _ in data:
            torch.testing.assert_close(net.model(x), model(x), rtol=1e-5, atol=1e-6)
        seen = torch.stack([net.model[:3](x).amax((0, 2, 3)) for x, _ in data]).amax(0)  # type: ignore[index]
        old = torch.stack([model[:3](x).amax((0, 2, 3)) for x, _ in data]).amax(0)
    assert float(old.max() / old.min()) > 10
    torch.testing.assert_close(seen, seen.max().expand(8), rtol=1e-4, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_channel_is_raised_to_the_limit_at_most() -> None:
    model, data = separable(), batches()
    net = EqualiseDepthwise(limit=2.0).prepare(network(copy.deepcopy(model), data[0][0]), bs.Plan(), data)
    factor = (net.model[1].weight / model[1].weight).detach().reciprocal()  # type: ignore[index]
    assert float(factor.min()) == pytest.approx(0.5)
    assert float(factor.max()) == pytest.approx(1.0)


def test_integers_come_closer_to_float() -> None:
    model, data = separable(), batches()
    with torch.no_grad():
        exact = model(data[1][0])
        plain, scaled = (
            float((bs.quantize(model, data, prepare=steps, choose=False)(data[1][0]) - exact).norm())
            for steps in ((), (EqualiseDepthwise(),))
        )
    assert scaled < 0.7 * plain


@pytest.mark.parametrize(
    "model", [separable(nn.ReLU6), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))]
)
def test_where_nothing_can_move_nothing_changes(model: nn.Module) -> None:
    model, data = model.eval(), batches()
    net = EqualiseDepthwise().prepare(network(copy.deepcopy(model), data[0][0]), bs.Plan(), data)
    assert all(
        torch.equal(a, b) for a, b in zip(net.model.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_it_is_in_the_plan_and_refuses_a_limit_that_is_none() -> None:
    plan = bs.Plan(prepare=(EqualiseDepthwise(8.0),))
    assert bs.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="above 1"):
        EqualiseDepthwise(1.0)
