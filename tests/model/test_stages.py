"""On which network statistics are collected: the float one, or one in which some sites run as planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.bench import Bench
from bitsmith.model.apply import computer_of
from bitsmith.model.network import network
from bitsmith.model.stages import moved, stages
from bitsmith.site import Format
from bitsmith.testing import MockTarget
from smallnet import Small, batches, task


class Passes(list[Any]):
    """Data that counts how often they are read."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return super().__iter__()


@dataclass(frozen=True)
class Late(bs.Technique):
    """Reads 8 bits, whose range is that behind quantized sites (a test)."""

    late: bool = True

    def fits(self, site: bs.Site) -> bool:
        return site.role == "integer"

    def wants(self, site: bs.Site) -> bs.Wants:
        return bs.Wants(after_quantized=self.late)

    def reads(self, site: bs.Site) -> tuple[Format | None, ...]:
        return tuple(None if o.constant else Format(8) for o in site.operands)

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return _Reading(site)


class _Reading(bs.Cell):
    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        return self.op(*(x if x is operands[1] else self.read(i, x) for i, x in enumerate(operands)), **rest)


@dataclass(frozen=True)
class Thrice(bs.Technique):
    """Another function than the operation's, of an operand in 8 bits if asked for (a test)."""

    bits: int | None = None

    def fits(self, site: bs.Site) -> bool:
        return site.role == "integer"

    def keeps_function(self) -> bool:
        return False

    def reads(self, site: bs.Site) -> tuple[Format | None, ...]:
        fmt = None if self.bits is None else Format(self.bits)
        return tuple(None if o.constant else fmt for o in site.operands)

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return _Thrice(site)


class _Thrice(bs.Cell):
    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        return 3.0 * self.op(self.read(0, x), weight, **rest)


class Branches(nn.Module):
    """``stem`` feeds two branches, that are added before ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y: Tensor = self.head(self.left(x) + self.right(x))
        return y


def chain(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(count))).eval()


def untrained() -> Small:
    """With a normalisation that turns what distances give, which is never positive, around."""
    torch.manual_seed(0)
    model = Small().eval()
    nn.init.constant_(model.norm.weight, -1.0)
    return model


def data(count: int = 3) -> Passes:
    return Passes((torch.randn(8, 6, generator=torch.Generator().manual_seed(i)), None) for i in range(count))


def affine(x: Tensor, bits: int = 8) -> tuple[Tensor, float]:
    """Rounded on the grid of its own range, 0 among it, and the step; in float64."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return (torch.round(x / step).clamp(-zero, 2**bits - 1 - zero)) * step, step


def scales(net: nn.Module) -> dict[str, float]:
    """The steps of what each site reads."""
    cells = {name: cell for name, cell in computer_of(net).cells.items() if isinstance(cell, bs.Cell)}
    return {name: float(cell.quantizers[0].scale) for name, cell in cells.items() if cell.quantizers[0] is not None}


def dense(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.detach().double(), layer.bias.detach().double())


def seen(items: Passes) -> Tensor:
    return torch.cat([x for x, _ in list.__iter__(items)]).double()


# -- a technique of another function ---------------------------------------------------------------------------------


def test_integers_behind_adders_get_the_ranges_that_adders_make() -> None:
    model, items = chain(3), data()
    net = bs.apply(model, bs.Plan({"0": bs.Adder(), "1": bs.Int(8, 8), "2": bs.Int(8, 8)}), items)
    x = seen(items)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    first = -(x[:, None] - weight).abs().sum(2) + bias
    second = dense(model[1], first)  # type: ignore[arg-type]
    found = scales(net)
    assert found["1"] == pytest.approx(affine(first)[1], rel=1e-5)
    assert found["2"] == pytest.approx(affine(second)[1], rel=1e-5)  # the others run in float while it is seen
    assert items.count == 2  # one to record the network, one for all ranges
    with torch.no_grad():
        wanted = dense(model[2], second).float()  # type: ignore[arg-type]
        assert float((net(x.float()) - wanted).norm() / wanted.norm()) < 0.02


