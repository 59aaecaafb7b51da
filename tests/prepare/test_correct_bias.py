"""Bias correction against the same two layers computed by hand; shrinking; where the correction is put."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import prepared
from bitsmith.model.network import network
from bitsmith.prepare._layers import watched
from bitsmith.prepare.correct_bias import CorrectBias
from smallnet import batches, small

Matrix = NDArray[np.float64]
LOW = bs.Int(3, 6)


def corrected(model: nn.Module, plan: bs.Plan, data: Any, samples: int = 256) -> nn.Module:
    net = network(copy.deepcopy(model), data[0][0])
    return CorrectBias(samples).prepare(net, plan, data).model


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)).eval()


def vectors(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) + 0.5


def on_grid(x: Matrix, bits: int) -> Matrix:
    """Affine, over the extremes and 0."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    grid: Matrix = (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return grid


def row_scales(w: Matrix, bits: int) -> Matrix:
    scales: Matrix = np.abs(w).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    return scales


def rows_on_grid(w: Matrix, bits: int) -> Matrix:
    scale = row_scales(w, bits)
    rounded: Matrix = np.clip(np.rint(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return rounded


def shrunk(difference: Matrix) -> Matrix:
    mean, variance = difference.mean(0), difference.var(0, ddof=1) / len(difference)
    spread = max(float((mean**2 - variance).mean()), 0.0)
    result: Matrix = mean * spread / (spread + variance)
    return result


def test_it_is_the_mean_error_layer_by_layer() -> None:
    model, x = mlp(), vectors(400)
    net = corrected(model, bs.Plan({"0": LOW, "2": LOW}), [(x, torch.zeros(400))], 400)
    inputs = x.double().numpy()
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in model.parameters())
    hidden = inputs @ w1.T + b1
    # the bias is an integer too, in units of both scales
    unit = row_scales(w1, 3)[:, 0] * (inputs.max() - inputs.min()) / 63
    coarse = on_grid(inputs, 6) @ rows_on_grid(w1, 3).T + np.rint(b1 / unit) * unit
    first = shrunk(hidden - coarse)
    float_hidden = np.maximum(hidden, 0)
    scale = float_hidden.max() / 63
    # the second layer is measured behind the corrected first one, on the range of the float network
    behind = np.clip(np.rint(np.maximum(coarse + first, 0) / scale), 0, 63) * scale
    unit = row_scales(w2, 3)[:, 0] * scale
    second = shrunk((float_hidden @ w2.T + b2) - (behind @ rows_on_grid(w2, 3).T + np.rint(b2 / unit) * unit))
    got = net.state_dict()
    for key, bias, shift in (("0.bias", b1, first), ("2.bias", b2, second)):
        assert np.abs(shift).max() > 0.01
        np.testing.assert_allclose(got[key].numpy() - bias, shift, atol=2e-3 * np.abs(shift).max() + 1e-5)
    for key in ("0.weight", "2.weight"):
        assert torch.equal(got[key], model.state_dict()[key])


def test_one_sample_corrects_nothing_and_noise_is_shrunk() -> None:
    model = mlp()
    plan = bs.Plan({"0": LOW})
    one = corrected(model, plan, [(vectors(1), torch.zeros(1))])
    assert torch.equal(one[0].bias, model[0].bias)  # type: ignore[index]
    whole = corrected(model, plan, [(vectors(4000), torch.zeros(4000))], 4000)
    truth = (whole[0].bias - model[0].bias).detach()  # type: ignore[index]
    errors = []
    for seed in range(20):
        few = corrected(model, plan, [(vectors(4, seed), torch.zeros(4))])
        errors.append(float(((few[0].bias - model[0].bias).detach() - truth).square().sum()))  # type: ignore[index]
    # with four samples it is on average no worse than leaving the bias alone
    assert sum(errors) / len(errors) < float(truth.square().sum())


def distance(net: nn.Module, model: nn.Module) -> float:
    """Mean squared difference of the logits."""
    with torch.no_grad():
        return sum(float((model(x) - net(x)).square().mean()) for x, _ in batches(8, seed=9)) / 8


def test_a_trained_network_comes_closer_to_float() -> None:
    model, data = small(), batches(4, seed=2)
    every = dict.fromkeys(("stem", "left", "right", "head"), LOW)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = distance(bs.apply(model, bs.Plan(every), data), model)
    better = distance(bs.apply(model, bs.Plan(every, (CorrectBias(),)), data), model)
    assert better < 0.6 * plain
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_normalisation_that_folds_takes_it() -> None:
    model, data = small(), batches(4, seed=2)
    net = corrected(model, bs.Plan({"left": bs.Int(4, 8)}), data).state_dict()
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, net[key])]
    assert changed == ["norm.bias"]
    assert net.keys() == model.state_dict().keys()


