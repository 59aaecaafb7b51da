"""Winograd: what a cell computes against the kernels' contract in plain NumPy, and its gradients."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
import winograd_reference as reference
from bitsmith.export.program import applied_program
from bitsmith.model.apply import computer_of, materialised
from bitsmith.numerics import winograd as algorithm
from bitsmith.numerics.errors import sqnr_db
from bitsmith.numerics.ranges import weight_qparams
from bitsmith.site import Range
from bitsmith.techniques.winograd import Winograd
from winograd_layers import Normalised, one


def integers(net: nn.Module, name: str, x: Tensor) -> tuple[np.ndarray, int, float]:
    """What the input's quantizer makes of ``x``, its zero point and its scale."""
    quantizer = computer_of(net).cells[name].quantizers[0]
    return quantizer.integers(x).numpy(), int(quantizer.zero_point), float(quantizer.scale)


def contract(net: nn.Module, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, pads: int) -> np.ndarray:
    """The kernels' result for what a layer should pack: nothing of the cell but its calibrated limits is used."""
    cell = computer_of(net).cells[name]
    tile = cell.tile
    q, zero, scale = integers(net, name, x)
    g = reference.G[tile]
    u = np.einsum("ia,kcab,jb->ijkc", g, weight.detach().double().numpy(), g).reshape(-1, *weight.shape[:2])
    matrix = np.kron(reference.BT[tile], reference.BT[tile])
    moved = np.abs(matrix).sum(1, keepdims=True) / 2  # by rounding the input
    least, greatest = cell.levels
    low, high = cell.tap_limits.double().numpy() / scale
    seen = high > low
    corners = (least - zero, greatest - zero)
    low = np.maximum(low - moved * seen, sum(np.minimum(matrix * end, 0).sum(1, keepdims=True) for end in corners))
    high = np.minimum(high + moved * seen, sum(np.maximum(matrix * end, 0).sum(1, keepdims=True) for end in corners))
    offset = np.rint((low + high)[tile + 3] / 2)
    low[tile + 3] -= offset
    high[tile + 3] -= offset
    peak = np.maximum(-low, high)
    peak = np.maximum(np.maximum(peak, peak.max(1, keepdims=True) / 2), 1e-6)
    mul = np.clip(np.floor(127 / peak * 2**15), 1, 2**15 - 1).astype(np.int64)
    u = u * (2.0**15 / mul)[:, None]
    unit = np.abs(u).max(2) / 127
    us = (unit * scale).astype(np.float32)
    b = np.zeros(u.shape[1], np.float32) if bias is None else bias.detach().numpy()
    return reference.convolution(
        q, zero, np.rint(u / unit[:, :, None]), mul, offset.astype(np.int64), us, b, tile, (pads,) * 4, 8
    )


