"""Range methods chosen by output error: against errors computed by hand, and which tensors must agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.formats import place
from bitsmith.model.network import Network, network
from bitsmith.prepare.ranges import INPUT_RANGES, choose_ranges
from bitsmith.site import Format, Range, Site
from bitsmith.techniques.float_ import Float
from smallnet import batches, small

MINMAX, TAIL, MSE = Range(), Range("percentile", 99.0), Range("mse")
Matrix = NDArray[np.float64]


class Two(nn.Module):
    """Two linear layers; the second one's inputs have a long tail or not, as its first one's bias says."""

    def __init__(self, spike: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 8)
        with torch.no_grad():
            self.one.weight[0] = 0.0
            self.one.weight[0, 0] = spike

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.two(F.relu(self.one(x)))
        return logits


def vectors(count: int = 256) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(4))


def on_grid(x: Matrix, low: float, high: float, bits: int) -> Matrix:
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    grid: Matrix = (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return grid


def by_hand(x: Matrix, weight: Matrix, bias: Matrix, bits: int) -> dict[Range, float]:
    """The mean over samples of (error / power) of the layer's output, for the extremes and for 1 and 99 percent."""
    wanted = x @ weight.T + bias
    limits = {MINMAX: (min(x.min(), 0), max(x.max(), 0)), TAIL: tuple(np.percentile(x, [1, 99]))}
    found = {}
    for method, (low, high) in limits.items():
        got = on_grid(x, min(low, 0), high, bits) @ weight.T + bias
        found[method] = float((((got - wanted) ** 2).sum(1) / (wanted**2).sum(1)).mean())
    return found


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("spike", [0.1, 12.0])
def test_the_method_is_that_of_the_least_output_error(spike: float, bits: int) -> None:
    model, x = Two(spike).eval(), vectors()
    plan = bs.Plan({"one": bs.Int(8, bits), "two": bs.Int(8, bits)})
    chosen = choose_ranges(network(model, x), plan, [(x, None)], (MINMAX, TAIL), (), samples=256)
    hidden = torch.relu(model.one(x)).detach().double().numpy()
    for name, seen in (("one", x.double().numpy()), ("two", hidden)):
        layer: Any = model.get_submodule(name)
        errors = by_hand(seen, layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy(), bits)
        ratio = errors[MINMAX] / errors[TAIL]
        assert not 0.95 < ratio < 1.05, "the choice must be clear"
        if name == "one":  # a ReLU follows
            continue
        assert _range(chosen, name) == min(errors, key=lambda method: errors[method])


def _range(plan: bs.Plan, name: str) -> Range:
    technique = plan.sites[name]
    assert isinstance(technique, bs.Int)
    return technique.range


def recorded(model: nn.Module | None = None) -> Network:
    return network(model or small(), batches(1, seed=2)[0][0])


def test_tensors_that_meet_agree() -> None:
    net = recorded()
    sites = [name for name, site in net.record.sites.items() if site.role == "integer"]
    plan = bs.targets.OnnxRuntime().adapt(bs.Plan(dict.fromkeys(sites, bs.Int(4, 4))), net.record)
    chosen = choose_ranges(net, plan, batches(2, seed=2))
    assert chosen.sites.keys() == plan.sites.keys()
    # one quantizer at every write, as before: no reader asks for another range than its neighbour
    before, after = place(plan, net.record), place(chosen, net.record)
    assert before.writes.keys() == after.writes.keys()
    assert {key: read for key, (_, _, read) in before.reads.items()} == {
        key: read for key, (_, _, read) in after.reads.items()
    }
    assert len({tensor for tensor, _ in after.tensors}) == len(after.tensors)
    # the addition's two operands, and who reads its first one
    assert _range(chosen, ":add") == _range(chosen, "left")
    for name, technique in chosen.sites.items():
        old = plan.sites[name]
        assert isinstance(technique, bs.Int)
        assert isinstance(old, bs.Int)
        keep = {"range": old.range, "weight_range": old.weight_range, "out": old.out}
        assert dataclasses.replace(technique, **keep) == old  # type: ignore[arg-type]


def test_at_layers_of_tokens_another_method_has_to_gain_more() -> None:
    plan = bs.Plan({"two": bs.Int(8, 4)})

    def chosen(x: Tensor, token_gain: float) -> Range:
        net = network(Two(30.0).eval(), x)
        return _range(choose_ranges(net, plan, [(x, None)], (MINMAX, MSE), token_gain=token_gain), "two")

    rows, tokens = vectors(), vectors().reshape(32, 8, 16)
    assert chosen(rows, 1.0) == chosen(tokens, 1.0) == MSE
    assert chosen(tokens, 0.0) == MINMAX
    assert chosen(rows, 0.0) == MSE, "vectors are no tokens"


