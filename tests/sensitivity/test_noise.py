"""Noise injection against noise put in by hand."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.sensitivity.noise import NoiseInjection
from bitsmith.task import TaskError
from smallnet import Small, batches, small, task


@functools.cache
def _trained() -> Small:
    return small()


def trained() -> Small:
    """A copy of the small network: training it once is enough."""
    return copy.deepcopy(_trained())


def never(plan: bs.Plan) -> nn.Module:
    raise AssertionError("noise needs no simulation")


def mean(model: Any, data: Any) -> float:
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(x), y)) * len(y) for x, y in data]
    return sum(losses) / sum(len(y) for _, y in data)


def test_a_weight_by_hand() -> None:
    model, data = trained(), batches(2, seed=2)
    pair = ("right", bs.Int(8, 8))
    found = NoiseInjection(scale=0.2, trials=3, seed=5)(model, task(), [pair], never)
    generator, rises = torch.Generator().manual_seed(5), []
    for _ in range(3):
        noisy = copy.deepcopy(model)
        weight = noisy.right.weight.detach()
        weight += 0.2 * weight.abs().max() * torch.randn(weight.shape, generator=generator)
        rises.append(mean(noisy, data) - mean(model, data))
    assert found.losses == {pair: pytest.approx(sum(rises) / 3, abs=1e-6)}
    assert len(set(rises)) == 3


class OnSum(nn.Module):
    """:class:`Small` with noise behind its addition."""

    def __init__(self, model: Small, noise: Tensor) -> None:
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = F.relu(model.stem(x))
        total = model.right(F.relu(model.norm(model.left(x)))) + x
        logits: Tensor = model.head(F.relu(total + self.noise).mean((2, 3)))
        return logits


def test_the_output_of_an_addition_by_hand() -> None:
    model, data = trained(), batches(1, seed=2)
    pair = (":add", bs.Int(8, 8))
    found = NoiseInjection(scale=0.3, seed=1)(model, task(calibration=data), [pair], never)
    sums: list[Tensor] = []
    plain = OnSum(model, torch.zeros(()))
    with torch.no_grad():
        x = F.relu(model.stem(data[0][0]))
        sums.append(model.right(F.relu(model.norm(model.left(x)))) + x)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([torch.randn(sums[0].shape[1:], generator=generator) for _ in range(16)])
    noisy = OnSum(model, 0.3 * sums[0].abs().max() * drawn)
    assert found.losses[pair] == pytest.approx(mean(noisy, data) - mean(plain, data), abs=1e-6)
    assert found.losses[pair] > 0


SITES = ("stem", "left", "right", ":add", ":mean", "head")


def test_all_techniques_of_a_site_score_the_same_and_no_other_site_matters() -> None:
    model = trained()
    pairs = [(site, technique) for site in SITES for technique in (bs.Int(8, 8), bs.Int(4, None))]
    found = NoiseInjection()(model, task(), pairs, never)
    assert list(found.losses) == pairs
    for site in SITES:
        assert found.losses[site, bs.Int(8, 8)] == found.losses[site, bs.Int(4, None)]
        alone = NoiseInjection()(model, task(), [(site, bs.Int(8, 8))], never)
        assert alone.losses[site, bs.Int(8, 8)] == found.losses[site, bs.Int(8, 8)]
    assert len(set(found.losses.values())) == len(SITES)


def test_how_samples_are_batched_does_not_matter() -> None:
    whole = [(torch.cat([x for x, _ in batches(3, seed=2)]), torch.cat([y for _, y in batches(3, seed=2)]))]
    cuts = [(0, 5), (5, 37), (37, 48)]
    uneven = [(whole[0][0][a:b], whole[0][1][a:b]) for a, b in cuts]
    pairs = [(site, bs.Int(8, 8)) for site in SITES]
    model = trained()
    one, several = (NoiseInjection()(model, task(calibration=data), pairs, never) for data in (whole, uneven))
    assert list(one.losses.values()) == pytest.approx(list(several.losses.values()), abs=1e-6)
    assert one.spent.forwards == several.spent.forwards == 7 * 48


def test_at_most_so_many_samples_in_whole_items() -> None:
    model, pairs = trained(), [("stem", bs.Int(8, 8))]
    data = batches(5, seed=2)
    limited = NoiseInjection(samples=47, trials=2)(model, task(calibration=data), pairs, never)
    same = NoiseInjection(trials=2)(model, task(calibration=data[:2]), pairs, never)
    assert limited.losses == same.losses
    assert (limited.spent.forwards, limited.spent.backwards) == ((1 + 2) * 32, 0)
    assert NoiseInjection(samples=1)(model, task(calibration=data), pairs, never).spent.forwards == 2 * 16


def test_the_model_stays_bitwise_and_so_do_its_flags() -> None:
    model = trained()
    model.train()
    model.left.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    NoiseInjection()(model, task(), [(site, bs.Int(8, 8)) for site in SITES], never)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.left.training
    assert torch.equal(torch.get_rng_state(), state)


class Tied(nn.Module):
    """Two layers with one weight, a sum in place, and a site with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.rnn = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.first(x))
        kept = y[:, -1]
        alias = kept
        kept += self.second(x[:, 0])
        return alias


