"""What is overwritten in place is seen through every name of its memory, in eval, in training and in copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.model.apply import apply, computer_of
from bitsmith.model.network import sites
from bitsmith.numerics.quantizer import Quantizer
from bitsmith.plan import Plan
from bitsmith.site import Format
from bitsmith.techniques.int_ import Int


class Body(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.body(self.a(x), self.b(x)))


def iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def isub(x: Tensor, y: Tensor) -> Tensor:
    x -= y
    return x


def imul(x: Tensor, y: Tensor) -> Tensor:
    x *= y
    return x


def alias(function: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor, Tensor], Tensor]:
    def body(x: Tensor, y: Tensor) -> Tensor:
        function(x, y)
        return x

    return body


OUT_OF_PLACE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], str]] = {
    "+=": (iadd, lambda x, y: x + y, "add"),
    "-=": (isub, lambda x, y: x - y, "sub"),
    "*=": (imul, lambda x, y: x * y, "mul"),
    "add_ by alias": (alias(lambda x, y: x.add_(y)), lambda x, y: x + y, "add"),
    "mul_ by alias": (alias(lambda x, y: x.mul_(y)), lambda x, y: x * y, "mul"),
    "relu_ by alias": (alias(lambda x, y: x.relu_()), lambda x, y: F.relu(x), "relu"),
    "F.relu_ by alias": (alias(lambda x, y: F.relu_(x)), lambda x, y: F.relu(x), "relu"),
    "F.relu(inplace)": (alias(lambda x, y: F.relu(x, inplace=True)), lambda x, y: F.relu(x), "relu"),
    "F.silu(inplace)": (alias(lambda x, y: F.silu(x, inplace=True)), lambda x, y: F.silu(x), "silu"),
    "clamp_": (alias(lambda x, y: x.clamp_(0.0, 0.5)), lambda x, y: x.clamp(0.0, 0.5), "clamp"),
    "view": (alias(lambda x, y: x.view(-1).add_(y.view(-1))), lambda x, y: x + y, "add"),
}


def pair(name: str, where: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Two applied nets, in place and out of place, with the same weights and the same quantizers."""
    torch.manual_seed(0)
    inplace, outofplace, kind = OUT_OF_PLACE[name]
    left = Body(inplace).eval()
    right = Body(outofplace).eval()
    right.load_state_dict(left.state_dict())
    x = torch.randn(16, 8)
    technique = Int(8, 8, out=Format(4)) if where == "out" else Int(4, 4)
    nets = []
    for model in (left, right):
        found = sites(model, x)
        site = next(s for s in found.values() if s.kind == kind)
        plan = {"a": technique, "c": Int(8, 4)}
        if site.role == "integer":
            plan[site.name] = technique
        nets.append(apply(model, Plan(plan), [(x, None)]))
    return nets[0], nets[1], x


@pytest.mark.parametrize("where", ["read", "out"])
@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_in_place_is_out_of_place(name: str, where: str) -> None:
    left, right, x = pair(name, where)
    # through a view, the record cannot see who changed the alias: it is quantized where it is read
    tolerance = 0.5 if name == "view" else 0.0
    with torch.no_grad():
        torch.testing.assert_close(left(x), right(x), rtol=tolerance, atol=tolerance)
    for net in (left, right):
        net(x).square().sum().backward()
    if name == "view":
        return
    for (key, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-7)


def test_written_quantizer_reaches_the_alias() -> None:
    """``F.relu_(x); return x`` under a plan that quantizes what the relu writes."""
    torch.manual_seed(0)
    model = Body(alias(lambda x, y: F.relu_(x))).eval()
    x = torch.randn(16, 8)
    net = apply(model, Plan({"c": Int(8, 4)}), [(x, None)])
    (tensor,) = computer_of(net).written
    assert tensor == ":relu"
    seen: list[Tensor] = []
    net.c.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        net(x)
    quantizer = computer_of(net).written[tensor]
    levels = seen[0] / quantizer.scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert len(levels.unique()) <= 16


def test_sequential_with_inplace_relu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(2, 2, 8, 8)
    other = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    other.load_state_dict(model.state_dict())
    plan = Plan({"0": Int(8, 8), "3": Int(8, 8)})
    left, right = (apply(m, plan, [(x, None)]) for m in (model, other))
    with torch.no_grad():
        assert torch.equal(left(x), right(x))
    left.train()
    left(x).sum().backward()
    assert all(p.grad is not None for p in left.parameters())


@pytest.mark.parametrize("fmt", [Format(8), Format(4, signed=True, symmetric=True), Format(16)])
def test_into_is_the_quantizer(fmt: Format) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(fmt, 0.02, 0 if fmt.symmetric else 3)
    x = torch.randn(5, 7)
    expected = quantizer(x)
    with torch.no_grad():
        target = torch.empty(7, 5).t()
        assert quantizer.into(x, target) is target
        assert torch.equal(target, expected)
        half = torch.empty(5, 7, dtype=torch.bfloat16)
        assert torch.equal(quantizer.into(x, half), expected.bfloat16())
        same = x.clone()
        assert torch.equal(quantizer.into(same, same), expected)
