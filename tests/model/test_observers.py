"""What a technique asks to have collected beside ranges: where it is seen, when, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.bench import Bench
from bitsmith.model.apply import computer_of
from bitsmith.model.calibrate import CalibrationError, calibrate
from bitsmith.model.formats import place
from bitsmith.model.network import network
from bitsmith.numerics.statistics import NonFiniteError
from bitsmith.testing import MockTarget
from smallnet import batches, small, task


class Shapes:
    def __init__(self) -> None:
        self.count = 0
        self.shapes: list[tuple[int, ...]] = []

    def update(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise NonFiniteError(int(x.isnan().sum()), int(x.isinf().sum()), x.numel())
        self.count += len(x)
        self.shapes.append(tuple(x.shape))


@dataclass(frozen=True)
class Watcher:
    scale: int = 1

    def start(self) -> Shapes:
        return Shapes()


@dataclass(frozen=True)
class Watching(bs.Technique):
    """Computes in float and asks to see its first operand (a test)."""

    which: int = 1

    def fits(self, site: bs.Site) -> bool:
        return site.role == "integer"

    def wants(self, site: bs.Site) -> bs.Wants:
        return bs.Wants(observers=(Watcher(self.which),))

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        cell = FloatCell(site)
        cell.seen = record.statistics[(site.name, 0), Watcher(self.which)]
        return cell


class FloatCell(bs.Cell):
    seen: Any = None

    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        return self.op(*operands, **rest)


class Viewed(nn.Module):
    """A tensor that is permuted between who writes it and who reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Conv1d(5, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).reshape(-1, 5, 4))
        return y


def test_it_sees_what_the_site_reads_not_what_was_written() -> None:
    data = [(torch.randn(6, 10, 4), None), (torch.randn(2, 10, 4), None)]
    net = bs.apply(Viewed().eval(), bs.Plan({"second": Watching(), "first": Watching()}), data)
    cells = computer_of(net).cells
    assert cells["second"].seen.shapes == [(12, 5, 4), (4, 5, 4)]
    assert cells["first"].seen.shapes == [(6, 10, 4), (2, 10, 4)]


def test_what_is_known_is_not_collected_again() -> None:
    data = [(torch.randn(6, 10, 4), None)]
    net = network(Viewed().eval(), data[0][0])
    plan = bs.Plan({"second": Watching(), "first": bs.Int(8, 8)})
    placement = place(plan, net.record)
    assert placement.observers == {("second", 0): Watcher()}
    found = calibrate(net, placement.wanted, data)
    again = calibrate(net.with_statistics(found), placement.wanted, [])
    assert again == found
    more = calibrate(net.with_statistics(found), [(("second", 0), Watcher(2))], data)
    assert more[("second", 0), Watcher(1)] is found[("second", 0), Watcher(1)]
    assert more[("second", 0), Watcher(2)].count == 12


def test_values_that_are_not_finite_name_the_site() -> None:
    data = [(torch.full((1, 10, 4), float("inf")), None)]
    net = network(Viewed().eval(), torch.randn(1, 10, 4))
    with pytest.raises(CalibrationError, match="second<0"):
        calibrate(net, [(("second", 0), Watcher())], data)


def test_a_bench_collects_for_all_techniques_in_one_pass() -> None:
    passes = []

    class Counting(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            passes.append(1)
            return super().__iter__()

    calibration = Counting(batches(2, seed=2))
    bench = Bench.open(small(), task(calibration=calibration), MockTarget())
    bench.choose = False
    passes.clear()
    asked = [(("left", 0), Watcher(k)) for k in (1, 2)]
    bench.ranges([("left", bs.Format(8))], asked)
    assert len(passes) <= 2  # one to collect, one for the key of the data
    passes.clear()
    bench.ranges([("left", bs.Format(8))], asked)
    bench.simulate(bs.Plan({"left": Watching(2)}))
    assert not passes
