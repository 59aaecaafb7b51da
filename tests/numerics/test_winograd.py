"""Transforms against direct correlation, exactly; the integer path against plain NumPy, bit for bit."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import winograd_reference as reference
from bitsmith.numerics.winograd import (
    ACCUMULATOR,
    FixedPoint,
    Tiling,
    accumulated,
    base_of,
    bound_of_taps,
    check_accumulator,
    cook_toom,
    exact_dtype,
    fixed_point,
    input_matrix,
    integer_convolution,
    kronecker,
    multipliers,
    scaled_taps,
    shared_steps,
    tap_bounds,
    transformed,
    transformed_weight,
    transforms,
    weight_steps,
    with_base,
)
from bitsmith.numerics.winograd_operation import load

# -- transforms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [2, 4])
def test_matrices_are_those_of_lavin_and_gray(tile: int) -> None:
    found = transforms(tile)
    for ours, theirs in ((found.at, reference.AT), (found.bt, reference.BT), (found.g, reference.G)):
        assert np.array_equal(np.array([[float(x) for x in row] for row in ours]), theirs[tile])


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_transforms_are_exact_with_an_integer_input_transform(tile: int) -> None:
    found = transforms(tile)
    assert found.exact
    assert found.sizes == (tile, tile + 2, 3)
    assert all(x.denominator == 1 for row in found.bt for x in row)


POINTS = st.fractions(min_value=-4, max_value=4, max_denominator=5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), m=st.integers(1, 6), r=st.integers(1, 5))
def test_any_points_give_the_correlation(data: st.DataObject, m: int, r: int) -> None:
    points = data.draw(st.lists(POINTS, min_size=m + r - 2, max_size=m + r - 2, unique=True))
    found = cook_toom(points, m, r)
    assert found.exact
    d = data.draw(st.lists(POINTS, min_size=m + r - 1, max_size=m + r - 1))
    w = data.draw(st.lists(POINTS, min_size=r, max_size=r))
    product = [
        sum(x * y for x, y in zip(row, w, strict=True)) * sum(x * y for x, y in zip(other, d, strict=True))
        for row, other in zip(found.g, found.bt, strict=True)
    ]
    got = [sum(x * y for x, y in zip(row, product, strict=True)) for row in found.at]
    assert got == [sum(d[o + k] * w[k] for k in range(r)) for o in range(m)]


def test_exact_can_fail() -> None:
    found = cook_toom((0, 1, -1), 2)
    assert found.scaled((2, 1, 1, 3), (1, Fraction(1, 2), 1, 1)).exact
    assert not type(found)(found.at, found.bt, found.scaled((2, 1, 1, 1), (1, 1, 1, 1)).g).exact


@pytest.mark.parametrize("points", [(0, 1), (0, 1, 1), (0, 1, -1, 2)])
def test_points_must_differ_and_suffice(points: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 different points"):
        cook_toom(points, 2)


def test_six_outputs_err_less_in_float32_with_halves() -> None:
    """Against the points +-3/2, as in ``methods.md``: about a tenth."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 16, 24, 24), torch.randn(8, 16, 3, 3)
    exact = F.conv2d(x.double(), w.double())
    worst = []
    for found in (transforms(6), cook_toom((0, 1, -1, 2, -2, Fraction(3, 2), Fraction(-3, 2)), 6)):
        at, bt, g = found.tensors()
        tiling = Tiling((6, 6), (8, 8), (0, 0, 0, 0))
        f = accumulated(transformed(kronecker(bt, bt), tiling.cut(x)), transformed_weight(w, g, g))
        y = tiling.join(transformed(kronecker(at, at), f).view(6, 6, 8, -1), 1, 24, 24)
        worst.append(float((y - exact).abs().max()))
    assert worst[0] < 1e-3
    assert worst[1] > 3 * worst[0]


# -- tiles -------------------------------------------------------------------------------------------------------------

PADS = st.tuples(*[st.integers(0, 2)] * 4)


