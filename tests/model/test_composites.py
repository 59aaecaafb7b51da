"""What composites are made of: the same function, the same names, and a plan that reaches inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitsmith.model import decompose
from bitsmith.model.apply import apply, computer_of
from bitsmith.model.network import network, sites
from bitsmith.operations import OPERATIONS
from bitsmith.plan import Plan, PlanError
from bitsmith.site import UnknownSiteError
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int


class Attend(nn.Module):
    """Self- or cross-attention followed by a linear layer."""

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.head = nn.Linear(16, 3)
        self.call = call or {}

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        source = x if memory is None else memory
        out, weights = self.attention(x, source, source, **self.call)
        return self.head(out), weights


def causal(n: int) -> Tensor:
    return torch.triu(torch.full((n, n), float("-inf")), 1)


SELF = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
ATTENTION: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "self": (lambda: Attend(batch_first=True), (SELF,)),
    "time first": (lambda: Attend(), (SELF,)),
    "no bias": (lambda: Attend(batch_first=True, bias=False), (SELF,)),
    "unbatched": (lambda: Attend(), (SELF[0],)),
    "cross": (lambda: Attend(batch_first=True), (SELF, SELF.roll(1, 1)[:, :4])),
    "other key width": (lambda: Attend(batch_first=True, kdim=16, vdim=16), (SELF, SELF[:, :3])),
    "no weights": (lambda: Attend({"need_weights": False}, batch_first=True), (SELF,)),
    "weights of each head": (lambda: Attend({"average_attn_weights": False}, batch_first=True), (SELF,)),
    "additive mask": (lambda: Attend({"attn_mask": causal(5)}, batch_first=True), (SELF,)),
    "boolean mask": (lambda: Attend({"attn_mask": causal(5).bool()}, batch_first=True), (SELF,)),
    "causal hint": (
        lambda: Attend({"attn_mask": causal(5), "is_causal": True, "need_weights": False}, batch_first=True),
        (SELF,),
    ),
    "padding": (
        lambda: Attend({"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}, batch_first=True),
        (SELF,),
    ),
    "a mask for each head": (lambda: Attend({"attn_mask": causal(5).expand(8, 5, 5)}, batch_first=True), (SELF,)),
}


def inside_plan(model: nn.Module, inputs: Any, technique: Any) -> Plan:
    found = sites(model, inputs, inside=True)
    return Plan({name: technique for name, site in found.items() if site.role == "integer" and site.parent})


def equal(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    elif a is not None:
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y, tolerance)


@pytest.mark.parametrize("name", ATTENTION)
def test_multi_head_attention_inside(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = ATTENTION[name]
    model = build().eval()
    plan = inside_plan(model, inputs, Float())
    assert sum(":linear" in site for site in plan) == 4
    net = apply(model, plan, [(inputs, None)])
    with torch.no_grad():
        expected = model(*inputs)
        equal(net(*inputs), expected)
        quantized = apply(model, inside_plan(model, inputs, Int(8, 8)), [(inputs, None)])(*inputs)
    assert not torch.equal(quantized[0], expected[0])
    equal(quantized[0], expected[0], 0.05)


def test_each_projection_has_its_own_weight() -> None:
    torch.manual_seed(0)
    model = Attend(batch_first=True).eval()
    net = network(model, SELF, inside=True)
    inner = "attention.multi_head_attention_forward"
    weights = model.attention.in_proj_weight.detach().chunk(3)
    for name, expected in zip((f"{inner}:linear", f"{inner}:linear.1", f"{inner}:linear.2"), weights, strict=True):
        site = net.record.sites[name]
        assert site.calls == 1
        assert site.weight is not None
        assert site.weight.parameters == ("attention.in_proj_weight",)
        assert torch.equal(net.record.weights[name, 1], expected)
        assert site.bias == ("attention.in_proj_bias",)
    assert net.record.sites["head"].operands[0].tensor == f"{inner}:linear.3"
    readers = net.record.tensors["@x"].readers
    assert readers == (f"{inner}:linear", f"{inner}:linear.1", f"{inner}:linear.2")


@pytest.mark.parametrize("name", ["self", "cross"])
def test_names_do_not_depend_on_the_listing(name: str) -> None:
    build, inputs = ATTENTION[name]
    model = build().eval()
    plain, inside = sites(model, inputs), sites(model, inputs, inside=True)
    assert list(plain) == ["attention", "head"]
    assert [n for n, s in inside.items() if s.parent is None] == list(plain)
    assert {s.parent for s in inside.values()} == {None, "attention"}


def test_both_outside_and_inside_is_refused() -> None:
    with pytest.raises(PlanError, match="inside it"):
        Plan({"attention": Float(), "attention.multi_head_attention_forward:linear": Int()})


class Idle(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_composite_as_a_whole() -> None:
    model = Attend(batch_first=True).eval()
    net = apply(model, Plan({"attention": Float(), "head": Int()}), [(SELF, None)])
    assert list(computer_of(net).record_sites) == ["attention", "head"]
    only = apply(model, Plan({"attention": Float()}), [(SELF, None)])
    with torch.no_grad():
        # torch's fused inference path steps aside for every function mode: the reference runs under an idle one
        with Idle():
            expected = model(SELF)[0]
        assert torch.equal(only(SELF)[0], expected)
    with pytest.raises(ValueError, match="inside can be planned"):
        apply(model, Plan({"attention": Int()}), [(SELF, None)])


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_cannot_be_opened_stays_whole(options: dict[str, bool]) -> None:
    model = Attend(batch_first=True, **options).eval()
    assert list(sites(model, SELF, inside=True)) == ["attention", "head"]
    with pytest.raises(UnknownSiteError, match="closest: attention"):
        network(model, SELF, names=["attention.multi_head_attention_forward:linear"]).record.site(
            "attention.multi_head_attention_forward:linear"
        )


QKV = tuple(torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 7, 7))
PRODUCT: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "additive": {"attn_mask": torch.linspace(-1, 1, 42).reshape(6, 7)},
    "boolean": {"attn_mask": torch.ones(6, 7, dtype=torch.bool).tril(2)},
}


@pytest.mark.parametrize("name", PRODUCT)
def test_scaled_dot_product_attention(name: str) -> None:
    expected = F.scaled_dot_product_attention(*QKV, **PRODUCT[name])
    equal(decompose.run(OPERATIONS["scaled_dot_product_attention"], QKV, PRODUCT[name]), expected)


def test_grouped_queries() -> None:
    q, k, v = QKV[0], QKV[1][:, :2], QKV[2][:, :2]
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    equal(decompose.run(OPERATIONS["scaled_dot_product_attention"], (q, k, v), {"enable_gqa": True}), expected)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), x, is_causal=True)


def test_functional_attention_inside() -> None:
    torch.manual_seed(0)
    model, x = Product().eval(), QKV[0]
    inner = ".scaled_dot_product_attention"
    assert list(sites(model, x)) == ["q", "k", ":scaled_dot_product_attention"]
    plan = inside_plan(model, x, Int(8, 8))
    assert list(plan) == [f"{inner}:matmul", f"{inner}:matmul.1"]
    with torch.no_grad():
        out = apply(model, plan, [(x, None)])(x)
        equal(out, model(x), 0.1)
        assert not torch.equal(out, model(x))
    both = plan.replace(sites={**plan.sites, "q": Int(8, 8)})
    assert "q" in computer_of(apply(model, both, [(x, None)])).plan.sites


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 5, **options)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)


RECURRENT: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm deep": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm no bias": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "batch_first": True}),
    "gru both ways": (nn.GRU, {"bidirectional": True}),
    "rnn tanh": (nn.RNN, {"num_layers": 2}),
    "rnn relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_inside(name: str) -> None:
    torch.manual_seed(0)
    kind, options = RECURRENT[name]
    model = Recurrent(kind, **options).eval()
    x = torch.randn(4, 3, 6)
    plan = inside_plan(model, x, Float())
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    linears = [site for site in plan if ":linear" in site]
    assert len(linears) == 2 * layers
    whole = apply(model, Plan({"rnn": Float()}), [(x, None)])
    with torch.no_grad():
        expected = model(x)
        equal(apply(model, plan, [(x, None)])(x), expected)
        equal(whole(x), expected, 0.0)
        quantized = apply(model, Plan(dict.fromkeys(linears, Int(8, 8))), [(x, None)])
        equal(quantized(x)[0], expected[0], 0.1)
        assert not torch.equal(quantized(x)[0], expected[0])
        longer = torch.cat([x, x], 1 if options.get("batch_first") else 0)
        equal(quantized(longer)[0], model(longer)[0], 0.1)
    first = sites(model, x, inside=True)[linears[0]]
    assert first.calls == (3 if options.get("batch_first") else 4)
    assert first.weight is not None


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_inside(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind).eval(), torch.randn(4, 6)
    plan = inside_plan(model, x, Int(8, 8))
    floating = inside_plan(model, x, Float())
    assert [name for name in plan if ":linear" in name]
    with torch.no_grad():
        equal(apply(model, floating, [(x, None)])(x), model(x))
        equal(apply(model, plan, [(x, None)])(x), model(x), 0.1)
        equal(apply(model, Plan({"rnn": Float()}), [(x, None)])(x), model(x), 0.0)


def test_packed_sequence_outside_only() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3]), batch_first=True)
            return self.rnn(packed)[1]

    model, x = Packed().eval(), torch.randn(2, 4, 6)
    net = apply(model, Plan({"rnn": Float()}), [(x, None)])
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    assert list(sites(model, x, inside=True)) == ["rnn"]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_lstm_outside_only() -> None:
    model, x = Recurrent(nn.LSTM, proj_size=3).eval(), torch.randn(4, 3, 6)
    assert list(sites(model, x, inside=True)) == ["rnn"]


def test_transformer_encoder_layer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    found = sites(model, SELF)
    assert list(found) == ["self_attn", ":add", "norm1", "linear1", ":relu", "linear2", ":add.1", "norm2"]
    plan = inside_plan(model, SELF, Int(8, 8))
    plan = plan.replace(sites={**plan.sites, "linear1": Int(8, 8), ":add": Int(8, 8)})
    with torch.no_grad():
        net = apply(model, plan, [(SELF, None)])
        equal(net(SELF), model(SELF), 0.1)
    net.train()
    net(SELF).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
