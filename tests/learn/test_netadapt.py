"""NetAdapt: budgets that are kept, the best group each time, costs that are predicted, and bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.learn.netadapt import Table, _fitted
from bitsmith.model.network import network
from bitsmith.prepare._channels import channel_groups
from bitsmith.targets.roofline import Roofline

MACHINE = Roofline(float32=10.0, bandwidth_gb_s=10.0)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    ).eval()


def task() -> bs.Task:
    generator = torch.Generator().manual_seed(0)
    net, x = model(), torch.randn(4, 16, 3, 8, 8, generator=generator)
    items = [(part, net(part).argmax(1)) for part in x]
    return bs.Task(calibration=items[:2], validation=items[2:], metric=bs.metrics.top1, loss=F.cross_entropy)


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean(1)


def macs(record: bs.Record) -> float:
    return float(sum(site.macs for site in record.sites.values()))


def test_the_budget_is_kept_by_removing_channels() -> None:
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    whole = macs(network(net, task().calibration[0][0]).record)  # type: ignore[index]
    found = bs.netadapt(net, task(), MACHINE, 0.6 * whole, cost=macs, divisor=4, cut=0.15, samples=32)
    got = macs(network(found.model, task().calibration[0][0]).record)  # type: ignore[index]
    assert found.cost == got <= 0.6 * whole
    assert found.first_cost == whole
    costs = [found.first_cost, *(step.cost for step in found.steps)]
    assert all(a > b for a, b in itertools.pairwise(costs))
    assert all(n % 4 == 0 for n in found.left.values())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    again = bs.netadapt(net, task(), MACHINE, 0.6 * whole, cost=macs, divisor=4, cut=0.15, samples=32)
    assert again.steps == found.steps
    # the same channels by hand: what a plan for the first model would say
    assert set(found.left) <= {"0", "2", "4"}


def test_each_iteration_takes_the_best_of_all_groups() -> None:
    """A group whose channels do nothing costs no accuracy, so its channels go first."""
    net = model()
    with torch.no_grad():
        net[2].weight[8:] *= 1e-6  # type: ignore[index, operator]
        net[2].bias[8:] = 0  # type: ignore[index]
    items = [(x, net(x).detach()) for x, _ in task().calibration]
    judge = bs.Task(calibration=items, validation=items, metric=squared_error, lower=True)
    whole = macs(network(net, items[0][0]).record)
    found = bs.netadapt(net, judge, MACHINE, 0.7 * whole, cost=macs, divisor=8, cut=0.2)
    assert set(found.left) == {"2"}
    assert found.steps[-1].score < 1e-6


def test_a_modelled_target_computes_the_cost() -> None:
    found = bs.netadapt(model(), task(), MACHINE, 0.1, divisor=4, cut=0.1, batch=16)
    record = network(found.model, task().calibration[0][0]).record  # type: ignore[index]
    timing = MACHINE.computed(bs.Plan(), record, 16)
    assert timing is not None
    assert found.cost == pytest.approx(timing.ms)
    assert found.source == "modelled"
    assert found.timing is None


def test_training_between() -> None:
    data = list(task().calibration)
    found = bs.netadapt(
        model(), task(), MACHINE, 2e6, cost=macs, divisor=8, cut=0.3, train=data, short=2, long=3, lr=1e-3
    )
    assert found.cost <= 2e6


def test_a_measured_table() -> None:
    target = bs.targets.OnnxRuntime(threads=1)
    whole = bs.netadapt(model(), task(), target, 1e9, probes=6)
    assert not whole.steps
    assert whole.table_error is not None
    assert whole.timing is not None
    found = bs.netadapt(model(), task(), target, 0.8 * whole.first_cost, divisor=4, cut=0.2, probes=6)
    assert found.left or found.first_cost <= 0.8 * whole.first_cost  # this machine has other work


def test_the_table_finds_the_times_it_was_made_from() -> None:
    net, x = model(), torch.zeros(1, 3, 8, 8)
    record = network(net, x).record
    groups = {name: group for name, group in channel_groups(record).items() if not group.locked}
    first = {name: group.channels for name, group in groups.items()}
    table, rng = Table(groups, record, first), np.random.default_rng(0)

    def times(counts: Any) -> dict[str, float]:
        a, b, c = (counts[name] / first[name] for name in ("0", "2", "4"))
        return {"0": 0.1 + 0.2 * a, "2": 0.05 + 0.6 * a * b, "4": 0.3 * b * c + 0.02 * b, "8": 0.01 * c}

    widths = [{name: int(rng.integers(1, n + 1)) for name, n in first.items()} for _ in range(12)]
    table.fit(widths, [times(w) for w in widths], [sum(times(w).values()) for w in widths])
    for counts in ({"0": 3, "2": 7, "4": 11}, {"0": 16, "2": 32, "4": 16}):
        assert table(counts) == pytest.approx(sum(times(counts).values()), rel=1e-6)
    assert (_fitted(np.array([[1.0, k] for k in range(4)]), np.array([3.0, 2.0, 1.0, 0.0])) >= 0).all()


def test_bad_input() -> None:
    with pytest.raises(bs.NetAdaptError, match="smallest design"):
        bs.netadapt(model(), task(), MACHINE, 1.0, cost=macs)
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(bs.NetAdaptError, match="no group"):
        bs.netadapt(nn.Linear(3, 4), bs.Task(data, data, metric=bs.metrics.top1), MACHINE, 1.0, cost=macs)
    for options in ({"cut": 0.0}, {"decay": 1.5}, {"short": 1}):
        with pytest.raises(ValueError, match="netadapt"):
            bs.netadapt(model(), task(), MACHINE, 1.0, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget"):
        bs.netadapt(model(), task(), MACHINE, 0.0)
