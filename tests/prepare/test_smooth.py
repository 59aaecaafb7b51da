"""SmoothQuant: eq. 4 by hand, the function preserved, which groups it takes, and the choice of alpha."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.network import Network, network
from bitsmith.prepare.smooth import ALPHAS, SmoothQuant

WIDTH, HEADS = 8, 2
LAYERS = ("query", "key", "value", "out", "fc1", "fc2", "head")


class Block(nn.Module):
    """A pre-norm transformer block with channels that hold outliers, and a head; or a post-norm one."""

    def __init__(self, post: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
            self.scale, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
            self.head = nn.Linear(WIDTH, 3)
            with torch.no_grad():
                self.norm1.weight.mul_(torch.logspace(-1, 1.5, WIDTH))
                self.norm1.bias.normal_()
        self.post = post

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        made: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x)
            x = self.norm2(x + self.attention(x))
        else:
            x = x + self.attention(self.norm1(x))
            x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        logits: Tensor = self.head(F.layer_norm(x, (WIDTH,), self.scale, self.shift))
        return logits


def data(count: int = 2, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 6, WIDTH, generator=generator), torch.zeros(4)) for _ in range(count)]


def every(a: int | None = 8) -> bs.Plan:
    return bs.Plan(dict.fromkeys(LAYERS, bs.Int(8, a)))


EVERY = every()


def recorded(model: nn.Module) -> Network:
    return network(copy.deepcopy(model).eval(), data()[0][0])


def smoothed(model: nn.Module, alpha: float | None = 0.5, plan: bs.Plan = EVERY, multiply: bool = False) -> Any:
    return SmoothQuant(alpha, multiply).prepare(recorded(model), plan, data()).model


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_factor_is_eq_4(alpha: float) -> None:
    model = Block().eval()
    net = smoothed(model, alpha)
    with torch.no_grad():
        peaks = torch.cat([model.norm1(x) for x, _ in data()]).abs().double().amax((0, 1))
    weights = torch.cat([model.query.weight, model.key.weight, model.value.weight]).detach().double().abs().amax(0)
    s = peaks**alpha / weights ** (1 - alpha)
    for key in ("weight", "bias"):
        got, before = getattr(net.norm1, key), getattr(model.norm1, key)
        torch.testing.assert_close(got.double(), before.double() / s, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(net.query.weight.double(), model.query.weight.double() * s, rtol=1e-5, atol=1e-7)
    assert torch.equal(net.query.bias, model.query.bias)
    assert torch.equal(net.fc2.weight, model.fc2.weight)  # behind a GELU


def test_values_move_into_the_projection_behind_the_attention() -> None:
    model = Block().eval()
    net = smoothed(model, 0.5)
    ratio = (net.out.weight / model.out.weight).detach()
    s = ratio[0]
    torch.testing.assert_close(ratio, s.expand(WIDTH, -1))
    torch.testing.assert_close(net.value.bias * s, model.value.bias)
    with torch.no_grad():
        normed = [model.norm1(x) for x, _ in data()]
        mixed = []
        model.out.register_forward_hook(lambda module, args, output: mixed.append(args[0]))
        for x in normed:
            model.attention(x)
    peaks = torch.cat(mixed).abs().amax((0, 1))
    torch.testing.assert_close(s, (peaks / model.out.weight.detach().abs().amax(0)).sqrt())


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9, None]),
    post=st.booleans(),
    multiply=st.booleans(),
)
def test_the_function_is_preserved(seed: int, alpha: float | None, post: bool, multiply: bool) -> None:
    model = Block(post, seed).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = bs.Plan(dict.fromkeys(("query", "value", "out", "head") + (() if post else ("fc2",)), bs.Int(4, 4)))
    net = smoothed(model, alpha, plan, multiply)
    x = data(1, seed=seed)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-4)
    assert net.state_dict().keys() >= before.keys()
    assert multiply or net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_groups_and_the_reasons_against_others() -> None:
    found, refused = SmoothQuant().groups(recorded(Block()), every())
    assert found == {
        "norm1": ("query", "key", "value"),
        "value": ("out",),
        "norm2": ("fc1",),
        ":layer_norm": ("head",),
    }
    assert "gelu" in refused["fc1"]
    post, why = SmoothQuant().groups(recorded(Block(post=True)), bs.Plan({"query": bs.Int(8, 8), "out": bs.Int(8, 8)}))
    assert post == {"value": ("out",)}
    assert why["norm1"] == ":add (add) reads it too"
    assert why[":layer_norm"] == "the plan gives none of its readers integer activations"


def test_what_nothing_in_front_can_take_is_multiplied() -> None:
    model = Block().eval()
    found, refused = SmoothQuant(multiply=True).groups(recorded(model), every())
    assert found[":gelu"] == ("fc2",)
    assert found["norm1"] == ("query", "key", "value"), "as without"
    assert "fc1" in refused
    net = smoothed(model, 0.8, multiply=True)
    seen: list[Tensor] = []
    model.fc2.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in data():
            model(x)
    peaks = torch.cat(seen).abs().amax((0, 1))
    s = peaks**0.8 / model.fc2.weight.detach().abs().amax(0) ** 0.2
    torch.testing.assert_close(net.fc2.weight, model.fc2.weight * s)
    torch.testing.assert_close(net.fc2.input_factor, 1 / s)
    assert {key for key in net.state_dict() if key not in model.state_dict()} == {"fc2.input_factor"}


def test_behind_a_norm_with_a_residual_all_readers_share_one_factor() -> None:
    model = Block(post=True).eval()
    plan = bs.Plan(dict.fromkeys(("query", "key", "value", "out"), bs.Int(8, 8)))
    assert SmoothQuant(multiply=True).groups(recorded(model), plan)[0]["norm1"] == ("query", "key", "value")
    net = smoothed(model, 0.5, plan, multiply=True)
    assert torch.equal(net.norm1.weight, model.norm1.weight)
    assert torch.equal(net.query.input_factor, net.key.input_factor)
    assert torch.equal(net.query.input_factor, net.value.input_factor)
    sites = network(net, data()[0][0]).record.sites
    assert sites.keys() == network(model, data()[0][0]).record.sites.keys(), "a plan's names stay"
    again = SmoothQuant(0.5, multiply=True).prepare(recorded(net), plan, data()).model
    assert torch.equal(again.query.input_factor, net.query.input_factor), "it is smooth already"


class Hidden(nn.Linear):
    """A linear layer whose input goes elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0 * x.shape[0]) + x[..., :1].detach().tanh().mul(0.1)


