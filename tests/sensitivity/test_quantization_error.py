"""Quantization error against its equation, and what it skips."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.intercept import InterceptionError
from bitsmith.sensitivity.base import Meter
from bitsmith.sensitivity.quantization_error import QuantizationError, roundings
from smallnet import Small, small, task


@functools.cache
def _trained() -> Small:
    return small()


def trained() -> Small:
    """A copy of the small network: training it once is enough."""
    return copy.deepcopy(_trained())


def simulator(model: nn.Module, data: Any) -> Callable[[bs.Plan], nn.Module]:
    return lambda plan: bs.apply(model, plan, data)


def scores(model: nn.Module, given: bs.Task, pairs: list[Any], **settings: Any) -> Any:
    return QuantizationError(**settings)(model, given, pairs, simulator(model, given.calibration))


def per_channel(weight: Tensor, bits: int) -> Tensor:
    """Symmetric rounding of each output channel (axis 0) in float64."""
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().double().flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / top
    return ((rows / scale).round().clamp(-top - 1, top) * scale).reshape(weight.shape)


def affine(x: Tensor) -> Tensor:
    """Rounding to 8 unsigned bits over the range of ``x`` and 0, in float64."""
    x = x.double()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def relative(rounded: Tensor, exact: Tensor) -> float:
    error = rounded.double() - exact.double()
    return float(error.square().mean().sqrt() / exact.abs().max())


def folded(model: Small) -> Tensor:
    norm = model.norm
    assert norm.running_var is not None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return model.left.weight.detach().double() * factor.detach().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("technique", [bs.Int(8, 8), bs.Int(4, 8)])
def test_weights_by_the_equation(technique: bs.Int) -> None:
    model = trained()
    found = scores(model, task(), [("stem", technique), ("left", technique), ("head", technique)])
    for name, weight in {"stem": model.stem.weight, "left": folded(model), "head": model.head.weight}.items():
        expected = relative(per_channel(weight, technique.w), weight.detach())
        assert found.losses[name, technique] == pytest.approx(expected, rel=1e-3)
    assert not found.skipped


def test_fewer_bits_lose_more_and_pairs_keep_their_order() -> None:
    pairs = [(site, t) for site in ("head", "stem") for t in (bs.Int(8, 8), bs.Int(4, None), bs.Int(2, 8))]
    found = scores(trained(), task(), pairs)
    assert list(found.losses) == pairs
    values = list(found.losses.values())
    assert values[0] < values[1] < values[2]


def test_the_error_of_a_folded_weight_is_told_in_the_models_own_weights() -> None:
    model, technique, meter = trained(), bs.Int(4, None), Meter()
    given = task()
    found = roundings(given, [("left", technique)], simulator(model, given.calibration), meter)["left", technique]
    wide = folded(model)
    factor = (wide / model.left.weight.detach().double())[:, :1, :1, :1]
    expected = float(((per_channel(wide, 4) - wide) / factor).square().sum())
    assert found.error is not None
    assert found.error.squared == pytest.approx(expected, rel=1e-3)


def test_an_addition_by_the_tensors_that_it_reads() -> None:
    model, given = trained(), task()
    x, _ = given.calibration[0]  # type: ignore[index]
    with torch.no_grad():
        trunk = F.relu(model.stem(x))
        branch = model.right(F.relu(model.norm(model.left(trunk))))
    one = [given.calibration[0]]  # type: ignore[index]
    given = task(calibration=one)
    found = scores(model, given, [(":add", bs.Int(8, 8)), ("right", bs.Int(8, 8))])
    expected = relative(affine(branch), branch) + relative(affine(trunk), trunk)
    assert found.losses[":add", bs.Int(8, 8)] == pytest.approx(expected, rel=1e-3)


def test_activations_are_added_if_asked_for() -> None:
    model, technique = trained(), bs.Int(8, 8)
    given = task(calibration=task().calibration[:1])  # type: ignore[index]
    pairs = [("stem", technique), (":add", technique), ("stem", bs.Int(8, None))]
    plain, more = scores(model, given, pairs), scores(model, given, pairs, activations=True)
    x = given.calibration[0][0]  # type: ignore[index]
    assert more.losses[pairs[0]] - plain.losses[pairs[0]] == pytest.approx(relative(affine(x), x), rel=1e-3)
    assert more.losses[pairs[1]] == plain.losses[pairs[1]]
    assert more.losses[pairs[2]] == plain.losses[pairs[2]]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.mix(x, x, x, need_weights=False)
        logits: Tensor = self.head(out.mean(1))
        return logits


def attention() -> tuple[nn.Module, bs.Task, list[str]]:
    """A network, its task, and the names of its products of two activations."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention().eval()
    data = [(torch.randn(8, 5, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)]
    sites = bs.sites(model, data[0][0], inside=True)
    products = [name for name, site in sites.items() if site.kind == "matmul" and site.weight is None]
    given = bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=F.cross_entropy)
    return model, given, products