# -- the integer path --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    tile=st.sampled_from([2, 4]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pads=st.integers(1, 2),
    bias=st.booleans(),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_cell_computes_the_contract_bit_for_bit(
    tile: Any, size: tuple[int, int], pads: int, bias: bool, signed: bool, seed: int
) -> None:
    """Maps from 1x1, smaller than a tile, and of no multiple of it."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 5, 3, padding=pads, bias=bias)
    x = torch.randn(3, 4, *size)
    net, _ = one(layer, Winograd(tile, signed=signed), x)
    wanted = contract(net, "0", x, layer.weight, layer.bias, pads)
    with torch.no_grad():
        got = net(x)
    np.testing.assert_array_equal(got.numpy(), wanted)
    np.testing.assert_array_equal(net(x).detach().numpy(), wanted)  # with gradients too
    with torch.inference_mode():
        np.testing.assert_array_equal(net(x).numpy(), wanted)


@pytest.mark.parametrize("tile", [2, 4])
def test_the_normalisation_is_folded_before_the_weights_are_transformed(tile: Any) -> None:
    torch.manual_seed(0)
    model, x = Normalised().eval(), torch.randn(2, 5, 9, 7)
    net = bs.apply(model, bs.Plan({"conv": Winograd(tile)}), [(x, None)])
    factor = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)  # type: ignore[operator]
    weight = model.conv.weight * factor.view(-1, 1, 1, 1)
    bias = model.norm.bias - model.norm.running_mean * factor  # type: ignore[operator]
    wanted = contract(net, "conv", x, weight, bias, 1)
    with torch.no_grad():
        got = net(x).numpy()
    # the factor is computed in another order here: a weight in a thousand may fall to the other side
    assert sqnr_db(torch.from_numpy(np.maximum(wanted, 0)), torch.from_numpy(got)) > 60
    assert sqnr_db(model(x).detach(), torch.from_numpy(got)) > (25 if tile == 2 else 12)


@pytest.mark.parametrize(("tile", "bits"), list(itertools.product([2, 4], [8, 16])))
def test_what_ships_computes_the_same(tile: Any, bits: Any) -> None:
    """``u``, ``mul``, ``offset``, ``us``, ``bias_f`` alone give the simulated result, by the plain contract and the
    operation."""
    torch.manual_seed(0)
    model, x = Normalised(bias=True).eval(), torch.randn(2, 5, 9, 7)
    net = bs.apply(model, bs.Plan({"conv": Winograd(tile, bits)}), [(x, None)])
    q, zero, scale = integers(net, "conv", x)
    with torch.no_grad():
        simulated = net(x)
        shipped = materialised(net, lambda module: module(x))
        cell = computer_of(shipped).cells["conv"]
        assert torch.equal(shipped(x), simulated)
    assert cell.u.dtype == (torch.int8 if bits == 8 else torch.int16)
    assert (cell.mul.dtype, cell.us.dtype, cell.bias_f.dtype) == (torch.int16, torch.float32, torch.float32)
    assert (cell.offset.dtype, cell.offset.shape) == (torch.int16, (5,))
    assert cell.u.shape == ((tile + 2) ** 2, 6, 5)
    assert cell.input_scale == scale
    parts = [getattr(cell, name).numpy() for name in ("u", "mul", "offset", "us", "bias_f")]
    wanted = reference.convolution(q, zero, *parts, tile, (1, 1, 1, 1), bits)
    np.testing.assert_array_equal(simulated.numpy(), np.maximum(wanted, 0))


def test_an_exported_program_has_one_operation_with_the_integers() -> None:
    torch.manual_seed(0)
    model, x = Normalised().eval(), torch.randn(2, 5, 9, 7)
    net = bs.apply(model, bs.Plan({"conv": Winograd()}), [(x, None)])
    program, _ = applied_program(net, x)
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.bitsmith.winograd.default]
    assert len(nodes) == 1
    with torch.no_grad():
        assert torch.equal(program.module()(x), net(x))


@pytest.mark.parametrize("technique", [Winograd(6), Winograd(4, transforms="flex"), Winograd(4, 32)], ids=repr)
def test_what_is_computed_in_float_is_written_as_ordinary_operations(technique: Winograd, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Normalised().eval(), torch.randn(2, 5, 9, 7)
    net = bs.apply(model, bs.Plan({"conv": technique}), [(x, None)])
    target = bs.targets.OnnxRuntime(1)
    artifact = bs.export(net, target, tmp_path / "net.onnx", x, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(target.run(artifact, [x.numpy()])[0]), net(x))


def test_it_compiles_as_a_whole() -> None:
    torch.manual_seed(0)
    model, x = Normalised().eval(), torch.randn(2, 5, 9, 7)
    for technique in (Winograd(), Winograd(4, transforms="flex")):
        net = bs.apply(model, bs.Plan({"conv": technique}), [(x, None)])
        with torch.no_grad():
            wanted = net(x)
            got = torch.compile(net, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_autocast_leaves_integers_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 8, 8)
    net, _ = one(model, Winograd(), x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        under = net(x)
    with torch.no_grad():
        assert torch.equal(under, net(x))


def test_a_dead_channel_and_an_input_of_zeros() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight[1] = 0
    for tile, bits in itertools.product([2, 4, 6], [8, 16]):
        net, _ = one(layer, Winograd(tile, bits), torch.zeros(1, 4, 5, 5))  # type: ignore[arg-type]
        with torch.no_grad():
            out = net(torch.zeros(1, 4, 5, 5))
            torch.testing.assert_close(out, layer.bias.view(1, -1, 1, 1).expand_as(out))
            assert bool(net(torch.rand(1, 4, 5, 5)).isfinite().all())


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_signal_to_noise_on_synthetic_data() -> None:
    """Measured with the prototypes of the kernels: direct 40 dB, F2 34, F4 18 to 21, F4 of 16 bits 42 to 49."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(4, 64, 28, 28).relu()
    with torch.no_grad():
        exact = layer(x)

    def db(technique: bs.Technique) -> float:
        with torch.no_grad():
            return sqnr_db(exact, one(layer, technique, x)[0](x))

    assert 32 < db(Winograd(2)) < 37
    assert 17 < db(Winograd(4)) < 23
    assert 42 < db(Winograd(4, 16)) < 50
    assert db(Winograd(2, 16)) > 42
    assert 10 < db(Winograd(6)) < 17
    assert db(Winograd(6, 16)) > 40
    assert db(bs.Int(8, 8)) > 40
    for tile, kind in itertools.product([2, 4, 6], ["static", "flex"]):
        assert db(Winograd(tile, 32, kind)) > 100  # type: ignore[arg-type]
        assert db(Winograd(tile, 8, kind)) < db(Winograd(tile, 16, kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), "same", "valid"])
