from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitsmith.numerics import dialect
from bitsmith.numerics.quantizer import Quantizer, _edges
from bitsmith.site import Format

scales = st.floats(2.0**-20, 2.0**13, width=32)
floats = st.one_of(st.floats(-(2.0**20), 2.0**20, width=32), st.floats(width=32, allow_nan=False, allow_infinity=False))


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    fmt = Format(draw(st.sampled_from([2, 4, 7, 8, 16])), draw(st.booleans()), draw(st.booleans()))
    zero_point = 0 if fmt.symmetric else draw(st.integers(*fmt.levels))
    return Quantizer(fmt, draw(scales), zero_point)


def _samples(quantizer: Quantizer, extra: list[float]) -> Tensor:
    """Ties, limits and their float neighbours, and whatever hypothesis brings."""
    low, high = quantizer.fmt.levels
    levels = torch.tensor([low, low + 1, -1, 0, 1, high - 1, high, low - 3, high + 3, 2 * high, -3 * high]).float()
    levels -= float(quantizer.zero_point)
    ties = torch.cat([levels, levels + 0.5, levels - 0.5]) * float(quantizer.scale)
    up, down = (torch.nextafter(ties, torch.tensor(v)) for v in (torch.inf, -torch.inf))
    return torch.cat([ties, up, down, torch.tensor([0.0, -0.0]), torch.tensor(extra, dtype=torch.float32)])