def test_before_it_and_beside_it_nothing_changes() -> None:
    torch.manual_seed(0)
    model, items = Branches().eval(), data()
    plain = {name: bs.Int(8, 8) for name in ("stem", "right", ":add", "head")}
    before = scales(bs.apply(model, bs.Plan(plain), items))
    net = bs.apply(model, bs.Plan({**plain, "left": Thrice()}), items)
    after = scales(net)
    assert {name for name in before if after[name] != before[name]} == {":add", "head"}
    x = torch.relu(dense(model.stem, seen(items)))
    left, right = 3 * dense(model.left, x), dense(model.right, x)
    assert after[":add"] == pytest.approx(affine(left)[1], rel=1e-5)
    assert after["head"] == pytest.approx(affine(left + right)[1], rel=1e-5)


def test_its_own_range_comes_first() -> None:
    model, items = chain(3), data()
    net = bs.apply(model, bs.Plan({"1": Thrice(8), "2": bs.Int(8, 8)}), items)
    rounded, step = affine(dense(model[0], seen(items)))  # type: ignore[arg-type]
    found = scales(net)
    assert found["1"] == pytest.approx(step, rel=1e-5)
    assert found["2"] == pytest.approx(affine(3 * dense(model[1], rounded))[1], rel=1e-4)  # type: ignore[arg-type]
    assert items.count == 3


def test_behind_a_normalisation_and_in_a_histogram() -> None:
    model = untrained()
    items = batches(2, seed=2)
    plan = bs.Plan({"left": bs.Adder(), "right": bs.Int(8, 8, range=bs.Range("mse"))})
    net = bs.apply(model, plan, items)
    with torch.no_grad():
        x = torch.cat([F.relu(model.stem(x)) for x, _ in items])
        patches = F.unfold(x, 3, padding=1)[:, None]  # [n, 1, patch, places]
        filters = model.left.weight.flatten(1)[None, :, :, None]
        found = -(patches - filters).abs().sum(2).reshape(len(x), 8, 12, 12)
        top = float(F.relu(model.norm(found)).max())
        of_products = float(F.relu(model.norm(model.left(x))).max())
    assert 4 * of_products < 0.5 * top < 255 * scales(net)["right"] <= top * 1.001


# -- a technique that asks for it ------------------------------------------------------------------------------------


def test_what_is_collected_after_quantized_sites() -> None:
    model, items = chain(3), data()
    plan = bs.Plan({"0": bs.Int(4, 4, granularity="tensor"), "1": bs.Int(8, 8), "2": Late()})
    plain = scales(bs.apply(model, plan.replace(sites={**plan.sites, "2": Late(False)}), items))
    items.count = 0
    net = bs.apply(model, plan, items)
    assert items.count == 3
    x = seen(items)
    rounded, width = affine(x, 4)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    step = weight.abs().max() / 7
    bias = torch.round(bias / step / width) * step * width  # an integer too
    first = F.linear(rounded, torch.round(weight / step) * step, bias)
    middle, width = affine(dense(model[0], x))  # type: ignore[arg-type]  # of the float network, as it does not ask
    low = -round(float(-dense(model[0], x).min()) / width)  # type: ignore[arg-type]
    middle = torch.round(first / width).clamp(low, 255 + low) * width
    weight = model[1].weight.detach().double()
    steps = weight.abs().amax(1, keepdim=True) / 127
    bias = model[1].bias.detach().double()
    second = F.linear(middle, torch.round(weight / steps) * steps, bias)
    found = scales(net)
    assert {name: found[name] == plain[name] for name in found} == {"0": True, "1": True, "2": False}
    assert found["2"] == pytest.approx(affine(second)[1], rel=2e-3)
    assert found["2"] != pytest.approx(plain["2"], rel=2e-3)


