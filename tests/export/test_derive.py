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

from bitsmith.export.derive import derive
from bitsmith.export.onnx import clean, opset_of, raw_onnx, site_map
from bitsmith.export.program import exported_program
from bitsmith.model.apply import build, materialised
from bitsmith.model.formats import place
from bitsmith.model.network import Network, network
from bitsmith.plan import Plan
from bitsmith.site import Format
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