def tied() -> tuple[nn.Module, bs.Task]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied()
    data = [(torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 6)]
    return model.eval(), bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=F.cross_entropy)


def test_a_shared_weight_is_disturbed_at_the_one_site_and_a_sum_in_place_where_it_is_kept() -> None:
    model, given = tied()
    sites = bs.sites(model, given.calibration[0][0])  # type: ignore[index]
    (add,) = [name for name, site in sites.items() if site.kind == "add"]
    technique = bs.Int(8, 8)
    found = NoiseInjection()(model, given, [("first", technique), ("second", technique), (add, technique)], never)
    assert len(set(found.losses.values())) == 3
    assert all(value != 0 for value in found.losses.values())


def test_what_cannot_be_seen_and_what_diverges_is_skipped_with_the_reason() -> None:
    model, given = tied()

    def fragile(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + (float("nan") if output.abs().max() > 50 else 0.0)

    given = bs.Task(calibration=given.calibration, validation=[], metric=bs.metrics.top1, loss=fragile)
    pairs = [(site, bs.Int(8, 8)) for site in ("rnn", "second")]
    found = NoiseInjection(scale=1000.0)(model, given, pairs, never)
    assert found.losses == {}
    assert "not one tensor" in found.skipped[pairs[0]]
    assert "loss is nan" in found.skipped[pairs[1]]


def test_products_in_attention_are_scored() -> None:
    class Mix(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x).mean(1)

    data = [(torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 6)]
    given = bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=F.cross_entropy)
    products = [n for n, site in bs.sites(Mix(), data[0][0], inside=True).items() if site.kind == "matmul"]
    found = NoiseInjection()(Mix(), given, [(name, bs.Int(8, 8)) for name in products], never)
    assert len(found.losses) == 2
    assert all(value != 0 for value in found.losses.values())


def test_negative_rises_are_kept_and_counted() -> None:
    given = task(loss=lambda output, target: -F.cross_entropy(output, target))
    found = NoiseInjection(scale=0.5)(trained(), given, [("stem", bs.Int(8, 8)), ("head", bs.Int(8, 8))], never)
    assert all(value < 0 for value in found.losses.values())
    assert "2 of 2" in found.notes["below 0"]


def test_errors() -> None:
    with pytest.raises(TaskError, match="no loss"):
        NoiseInjection()(trained(), task(loss=None), [("stem", bs.Int(8, 8))], never)
    for settings in ({"scale": 0.0}, {"scale": float("nan")}, {"trials": 0}, {"samples": 0}):
        with pytest.raises(ValueError, match="NoiseInjection"):
            NoiseInjection(**settings)  # type: ignore[arg-type]