@pytest.mark.parametrize("tile", [2, 4, 6])
def test_kernels_paddings_and_float(tile: Any, padding: Any, kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, kernel, padding=padding), torch.randn(2, 3, 7, 10)
    with torch.no_grad():
        torch.testing.assert_close(one(layer, Winograd(tile, 32), x)[0](x), layer(x), rtol=1e-3, atol=1e-3)
        assert sqnr_db(layer(x), one(layer, Winograd(tile, 16), x)[0](x)) > 30


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_one_dimension(tile: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv1d(8, 4, 3, padding=1), torch.randn(2, 8, 21)
    with torch.no_grad():
        torch.testing.assert_close(one(layer, Winograd(tile, 32), x)[0](x), layer(x), rtol=1e-4, atol=1e-4)
        assert sqnr_db(layer(x), one(layer, Winograd(tile, 16), x)[0](x)) > 35
        net, _ = one(layer, Winograd(tile), x)
        shipped = materialised(net, lambda module: module(x))
        torch.testing.assert_close(shipped(x), net(x), rtol=1e-6, atol=1e-6)


def test_other_map_sizes_than_the_recorded_one() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 12, 12)
    net, cell = one(layer, Winograd(4, 16), x)
    for size in itertools.product((1, 2, 5, 13), repeat=2):
        y = torch.randn(2, 8, *size).clamp(-3, 3)
        with torch.no_grad():
            assert sqnr_db(layer(y), net(y)) > 30
    with pytest.raises(ValueError, match="smaller than the kernel"):
        cell(torch.randn(2, 8, 0, 5), layer.weight, bias=layer.bias)


def test_the_batches_of_calibration_count_together() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(8, 4, 9, 9)
    whole, cell = one(layer, Winograd(), x)
    parts, other = one(layer, Winograd(), *x.split(3))
    torch.testing.assert_close(cell.tap_limits, other.tap_limits)
    torch.testing.assert_close(cell.tap_power, other.tap_power)
    with torch.no_grad():
        assert torch.equal(whole(x), parts(x))


def test_a_range_of_weights_by_squared_error() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 8, 3, padding=1), torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        layer.weight[:, 0] *= 8  # an outlier
        net, _ = one(layer, Winograd(weight_range=Range("mse")), x)
        net(x)
        shipped = materialised(net, lambda module: module(x))
        frozen = computer_of(shipped).cells["0"]
        g = torch.from_numpy(reference.G[2])
        u = torch.einsum("ia,kcab,jb->ijkc", g, layer.weight.double(), g).reshape(-1, 64)
        u = (u.view(16, 8, 64) * (2.0**15 / frozen.mul.double())[:, None]).flatten(0, 1)
        steps = weight_qparams(u, 8, True, 0, None, Range("mse"))[0].view(16, 8)
        torch.testing.assert_close(frozen.us / frozen.input_scale, steps, rtol=1e-5, atol=0)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "bits"), list(itertools.product([2, 4, 6], [8, 16, 32])))