@settings(max_examples=150, deadline=None)
@given(quantizer=quantizers(), extra=st.lists(floats, max_size=40), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_eager_is_the_dialect_bit_for_bit(quantizer: Quantizer, extra: list[float], dtype: str) -> None:
    x = _samples(quantizer, extra).to(getattr(torch, dtype))
    scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
    expected = dialect.quantize_dequantize(x, scale, zero_point, quantizer.fmt)
    with torch.no_grad():
        plain = quantizer(x)
    trained = quantizer(x.clone().requires_grad_())
    for output in (plain, trained):
        assert output.dtype == torch.float32
        assert torch.equal(output, expected)
    integers = quantizer.integers(x)
    assert integers.dtype == dialect.storage(quantizer.fmt.bits, quantizer.fmt.signed)
    # float64 reference from the definition, with the product by the float32 reciprocal
    with np.errstate(over="ignore"):  # infinity is clipped like every other large value
        product = (x.float().numpy() * np.float32(1.0 / scale)).astype(np.float64)
    levels = np.clip(np.rint(product) + zero_point, *quantizer.fmt.levels)
    np.testing.assert_array_equal(integers.to(torch.int64).numpy(), levels)
    np.testing.assert_array_equal(expected.numpy(), ((levels - zero_point) * scale).astype(np.float32))


@settings(max_examples=50, deadline=None)
@given(quantizer=quantizers(), extra=st.lists(floats, max_size=20))
def test_gradient_is_straight_through(quantizer: Quantizer, extra: list[float]) -> None:
    x = _samples(quantizer, extra).requires_grad_()
    upstream = torch.linspace(-1, 2, x.numel())
    (gradient,) = torch.autograd.grad(quantizer(x), x, upstream)
    reference = torch.fake_quantize_per_tensor_affine(
        x, float(quantizer.scale), int(quantizer.zero_point), *quantizer.fmt.levels
    )
    # the kernel converts levels to int64, which is undefined beyond it
    sane = x.detach().abs() / float(quantizer.scale) < 1e15
    (expected,) = torch.autograd.grad(reference, x, upstream)
    assert torch.equal(gradient[sane], expected[sane])
    assert not gradient[~sane].any()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.first = Quantizer(Format(8), 0.02, 117)
        self.second = Quantizer(Format(4, signed=True, symmetric=True), 0.13, 0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.linear(self.first(x)))
        return y


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_export_has_the_dialect_with_constants(strict: bool, train: bool) -> None:
    net, x = Net().train(train), torch.randn(3, 4)
    program = torch.export.export(net, (x,), strict=strict)
    calls = [node for node in program.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert [str(c.target).split(".")[1] for c in calls] == ["quantize_per_tensor", "dequantize_per_tensor"] * 2
    assert calls[0].args[1:] == (float(np.float32(0.02)), 117, 0, 255, torch.uint8)
    assert calls[3].args[1:] == (float(np.float32(0.13)), 0, -8, 7, torch.int8)
    assert torch.equal(program.module()(x), net(x))


def test_compile_full_graph_with_and_without_gradient() -> None:
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for module in (net, compiled):
        gradients.append(torch.autograd.grad(module(x).square().sum(), (x, net.linear.weight)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
        net.first.set(0.05, 3)
        assert torch.equal(compiled(x), net(x))


def test_state_dict_deepcopy_and_set() -> None:
    quantizer = Quantizer(Format(8), 0.1, 3)
    assert {k: (v.dtype, v.shape) for k, v in quantizer.state_dict().items()} == {
        "scale": (torch.float32, ()),
        "zero_point": (torch.int32, ()),
    }
    x = torch.randn(50)
    expected = quantizer(x)
    other = Quantizer(Format(8), 7.0, 0)
    other(x)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), expected)
    twin = copy.deepcopy(quantizer)
    assert twin._memo is None
    assert torch.equal(twin(x), expected)
    twin.set(0.5, 0)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(quantizer(x), expected)
    assert (float(twin.scale), int(twin.zero_point)) == (0.5, 0)


def test_half_keeps_the_scale() -> None:
    quantizer = Quantizer(Format(8), 0.1, 3).half().double()
    assert quantizer.scale.dtype == torch.float32
    assert float(quantizer.scale) == float(np.float32(0.1))


@pytest.mark.parametrize("shared", [False, True])
def test_second_reader_gets_the_same_output_only_if_nothing_changed(shared: bool) -> None:
    quantizer = Quantizer(Format(8), 0.1, 3)
    quantizer.shared = shared
    x = torch.randn(50)
    first = quantizer(x)
    assert quantizer(x) is first
    x.add_(1.0)
    second = quantizer(x)
    assert second is not first
    assert torch.equal(second, dialect.quantize_dequantize(x, float(quantizer.scale), 3, quantizer.fmt))
    second.zero_()  # a consumer works in place
    assert bool(quantizer(x).any())
    third = quantizer(x)
    quantizer.set(0.2, 3)
    assert not torch.equal(quantizer(x), third)
    with torch.inference_mode():
        y = torch.randn(5)
        assert quantizer(y) is not quantizer(y)
        quantizer.reset()
        kept = quantizer(x)
    with torch.enable_grad():
        weight = torch.ones((), requires_grad=True)
        (quantizer(x) * weight).sum().backward()  # would fail with an inference tensor
    assert kept.is_inference()


def test_shared_lives_as_long_as_its_input() -> None:
    quantizer = Quantizer(Format(8), 0.1, 3)
    x = torch.randn(50)
    alive = weakref.ref(quantizer(x))
    assert alive() is None
    quantizer.shared = True
    alive = weakref.ref(quantizer(x))
    assert quantizer(x) is alive()
    del x
    gc.collect()
    assert alive() is None
    x = torch.randn(50)
    alive = weakref.ref(quantizer(x))
    quantizer.reset()
    assert alive() is None


@settings(max_examples=150, deadline=None)
@given(quantizer=quantizers(), extra=st.lists(floats, max_size=40))
def test_gradient_behind_a_relu_is_the_same_without_a_mask(quantizer: Quantizer, extra: list[float]) -> None:
    x = _samples(quantizer, extra)
    weight = torch.linspace(-1, 1, len(x))
    found = []
    for kept in (True, False):
        given = x.clone().requires_grad_()
        rectified = given.relu()
        output = quantizer(rectified if kept else rectified.view(-1))  # of a view a mask is saved
        output.backward(weight)
        assert given.grad is not None
        found.append((output.detach(), given.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_edges_are_the_last_numbers_that_are_clipped() -> None:
    for scale, fmt, zero_point in ((0.1, Format(8), 3), (1.7e-5, Format(4, signed=True), -2), (3.0, Format(2), 0)):
        quantizer = Quantizer(fmt, scale, zero_point)
        edges = _edges(quantizer._constants)
        assert edges is not None
        below, above = (torch.tensor(edge) for edge in edges)
        low, high = (level - zero_point for level in fmt.levels)

        def level(x: Tensor, quantizer: Quantizer = quantizer) -> float:
            return float(torch.mul(x, 1.0 / float(quantizer.scale)).round())

        assert level(below) == low - 1
        assert level(torch.nextafter(below, torch.tensor(torch.inf))) == low
        assert level(above) == high + 1
        assert level(torch.nextafter(above, torch.tensor(-torch.inf))) == high
    assert _edges(Quantizer(Format(16), 2.0**113, 0)._constants) is None


def test_nothing_is_saved_behind_a_relu_but_its_own_output() -> None:
    quantizer = Quantizer(Format(8), 0.05, 0)
    x = torch.randn(1000, requires_grad=True)
    rectified = x.relu()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantizer(rectified)
    assert [t.data_ptr() for t in saved] == [rectified.data_ptr()]


def test_a_tensor_that_nobody_keeps_may_be_overwritten() -> None:
    quantizer = Quantizer(Format(8), 0.05, 0)
    x = torch.randn(100, requires_grad=True)
    doubled = x * 2
    output = quantizer(doubled)
    doubled.add_(100)  # a float network may do this behind an addition
    output.sum().backward()
    inside = ((x.detach() * 2 / 0.05).round() >= 0) & ((x.detach() * 2 / 0.05).round() <= 255)
    assert torch.equal(x.grad, 2.0 * inside)


def test_outputs_with_gradient_are_not_shared() -> None:
    quantizer = Quantizer(Format(8), 0.1, 3)
    x = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        kept = quantizer(x)
    first = quantizer(x)
    assert first is not kept
    first.sum().backward()
    quantizer(x).sum().backward()  # a graph of its own
    assert x.grad is not None


def test_checkpoint_of_two_readers() -> None:
    quantizer, weight = Quantizer(Format(8), 0.1, 3), torch.randn(4, 4, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y = x * 2
        return quantizer(y) @ weight + (quantizer(y) @ weight).tanh()

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        gradients.append(torch.autograd.grad(run(x).sum(), (x, weight)))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_threads_never_mix_up() -> None:
    quantizer = Quantizer(Format(8), 0.1, 3)
    quantizer.shared = True
    inputs = [torch.randn(64) for _ in range(8)]
    expected = [dialect.quantize_dequantize(x, float(quantizer.scale), 3, quantizer.fmt) for x in inputs]

    def work(index: int) -> bool:
        return all(torch.equal(quantizer(inputs[index]), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_functional_gradient() -> None:
    quantizer = Quantizer(Format(8), 0.1, 3)
    x = torch.randn(6, 5)
    gradient = torch.func.grad(lambda v: quantizer(v).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * quantizer(x) * (quantizer.integers(x) == (x / 0.1).round() + 3))


def test_errors() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-42):
        with pytest.raises(ValueError, match="scale"):
            Quantizer(Format(8), scale, 0)
    with pytest.raises(ValueError, match="0 to 255"):
        Quantizer(Format(8), 1.0, 256)
    with pytest.raises(ValueError, match="0 only"):
        Quantizer(Format(8, symmetric=True), 1.0, 1)
    with pytest.raises(TypeError, match="float64"):
        Quantizer(Format(8), 1.0, 0)(torch.ones(2, dtype=torch.float64))
