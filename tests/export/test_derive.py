from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.export.derive import derive, parts
from bitsmith.export.onnx import clean, opset_of, raw_onnx, site_map
from bitsmith.export.program import exported_program
from bitsmith.model.apply import build, materialised
from bitsmith.model.formats import place
from bitsmith.model.network import Network, network
from bitsmith.plan import Plan
from bitsmith.prepare.correct_bias import CorrectBias
from bitsmith.site import Format, Range
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int
from bitsmith.zoo.cifar_resnet import CifarResNet


class Net(nn.Module):
    """ReLU6, in-place and shared reads, max pool, cat, views, linear on matrices and tensors, norms that fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.tokens = nn.Linear(10, 10)
        self.head, self.bn3 = nn.Linear(10, 12), nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 5, bias=False)
        self.shift = nn.Parameter(torch.randn(1, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn1(self.conv1(x)))
        h += F.relu6(self.bn2(self.depthwise(h)))
        h = F.max_pool2d(h, 2)
        h = torch.cat([F.relu(self.left(h)), self.right(F.pad(h, (1, 1, 0, 0))[..., 1:-1])], 1)
        t = torch.tanh(self.tokens(h.flatten(2).transpose(1, 2)))
        h = h.mean((2, 3)) + t.mean(1)
        h = h + h
        return self.out(F.relu(self.bn3(self.head(h))) + self.shift)


@dataclasses.dataclass
class Case:
    net: Network
    example: Tensor
    full_plan: Plan
    full: onnx.ModelProto
    base: onnx.ModelProto

    def export(self, plan: Plan) -> onnx.ModelProto:
        return _export(self.net, self.example, plan, opset_of(self.full))

    def holds(self, plan: Plan) -> bool:
        """Whether every quantizer of the plan is in the full one."""
        return place(plan, self.net.record).tensors.keys() <= place(self.full_plan, self.net.record).tensors.keys()

    def derive(self, plan: Plan) -> onnx.ModelProto | None:
        return derive([(self.full, self.full_plan)], self.base, plan, self.net.record)


def _export(net: Network, example: Tensor, plan: Plan, opset: int | None = None) -> onnx.ModelProto:
    applied = build(net, plan, [(example, torch.zeros(len(example)))])
    return raw_onnx(exported_program(materialised(applied, lambda replica: replica(example)), example), opset)


def _with_outputs(plan: Plan, net: Network) -> Plan:
    """What ONNX Runtime's adapt does: an output format where the readers agree on none."""
    written = {tensor for tensor, _ in place(plan, net.record).writes.values()}
    sites = dict(plan.sites)
    for name, technique in plan.sites.items():
        site = net.record.sites[name]
        if isinstance(technique, Int) and technique.a and site.tail and site.tail not in written:
            sites[name] = dataclasses.replace(technique, out=Format(technique.a))
    return plan.replace(sites=sites)


def _integer_sites(net: Network) -> list[str]:
    return [name for name, site in net.record.sites.items() if site.role == "integer"]


def _case(model: nn.Module, example: Tensor, technique: Callable[[str], Int]) -> Case:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    net = network(model.eval(), example)
    full_plan = _with_outputs(Plan({name: technique(name) for name in _integer_sites(net)}), net)
    full = _export(net, example, full_plan)
    return Case(net, example, full_plan, full, _export(net, example, Plan({}), opset_of(full)))


@pytest.fixture(scope="module")
def small() -> Case:
    torch.manual_seed(0)
    return _case(Net(), torch.randn(2, 3, 8, 8), lambda name: Int())


@pytest.fixture(scope="module")
def mixed() -> Case:
    """Several formats, also on one tensor; few bits, which clip; weights only."""
    torch.manual_seed(0)
    kinds = {
        "conv1": Int(8, 6),
        "depthwise": Int(8, 8),
        "left": Int(8, 8, signed=True),
        "right": Int(4, 4, granularity="tensor"),
        "head": Int(8, None),
    }
    return _case(Net(), torch.randn(2, 3, 8, 8), lambda name: kinds.get(name, Int()))


