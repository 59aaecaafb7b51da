"""Int against the plain equation in float64, its storage counted by hand, and every option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.model.apply import apply, computer_of, materialised
from bitsmith.model.calibrate import CalibrationError
from bitsmith.model.network import sites
from bitsmith.plan import Plan
from bitsmith.site import Format, Range, Site
from bitsmith.technique import No
from bitsmith.techniques.int_ import Int


def grid(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, signed: bool, symmetric: bool) -> np.ndarray:
    """``r = S (q - Z)`` with min/max limits, in float64 (Jacob et al. 2018, eq. 1)."""
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if symmetric:
        bound = np.maximum(-low, high) if signed else high
        scale, zero = bound / most, np.zeros_like(bound)
    else:
        scale = (high - low) / (most - least)
        zero = np.clip(np.round(least - low / scale), least, most)
    scale = scale.astype(np.float32).astype(np.float64)
    return scale * (np.clip(np.round(x / scale) + zero, least, most) - zero)


def tensor_grid(x: Tensor, bits: int, signed: bool = False, symmetric: bool = False) -> np.ndarray:
    values = x.double().numpy()
    return grid(values, values.min(), values.max(), bits, signed, symmetric)


def weight_grid(w: Tensor, bits: int, affine: bool, granularity: str, group: int) -> np.ndarray:
    values = w.detach().double().numpy()
    if granularity == "tensor":
        return grid(values, values.min(), values.max(), bits, not affine, not affine)
    rows = values.reshape(values.shape[0] * (values.shape[1] // group if group else 1), -1)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    return grid(rows, low, high, bits, not affine, not affine).reshape(values.shape)


def close(ours: Tensor, reference: np.ndarray, steps: float) -> None:
    """Equal up to ``steps``, and mostly far closer: ties of float32 arithmetic may fall on the other side."""
    gap = np.abs(ours.detach().double().numpy() - reference)
    assert gap.max() <= steps
    assert np.median(gap) < 1e-5 * max(1.0, np.abs(reference).max())


@settings(max_examples=40, deadline=None)
@given(
    w=st.integers(2, 8),
    a=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16, None]),
    symmetric=st.booleans(),
    signed=st.booleans(),
    affine=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    seed=st.integers(0, 99),
)
def test_linear_is_the_plain_equation(
    w: int, a: int | None, symmetric: bool, signed: bool, affine: bool, granularity: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(12, 5)).eval(), torch.randn(7, 12)
    group = 4 if granularity == "group" else 0
    signed = signed or symmetric  # the data has both signs
    technique = Int(w, a, symmetric, signed, affine, granularity, group)
    net = apply(model, Plan({"0": technique}), [(x, None)])
    inputs = x.double().numpy() if a is None else tensor_grid(x, a, signed, symmetric)
    weight = weight_grid(model[0].weight, w, affine, granularity, group)
    bias = model[0].bias.detach().double().numpy()
    cell = computer_of(net).cells["0"]
    if a is not None and not group:  # a 32-bit integer, as the runtimes hold it
        unit = cell.weight_scale.double().numpy() * float(cell.quantizers[0].scale)
        bias = np.round(bias / unit) * unit
    expected = inputs @ weight.T + bias
    with torch.no_grad():
        # one input level more or less, at most, where a tie falls on the other side
        step = 0.0 if a is None else np.abs(weight).max() * float(cell.quantizers[0].scale)
        close(net(x), expected, step + 2e-5 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_is_the_plain_equation(granularity: Any, groups: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)).eval()
    x = torch.rand(2, 4, 9, 9)
    net = apply(model, Plan({"0": Int(8, 8, granularity=granularity)}), [(x, None)])
    inputs, weight = tensor_grid(x, 8), weight_grid(model[0].weight, 8, False, granularity, 0)
    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.zeros((2, 6, 5, 5))
    per_in, per_out = 4 // groups, 6 // groups
    for o, i, j in itertools.product(range(6), range(5), range(5)):
        g = o // per_out
        patch = padded[:, g * per_in : (g + 1) * per_in, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        expected[:, o, i, j] = (patch * weight[o]).sum((1, 2, 3)) + float(model[0].bias[o].detach())
    with torch.no_grad():
        close(net(x), expected, float(np.abs(weight).max()) / 255 + 1e-4)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("out", [None, Format(8), Format(8, signed=True, symmetric=True, range=Range("mse"))])
def test_every_range_choice(method: Any, out: Format | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).eval(), torch.randn(64, 12)
    chosen = Range(method, 99.9)
    granularity: Any = "tensor" if method == "entropy" else "channel"
    technique = Int(8, 8, range=chosen, weight_range=chosen, granularity=granularity, out=out)
    net = apply(model, Plan({"0": technique}), [(x, None)])
    with torch.no_grad():
        error = (net(x) - model(x)).square().mean() / model(x).square().mean()
    assert 0 < float(error) < 5e-3


def test_a_format_that_cannot_hold_the_tensor_names_it() -> None:
    model, x = nn.Sequential(nn.Linear(12, 5)).eval(), torch.randn(64, 12)
    with pytest.raises(CalibrationError, match=r"'@input', seen from -\d.*unsigned"):
        apply(model, Plan({"0": Int(8, 8, symmetric=True)}), [(x, None)])


def test_output_format_is_on_its_grid() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5), nn.ReLU()).eval(), torch.randn(64, 12)
    net = apply(model, Plan({"0": Int(8, 8, out=Format(4))}), [(x, None)])
    (quantizer,) = computer_of(net).written.values()
    assert list(computer_of(net).written) == ["1"]  # behind the ReLU that is fused
    with torch.no_grad():
        out = net(x)
    assert len(out.unique()) <= 16
    torch.testing.assert_close(out / quantizer.scale, (out / quantizer.scale).round(), rtol=0, atol=1e-4)
    assert float(out.min()) == 0.0


# -- storage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "bits"),
    [
        (Int(8, 8), 96 * 8 + 8 * 32),
        (Int(4, 8), 96 * 4 + 8 * 32),
        (Int(3, None, granularity="tensor"), 96 * 3 + 32),
        (Int(4, None, granularity="group", group=4), 96 * 4 + 24 * 32),
        (Int(8, 8, affine_weights=True), 96 * 8 + 8 * 40),
    ],
    ids=repr,
)
def test_bits_by_hand(technique: Int, bits: int) -> None:
    site = sites(nn.Sequential(nn.Linear(12, 8)).eval(), torch.randn(2, 12))["0"]
    assert technique.bits(site) == bits


def test_bits_without_a_weight() -> None:
    site = sites(Two(lambda x, y: x + y).eval(), (torch.randn(2, 3), torch.randn(2, 3)))[":add"]
    assert Int(8, 8).bits(site) == 0


# -- every kind of operation -------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args, **dict(self.named_parameters()))


R = torch.Generator().manual_seed(0)
A, B, W = torch.rand(3, 4, 6, generator=R), torch.rand(3, 4, 6, generator=R), torch.rand(6, 5, generator=R) - 0.5
IMAGE = torch.rand(2, 4, 7, 7, generator=R)
INDEX = torch.tensor([0, 2, 2])
KINDS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Tensor]]] = {
    "add": (lambda x, y: torch.add(x, y, alpha=2), (A, B), {}),
    "sub": (lambda x, y: x - y, (A, B), {}),
    "mul": (lambda x, y: x * y, (A, B), {}),
    "cat": (lambda x, y: torch.cat([x, y], dim=-1), (A, B), {}),
    "mean": (lambda x: x.mean((1, 2), keepdim=True), (A,), {}),
    "matmul": (lambda x, y: x @ y.transpose(1, 2), (A, B), {}),
    "weight on the right": (lambda x, w: x @ w, (A,), {"w": W}),
    "weight on the left": (lambda x, w: w.t() @ x.transpose(1, 2), (A,), {"w": W}),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (A[0],), {"w": W, "b": W[0]}),
    "addmm by name": (lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w), (A[0],), {"w": W, "b": W[0]}),
    "baddbmm": (lambda b, x, y: torch.baddbmm(b, x, y), (A[:, :, :4], A, B.transpose(1, 2)), {}),
    "einsum": (lambda x, w: torch.einsum("nij,jk->nik", x, w), (A,), {"w": W}),
    "embedding": (lambda i, w: F.embedding(i, w), (INDEX,), {"w": W}),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), (IMAGE,), {}),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), (IMAGE,), {}),
    "index_add": (lambda x, y: x.index_add(0, INDEX, y), (A, B), {}),
    "scatter_add": (lambda x, y: x.scatter_add(0, INDEX[:, None, None].expand(3, 4, 6), y), (A, B), {}),
    "scatter_reduce": (
        lambda x, y: x.scatter_reduce(0, INDEX[:, None, None].expand(3, 4, 6), y, "amax"),
        (A, B),
        {},
    ),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), (A,), {"w": torch.randn(2, 4, 3), "b": W[0, :2]}),
    "conv3d": (lambda x, w: F.conv3d(x, w), (IMAGE[:, None],), {"w": torch.randn(2, 1, 2, 3, 3)}),
    "conv_transpose1d": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, groups=2),
        (A,),
        {"w": torch.randn(4, 3, 3), "b": torch.randn(6)},
    ),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1),
        (IMAGE,),
        {"w": torch.randn(4, 2, 3, 3)},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str) -> None:
    function, inputs, parameters = KINDS[name]
    model = Two(function, **parameters).eval()
    (site,) = sites(model, inputs).values()
    fine = apply(model, Plan({site.name: Int(8, 16, out=Format(16))}), [(inputs, None)])
    coarse = apply(model, Plan({site.name: Int(2, 8, out=Format(3))}), [(inputs, None)])
    with torch.no_grad():
        expected = model(*inputs)
        scale = float(expected.abs().max())
        torch.testing.assert_close(fine(*inputs), expected, rtol=0, atol=0.03 * scale)
        assert not torch.equal(coarse(*inputs), expected)
        assert len(coarse(*inputs).unique()) <= 8
        shipped = materialised(coarse, lambda net: net(*inputs))
        torch.testing.assert_close(shipped(*inputs), coarse(*inputs), rtol=1e-6, atol=1e-6 * scale)
    fine.train()
    if any(x.is_floating_point() for x in inputs) or parameters:
        given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        fine(*given).sum().backward()
        for t in (*given, *fine.parameters()):
            assert not t.is_floating_point() or (t.grad is not None and bool(t.grad.isfinite().all()))
            assert not t.is_floating_point() or t.requires_grad


def test_channels_of_a_transposed_convolution() -> None:
    """With groups, axis 1 of the weight is a group's share of the output channels."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    x = torch.rand(2, 4, 5, 5)
    net = apply(nn.Sequential(layer).eval(), Plan({"0": Int(4, None)}), [(x, None)])
    assert computer_of(net).cells["0"].weight_scale.shape == (3,)
    values = layer.weight.detach().double().numpy()
    rows = values.transpose(1, 0, 2, 3).reshape(3, -1)
    on_grid = grid(rows, rows.min(1, keepdims=True), rows.max(1, keepdims=True), 4, True, True)
    weight = torch.from_numpy(on_grid.reshape(3, 4, 3, 3).transpose(1, 0, 2, 3).copy()).float()
    with torch.no_grad():
        expected = F.conv_transpose2d(x, weight, layer.bias, groups=2)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