@settings(max_examples=80, deadline=None)
@given(
    tile=st.sampled_from([2, 4, 6]),
    kernel=st.sampled_from([(3, 3), (1, 3), (3, 1)]),
    pads=PADS,
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    seed=st.integers(0, 99),
)
def test_any_map_in_float64(
    tile: int, kernel: tuple[int, int], pads: tuple[int, int, int, int], size: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    w = torch.randn(4, 3, *kernel, generator=generator, dtype=torch.float64)
    tiling = Tiling.of(tile, kernel, pads)
    top, left, bottom, right = pads
    if size[0] + top + bottom < kernel[0] or size[1] + left + right < kernel[1]:
        with pytest.raises(ValueError, match="smaller than the kernel"):
            tiling.cut(x)
        return
    at, bt, g = zip(*(transforms(tile, k).tensors(torch.float64) for k in kernel), strict=True)
    f = accumulated(transformed(kronecker(*bt), tiling.cut(x)), transformed_weight(w, *g))
    y = tiling.join(transformed(kronecker(*at), f).view(*tiling.m, 4, -1), 2, *size)
    torch.testing.assert_close(y, F.conv2d(F.pad(x, (left, right, top, bottom)), w), rtol=1e-10, atol=1e-10)


# -- the integer path --------------------------------------------------------------------------------------------------


def layer(
    tile: int, bits: int, channels: int, out: int, generator: np.random.Generator, zero: int
) -> tuple[np.ndarray, ...]:
    """Transformed weights, multipliers, offsets, units and bias within the kernels' bounds; not what any network
    has."""
    taps = (tile + 2) ** 2
    mul = generator.integers(1, 2**15, (taps, channels))
    mul[:2, 0] = 1, 2**15 - 1
    bias = generator.standard_normal(out).astype(np.float32)
    us = (generator.random((taps, out)) * 1e-3 + 1e-6).astype(np.float32)
    low, high = tap_bounds(input_matrix(tile, (3, 3)), -zero, 255 - zero)
    tap = tile + 3
    offset = generator.integers(int(low[tap]), int(high[tap]) + 1, channels) * generator.integers(0, 2)
    if bits == 8:
        return generator.integers(-127, 128, (taps, out, channels)), mul, offset, us, bias
    bound = bound_of_taps(low, high, torch.from_numpy(mul), torch.from_numpy(offset), tap, 16).numpy()
    bound[tap] += np.abs(offset) * mul[tap] // 2**15 + 1  # what the sum begins with
    most = np.minimum(ACCUMULATOR // np.maximum(bound.sum(1), 1), 2**15 - 1)[:, None, None]
    return generator.integers(-most, most + 1, (taps, out, channels)), mul, offset, us, bias


@settings(max_examples=40, deadline=None)
@given(
    tile=st.sampled_from([2, 4]),
    bits=st.sampled_from([8, 16]),
    channels=st.integers(1, 9),
    pads=PADS,
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    zero=st.sampled_from([0, 1, 97, 128, 254, 255]),
    extreme=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_integer_path_is_the_contract(
    tile: int,
    bits: int,
    channels: int,
    pads: tuple[int, ...],
    size: tuple[int, int],
    zero: int,
    extreme: bool,
    seed: int,
) -> None:
    top, left, bottom, right = pads
    if size[0] + top + bottom < 3 or size[1] + left + right < 3:
        return
    generator = np.random.default_rng(seed)
    u, mul, offset, us, bias = layer(tile, bits, channels, 3, generator, zero)
    x = (
        generator.choice([0, 255], (2, channels, *size))
        if extreme
        else generator.integers(0, 256, (2, channels, *size))
    )
    wanted = reference.convolution(x, zero, u, mul, offset, us, bias, tile, pads, bits)
    given_ = [torch.from_numpy(a) for a in (x - zero, u, mul, offset, us, bias)]
    tiling = Tiling.of(tile, (3, 3), (top, left, bottom, right))
    got = integer_convolution(*given_, input_matrix(tile, (3, 3)), tiling, bits)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy().view(np.int32), wanted.view(np.int32))


def test_sums_beyond_float32_are_exact() -> None:
    """1100 channels of extremes: more than 2^24, where float32 would round; as many of 512 fit."""
    assert exact_dtype(1100, 8) == torch.float64
    assert exact_dtype(1032, 8) == torch.float32
    generator = np.random.default_rng(0)
    u, mul, offset, us, bias = layer(2, 8, 1100, 2, generator, 0)
    u = np.where(u > 0, 127, 126)
    mul[:] = 2**15 - 1
    x = generator.choice([254, 255], (1, 1100, 4, 4))
    wanted = reference.convolution(x, 0, u, mul, offset, us, bias, 2, (0, 0, 0, 0), 8)
    got = integer_convolution(
        *(torch.from_numpy(a) for a in (x, u, mul, offset, us, bias)),
        input_matrix(2, (3, 3)),
        Tiling.of(2, (3, 3), (0,) * 4),
        8,
    )
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_the_operation_computes_the_same_and_is_well_formed() -> None:
    load()
    load()
    generator = np.random.default_rng(1)
    u, mul, offset, us, bias = layer(4, 8, 5, 3, generator, 7)
    d = torch.from_numpy(generator.integers(0, 256, (2, 5, 7, 6)) - 7)
    scale = float(np.float32(0.0371))
    u_ = torch.from_numpy(u).to(torch.int8)
    mul_, offset_ = (torch.from_numpy(a).to(torch.int16) for a in (mul, offset))
    arguments = (
        d.float() * scale,
        u_,
        mul_,
        offset_,
        torch.from_numpy(us),
        torch.from_numpy(bias),
        scale,
        4,
        [3, 3],
        [1, 0, 2, 1],
    )
    got = torch.ops.bitsmith.winograd(*arguments, 8)
    tiling = Tiling.of(4, (3, 3), (1, 0, 2, 1))
    wanted = integer_convolution(d, u_, mul_, offset_, *arguments[4:6], input_matrix(4, (3, 3)), tiling, 8)
    assert torch.equal(got, wanted)
    torch.library.opcheck(torch.ops.bitsmith.winograd.default, (*arguments, 8))


@settings(max_examples=200, deadline=None)
@given(
    low=st.integers(-25500, 0),
    ends=st.tuples(st.integers(0, 25500), st.integers(0, 25500)),
    mul=st.integers(1, 2**15 - 1),
    bits=st.sampled_from([8, 16]),
)
def test_scaled_taps_round_half_up(low: int, ends: tuple[int, int], mul: int, bits: int) -> None:
    """Of two taps the offset moves the second, which reaches from ``low`` over 25500 at most."""
    d, offset = (low + end for end in ends)
    taps = torch.tensor([[float(d)], [float(d)]])
    got, moved = scaled_taps(taps, torch.tensor([[mul], [mul]]), torch.tensor([offset]), 1, bits)[:, 0].tolist()
    assert moved == int(scaled_taps(taps[:1] - offset, torch.tensor([[mul]]), torch.tensor([0]), 0, bits))
    exact = Fraction(d * mul, 2**15)
    wanted = (exact + Fraction(1, 2)).__floor__()
    assert got == (max(-128, min(127, wanted)) if bits == 8 else wanted)
    if bits == 16:
        assert abs(got) <= abs(d)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("tile", [2, 4])
def test_one_tap_keeps_the_mean(tile: int, kernel: tuple[int, int]) -> None:
    sums = input_matrix(tile, kernel).sum(1)
    assert sums.nonzero().flatten().tolist() == [Tiling.of(tile, kernel, (0, 0, 0, 0)).mean_tap]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("zero", [0, 3, 128, 255])
def test_bounds_of_taps_are_attained(tile: int, zero: int) -> None:
    bt = input_matrix(tile, (3, 3))
    low, high = tap_bounds(bt, -zero, 255 - zero)
    for p in range(len(bt)):
        greatest = torch.where(bt[p] > 0, 255.0 - zero, -float(zero)).double()
        least = torch.where(bt[p] > 0, -float(zero), 255.0 - zero).double()
        assert float(bt[p].double() @ greatest) == float(high[p])
        assert float(bt[p].double() @ least) == float(low[p])
    assert float(torch.maximum(-low, high).max()) <= (255 * 4 if tile == 2 else 255 * 100) < 2**15


def test_multipliers_by_the_formula() -> None:
    peaks = torch.tensor([1020.0, 127.0, 126.9, 0.0, 25500.0, 8e6], dtype=torch.float64)
    found = multipliers(peaks / 127)
    assert found.tolist() == [int(127 / 1020 * 32768), 32767, 32767, 32767, int(127 / 25500 * 32768), 1]


def test_scales_by_hand() -> None:
    """A channel has a scale of its own, a silent one that of half the greatest; the last tap is halved by its
    offset."""
    low = [[-800.0, -200.0, -10.0, 0.0], [0.0] * 4, [0.0, 100.0, 0.0, 0.0]]
    high = [[700.0, 400.0, 5.0, 0.0], [0.0] * 4, [2000.0, 900.0, 300.0, 0.0]]
    limits = torch.tensor([low, high], dtype=torch.float64)
    ends = (torch.tensor([-510.0, -510.0, 0.0]), torch.tensor([510.0, 300.0, 1020.0]))
    real = torch.ones(3, 1, 4, dtype=torch.float64)
    found = fixed_point(real, limits, torch.zeros(3, 4), ends, 2, 8)
    wanted = [[510.0, 400.0, 510 / 2, 510 / 2], [510.0] * 4, [510.0, 400.0, 510 / 2, 510 / 2]]
    assert found.mul.tolist() == [[min(int(127 / p * 2**15), 2**15 - 1) for p in row] for row in wanted]
    assert found.offset.tolist() == [510, 500, 150, 0]
    assert found.bound.tolist() == [[127, 128, 128, 128], [127] * 4, [127, 128, 127, 127]]
    assert fixed_point(real, limits, torch.ones(3, 4), ends, 2, 16).offset.tolist() == [0] * 4


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), tile=st.sampled_from([2, 4]))
def test_the_offset_changes_nothing_but_rounding(seed: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tap, taps = tile + 3, (tile + 2) ** 2
    d = torch.randint(0, 25500, (taps, 7, 50), generator=generator).float()
    u = torch.randint(-127, 128, (taps, 4, 7), generator=generator)
    mul = torch.randint(1000, 2**15, (taps, 7), generator=generator)
    offset = torch.randint(0, 25500, (7,), generator=generator)
    sums = []
    for shift in (offset, torch.zeros_like(offset)):
        v = scaled_taps(d, mul, shift, tap, 16)
        acc = accumulated(v.double(), u.double())
        sums.append(with_base(acc, base_of(u, mul, shift, tap), tap).double())
    assert float((sums[0] - sums[1]).abs().max()) <= 127 * 7 + 1  # half a level of V and one of the float's last bits
    assert torch.equal(sums[0][:tap], sums[1][:tap])
    assert torch.equal(sums[0][tap + 1 :], sums[1][tap + 1 :])


@settings(max_examples=50, deadline=None)
@given(
    channels=st.integers(1, 700),
    tile=st.sampled_from([2, 4]),
    zero=st.integers(0, 255),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_sixteen_bits_never_overflow(channels: int, tile: int, zero: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bt = input_matrix(tile, (3, 3)).double()
    u = torch.randn(len(bt), 5, channels, generator=generator, dtype=torch.float64)
    u = u.sign() * u.abs().pow(spread)  # 0: all alike, which fills the accumulator most
    low, high = tap_bounds(bt, -zero, 255 - zero)
    power = torch.rand(len(bt), channels, generator=generator, dtype=torch.float64) * 4e6
    mul = multipliers(shared_steps(u, power, torch.maximum(-low, high)))
    zeros = torch.zeros(channels, dtype=torch.int32)
    scaling = FixedPoint(mul, zeros, bound_of_taps(low, high, mul, zeros, 5, 16))
    u = u * scaling.steps[:, None]
    units = weight_steps(u, scaling.bound, 16)
    integers = torch.round(u / units[:, :, None])
    assert float(integers.abs().max()) <= 2**15 - 1
    most = check_accumulator(integers, scaling, 5, "layer")
    assert 0 < most <= ACCUMULATOR
    # the room is used: some accumulator comes near, or some weight has all of its 16 bits
    assert most > 0.9 * ACCUMULATOR or float(integers.abs().max()) == 2**15 - 1


def test_an_accumulator_that_could_overflow_is_refused_with_its_bound() -> None:
    u, bound = torch.full((2, 1, 70000), 127.0), torch.tensor([[128], [300]]).repeat(1, 70000)
    mul, zeros = torch.full((2, 70000), 2**14), torch.zeros(70000, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"'conv3'.*{127 * 300 * 70000}"):
        check_accumulator(u, FixedPoint(mul, zeros, bound), 0, "conv3")
    with pytest.raises(ValueError, match=f"'conv3'.*{127 * (128 + 200) * 70000}"):  # with what the sum begins with
        check_accumulator(u, FixedPoint(mul, zeros + 400, bound), 0, "conv3")


@pytest.mark.parametrize("channels", [64, 512])
def test_the_shared_accumulator_is_shared_well(channels: int) -> None:
    """The error of whole products is no more than a tenth above the least that multiples of it, or of one step for all
    channels, give."""
    generator = torch.Generator().manual_seed(0)
    bt = input_matrix(4, (3, 3)).double()
    u = torch.randn(36, 8, channels, generator=generator, dtype=torch.float64)
    x = (torch.randn(16, channels, 36, generator=generator).relu() * 60).round().clamp(max=255).double()
    d = torch.einsum("pq,ncq->pcn", bt, x)
    low, high = tap_bounds(bt, 0, 255)
    chosen = shared_steps(u, d.square().mean(2), torch.maximum(-low, high))

    def error(steps: torch.Tensor) -> float:
        mul, zeros = multipliers(steps), torch.zeros(channels, dtype=torch.int32)
        absorbed = u * (2.0**15 / mul.double())[:, None]
        units = weight_steps(absorbed, bound_of_taps(low, high, mul, zeros, 7, 16), 16)
        v, w = scaled_taps(d, mul, zeros, 7, 16).double(), torch.round(absorbed / units[:, :, None])
        got = torch.bmm(w, v) * units[:, :, None]
        return float((got - torch.bmm(u, d)).square().sum())

    alike = chosen.square().mean(1, keepdim=True).sqrt().expand_as(chosen)  # one step for all channels
    tried = [error(steps * 2.0 ** (k / 2)) for k in range(-6, 7) for steps in (chosen, alike)]
    assert error(chosen) <= 1.1 * min(tried)
    assert max(tried) > 3 * min(tried)


def test_steps_of_weights() -> None:
    u = torch.zeros(2, 2, 3, dtype=torch.float64)
    u[0, 0] = torch.tensor([-2.54, 1.0, 0.0])
    steps = weight_steps(u, torch.full((2, 3), 128), 8)
    assert steps[0].tolist() == pytest.approx([0.02, 1.0])
    assert steps[1].tolist() == [1.0, 1.0]
    assert weight_steps(u, torch.ones(2, 3), 16)[0, 0] == pytest.approx(2.54 / 32767)


def test_every_entry_of_the_two_dimensional_matrix() -> None:
    matrix, bt = input_matrix(4, (3, 3)), reference.BT[4]
    for (i, j), (k, n) in itertools.product(itertools.product(range(6), repeat=2), repeat=2):
        assert float(matrix[6 * i + j, 6 * k + n]) == bt[i, k] * bt[j, n]
