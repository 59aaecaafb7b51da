"""Fisher-weighted palettes: the information against its closed form, and what it does to the values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.model.network import network
from bitsmith.technique import PrepareError
from smallnet import batches, small


def test_it_is_the_fisher_information_of_logistic_regression() -> None:
    """E_y (dlog p / dw_oi)^2 = p_o (1 - p_o) x_i^2 for a linear layer with softmax."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2000, 6)
    step = bs.FisherPalettes(2000)
    net = network(model, x)
    found = step.prepare(net, bs.Plan({"0": bs.Palette(2)}), [(x, None)]).record.importance["0", 1]
    with torch.no_grad():
        p = model(x).softmax(1).double()
    wanted = torch.einsum("no,ni->oi", p * (1 - p), x.double().square()) / len(x)
    torch.testing.assert_close(found.double(), wanted, rtol=0.15, atol=0.0)


def test_gaussian_is_the_square_of_the_jacobian() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(3000, 5)
    step = bs.FisherPalettes(3000, "gaussian")
    found = step.prepare(network(model, x), bs.Plan({"0": bs.Palette(2)}), [(x, None)]).record.importance["0", 1]
    torch.testing.assert_close(found, x.square().mean(0).expand(3, 5), rtol=0.15, atol=0.0)


def test_heavy_weights_lie_nearer_to_their_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16))
    x = torch.randn(200, 64) * torch.where(torch.arange(64) < 8, 10.0, 0.1)
    plain = bs.apply(model, bs.Plan({"0": bs.Palette(2)}), [(x, None)])
    felt = bs.apply(model, bs.Plan({"0": bs.Palette(2)}, (bs.FisherPalettes(100),)), [(x, None)])
    with torch.no_grad():
        errors = [float((net(x) - model(x)).square().mean()) for net in (felt, plain)]
    assert errors[0] < errors[1]


def test_later_steps_keep_it_and_seeds_repeat_it() -> None:
    data = batches(2, seed=0)
    names = [name for name, site in bs.sites(small(), data[0][0]).items() if bs.Palette(2).fits(site)]
    for inner in (bs.Palette(2), bs.Int(8, 8, of=bs.Palette(2))):
        plan = bs.Plan(dict.fromkeys(names, inner), (bs.FisherPalettes(8), bs.CorrectBias()))
        x = data[0][0]
        one, two = (bs.apply(small(), plan, data) for _ in range(2))
        other = bs.apply(small(), plan.replace(prepare=(bs.CorrectBias(),)), data)
        with torch.no_grad():
            assert torch.equal(one(x), two(x))
            assert not torch.equal(one(x), other(x))


def test_nothing_to_do() -> None:
    with pytest.raises(PrepareError, match="Palette"):
        bs.apply(small(), bs.Plan({}, (bs.FisherPalettes(),)), batches(1))
    with pytest.raises(ValueError, match="samples"):
        bs.FisherPalettes(0)
    with pytest.raises(ValueError, match="output"):
        bs.FisherPalettes(output="poisson")  # type: ignore[arg-type]