def test_gradients_are_those_of_the_convolution(tile: Any, bits: Any) -> None:
    """Straight-through: near the exact gradients of the convolution, which float64 gives; nearer with more bits."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 5, 3, padding=1), torch.randn(3, 6, 8, 8)
    net, _ = one(layer, Winograd(tile, bits), x)
    net.train()
    direction = torch.randn(3, 5, 8, 8)
    given_ = x.clone().requires_grad_()
    (net(given_) * direction).sum().backward()
    own = x.double().requires_grad_()
    weight, bias = layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()  # type: ignore[union-attr]
    (F.conv2d(own, weight, bias, padding=1) * direction).sum().backward()
    found = dict(net.named_parameters())
    least = {8: {2: 25, 4: 12, 6: 2}[tile], 16: 35, 32: 80}[bits]
    assert sqnr_db(weight.grad, found["0.weight"].grad) > least  # type: ignore[arg-type]
    assert sqnr_db(own.grad, given_.grad) > least  # type: ignore[arg-type]
    assert sqnr_db(bias.grad, found["0.bias"].grad) > 90  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [2, 4])
def test_taps_that_saturate_pass_no_gradient(tile: Any) -> None:
    """Against the same computation with the rounding left out and those taps cut off."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.rand(2, 3, 8, 8)
    net, cell = one(layer, Winograd(tile), x)
    cell.tap_limits.div_(3)
    leaf = x.clone().requires_grad_()
    direction = torch.randn(2, 4, 8, 8)
    (net(leaf) * direction).sum().backward()
    with torch.no_grad():
        net(x)
        frozen = computer_of(materialised(net, lambda module: module(x))).cells["0"]
    other = x.clone().requires_grad_()
    matrix = algorithm.input_matrix(tile, (3, 3))
    levels = torch.from_numpy(integers(net, "0", x)[0].astype(np.float32))
    with torch.no_grad():
        d = algorithm.transformed(matrix, cell.tiling.cut(levels))
        full = algorithm.scaled_taps(d, frozen.mul, frozen.offset, tile + 3, 16)
        inside = (full >= -128) & (full <= 127)
    assert 0.02 < float(inside.float().mean()) < 0.98
    v = algorithm.transformed(matrix, cell.tiling.cut(other / frozen.input_scale))
    v[tile + 3] -= frozen.offset[:, None]
    v = v * (frozen.mul.float() / 2**15)[:, :, None] * inside
    base = algorithm.base_of(frozen.u, frozen.mul, frozen.offset, tile + 3)
    f = algorithm.with_base(algorithm.accumulated(v, frozen.u.float()), base, tile + 3) * frozen.us[:, :, None]
    y = cell.tiling.join(algorithm.output_tiles(f, cell.tiling.taps), 2, 8, 8)
    (y * direction).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_learned_transforms_have_the_gradients_of_finite_differences() -> None:
    """In float64, without quantizers, through all three transforms, the weights and the input."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 2, 3, padding=1).double(), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    tiling = algorithm.Tiling.of(4, (3, 3), (1, 1, 1, 1))

    def compute(x: Tensor, weight: Tensor, at: Tensor, bt: Tensor, g: Tensor) -> Tensor:
        u = algorithm.transformed_weight(weight, g, g)
        d = algorithm.transformed(algorithm.kronecker(bt, bt), tiling.cut(x))
        f = algorithm.transformed(algorithm.kronecker(at, at), algorithm.accumulated(d, u))
        return tiling.join(f.view(4, 4, 2, -1), 1, 5, 4)

    leaves = [x, layer.weight.detach(), *algorithm.transforms(4).tensors(torch.float64)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(compute, leaves)
    # and the cell's own gradients of its transforms are these
    compute(*leaves).sum().backward()
    net, cell = one(layer.float(), Winograd(4, 32, "flex"), x.float())
    net(x.float()).sum().backward()
    for name, leaf in zip(("at", "bt", "g"), leaves[2:], strict=True):
        torch.testing.assert_close(getattr(cell, name).grad, leaf.grad.float(), rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [16, 32])
def test_learned_transforms_learn(bits: Any) -> None:
    """Pushed off Cook and Toom's, they find transforms of the convolution again, through all quantizers."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 12, 12)
    net, cell = one(layer, Winograd(2, bits, "flex"), x)
    net.train()
    with torch.no_grad():
        exact = layer(x)
        for matrix in (cell.at, cell.bt, cell.g):
            matrix.add_(0.1 * torch.randn_like(matrix))
        before = sqnr_db(exact, net(x))
    optimizer = torch.optim.Adam([cell.at, cell.bt, cell.g], 5e-3)
    for done in range(150):
        cell.step(done, 150)
        optimizer.zero_grad()
        F.mse_loss(net(x), exact).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        assert sqnr_db(exact, net(x)) > before + 15


@pytest.mark.parametrize("technique", [Winograd(2, 16), Winograd(4, 32), Winograd(6, 32, "flex")], ids=repr)
def test_the_normalisation_itself_runs_in_training(technique: Winograd) -> None:
    torch.manual_seed(0)
    model, x = Normalised(bias=True), torch.randn(8, 5, 8, 8)
    net = bs.apply(model.eval(), bs.Plan({"conv": technique}), [(x, None)]).train()
    plain = copy.deepcopy(model).train()
    got, wanted = net(x), plain(x)
    assert sqnr_db(wanted.detach(), got.detach()) > 35
    (got.square().sum()).backward()
    (wanted.square().sum()).backward()
    found = dict(net.named_parameters())
    assert sqnr_db(plain.conv.weight.grad, found["conv.weight"].grad) > 25  # type: ignore[arg-type]
    torch.testing.assert_close(net.norm.running_mean, plain.norm.running_mean, rtol=1e-2, atol=1e-2)


def test_ranges_of_taps_follow_training() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 3, 3, padding=1), torch.rand(2, 3, 8, 8)
    net, cell = one(layer, Winograd(), x)
    limits = cell.tap_limits.clone()
    cell.step(0, 10)
    assert torch.equal(cell.tap_limits, limits)  # nothing was seen
    with torch.no_grad():
        net(x / 2)
    cell.step(0, 10)
    assert torch.equal(cell.tap_limits, limits)  # nor in eval
    net.train()
    net(x / 2)
    cell.step(0, 10)
    moved = limits - cell.tap_limits
    assert bool((moved[1] > 0).all())
    torch.testing.assert_close(moved, 0.01 * limits / 2, rtol=0.1, atol=1e-4)  # widened alike
    before = cell.tap_limits.clone()
    cell.step(1, 10)
    assert torch.equal(cell.tap_limits, before)