# -- corners -----------------------------------------------------------------------------------------------------------


def test_bias_is_a_32_bit_integer() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).eval(), torch.randn(7, 12)
    net = apply(model, Plan({"0": Int(8, 8)}), [(x, None)])
    cell = computer_of(net).cells["0"]
    with torch.no_grad():
        zero = net(torch.zeros(1, 12))[0]
    step = cell.weight_scale.double() * cell.quantizers[0].scale.double()
    expected = torch.round(model[0].bias.detach().double() / step) * step
    torch.testing.assert_close(zero.double(), expected, rtol=1e-6, atol=1e-9)
    shipped = materialised(net, lambda n: n(x))
    assert computer_of(shipped).cells["0"].bias_q.dtype == torch.int32
    assert computer_of(shipped).cells["0"].weight_q.dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(shipped(x), net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-30])
def test_a_dead_channel_does_not_overflow_the_bias(size: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)).eval(), torch.randn(7, 12)
    with torch.no_grad():
        model[0].weight[2] *= size
        net = apply(model, Plan({"0": Int(8, 8)}), [(x, None)])
        torch.testing.assert_close(net(x)[:, 2], model(x)[:, 2], rtol=1e-4, atol=1e-4)
        shipped = materialised(net, lambda n: n(x))
        torch.testing.assert_close(shipped(x), net(x), rtol=1e-6, atol=1e-6)
        assert int(computer_of(shipped).cells["0"].bias_q.abs().max()) < 2**31 - 1