class Scaled(nn.Linear):
    """A linear layer that must be given a keyword."""

    def forward(self, x: Tensor, *, factor: float) -> Tensor:  # type: ignore[override]
        return super().forward(x) * factor


class Keyword(nn.Module):
    """Behind a GELU: layers whose first argument cannot be multiplied, and one where it can."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.plain, self.named, self.hidden = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4), Hidden(WIDTH, 4)
            self.scaled = Scaled(WIDTH, 4)
            self.taken = nn.Linear(WIDTH, 4)
            self.taken.register_buffer("input_factor", torch.full((WIDTH,), 2.0))
            self.free = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        made: Tensor = self.plain(x) + self.named(input=x) + self.hidden(x) + self.taken(x) + F.linear(x, self.free)
        return made + self.scaled(x, factor=2.0)


def test_only_a_layer_that_is_a_module_of_its_own_is_multiplied() -> None:
    model = Keyword().eval()
    names = [name for name, site in network(model, data()[0][0]).record.sites.items() if site.kind == "linear"]
    assert len(names) == 6
    plan = bs.Plan(dict.fromkeys(names, bs.Int(8, 8)))
    assert SmoothQuant(multiply=True).groups(recorded(model), plan)[0] == {":gelu": ("plain", "scaled")}


def ffn_error(step: SmoothQuant | None) -> float:
    """Error / power of a layer behind a GELU with outliers in a few channels."""
    model = Block().eval()
    with torch.no_grad():
        model.fc1.weight[::5] *= 30
    net = bs.apply(model, bs.Plan({"fc2": bs.Int(8, 8)}, () if step is None else (step,)), data(8))
    with torch.no_grad():
        pairs = [(model(x), net(x)) for x, _ in data(8)]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def test_outliers_behind_a_gelu_cost_less() -> None:
    assert ffn_error(SmoothQuant()) == ffn_error(None)
    assert ffn_error(SmoothQuant(0.8, multiply=True)) < 0.5 * ffn_error(None)


def test_without_integer_activations_nothing_changes() -> None:
    model = Block().eval()
    for plan in (bs.Plan(), every(None)):
        net = smoothed(model, 0.5, plan)
        assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in model.state_dict().items())


def attention_error(step: SmoothQuant | None) -> tuple[float, Any]:
    """Of the attention's three inputs, each as a part of its power, when they alone are quantized to 6 bits."""
    model = Block().eval()
    plan = bs.Plan(dict.fromkeys(("query", "key", "value"), bs.Int(6, 6)), () if step is None else (step,))
    net = bs.apply(model, plan, data(8))
    total = 0.0
    for name in plan.sites:
        found: list[list[Tensor]] = [[], []]
        for seen, one in zip(found, (model, net), strict=True):
            one.get_submodule(name).register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        with torch.no_grad():
            for x, _ in data(8):
                model(x), net(x)
        wanted, got = (torch.cat(seen) for seen in found)
        total += float((got - wanted).square().sum() / wanted.square().sum())
    return total, net.state_dict()["query.weight"]


def test_outliers_cost_less_and_the_best_alpha_is_found() -> None:
    plain, _ = attention_error(None)
    fixed = {alpha: attention_error(SmoothQuant(alpha)) for alpha in ALPHAS}
    best = min(fixed, key=lambda alpha: fixed[alpha][0])
    assert fixed[best][0] < 0.5 * plain
    assert max(error for error, _ in fixed.values()) > 1.5 * fixed[best][0], "else alpha would not matter here"
    error, weight = attention_error(SmoothQuant(None))
    assert error == pytest.approx(fixed[best][0], rel=1e-3)
    torch.testing.assert_close(weight, fixed[best][1])


@pytest.mark.parametrize("alpha", [0.5, None])
@pytest.mark.parametrize("batch", [0, 1])
def test_what_is_not_finite_is_left_to_calibration(batch: int, alpha: float | None) -> None:
    items = data()
    items[batch][0][0, 0, 0] = float("nan")
    plan = every().replace(prepare=(SmoothQuant(alpha, multiply=True),))
    with pytest.raises(bs.CalibrationError, match="NaN"):
        bs.apply(Block(), plan, items)


def test_it_stands_in_a_plan() -> None:
    for step in (SmoothQuant(), SmoothQuant(0.8), SmoothQuant(None), SmoothQuant(multiply=True)):
        plan = every().replace(prepare=(step,))
        assert bs.Plan.from_json(plan.to_json()) == plan
    assert "arXiv:2211.10438" in plan.cite()[0]
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        SmoothQuant(1.5)
    one, two = (bs.apply(Block(), plan, data()).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