def test_weights_get_the_method_with_less_output_error() -> None:
    model = small()
    with torch.no_grad():
        model.right.weight[:, 0, 0, 0] *= 12.0  # one outlier in every row
    data = batches(2, seed=2)
    net = recorded(model)
    plan = bs.Plan(dict.fromkeys(("left", "right", "head"), bs.Int(3, 8)))
    chosen = choose_ranges(net, plan, data, (), samples=32)
    for name in plan.sites:
        technique = chosen.sites[name]
        assert isinstance(technique, bs.Int)
        assert technique.range == MINMAX
        errors = {}
        for method in (MINMAX, MSE):
            weights_only = bs.Plan({name: bs.Int(3, None, weight_range=method)})
            errors[method] = _output_error(model, weights_only, net.record.sites[name], data)
        assert technique.weight_range == min(errors, key=lambda method: errors[method]), (name, errors)


def _output_error(model: nn.Module, plan: bs.Plan, site: Site, data: Any) -> float:
    """Of a module's output behind its normalisation and ReLU, taken from module hooks."""
    simulated = bs.apply(model, plan, data)
    last = {"left": "norm"}.get(site.name, site.name)
    total = 0.0
    for x, _ in data:
        found = []
        for net in (model, simulated):
            seen: list[Tensor] = []
            handle = net.get_submodule(last).register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(out.clone())
            )
            with torch.no_grad():
                net(x)
            handle.remove()
            found.append(F.relu(seen[0]) if site.name == "left" else seen[0])
        wanted, got = (value.flatten(1).double() for value in found)
        power = wanted.square().sum(1)
        total += float(((got - wanted).square().sum(1) / power.clamp_min(1e-3 * float(power.mean()))).sum())
    return total


def test_what_has_no_choice_keeps_its_format() -> None:
    net, data = recorded(), batches(2, seed=2)
    assert choose_ranges(net, bs.Plan(), data) == bs.Plan()
    plan = bs.Plan({"stem": bs.Int(4, None), "head": Float()})
    weights = choose_ranges(net, plan, data, weight_candidates=())
    assert weights == plan
    fixed = bs.Plan({"right": bs.Int(8, 3), ":add": _Fixed()})
    chosen = choose_ranges(net, fixed, data, (TAIL,), ())
    assert chosen.sites[":add"] == _Fixed()
    assert _range(chosen, "right") == TAIL  # its input is not read by the addition
    shared = bs.Plan({"left": bs.Int(8, 3), ":add": _Fixed()})
    assert choose_ranges(net, shared, data, (TAIL,), ()) == shared  # its input is


@dataclasses.dataclass(frozen=True)
class _Fixed(bs.Technique):
    """Reads 4-bit integers whose range nobody may choose."""

    def fits(self, site: Site) -> bool:
        return True

    def reads(self, site: Site) -> tuple[Format | None, ...]:
        return (Format(4),) * len(site.operands)

    def build(self, site: Site, record: Any, rng: torch.Generator) -> bs.Cell:
        return bs.Cell(site)


def test_it_is_reproducible_and_changes_nothing_it_was_given() -> None:
    model, data = small(), batches(3, seed=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    net = recorded(model)
    plan = bs.Plan(dict.fromkeys(("stem", "left", "right", "head", ":add"), bs.Int(4, 4)))
    one, two = (choose_ranges(net, plan, data) for _ in range(2))
    assert one == two
    assert bs.Plan.from_json(one.to_json()) == one
    assert not net.record.statistics
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_input_gets_the_method_with_the_least_error_of_the_whole_network() -> None:
    """A feature that is large and does not matter: one layer's output says keep it, the network says clip it."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.second(self.first(x))
            return made

    torch.manual_seed(0)
    model = Features().eval()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(8))
        model.second.weight[:, 0] = 0.0
    x = torch.randn(512, 8)
    x[:, 0] *= 300.0
    data = [(x, None)]
    net = network(model, x)
    plan = bs.Plan({"first": bs.Int(8, 8), "second": bs.Int(8, 8)})
    alone = choose_ranges(net, plan, data, weight_candidates=(), input_candidates=())
    whole = choose_ranges(net, plan, data, weight_candidates=())
    errors = {}
    for method in INPUT_RANGES:
        only = bs.Plan({"first": dataclasses.replace(plan["first"], range=method, w=8)})  # type: ignore[type-var]
        net_ = bs.apply(model, only, data)
        with torch.no_grad():
            errors[method] = float((net_(x) - model(x)).double().square().sum(1).div(model(x).square().sum(1)).sum())
    assert whole["first"].range == min(errors, key=lambda method: errors[method])  # type: ignore[attr-defined]
    assert errors[whole["first"].range] < errors[alone["first"].range]  # type: ignore[attr-defined]