def test_two_sites_share_one_parameter() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 3, 1]])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.embed(i))

    model = Tied().eval()
    found = sites(model, tokens)
    assert {s.weight.key for s in found.values() if s.weight is not None} == {"embed.weight"}
    net = apply(model, Plan(dict.fromkeys(found, Int(8, 8))), [(tokens, None)])
    assert net.head.weight is net.embed.weight
    with torch.no_grad():
        torch.testing.assert_close(net(tokens), model(tokens), rtol=0.1, atol=0.1)
    net(tokens).sum().backward()
    assert net.embed.weight.grad is not None


def test_gradient_is_straight_through() -> None:
    """1 inside the range, 0 where the input is clipped; the weight's is the quantized input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).eval()
    calibration = torch.tensor([[-1.0, 0.5, 1.0]])
    net = apply(model, Plan({"0": Int(8, 8)}), [(calibration, None)])
    x = torch.tensor([[0.3, 5.0, -7.0]], requires_grad=True)
    net(x).sum().backward()
    weight = computer_of(net).cells["0"]._simulated(net[0].weight, None)[0].detach()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight * torch.tensor([[1.0, 0.0, 0.0]]))
    quantized = computer_of(net).cells["0"].quantizers[0](x.detach())
    torch.testing.assert_close(net[0].weight.grad, quantized)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(1, 8), "2 to 8"),
        (lambda: Int(9, 8), "2 to 8"),
        (lambda: Int(8, 9), "2 to 8, 16"),
        (lambda: Int(8, 8, granularity="row"), "granularity"),
        (lambda: Int(8, 8, granularity="group"), "go together"),
        (lambda: Int(8, 8, group=4), "go together"),
        (lambda: Int(8, 8, weight_range=Range("entropy")), "granularity='tensor'"),
    ],
)
def test_impossible_options(make: Callable[[], Int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_says_why() -> None:
    def only(model: nn.Module, *inputs: Tensor) -> Site:
        return next(iter(sites(model.eval(), inputs).values()))

    linear = only(nn.Sequential(nn.Linear(6, 2)), torch.randn(2, 6))
    add = only(Two(lambda x, y: x + y), A, B)
    relu = only(nn.Sequential(nn.ReLU()), torch.randn(2, 6))
    product = only(Two(lambda x, w: x @ w, w=W), A)
    for technique, site, reason in (
        (Int(4, None, granularity="group", group=4), linear, "not a multiple of group=4"),
        (Int(4, None), add, "weights only"),
        (Int(8, 8), relu, "computed in float"),
        (Int(4, None, granularity="group", group=2), product, "no groups"),
    ):
        verdict = technique.fits(site)
        assert isinstance(verdict, No)
        assert reason in verdict.reason


def test_repr_shows_what_differs_and_citations() -> None:
    assert repr(Int(4, None, granularity="group", group=32)) == "Int(w=4, a=None, granularity='group', group=32)"
    assert "Jacob" in Int().cite()
