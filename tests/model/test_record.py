"""What one recorded run shows: names, counts, costs, data flow, folds; and that nothing of the run stays alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.model.apply import apply, computer_of
from bitsmith.model.intercept import InterceptionError
from bitsmith.model.network import network, sites
from bitsmith.plan import Plan
from bitsmith.site import Site
from bitsmith.techniques.int_ import Int


def run(model: nn.Module, inputs: Any) -> Mapping[str, Site]:
    return sites(model.eval(), inputs)


class Function(nn.Module):
    """A model made of one function, with parameters by name."""

    def __init__(self, function: Any, **parameters: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_of_functions_modules_and_the_root() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.same, self.act = nn.Dropout(0.5), nn.Identity(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.same(self.drop(x)))
            return self.act(y + x) + F.relu(x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x

    assert list(run(Root(), X)) == ["inner:relu", "inner:add", "inner.act", "inner:relu.1", "inner:add.1", ":add"]


def test_a_function_called_from_two_lines_is_two_sites() -> None:
    def helper(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def body(self: Any, x: Tensor, y: Tensor) -> Tensor:
        first = helper(x, y)
        second = helper(first, y)
        return helper(second, x)

    assert list(run(Function(body), (X, X))) == [":add", ":add.1", ":add.2"]


def test_two_operations_on_one_line_are_two_sites() -> None:
    found = run(Function(lambda self, x, y: (x + y) * (y + x) + x), (X, X))
    assert list(found) == [":add", ":add.1", ":mul", ":add.2"]


def test_names_are_stable_from_run_to_run_and_after_the_interpreter_warms_up() -> None:
    """A specialised call sits at another instruction: names must not move."""

    def body(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.conv1d(torch.cat([x + y, torch.sub(x, y)], 1)[:, None], self.w)[:, 0].mean(1)

    model = Function(body, w=torch.randn(1, 1, 3)).eval()
    first = list(run(model, (X, X)))
    net = apply(model, Plan(dict.fromkeys(first, Int(8, 8))), [((X, X), None)])
    with torch.no_grad():
        expected = net(X, X)
        for _ in range(64):
            assert torch.equal(net(X, X), expected)
    assert list(run(model, (X, X))) == first == [":add", ":sub", ":cat", ":conv1d", ":mean"]


def test_shared_layer_is_one_site_with_two_calls() -> None:
    layer = nn.Linear(6, 6)
    found = run(Function(lambda self, x: self.layer(F.relu(self.layer(x))), layer=layer), X)
    assert list(found) == ["layer", ":relu"]
    assert (found["layer"].calls, found["layer"].macs) == (2, 2 * 4 * 36)


def test_two_names_of_one_module() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found = run(model, X)
    assert {site.calls for name, site in found.items() if site.kind == "linear"} == {2}
    net = apply(model, Plan({"0": Int(8, 8)}), [(X, None)])
    with torch.no_grad():
        torch.testing.assert_close(net(X), model(X), rtol=0.1, atol=0.1)
        assert not torch.equal(net(X), model(X))


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 6)
        for step in x:
            h = torch.tanh(self.inp(step) + self.rec(h))
        return h


def test_recurrence_of_changing_length() -> None:
    torch.manual_seed(0)
    model, five, seven = Recurrence().eval(), torch.rand(5, 3, 6), torch.rand(7, 3, 6)
    found = run(model, five)
    assert {name: site.calls for name, site in found.items()} == {"inp": 5, "rec": 5, ":add": 5, ":tanh": 5}
    net = apply(model, Plan(dict.fromkeys(["inp", "rec", ":add"], Int(8, 8))), [(five, None)])
    with torch.no_grad():
        for x in (seven, five, seven[:1]):
            torch.testing.assert_close(net(x), model(x), rtol=0.1, atol=0.05)
            assert not torch.equal(net(x), model(x))


def test_a_branch_that_only_training_takes() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training:
            y = y + x
            y = torch.tanh(y) * 2.0 + 1.0
        return y + self.b(x)

    model = Function(body, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert list(run(model, X)) == ["a", "b", ":add"]
    layers = apply(model, Plan({"a": Int(8, 8)}), [(X, None)]).train()
    layers(X).sum().backward()
    net = apply(model, Plan({":add": Int(8, 8)}), [(X, None)])
    with torch.no_grad():
        net.eval()(X)
    with pytest.raises(InterceptionError, match=r"(?s)'add'.*test_record\.py:\d+ was not seen.*test_record\.py:\d+"):
        net.train()(X)


def test_scalar_arithmetic_in_training_is_no_site() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1
        return x + self.a(x)

    net = apply(Function(body, a=nn.Linear(6, 6)), Plan({":add": Int(8, 8)}), [(X, None)]).train()
    net(X).sum().backward()


# -- data flow ---------------------------------------------------------------------------------------------------------


def test_views_pass_identity_on_and_inputs_have_names() -> None:
    def body(self: Any, image: Tensor, *, mask: Tensor) -> Tensor:
        a = self.a(image).reshape(2, 12).transpose(0, 1).contiguous()
        return torch.matmul(a, mask)

    record = network(Function(body, a=nn.Linear(6, 6)).eval(), {"image": X, "mask": X[:2, :2]}, forward=None).record
    assert record.sites[":matmul"].operands[0].tensor == "a"
    assert record.sites[":matmul"].operands[1].tensor == "@mask"
    assert record.sites["a"].operands[0].tensor == "@image"
    assert [(e.producer, e.consumer, e.operand) for e in record.edges()] == [
        ("@image", "a", 0),
        ("a", ":matmul", 0),
        ("@mask", ":matmul", 1),
    ]
    assert record.outputs == (":matmul",)
    assert record.tensors[":matmul"].is_output


@pytest.mark.parametrize(
    ("pad", "passes"),
    [
        (lambda x: F.pad(x, (0, 1, 2, 0)), True),
        (lambda x: F.pad(x, (-1, -1)), True),
        (lambda x: torch.constant_pad_nd(x, (1, 1), 0.0), True),
        (nn.ZeroPad2d((0, 1, 0, 1)), True),
        (lambda x: F.pad(x, (1, 1), value=1.0), False),
        (lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), False),
    ],
)
def test_zeros_around_a_tensor_pass_identity_on(pad: Any, passes: bool) -> None:
    model = Function(lambda self, x: self.b(pad(self.a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 5, 2)).eval()
    x = torch.randn(2, 3, 9, 9)
    record = network(model, x).record
    assert (record.sites["b"].operands[0].tensor == "a") is passes
    assert ("?" in record.tensors["a"].readers) is not passes
    net = apply(model, Plan({"a": Int(8, 8), "b": Int(8, 8)}), [(x, None)])
    written = computer_of(net).written
    assert ("a" in written) is passes
    if passes:  # the range is that of the tensor without its zeros' neighbourhood
        with torch.no_grad():
            values = apply(model, Plan({"a": Int(8, 8)}), [(x, None)]).get_submodule("a")(x)
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        assert float(written["a"].scale) == pytest.approx((high - low) / 255, rel=0.02)


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


@pytest.mark.parametrize("form", ["tuple", "mapping", "dataclass"])
def test_several_inputs_and_outputs(form: str) -> None:
    def body(self: Any, x: Tensor, y: Tensor) -> Any:
        a, b = self.a(x), self.b(y)
        c = a + b
        if form == "tuple":
            return c, (a,)
        return {"c": c, "a": a} if form == "mapping" else Output(c, (a,))

    model = Function(body, a=nn.Linear(6, 3), b=nn.Linear(6, 3)).eval()
    record = network(model, (X, X + 1)).record
    assert record.outputs == (":add", "a")
    assert record.tensors["a"].is_output
    net = apply(model, Plan(dict.fromkeys(["a", "b", ":add"], Int(8, 8))), [((X, X + 1), None)])
    with torch.no_grad():
        out = net(X, X + 1)
    assert type(out) is {"tuple": tuple, "mapping": dict, "dataclass": Output}[form]
    by_name = apply(model, Plan({"a": Int(8, 8)}), [({"x": X, "y": X}, None)])
    with torch.no_grad():
        by_name(x=X, y=X)


def test_mixed_origins_keep_a_tensor_float_where_it_is_written() -> None:
    """A norm that is called on two tensors reads the convolution too: nobody may quantize that where it is made."""

    def body(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(y) + self.norm(x) + F.relu(y)

    model = Function(body, a=nn.Linear(6, 6), norm=nn.LayerNorm(6)).eval()
    record = network(model, X).record
    assert "?" in record.tensors["a"].readers
    assert record.sites["a"].epilogue == ()


def test_epilogue_and_edges() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.GELU()).eval()
    record = network(model, torch.randn(1, 1, 8, 8)).record
    first = record.sites["0"]
    assert (first.epilogue, first.tail) == (("1", "2"), "2")
    assert first.fold is not None
    assert first.fold.module == "1"
    assert record.sites["3"].epilogue == ()
    assert [(e.producer, e.consumer) for e in record.edges()] == [("@input", "0"), ("0", "3"), ("3", "4")]


def test_constants_are_weights_whatever_they_went_through() -> None:
    mask = torch.ones(6, 6).tril()

    def body(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.w * self.mask)
        y = torch.matmul(y, self.w.t())
        return torch.matmul(self.w[:4, :4], y)

    model = Function(body, w=torch.randn(6, 6))
    model.register_buffer("mask", mask)
    record = network(model.eval(), X).record
    assert ":mul" not in record.sites
    for name, index, value in (
        (":linear", 1, model.w * mask),
        (":matmul", 1, model.w.t()),
        (":matmul.1", 0, model.w[:4, :4]),
    ):
        site = record.sites[name]
        assert site.weight is site.operands[index]
        assert site.weight is not None
        assert "w" in site.weight.parameters
        assert torch.equal(record.weights[name, index], value)
    net = apply(model, Plan(dict.fromkeys(record.sites, Int(8, 8))), [(X, None)])
    with torch.no_grad():
        torch.testing.assert_close(net(X), model(X), rtol=0.1, atol=0.5)
        before = net(X)
        net.w.mul_(1.1)  # computed weights follow their parameter
        assert not torch.equal(net(X), before)


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [8, 16])
def test_different_weights_at_one_place_are_none(wide: int) -> None:
    """As Keras computes every layer in one function, with weights that it transposes first."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.ParameterList([torch.randn(8, wide), torch.randn(wide, 4)])

        def forward(self, x: Tensor) -> Tensor:
            for kernel in self.kernels:
                x = F.linear(x, kernel.t())
            return x

    model, x = Loop().eval(), torch.randn(5, 8)
    site = run(model, x)[":linear"]
    assert site.weight is None
    assert site.calls == 2
    net = apply(model, Plan({":linear": Int(8, 8)}), [(x, None)])
    assert (net(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 6 * 8 * 4 * 3),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 10, 10), 2 * 6 * 64 * 2 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 2 * 4 * 25 * 6 * 9),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), 2 * 4 * 5 * 3 * 3),
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_by_hand(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    site = run(nn.Sequential(module), torch.randn(shape))["0"]
    assert site.macs == macs
    assert site.parameter_bytes == 4 * module.weight.numel()
    assert site.out_shapes == (tuple(module(torch.randn(shape)).shape),)


def test_macs_of_products() -> None:
    q = torch.randn(2, 4, 5, 8)
    k = torch.randn(2, 4, 7, 8)
    found = run(Function(lambda self, q, k: F.scaled_dot_product_attention(q, k, k)), (q, k))
    assert found[":scaled_dot_product_attention"].macs == 2 * (2 * 4 * 5 * 7 * 8)
    inside = sites(Function(lambda self, q, k: F.scaled_dot_product_attention(q, k, k)).eval(), (q, k), inside=True)
    assert sum(s.macs for s in inside.values() if s.parent) == inside[":scaled_dot_product_attention"].macs
    product = run(Function(lambda self, a, b: torch.einsum("ab,bc->ac", a, b)), (X, X.t()))
    assert product[":einsum"].macs == 4 * 6 * 4
    batched = run(Function(lambda self, a, b: torch.bmm(a, b)), (torch.randn(3, 4, 5), torch.randn(3, 5, 2)))
    assert batched[":matmul"].macs == 3 * 4 * 5 * 2


# -- bad input and memory ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named() -> None:
    inner = torch.jit.script(nn.Linear(6, 6))
    with pytest.raises(InterceptionError, match=r"'0' is a TorchScript module"):
        sites(nn.Sequential(inner), X)
    with pytest.raises(InterceptionError, match="the model is a TorchScript module"):
        sites(torch.jit.trace(nn.Linear(6, 6), X), X)


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(6, 6)
    model.extra = torch.ones(2, requires_grad=True) * 2  # not a leaf
    with pytest.raises(InterceptionError, match="cannot be copied"):
        sites(model, X)


def test_a_model_without_sites() -> None:
    with pytest.raises(InterceptionError, match="not one site"):
        sites(Function(lambda self, x: torch.from_numpy(x.numpy() * 2)), X)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sites(lambda x: x, X)  # type: ignore[arg-type]


def test_recording_keeps_no_activation_alive() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def body(self: Any, x: Tensor, index: Tensor) -> Tensor:
        a = self.a(x)
        mask = a.mean(1, keepdim=True)
        out = torch.addmm(a, x, self.w)
        out = out.index_add(0, index, mask.expand(-1, 6) * a)
        alive.extend(weakref.ref(t) for t in (a, mask, out))
        return out

    model = Function(body, a=nn.Linear(6, 6), w=torch.randn(6, 6)).eval()
    net = network(model, (X, torch.arange(4)))
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert net.record.biases.keys() == {"a"}


def test_a_thousand_sites_in_little_time() -> None:
    import time

    layers: list[nn.Module] = []
    for _ in range(250):
        layers += [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Sigmoid()]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 2, 2, 2)
    start = time.process_time()
    net = apply(model, Plan({str(i): Int(8, 8) for i in range(0, 1000, 4)}), [(x, None)])
    assert time.process_time() - start < 20  # 3 s on a quiet machine; quadratic work would take minutes
    assert len(computer_of(net).record_sites) == 1000