@pytest.fixture(scope="module")
def padded() -> Case:
    """Convolutions behind zero padding, as TensorFlow's networks have them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(8, 8, 3, 2, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    return _case(net, torch.randn(2, 3, 12, 12), lambda name: Int())


@pytest.fixture(scope="module")
def resnet() -> Case:
    torch.manual_seed(0)
    return _case(CifarResNet(20), torch.randn(2, 3, 16, 16), lambda name: Int())


def _subplans(case: Case, count: int, seed: int) -> list[Plan]:
    draw = random.Random(seed)
    names = list(case.full_plan.sites)
    found = []
    for k in range(count):
        share = draw.random()
        sites: dict[str, Any] = {}
        for name in names:
            if draw.random() < share:
                sites[name] = dataclasses.replace(case.full_plan[name], out=None)
            elif draw.random() < 0.3:
                sites[name] = Float()
        plan = Plan(sites)
        found.append(plan if k % 3 == 2 else _with_outputs(plan, case.net))
    return found


def _described(model: onnx.ModelProto) -> dict[str, Any]:
    """Every node by name: operation, attributes, and what it reads: nodes by name, constants by value."""
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    makers = {value: (node.name, index) for node in model.graph.node for index, value in enumerate(node.output)}

    def source(name: str) -> Any:
        if name in constants:
            return str(constants[name].dtype), constants[name].shape, constants[name].tobytes()
        return makers.get(name, name)

    described = {
        node.name: (
            node.op_type,
            sorted(attribute.SerializeToString() for attribute in node.attribute),
            [source(name) for name in node.input],
        )
        for node in model.graph.node
    }
    return {**described, "outputs": [makers[value.name] for value in model.graph.output]}


def _check(case: Case, plan: Plan, execute: Callable[..., list[Any]]) -> None:
    expected, derived = clean(case.export(plan)), case.derive(plan)
    assert (derived is None) == (not case.holds(plan))
    if derived is None:
        return
    onnx.checker.check_model(derived, full_check=True)
    assert _described(derived) == _described(expected)
    _same_sites(site_map(derived), site_map(expected), derived, expected)
    (got,), (wanted,) = execute(derived, case.example.numpy()), execute(expected, case.example.numpy())
    np.testing.assert_array_equal(got, wanted)


def _same_sites(got: Any, wanted: Any, derived: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    """The same nodes at every site, and the same tensors made by the same nodes."""
    assert got[0] == wanted[0]
    assert _made_by(got[1], derived) == _made_by(wanted[1], expected)


def _made_by(values: Mapping[str, str], model: onnx.ModelProto) -> dict[str, str]:
    makers = {value: node.name for node in model.graph.node for value in node.output}
    return {tensor: makers.get(value, value) for tensor, value in values.items()}


@pytest.mark.parametrize(("name", "count"), [("small", 4), ("mixed", 4), ("padded", 4), ("resnet", 2)])
def test_derived_equals_exported(name: str, count: int, request: Any, execute: Callable[..., list[Any]]) -> None:
    case: Case = request.getfixturevalue(name)
    plans = _subplans(case, count, 0)
    assert sum(map(case.holds, plans)) > count / 2
    for plan in plans:
        _check(case, plan, execute)


def test_ends(small: Case, execute: Callable[..., list[Any]]) -> None:
    """All of the plan, and nothing of it."""
    _check(small, small.full_plan, execute)
    _check(small, Plan({}), execute)


def test_inputs_are_left_alone(small: Case) -> None:
    before = small.full.SerializeToString(), small.base.SerializeToString()
    for plan in _subplans(small, 3, 7):
        assert small.derive(plan) is not None
    assert (small.full.SerializeToString(), small.base.SerializeToString()) == before


def test_nothing_is_exported(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exporting costs is spent nowhere: no program is traced, no operation translated, no module called."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("derive exports again")

    plans = [plan for plan in _subplans(small, 4, 3) if small.holds(plan)]
    assert plans
    for owner, name in ((torch.onnx, "export"), (torch.export, "export"), (nn.Module, "__call__")):
        monkeypatch.setattr(owner, name, refused)
    with pytest.raises((AssertionError, RuntimeError), match="exports again"):
        small.export(plans[0])
    assert all(small.derive(plan) is not None for plan in plans)


def test_what_cannot_be_derived(small: Case) -> None:
    sites = small.full_plan.sites
    name = "left"
    assert small.derive(Plan({name: Int(4, 8)})) is None  # other weights
    assert small.derive(Plan({name: Float("bfloat16")})) is None
    stepped = small.full_plan.replace(prepare=(CorrectBias(),))  # of the whole plan, so not of its parts
    part = stepped.replace(sites={name: sites[name]})
    assert derive([(small.full, stepped)], small.base, part, small.net.record) is None
    assert small.derive(Plan({name: dataclasses.replace(sites[name], out=Format(4))})) is None  # no such quantizer
    part = Plan({key: value for key, value in sites.items() if key != name})
    assert (
        derive([(small.full, part)], small.base, small.full_plan, small.net.record) is None
    )  # more than the full plan
    other = onnx.ModelProto()
    other.CopyFrom(small.base)
    other.opset_import[0].version += 1
    assert derive([(small.full, small.full_plan)], other, part, small.net.record) is None


def test_other_float_graph_is_refused(small: Case) -> None:
    """A float graph whose structure differs from the quantized one's must not be mixed into it."""
    part = Plan({key: value for key, value in small.full_plan.sites.items() if key != "right"})
    assert small.derive(part) is not None
    for operation in ("Pad", "Clip"):
        other = onnx.ModelProto()
        other.CopyFrom(small.base)
        node = next(node for node in other.graph.node if node.op_type == operation)
        for reader in other.graph.node:
            reader.input[:] = [node.input[0] if value == node.output[0] else value for value in reader.input]
        other.graph.node.remove(node)
        assert derive([(small.full, small.full_plan)], other, part, small.net.record) is None