def test_each_link_of_a_chain_takes_a_pass_and_branches_take_none() -> None:
    items = data()
    assert _passes(chain(3), {"0": bs.Int(8, 8), "1": bs.Int(8, 8), "2": bs.Int(8, 8)}, items) == 1
    assert _passes(chain(3), {"0": Late()}, items) == 1  # nothing before it is planned
    assert _passes(chain(4), {"1": bs.Int(8, 8), "3": Late()}, items) == 2
    assert _passes(chain(4), {str(k): Late() for k in range(4)}, items) == 4
    assert _passes(Branches().eval(), {"stem": bs.Int(8, 8), "left": Late(), "right": Late()}, items) == 2
    assert _passes(chain(4), {"0": bs.Adder(), "1": bs.Int(8, 8), "2": bs.Adder(), "3": bs.Int(8, 8)}, items) == 1
    assert _passes(chain(4), {"0": bs.Adder(), "1": Late()}, items) == 1
    assert _passes(chain(4), {"0": bs.Adder(), "1": Late(), "2": bs.Int(8, 8), "3": Late()}, items) == 2


def _passes(model: nn.Module, sites: dict[str, bs.Technique], items: Passes) -> int:
    items.count = 0
    bs.apply(model, bs.Plan(sites), items)
    return items.count - 1  # the first records


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        x = torch.fft.fft(x).real  # no site: where its output comes from is not recorded
        y: Tensor = self.last(x)
        return y


def test_where_the_flow_is_not_known_all_that_ran_earlier_counts() -> None:
    torch.manual_seed(0)
    model, items = Loop().eval(), data()
    plan = bs.Plan({"first": Thrice(), "cell": bs.Int(8, 8), "last": bs.Int(8, 8)})
    record = network(model, items[0][0]).record
    assert moved(plan, record) == {"cell<0", "last<0"}
    x = 3 * dense(model.first, seen(items))
    made = [x]
    for _ in range(3):
        x = torch.tanh(dense(model.cell, x))
        made.append(x)
    found = scales(bs.apply(model, plan, items))
    assert found["cell"] == pytest.approx(affine(torch.cat(made[:3]))[1], rel=1e-5)
    assert found["last"] == pytest.approx(affine(torch.fft.fft(x).real)[1], rel=1e-5)


# -- what stays ------------------------------------------------------------------------------------------------------


def test_other_plans_take_the_one_pass_that_they_took() -> None:
    record = network(untrained(), batches(1)[0][0]).record
    plan = bs.Plan({name: bs.Int(8, 8) for name in ("stem", "left", "right", "head")})
    (only,) = stages(plan, record)
    assert only.active == frozenset()
    assert not moved(plan, record)
    assert stages(bs.Plan({"left": bs.Adder()}), record) == []


def test_neither_the_model_nor_what_is_shared_keeps_anything() -> None:
    given = task()
    bench = Bench.open(untrained(), given, MockTarget())
    bench.choose = False
    plain = bs.Plan({"right": bs.Int(8, 8), "head": bs.Int(8, 8)})
    before = scales(bench.simulate(plain))
    mixed = scales(bench.simulate(bs.Plan({**plain.sites, "left": bs.Adder()})))
    assert scales(bench.simulate(plain)) == before
    assert mixed["right"] != before["right"]
    alone = bs.apply(untrained(), bs.Plan({**plain.sites, "left": bs.Adder()}), given.calibration)
    assert scales(alone) == mixed


def test_steps_see_the_same_ranges() -> None:
    items = batches(2, seed=2)
    sites = {"left": bs.Adder(), "right": bs.Int(8, 8), "head": bs.Int(8, 8)}
    plain, corrected = (bs.apply(untrained(), bs.Plan(sites, steps), items) for steps in ((), (bs.CorrectBias(32),)))
    assert scales(plain) == scales(corrected)
