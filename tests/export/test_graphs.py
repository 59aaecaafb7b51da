from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from bitsmith.export.graphs import Graphs
from bitsmith.export.onnx import clean, raw_onnx
from bitsmith.export.program import applied_program
from bitsmith.model.apply import build
from bitsmith.model.network import Network, network
from bitsmith.plan import Plan
from bitsmith.prepare.adaround import AdaRound
from bitsmith.prepare.correct_bias import CorrectBias
from bitsmith.prepare.equalise import Equalise
from bitsmith.technique import Step
from bitsmith.techniques.int_ import Int

graphs_module = importlib.import_module("bitsmith.export.graphs")  # the verb ``export`` hides the package


class Net(nn.Module):
    """A folded normalisation, a bias of its own, a layer without one; two biases that are equal at first."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.wide, self.last = nn.Conv2d(6, 6, 1), nn.Linear(6, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.wide(torch.relu(self.norm(self.conv(x))))).mean((2, 3)))


class Made:
    def __init__(self, model: nn.Module, zeros: bool | None = None) -> None:
        torch.manual_seed(0)
        self.data = [(torch.randn(8, 3, 6, 6) + 0.5, torch.zeros(8)) for _ in range(4)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
            if zeros is not None:
                model.wide.bias.zero_()
            if zeros:
                model.norm.bias.zero_()
            else:
                model.norm.running_mean.uniform_(-0.5, 0.5)
        self.net: Network = network(model.eval(), self.data[0][0])
        self.simulated: list[Plan] = []
        sites = self.net.record.sites
        self.whole = [Plan({n: t for n, s in sites.items() if s.role == "integer"}) for t in (Int(8, 8), Int(4, 8))]
        self.graphs = Graphs(self.whole, self.simulate, self.data[0][0], 2)

    def simulate(self, plan: Plan) -> nn.Module:
        self.simulated.append(plan)
        return build(self.net, plan, self.data)

    def exported(self, plan: Plan) -> bytes:
        opset = 21 if any(isinstance(t, Int) and t.w == 4 for t in plan.sites.values()) else 20
        program, _ = applied_program(build(self.net, plan, self.data), self.data[0][0], 2)
        return clean(raw_onnx(program, opset)).SerializeToString()

    def runs(self, file: bytes) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return [session.run(None, {name: x[k : k + 2].numpy()})[0] for x, _ in self.data for k in (0, 2)]


@pytest.fixture
def made() -> Made:
    return Made(Net())


def test_the_float_file_needs_no_plan_and_its_export_serves_the_next(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Graphs([], made.simulate, made.data[0][0], 2)
    found = first.derived(Plan(), made.net.record)
    assert found is not None
    assert found[0].SerializeToString() == made.exported(Plan())
    assert set(found[1]) == set(made.net.record.sites)
    made.graphs.take(first)
    real, asked = made.simulate, list[Plan]()
    monkeypatch.setattr(made.graphs, "simulate", lambda plan: (asked.append(plan), real(plan))[1])
    part = Plan(dict(list(made.whole[0].sites.items())[:1]))
    assert made.graphs.derived(part, made.net.record) is not None
    assert asked == [made.whole[0]]


def mixture(made: Made) -> Plan:
    wide, narrow = made.whole
    return Plan({name: narrow[name] if name == "wide" else t for name, t in wide.sites.items() if name != "conv"})


@pytest.mark.parametrize("step", [CorrectBias(), AdaRound(iterations=30)])
@pytest.mark.parametrize("choose", [lambda made: made.whole[0], lambda made: made.whole[1], mixture])
def test_steps_that_change_integers_and_biases(made: Made, choose: Callable[[Made], Plan], step: Step) -> None:
    plan = choose(made).replace(prepare=(step,))
    found = made.graphs.derived(plan, made.net.record)
    assert found is not None
    bare = made.graphs.derived(plan.replace(prepare=()), made.net.record)
    assert bare is not None
    wanted, got, without = (
        made.runs(file) for file in (made.exported(plan), *(f[0].SerializeToString() for f in (found, bare)))
    )
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(got, without, strict=True))  # the step did something


def test_the_network_is_exported_once_for_all_steps(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made.whole[0]
    assert made.graphs.derived(plan, made.net.record) is not None

    def refused(*given: object) -> None:
        raise AssertionError("exported once more")

    monkeypatch.setattr(graphs_module, "exported_program", refused)
    monkeypatch.setattr(graphs_module, "raw_onnx", refused)
    first = made.graphs.derived(plan.replace(prepare=(CorrectBias(),)), made.net.record)
    assert first is not None
    again = made.graphs.derived(plan, made.net.record)  # what is kept was not changed
    assert again is not None
    assert made.runs(again[0].SerializeToString())[0].tolist() != made.runs(first[0].SerializeToString())[0].tolist()


def test_other_ranges_are_exported(made: Made) -> None:
    """Equalisation moves scales of activations: their quantizers are in no graph."""
    assert made.graphs.derived(made.whole[0].replace(prepare=(Equalise(),)), made.net.record) is None


def test_a_new_bias_is_exported() -> None:
    made = Made(Net(bias=False))
    plan = made.whole[0].replace(prepare=(CorrectBias(),))
    assert made.graphs.derived(plan, made.net.record) is None


@pytest.mark.parametrize("both", [False, True])
def test_equal_constants_that_the_exporter_made_one(both: bool) -> None:
    """A bias of zeros shares its constant with zero points; two such biases would get one value: no file."""
    made = Made(Net(), zeros=both)
    plan = made.whole[0].replace(prepare=(CorrectBias(),))
    found = made.graphs.derived(plan, made.net.record)
    if both:
        assert found is None
        return
    assert found is not None
    wanted, got = made.runs(made.exported(plan)), made.runs(found[0].SerializeToString())
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
