"""Hutchinson's estimate against exact Hessians, its stopping rule and its standard error."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bitsmith as bs
from bitsmith.sensitivity.base import Scores
from bitsmith.sensitivity.hessian_trace import HessianTrace
from bitsmith.task import NonFiniteError, TaskError
from smallnet import small
from smallnet import task as small_task

TECHNIQUE = bs.Int(8, None)


def never(plan: bs.Plan) -> nn.Module:
    raise AssertionError("a plain trace needs no simulation")


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


def tanh(sizes: tuple[int, ...] = (6, 6), loss: Any = F.cross_entropy) -> tuple[nn.Module, bs.Task]:
    """In float64. Without a loss: squares of what the output misses, where it misses nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Tanh().double().eval()
        x = torch.randn(sum(sizes), 3, dtype=torch.float64)
    model.norm.running_var = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = torch.arange(sum(sizes)) % 2
    if loss is None:
        loss = F.mse_loss
        with torch.no_grad():
            y = model(x)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    return model, bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=loss)


def exact(model: nn.Module, given: bs.Task, key: str) -> float:
    """``Tr(H) / n`` by a parameter, of the mean loss over all samples."""
    batches: Any = given.calibration
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    weight = model.get_parameter(key).detach()

    def loss(w: Tensor) -> Tensor:
        assert given.loss is not None
        return given.loss(torch.func.functional_call(model, {key: w}, (x,)), y)

    hessian: Tensor = torch.autograd.functional.hessian(loss, weight)
    return float(hessian.reshape(weight.numel(), -1).trace()) / weight.numel()


def plain(model: nn.Module, given: bs.Task, *names: str, **settings: Any) -> Scores:
    pairs = [(name, TECHNIQUE) for name in names]
    return HessianTrace(weighted=False, **settings)(model, given, pairs, never)


def error_of_the_sum(found: Scores) -> float:
    match = re.search(r"traces: ([0-9.]+|inf)%", found.notes["vectors"])
    assert match is not None
    return float(match[1]) / 100


def error_of_the_worst(found: Scores) -> float:
    match = re.search(r"standard error of ([0-9.]+)%", found.notes["worst layer"])
    assert match is not None
    return float(match[1]) / 100


def test_the_trace_of_every_layer() -> None:
    model, given = tanh((12,), loss=None)
    found = plain(model, given, "first", "second", tolerance=1e-6, least=200, most=200)
    assert error_of_the_worst(found) < 0.1
    for name in ("first", "second"):
        expected = exact(model, given, f"{name}.weight")
        assert found.losses[name, TECHNIQUE] == pytest.approx(expected, rel=3 * error_of_the_worst(found))


def test_hutchinsons_estimate_from_the_whole_hessian() -> None:
    model, given = tanh((5, 7))
    batches: Any = given.calibration
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def loss(first: Tensor, second: Tensor) -> Tensor:
        weights = {"first.weight": first, "second.weight": second}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    weights = model.get_parameter("first.weight").detach(), model.get_parameter("second.weight").detach()
    blocks = torch.autograd.functional.hessian(loss, weights)
    hessian = torch.cat(
        [torch.cat([blocks[i][j].reshape(w.numel(), -1) for j in (0, 1)], 1) for i, w in enumerate(weights)]
    )
    generator, estimates = torch.Generator().manual_seed(3), []
    for _ in range(6):
        v = torch.cat([torch.randint(0, 2, w.shape, generator=generator).double().flatten() * 2 - 1 for w in weights])
        products = v * (hessian @ v)
        estimates.append([float(products[:12].sum()), float(products[12:].sum())])
    draws = torch.tensor(estimates, dtype=torch.float64)
    found = plain(model, given, "first", "second", most=6, tolerance=1e-9, seed=3)
    for name, mean, count in zip(("first", "second"), draws.mean(0).tolist(), (12, 8), strict=True):
        assert found.losses[name, TECHNIQUE] == pytest.approx(max(mean, 0.0) / count, rel=1e-9)
    total = draws.sum(1)
    assert error_of_the_sum(found) == pytest.approx(float(total.std() / 6**0.5 / total.mean().abs()), abs=6e-4)


