"""Compiled and exported nets compute what the eager ones do, or fall back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.model.apply import apply
from bitsmith.model.network import sites
from bitsmith.plan import Plan
from bitsmith.techniques.int_ import Int

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Residual(nn.Module):
    """In-place additions, functional and modular activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        z = self.other(F.relu(y))
        z += y
        return self.head(self.relu(z).mean((2, 3)))


class Twice(nn.Module):
    """The same operation at several places, of which a plan may name one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        first = a + b
        second = torch.tanh(first) + a + 1.0
        return second + b


class Loop(nn.Module):
    """A recurrence by hand; the number of steps is the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 6)
        for step in x:
            h = torch.tanh(self.inp(step) + self.rec(h))
            h = h + step
        return h


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...] | None]] = {
    "residual": (Residual, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), None),
    "one of three additions": (Twice, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), (":add.1",)),
    "two of three additions": (
        Twice,
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        (":add", ":add.2"),
    ),
    "loop": (Loop, torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0)), ("rec", ":add.1")),
}


def build(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x, names = CASES[name]
    model = make().eval()
    found = sites(model, x)
    chosen = names or tuple(n for n, s in found.items() if s.role == "integer")
    return model, apply(model, Plan(dict.fromkeys(chosen, Int(8, 8))), [(x, None)]), x


@pytest.mark.parametrize("name", CASES)
def test_full_graph(name: str) -> None:
    model, net, x = build(name)
    with torch.no_grad():
        expected = net(x)
        assert not torch.equal(expected, model(x))
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(net(x), expected)


def test_inductor() -> None:
    _, net, x = build("residual")
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), expected, rtol=1e-3, atol=1e-3)


def test_compiled_loop_of_another_length() -> None:
    model, net, x = build("loop")
    longer = torch.cat([x, x, x[:1]])
    with torch.no_grad():
        expected = net(longer)
        assert not torch.equal(expected, model(longer))
        compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=False)
        assert torch.equal(compiled(longer), expected)
        assert torch.equal(compiled(x), net(x))


def test_compiled_training_has_the_gradients_of_eager() -> None:
    _, net, x = build("one of three additions")
    other = copy.deepcopy(net)
    torch.compile(net, backend="eager", fullgraph=True)(x).square().sum().backward()
    other(x).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


class Breaks(nn.Module):
    """Dynamo cannot trace ``.item()`` here: what is behind the break runs in another code object."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = a + x
        if y.sum().item() > 1e9:
            y = y * 2
        return self.b(y) + a


def test_graph_break_falls_back() -> None:
    torch.manual_seed(0)
    model, x = Breaks().eval(), torch.randn(4, 6)
    net = apply(model, Plan(dict.fromkeys(["a", ":add", "b", ":add.1"], Int(8, 8))), [(x, None)])
    with torch.no_grad():
        expected = net(x)
        assert not torch.equal(expected, model(x))
        with pytest.warns(RuntimeWarning, match="runs in eager mode"):
            assert torch.equal(torch.compile(net, backend="eager")(x), expected)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(net, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("name", CASES)
def test_export(name: str) -> None:
    _, net, x = build(name)
    with torch.no_grad():
        expected = net(x)
        program = torch.export.export(net, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    assert any("quantize_per_tensor" in str(node.target) for node in program.graph.nodes)
