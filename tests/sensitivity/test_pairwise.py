"""Pairwise losses where they are known exactly."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.sensitivity.pairwise import Pairwise
from smallnet import Small, small, task


@functools.cache
def _trained() -> Small:
    return small()


def trained() -> Small:
    """A copy of the small network: training it once is enough."""
    return copy.deepcopy(_trained())


@dataclass(frozen=True)
class Shift(bs.Technique):
    """The weight plus a number (a toy of these tests)."""

    by: float = 0.0

    def fits(self, site: bs.Site) -> bool | bs.No:
        return site.kind == "linear" or bs.No("linear layers only")

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return ShiftCell(site, self.by)


class ShiftCell(bs.Cell):
    def __init__(self, site: bs.Site, by: float) -> None:
        super().__init__(site)
        self.by = by

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        return self.op(x, weight + self.by, **rest)


class Sum(nn.Module):
    """``y = (a + 2 b + c) x`` on [n, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(1, 1, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer, value in zip((self.a, self.b, self.c), (0.5, -0.25, 1.5), strict=True):
                layer.weight.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + 2 * self.b(x) + self.c(x)
        return y


GAIN = {"a": 1.0, "b": 2.0, "c": 1.0}


def squared(output: Any, target: Any) -> Tensor:
    loss: Tensor = (output - target).square().mean()
    return loss


def toy(sizes: tuple[int, ...] = (8, 8), **changes: Any) -> tuple[Sum, bs.Task, Tensor, Tensor]:
    """The model, its task, all its inputs, and what the output misses the target by."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(sum(sizes), 1, generator=generator) for _ in range(2))
    model = Sum().eval()
    with torch.no_grad():
        target = model(x) + noise
    data = list(zip(x.split(sizes), target.split(sizes), strict=True))
    parts: dict[str, Any] = {"calibration": data, "validation": data, "metric": bs.metrics.top1, "loss": squared}
    return model, bs.Task(**{**parts, **changes}), x.double(), -noise.double()


def simulator(model: nn.Module, given: bs.Task) -> Callable[[bs.Plan], nn.Module]:
    return lambda plan: bs.apply(model, plan, given.calibration)


PAIRS = [("a", Shift(0.3)), ("a", Shift(-0.2)), ("b", Shift(0.1)), ("c", Shift(-0.4))]


def test_a_quadratic_loss_exactly() -> None:
    model, given, x, missed = toy()
    found = Pairwise()(model, given, PAIRS, simulator(model, given))
    power, slope = float(x.square().mean()), float((missed * x).mean())
    size = {pair: GAIN[pair[0]] * pair[1].by for pair in PAIRS}
    for pair in PAIRS:
        assert found.losses[pair] == pytest.approx(2 * size[pair] * slope + size[pair] ** 2 * power, abs=1e-6)
    expected = {
        (one, other): 2 * size[one] * size[other] * power
        for k, one in enumerate(PAIRS)
        for other in PAIRS[k + 1 :]
        if one[0] != other[0]
    }
    assert len(expected) == 5
    assert found.cross == {key: pytest.approx(value, abs=1e-6) for key, value in expected.items()}
    assert min(found.losses.values()) < 0  # nothing is clipped, so that they add up


def test_without_a_loss_the_relative_error_of_the_output() -> None:
    model, given, x, _ = toy(loss=None)
    found = Pairwise()(model, given, PAIRS[1:], simulator(model, given))
    with torch.no_grad():
        power = float(x.square().sum() / model(x.float()).double().square().sum())
    size = {pair: GAIN[pair[0]] * pair[1].by for pair in PAIRS}
    for pair in PAIRS[1:]:
        assert found.losses[pair] == pytest.approx(size[pair] ** 2 * power, rel=1e-4)
    for (one, other), value in found.cross.items():
        assert value == pytest.approx(2 * size[one] * size[other] * power, rel=1e-4)
    assert len(found.cross) == 3


def test_losses_and_cross_add_up_to_what_two_sites_lose() -> None:
    model, given = trained(), task(loss=None)
    pairs = [(site, bs.Int(3, 8)) for site in ("left", ":add", "head")]
    found = Pairwise()(model, given, pairs, simulator(model, given))
    plan = bs.Plan({"left": bs.Int(3, 8), "head": bs.Int(3, 8)})
    (measured,) = bs.output_error(model, given, [pairs[0]], lambda _: simulator(model, given)(plan))
    both = found.losses[pairs[0]] + found.losses[pairs[2]] + found.cross[pairs[0], pairs[2]]
    assert both == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("loss", [squared, None])
def test_batches_do_not_matter_and_the_cost_is_exact(loss: Any) -> None:
    model, several, _, _ = toy((3, 8, 5), loss=loss)
    _, one, _, _ = toy((16,), loss=loss)
    found = [Pairwise()(model, given, PAIRS[1:], simulator(model, given)) for given in (several, one)]
    assert list(found[0].losses.values()) == pytest.approx(list(found[1].losses.values()), rel=1e-4)
    assert list(found[0].cross.values()) == pytest.approx(list(found[1].cross.values()), rel=1e-4)
    assert {(f.spent.forwards, f.spent.backwards) for f in found} == {((1 + 3 + 3) * 16, 0)}


def test_at_most_so_many_samples() -> None:
    model, given, _, _ = toy((6, 6, 6))
    found = Pairwise(samples=13)(model, given, PAIRS[2:], simulator(model, given))
    assert found.spent.forwards == (1 + 2 + 1) * 12
    with pytest.raises(ValueError, match="samples=0"):
        Pairwise(samples=0)


def test_too_many_networks_is_an_error_before_one_is_built() -> None:
    model, given, _, _ = toy()

    def never(plan: bs.Plan) -> nn.Module:
        raise AssertionError("nothing may be built")

    pairs = [(f"site{k}", Shift(0.1)) for k in range(63)]
    with pytest.raises(ValueError, match=r"2016 networks.*2000.*InterLayer"):
        Pairwise()(model, given, pairs, never)


def test_losses_that_are_not_finite() -> None:
    def fragile(output: Tensor, target: Tensor) -> Tensor:
        return squared(output, target) / (output.abs().max() < 8)

    model, given, _, _ = toy(loss=fragile)
    pairs = [("a", Shift(2.0)), ("b", Shift(100.0)), ("c", Shift(2.0))]
    found = Pairwise()(model, given, pairs, simulator(model, given))
    assert list(found.losses) == [pairs[0], pairs[2]]
    assert "nan" in found.skipped[pairs[1]]
    assert found.cross == {}
    assert "a Shift(by=2.0) with c Shift(by=2.0)" in found.notes["not finite together"]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def test_a_module_and_what_is_inside_it_have_no_cross_term() -> None:
    _, given, _, _ = toy()
    model = Nested().eval()
    pairs = [("block", bs.Float()), ("block.0", Shift(0.1)), ("block.1", Shift(0.1))]
    found = Pairwise()(model, given, pairs, simulator(model, given))
    assert list(found.cross) == [(pairs[1], pairs[2])]
    assert found.losses[pairs[0]] == 0.0


def test_the_model_stays() -> None:
    model, given = trained().train(), task()
    before = copy.deepcopy(model.state_dict())
    pairs = [(site, bs.Int(4, 8)) for site in ("stem", ":add")]
    Pairwise()(model, given, pairs, simulator(model, given))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert Pairwise()(model, given, [], simulator(model, given)).losses == {}