def test_products_in_attention_are_scored() -> None:
    model, given, products = attention()
    assert len(products) == 2
    pairs = [*((name, bs.Int(8, 8)) for name in products), *((name, bs.Int(4, 4)) for name in products)]
    found = scores(model, given, pairs)
    assert not found.skipped
    for name in products:
        assert 0 < found.losses[name, bs.Int(8, 8)] < 0.02 < found.losses[name, bs.Int(4, 4)]


# -- techniques of strangers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strange(bs.Technique):
    """Halves of the weight, handed to the operation in one way or another (a toy of these tests)."""

    way: str = "plain"

    def fits(self, site: bs.Site) -> bool | bs.No:
        return True

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return StrangeCell(site, self.way)


class StrangeCell(bs.Cell):
    def __init__(self, site: bs.Site, way: str) -> None:
        super().__init__(site)
        self.way = way
        self.folds = way == "behind"

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        half = torch.round(weight * 2) / 2
        if self.way == "twice":
            bias = rest.pop("bias")
            return self.op(x, half, bias=bias, **rest) + self.op(x, weight * 0, bias=None, **rest)
        if self.way == "unseen":
            return F.conv2d(x, half, **rest)
        if self.way == "wider":
            return self.op(x, torch.cat([half, half]), **{**rest, "bias": None})[:, : len(half)]
        if self.way == "nan":
            return self.op(x, half * float("nan"), **rest)
        if self.way == "named":
            return self.op(x, weight=half, **rest)
        output = self.op(x, half, **rest)
        return self.norm[0](output) if self.norm else output


@pytest.mark.parametrize(("way", "site"), [("plain", "stem"), ("named", "stem"), ("plain", "left"), ("behind", "left")])
def test_what_a_strangers_cell_makes_of_the_weight(way: str, site: str) -> None:
    model = trained()
    found = scores(model, task(), [(site, Strange(way))])
    weight = model.get_submodule(site).weight
    assert isinstance(weight, Tensor)
    expected = relative(torch.round(weight.detach() * 2) / 2, weight.detach())
    assert found.losses[site, Strange(way)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("way", "reason"),
    [("twice", "several weights"), ("unseen", "no weight"), ("wider", "shape"), ("nan", "not finite")],
)
def test_a_weight_that_cannot_be_had_is_skipped_with_the_reason(way: str, reason: str) -> None:
    found = scores(trained(), task(), [("stem", Strange(way)), ("stem", bs.Int(8, 8))])
    assert list(found.losses) == [("stem", bs.Int(8, 8))]
    assert reason in found.skipped["stem", Strange(way)]


def test_a_site_that_reads_nothing_in_integers_is_skipped() -> None:
    found = scores(trained(), task(), [(":add", bs.Float("bfloat16")), ("stem", bs.Float("bfloat16"))])
    assert "nothing in an integer format" in found.skipped[":add", bs.Float("bfloat16")]
    assert 0 < found.losses["stem", bs.Float("bfloat16")] < 2.0**-8


def test_scores_do_not_depend_on_which_others_are_asked_for() -> None:
    model, given = trained(), task()
    pairs = [(site, bs.Int(8, 8)) for site in ("stem", "left", "right", ":add", ":mean", "head")]
    together = scores(model, given, pairs)
    assert {pair: scores(model, given, [pair]).losses[pair] for pair in pairs} == together.losses


def test_the_model_stays_and_the_cost_is_one_batch_for_each_technique_and_one_for_what_is_read() -> None:
    model, given = trained().train(), task()
    before = copy.deepcopy(model.state_dict())
    found = scores(model, given, [("stem", bs.Int(8, 8)), ("stem", bs.Int(4, 8)), (":add", bs.Int(8, 8))])
    assert (found.spent.forwards, found.spent.backwards) == (3 * 16, 0)
    assert found.spent.seconds > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert scores(model, given, []).losses == {}


def test_a_network_without_a_plan_is_an_error() -> None:
    model = trained()
    with pytest.raises(InterceptionError, match="carries no plan"):
        QuantizationError()(model, task(), [("stem", bs.Int(8, 8))], lambda plan: model)