def test_the_standard_error_is_honest() -> None:
    model, given = tanh((12,), loss=None)
    whole = 12 * exact(model, given, "first.weight") + 8 * exact(model, given, "second.weight")
    missed = []
    for seed in range(40):
        found = plain(model, given, "first", "second", tolerance=1e-6, least=8, most=8, seed=seed)
        total = 12 * found.losses["first", TECHNIQUE] + 8 * found.losses["second", TECHNIQUE]
        missed.append((total - whole) / (error_of_the_sum(found) * total))
    # Student's t with 7 degrees of freedom has a root mean square of 1.18
    assert 0.8 < math.sqrt(sum(z * z for z in missed) / len(missed)) < 1.5
    assert abs(sum(missed) / len(missed)) < 0.5


@pytest.mark.parametrize("tolerance", [0.3, 0.1])
def test_it_stops_when_the_standard_error_is_small_enough(tolerance: float) -> None:
    model, given = tanh(loss=None)
    found = plain(model, given, "first", "second", tolerance=tolerance, least=2, most=500)
    count = int(found.notes["vectors"].split()[0])
    assert 2 <= count < 500
    assert error_of_the_sum(found) <= tolerance
    assert "not below" not in found.notes["vectors"]
    if count > 2:
        before = plain(model, given, "first", "second", tolerance=1e-9, least=2, most=count - 1)
        assert error_of_the_sum(before) >= tolerance - 5e-4
    assert (found.spent.forwards, found.spent.backwards) == (count * 12, 2 * count * 12)
    assert re.match(r"(first|second).weight: standard error of [0-9.]+%", found.notes["worst layer"])


def test_it_stops_at_most_there_and_says_so() -> None:
    model, given = tanh()
    found = plain(model, given, "first", tolerance=1e-9, most=5)
    assert found.notes["vectors"].startswith("5 (at most 5)")
    assert "not below" in found.notes["vectors"]
    assert found.spent.forwards == 5 * 12


def test_a_diagonal_hessian_is_exact_with_the_fewest_vectors() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    data = [(x, x[:, :3])]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().sum() / 4

    given = bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=loss)
    name = next(iter(bs.sites(model, x)))
    pairs = [(name, TECHNIQUE)]
    found = HessianTrace(weighted=False)(model, given, pairs, never)
    assert found.losses[pairs[0]] == pytest.approx(2 * 30 * 3 / 4 / 12, rel=1e-12)
    assert found.notes["vectors"].startswith("4 (")
    assert found.spent.forwards == 4 * 4


def test_batches_do_not_matter() -> None:
    found = [plain(*tanh(sizes), "first", "second", most=8) for sizes in ((12,), (1, 4, 7))]
    assert list(found[0].losses.values()) == pytest.approx(list(found[1].losses.values()), rel=1e-9)
    assert found[0].notes == found[1].notes
    assert plain(*tanh((12,)), "first", "second", most=8).losses == found[0].losses
    assert plain(*tanh((12,)), "first", "second", most=8, seed=1).losses != found[0].losses


def test_at_most_so_many_samples() -> None:
    model, given = tanh((5, 5, 5))
    found = plain(model, given, "first", samples=11, most=6)
    shorter = bs.Task(
        calibration=given.calibration[:2],  # type: ignore[index]
        validation=[],
        metric=bs.metrics.top1,
        loss=F.cross_entropy,
    )
    assert found.losses == plain(model, shorter, "first", most=6).losses
    count = int(found.notes["vectors"].split()[0])
    assert (found.spent.forwards, found.spent.backwards) == (count * 10, count * 20)


def test_a_negative_trace_is_given_as_0_and_counted() -> None:
    model, given = tanh(loss=lambda output, target: -output.square().mean())
    found = plain(model, given, "second", most=20)
    assert found.losses == {("second", TECHNIQUE): 0.0}
    assert found.notes["below 0"].startswith("1 of 1")


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    model, given = tanh(loss=lambda output, target: output.mean())
    found = plain(model, given, "second")
    assert found.losses == {("second", TECHNIQUE): 0.0}
    assert found.notes["vectors"].startswith("4 (")