# -- parts of several plans ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Several:
    """Two techniques everywhere; the second has few bits, and ranges of its own."""

    one: Case
    other: Case

    def derive(self, plan: Plan) -> onnx.ModelProto | None:
        fulls = [(case.full, case.full_plan) for case in (self.one, self.other)]
        return derive(fulls, self.one.base, plan, self.one.net.record)


@pytest.fixture(scope="module")
def several() -> Several:
    torch.manual_seed(0)
    model, example = Net(), torch.randn(2, 3, 8, 8)
    one = _case(model, example, lambda name: Int())
    net, opset = one.net, 21  # 4-bit weights need it
    base = _export(net, example, Plan(), opset)
    few = _with_outputs(Plan({name: Int(4, 8, range=Range("mse")) for name in _integer_sites(net)}), net)
    cases = [Case(net, example, plan, _export(net, example, plan, opset), base) for plan in (one.full_plan, few)]
    return Several(*cases)


def _mixtures(case: Several, count: int, seed: int) -> list[Plan]:
    draw, plans = random.Random(seed), [case.one.full_plan, case.other.full_plan]
    found = []
    for _ in range(count):
        picked = {name: draw.choice([*plans, None]) for name in plans[0].sites}
        sites = {name: dataclasses.replace(p[name], out=None) for name, p in picked.items() if p is not None}
        found.append(_with_outputs(Plan(sites), case.one.net))
    return found


def test_a_mixture_of_two_plans_equals_the_exported_one(several: Several, execute: Callable[..., list[Any]]) -> None:
    holding = 0
    for plan in _mixtures(several, 5, 0):
        derived = several.derive(plan)
        needed = place(plan, several.one.net.record).tensors.keys()
        held = {key for case in (several.one, several.other) for key in place(case.full_plan, case.net.record).tensors}
        assert (derived is not None) == (needed <= held)
        if derived is None:
            continue
        holding += 1
        expected = clean(several.one.export(plan))
        onnx.checker.check_model(derived, full_check=True)
        assert _described(derived) == _described(expected)
        _same_sites(site_map(derived), site_map(expected), derived, expected)
        example = several.one.example.numpy()
        (got,), (wanted,) = execute(derived, example), execute(expected, example)
        np.testing.assert_array_equal(got, wanted)
    assert holding >= 3


def test_which_plans_a_mixture_needs(several: Several) -> None:
    one, other, record = several.one.full_plan, several.other.full_plan, several.one.net.record
    plans = [one, other]
    assert parts(one, plans, record) == (0,)
    assert parts(other, plans, record) == (1,)
    assert parts(Plan(), plans, record) == (0,)
    names = list(one.sites)
    mostly = Plan({name: (one if k == 0 else other)[name] for k, name in enumerate(names)})
    assert parts(mostly, plans, record) == (1, 0)
    assert parts(mostly, [other], record) is None
    assert parts(Plan({names[0]: Int(3, 8)}), plans, record) is None
    assert parts(Plan({names[0]: Float("bfloat16")}), plans, record) is None
    assert parts(one, [], record) is None


def test_a_plan_is_exported_only_when_it_is_needed(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the first plan alone come in its own opset, without the second."""
    from bitsmith.export.graphs import Graphs

    net, example = several.one.net, several.one.example
    asked: list[Plan] = []

    def simulate(plan: Plan) -> nn.Module:
        asked.append(plan)
        return build(net, plan, [(example, torch.zeros(len(example)))])

    one, other = several.one.full_plan, several.other.full_plan
    graphs = Graphs([one, other], simulate, example, None)
    assert not asked
    name = "head"
    found = graphs.derived(Plan({name: one[name]}), net.record)
    assert found is not None
    assert opset_of(found[0]) == 20
    assert asked == [one, Plan()]
    assert set(found[1]) == set(net.record.sites)
    assert graphs.derived(Plan({"left": one["left"]}), net.record) is not None
    assert asked == [one, Plan()]
    found = graphs.derived(Plan({name: one[name], "out": other["out"]}), net.record)
    assert found is not None
    assert opset_of(found[0]) == 21
    assert asked == [one, Plan(), other]
    assert graphs.derived(Plan({name: Int(2, 8)}), net.record) is None