class Bare(nn.Module):
    """A convolution whose normalisation has no parameters, a linear layer without bias, a weight used by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=True)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 4, bias=False)
        self.matrix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(5)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        logits: Tensor = F.linear(self.head(x.mean((2, 3))), self.matrix)
        return logits


def bare() -> Bare:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Bare()
    model.norm.running_var.fill_(0.25)  # type: ignore[union-attr]
    return model.eval()


def test_layers_without_a_bias_get_one_where_they_can_hold_it() -> None:
    model, data = bare(), batches(4, seed=2)
    plan = bs.Plan(dict.fromkeys(("conv", "head", ":linear"), LOW))
    net = corrected(model, plan, data)
    assert set(net.state_dict()) - set(model.state_dict()) == {"head.bias"}
    assert not torch.equal(net.conv.bias, model.conv.bias)  # type: ignore[arg-type,union-attr]
    assert torch.equal(net.matrix, model.matrix)  # type: ignore[arg-type]
    plain, better = (bs.apply(model, p, data) for p in (plan, plan.replace(prepare=(CorrectBias(),))))
    assert distance(better, model) < 0.7 * distance(plain, model)


def test_ranges_stay_those_of_the_network_before() -> None:
    model, data = small(), batches(4, seed=2)
    plan = bs.Plan(dict.fromkeys(("stem", "left", "right", "head"), LOW))

    def scales(net: nn.Module) -> dict[str, Tensor]:
        return {key: value for key, value in net.state_dict().items() if "tensors" in key}

    plain, prepared = (scales(bs.apply(model, p, data)) for p in (plan, plan.replace(prepare=(CorrectBias(),))))
    assert plain.keys() == prepared.keys()
    assert all(torch.equal(plain[key], prepared[key]) for key in plain)


def test_it_is_a_function_of_the_data_and_stands_in_a_plan() -> None:
    model, data = small(), batches(4, seed=2)
    plan = bs.Plan({"stem": LOW, "right": LOW}, (CorrectBias(48),))
    assert bs.Plan.from_json(plan.to_json()) == plan
    assert "arXiv:1906.04721" in plan.cite()[0]
    one, two = (bs.apply(model, plan, data).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    # 48 samples are three batches of 16: the fourth is not read
    other = bs.apply(model, bs.Plan({"stem": LOW}, (CorrectBias(48),)), data[:3]).state_dict()["stem.bias"]
    assert not torch.equal(other, model.state_dict()["stem.bias"])
    assert torch.equal(corrected(model, bs.Plan({}), data).stem.bias, model.stem.bias)  # type: ignore[arg-type,union-attr]
    with pytest.raises(ValueError, match="samples=1"):
        CorrectBias(1)


class Padded(nn.Module):
    """Most positions are padding, whose outputs are masked away."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.one, self.two = nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.one(x)) * mask
        return {"logits": self.two(hidden.sum(1) / mask.sum(1))}


def test_means_that_mislead_are_not_applied() -> None:
    model = Padded().eval()
    x = vectors(64 * 8).reshape(64, 8, 12)
    mask = torch.zeros(64, 8, 1)
    mask[:, 0] = 1.0
    x[:, 1:] = 3.0 * vectors(1, seed=7)  # one padding, with an error of its own
    data = [((x, mask), torch.zeros(64))]
    plan = bs.Plan({"one": bs.Int(2, 8)})
    net = corrected(model, plan, data)
    assert torch.equal(net.one.bias, model.one.bias)  # type: ignore[union-attr,arg-type]
    # the same layer without padding is corrected
    alone = [((x[:, :1], mask[:, :1]), torch.zeros(64))]
    assert not torch.equal(corrected(model, plan, alone).one.bias, model.one.bias)  # type: ignore[union-attr,arg-type]


# -- the float network -----------------------------------------------------------------------------------------------


def biases(net: Any, plan: bs.Plan, data: Any) -> dict[str, Tensor]:
    return prepared(net, plan.replace(prepare=(CorrectBias(),)), data).model.state_dict()


@pytest.mark.parametrize("kept", [2**27, 0])
def test_the_float_network_is_computed_once_for_all_plans(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Unless that is too large to keep: then anew, with the same outcome."""
    data, plans = batches(4, seed=2), [bs.Plan({"left": LOW}), bs.Plan(dict.fromkeys(("stem", "right", "head"), LOW))]
    alone = [biases(network(small(), data[0][0]), plan, data) for plan in plans]
    calls: list[int] = []

    def counted(net: Any, names: Any, see: Any) -> nn.Module:
        replica = watched(net, names, see)
        replica.register_forward_hook(lambda *_: calls.append(1))
        return replica

    monkeypatch.setattr("bitsmith.prepare._floats.watched", counted)
    monkeypatch.setattr("bitsmith.prepare._floats._KEPT", kept)
    net = network(small(), data[0][0])
    for plan, wanted in zip(plans, alone, strict=True):
        got = biases(net, plan, data)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    # for each plan all 4 batches, and for the comparison the 64 samples in them
    assert len(calls) == (len(data) if kept else 2 * (4 + 4))


def test_other_inputs_and_weights_are_not_taken_for_those_before() -> None:
    plan, first, other = bs.Plan({"left": LOW, "head": LOW}), batches(4, seed=2), batches(4, seed=7)
    net = network(small(), first[0][0])
    biases(net, plan, first)
    fresh = biases(network(small(), first[0][0]), plan, other)
    got = biases(net, plan, other)
    assert all(torch.equal(got[key], fresh[key]) for key in fresh)
    model = small()
    with torch.no_grad():
        model.stem.weight.mul_(1.5)
    changed = dataclasses.replace(network(model, first[0][0]), memo=net.memo)
    fresh = biases(network(model, first[0][0]), plan, first)
    got = biases(changed, plan, first)
    assert all(torch.equal(got[key], fresh[key]) for key in fresh)
