"""Plans with prepare steps: applied in order on a copy, written to the file, cited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.model.network import Network
from bitsmith.testing import MockTarget
from smallnet import batches, small, task


@dataclass(frozen=True)
class Scaled(bs.Step):
    """A layer's output channels scaled, and its reader's input channels scaled back (a toy after Nagel et al. 2019)."""

    layer: str
    reader: str
    factor: float = 2.0

    def prepare(self, net: Network, plan: bs.Plan, data: Any) -> Network:
        assert self.layer in net.record.sites
        assert not plan.prepare
        with torch.no_grad():
            one, two = net.model.get_submodule(self.layer), net.model.get_submodule(self.reader)
            one.weight.mul_(self.factor)  # type: ignore[operator]
            one.bias.mul_(self.factor)  # type: ignore[operator]
            two.weight.div_(self.factor)  # type: ignore[operator]
        return net.with_model(net.model)


@dataclass(frozen=True)
class Shifted(bs.Step):
    """Adds to the bias of a layer (a toy): order matters beside a scaling."""

    layer: str
    by: float

    def prepare(self, net: Network, plan: bs.Plan, data: Any) -> Network:
        with torch.no_grad():
            net.model.get_submodule(self.layer).bias.add_(self.by)  # type: ignore[operator]
        return net.with_model(net.model)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.two(torch.relu(self.one(x)))
        return made


@pytest.fixture
def model() -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain().eval()


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(2)]


def test_a_step_keeps_the_function_and_leaves_the_model_alone(model: Chain) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = bs.apply(model, bs.Plan(prepare=(Scaled("one", "two", 4.0),)), data())
    x = data()[0][0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x))
    assert torch.equal(net.state_dict()["one.weight"], 4.0 * before["one.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_steps_run_in_the_order_of_the_plan(model: Chain) -> None:
    scale, shift = Scaled("one", "two", 2.0), Shifted("one", 1.0)
    bias = model.one.bias.detach()
    first = bs.apply(model, bs.Plan(prepare=(scale, shift)), data()).state_dict()["one.bias"]
    second = bs.apply(model, bs.Plan(prepare=(shift, scale)), data()).state_dict()["one.bias"]
    torch.testing.assert_close(first, 2 * bias + 1)
    torch.testing.assert_close(second, 2 * (bias + 1))


def test_ranges_are_those_of_the_prepared_network(model: Chain) -> None:
    plain = bs.apply(model, bs.Plan({"two": bs.Int(8, 8)}), data())
    scaled = bs.apply(model, bs.Plan({"two": bs.Int(8, 8)}, (Scaled("one", "two", 8.0),)), data())

    def scale(net: nn.Module) -> float:
        (found,) = [value for name, value in net.state_dict().items() if name.endswith(".scale")]
        return float(found)

    assert scale(scaled) == pytest.approx(8.0 * scale(plain), rel=1e-5)


def test_a_plan_with_steps_is_written_read_and_cited(tmp_path: Path) -> None:
    plan = bs.Plan({"two": bs.Int(8, 8)}, (Scaled("one", "two"), Shifted("one", 0.5)))
    path = plan.save(tmp_path / "plan.json")
    assert bs.Plan.load(path, techniques=[Scaled, Shifted]) == plan
    with pytest.raises(bs.PlanError, match="unknown type 'Scaled'"):
        bs.Plan.load(path, techniques=[Shifted])
    assert plan.cite()[0].startswith("A layer's output channels scaled")
    assert len(plan.cite()) == 3


def test_an_evaluated_plan_keeps_its_steps() -> None:
    plan = bs.Plan({"right": bs.Int(8, 8)}, (Scaled("stem", "head", 3.0),))
    broken = bs.evaluator(small(), task(), MockTarget())(plan)
    fine = bs.evaluator(small(), task(), MockTarget())(bs.Plan({"right": bs.Int(8, 8)}))
    net = bs.apply(small(), plan, batches(2, seed=2))
    assert broken.plan.prepare == plan.prepare
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches(4, seed=3)) / 64
    assert broken.metric == pytest.approx(right)
    assert fine.metric is not None


def test_a_step_alone_is_scored_as_itself_not_as_float() -> None:
    spoiled = bs.evaluator(small(), task(), MockTarget())(bs.Plan(prepare=(Shifted("stem", 50.0),)))
    assert spoiled.drop is not None
    assert spoiled.drop > 0.2