class Shared(nn.Module):
    """One weight at two places, and one that is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.third = parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y


def test_shared_weights_share_a_trace_and_computed_ones_have_their_own() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shared().double().eval()
        x = torch.randn(10, 4, dtype=torch.float64)
    with torch.no_grad():
        data = [(x, model(x))]
    given = bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=F.mse_loss)
    found = plain(model, given, "first", "second", "third", tolerance=1e-6, least=100, most=100)
    assert found.losses["first", TECHNIQUE] == found.losses["second", TECHNIQUE]
    assert found.losses["first", TECHNIQUE] == pytest.approx(
        exact(model, given, "first.weight"), rel=3 * error_of_the_worst(found)
    )
    # of the weight that the layer computes with: a linear layer under a squared error, H = 2 / (2 n) x x' per output
    with torch.no_grad():
        hidden = torch.tanh(model.second(torch.tanh(model.first(x))))
    expected = float(hidden.square().sum(1).mean()) / 4
    assert found.losses["third", TECHNIQUE] == pytest.approx(expected, rel=3 * error_of_the_worst(found))


def simulator(model: nn.Module, given: bs.Task) -> Callable[[bs.Plan], nn.Module]:
    return lambda plan: bs.apply(model, plan, given.calibration)


def test_weighted_by_the_squared_error_of_the_weight() -> None:
    model, given = small(), small_task()
    pairs = [(site, technique) for site in ("stem", "left", ":add") for technique in (bs.Int(8, 8), bs.Int(4, 8))]
    weighted = HessianTrace(most=4)(model, given, pairs, simulator(model, given))
    plain = HessianTrace(most=4, weighted=False)(model, given, pairs, never)
    norm = model.norm
    assert norm.running_var is not None
    factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach().reshape(-1, 1, 1, 1)
    for site, along in (("stem", torch.ones(8, 1, 1, 1)), ("left", factor)):
        weight = model.get_submodule(site).weight
        assert isinstance(weight, Tensor)
        folded = weight.detach().double() * along
        for bits in (8, 4):
            scale = folded.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) / (2 ** (bits - 1) - 1)
            squared = float((((folded / scale).round() * scale - folded) / along).square().sum())
            expected = plain.losses[site, bs.Int(bits, 8)] * squared
            assert expected > 0
            assert weighted.losses[site, bs.Int(bits, 8)] == pytest.approx(expected, rel=2e-3)
    for found in (weighted, plain):
        assert dict(found.skipped) == {pair: "it has no weight" for pair in pairs if pair[0] == ":add"}
    # two techniques: two forwards of the first batch that show what they make of the weights
    assert weighted.spent.forwards == plain.spent.forwards + 2 * 16 == 4 * 32 + 2 * 16
    assert weighted.spent.backwards == 4 * 2 * 32


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x, _ = self.mix(x, x, x, need_weights=False)
        x = F.scaled_dot_product_attention(x, x, x)
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


def test_attention_and_recurrence_have_second_derivatives_and_products_are_skipped() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Sequences().eval()
    ids = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    data = [(ids, torch.arange(6) % 3)]
    given = bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=F.cross_entropy)
    sites = bs.sites(model, ids, inside=True)
    names = [name for name, site in sites.items() if site.role == "integer"]
    weights = [name for name in names if sites[name].weight is not None]
    products = [name for name in names if sites[name].kind == "matmul" and sites[name].weight is None]
    assert len(products) == 4
    assert {"words", "head"} < set(weights)
    found = plain(model, given, *names, most=4)
    assert {name for name, _ in found.losses} == set(weights)
    assert all(found.skipped[name, TECHNIQUE] == "it has no weight" for name in products)
    assert any(value > 0 for value in found.losses.values())


def test_the_model_stays() -> None:
    model, given = small().train(), small_task()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    HessianTrace(most=4)(model, given, [("left", bs.Int(8, 8))], simulator(model, given))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert HessianTrace()(model, given, [], never).losses == {}


def test_errors() -> None:
    model, _ = tanh()
    with pytest.raises(TaskError, match="needs Task"):
        plain(model, small_task(loss=None), "first")
    with pytest.raises(TaskError, match="with a gradient"):
        plain(model, tanh(loss=lambda output, target: output.argmax().double())[1], "first")
    with pytest.raises(NonFiniteError, match="calibration item 0"):
        plain(model, tanh(loss=lambda output, target: output.mean() * float("nan"))[1], "first")
    for settings in ({"tolerance": 0.0}, {"least": 1}, {"least": 9, "most": 8}, {"samples": 0}):
        with pytest.raises(ValueError, match="HessianTrace"):
            HessianTrace(**settings)  # type: ignore[arg-type]
