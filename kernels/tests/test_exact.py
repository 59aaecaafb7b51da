"""Every instruction set gives the bits of the contract, which ``contract.py`` computes on its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import contract
from bitsmith_kernels import Winograd, isas
from contract import Case

FORMS = [(2, 8), (4, 8), (2, 16), (4, 16)]


def bounded(rng: np.random.Generator, case: Case, extreme: bool) -> np.ndarray:
    """int16 weights whose accumulators use all of int32, up to the bound in the extreme case."""
    most = contract.largest(case)
    taps, channels_out, channels_in = case.u.shape
    u = np.empty(case.u.shape, np.int16)
    for p in range(taps):
        limit = min((2**31 - 1) // max(int(most[p].sum()), 1), 32767)
        size = (channels_out, channels_in)
        u[p] = limit * rng.choice([-1, 1], size) if extreme else rng.integers(-limit, limit + 1, size)
    return u


def make(
    rng: np.random.Generator,
    tile: int,
    bits: int,
    size: tuple[int, int, int],
    channels: tuple[int, int],
    *,
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    x_zero: int = 0,
    x_signed: bool = False,
    signed: bool = False,
    image: str = "random",
    extreme: bool = False,
    saturate: bool = False,
    relu: bool = False,
    residual: str | None = None,
    bias: bool = True,
) -> Case:
    channels_in, channels_out = channels
    taps = (tile + 2) ** 2
    shape = (*size, channels_in)
    x: Any
    if image == "random":
        x = rng.integers(0, 256, shape, np.uint8)
    elif image == "edges":
        x = rng.choice(np.array([0, 255], np.uint8), shape)
    else:
        x = np.full(shape, int(image), np.uint8)
    if x_signed:
        x, x_zero = (x ^ 0x80).view(np.int8), x_zero - 128
    # 8 bits: from scales that never saturate to those that nearly always do
    low, high = (2000, 32768) if saturate else (100, 32768 * 127 // (1020 if tile == 2 else 25500))
    if bits == 16:
        low, high = 1, 32768
    mul = rng.integers(low, high, (taps, channels_in))
    if extreme and bits == 16:
        mul[:] = 32767
    u = np.zeros((taps, channels_out, channels_in), np.int8 if bits == 8 else np.int16)
    case = Case(tile, bits, u, mul, np.ones((taps, channels_out)), None, x, x_zero, pads)
    if rng.integers(0, 3):
        least, greatest = contract.reach(case)
        ends = np.array([least, greatest])
        case.offset = rng.choice(ends, channels_in) if extreme else rng.integers(least, greatest + 1, channels_in)
    if bits == 16:
        case.u = bounded(rng, case, extreme)
    elif extreme:
        case.u = rng.choice(np.array([-127, 127], np.int8), u.shape)
    else:
        case.u = rng.integers(-127, 128, u.shape).astype(np.int8)
    v = contract.transformed(case)
    if bits == 8:
        v = np.clip(v, -128, 127)
    acc = np.abs(np.einsum("pnyxc,pkc->pnyxk", v, case.u.astype(np.int64)).astype(float)).mean((1, 2, 3)) + 1
    # each tap contributes a few levels
    case.us = (rng.uniform(2, 30, acc.shape) / acc).astype(np.float32)
    case.bias = rng.normal(0, 20, channels_out).astype(np.float32) if bias else None
    height, width = size[1] + pads[0] + pads[2] - 2, size[2] + pads[1] + pads[3] - 2
    case.call = {"scale": float(rng.uniform(0.3, 1.5)), "relu": relu, "signed": signed}
    case.call["zero"] = int(rng.integers(0, 256)) - (128 if signed else 0)
    if residual:
        r = rng.integers(0, 256, (size[0], height, width, channels_out), np.uint8)
        case.call["residual"] = r.view(np.int8) if residual == "signed" else r
        case.call["residual_zero"] = int(rng.integers(0, 128))
        case.call["residual_scale"] = float(rng.uniform(0.05, 0.7))
    return case


def agree(case: Case, threads: tuple[int, ...] = (1, 2, 3)) -> None:
    expected = contract.run(case)
    for isa in isas():
        layer = Winograd(**case.layer(), isa=isa)
        assert layer.isa == isa
        for count in threads:
            y = layer(case.x, threads=count, **case.call)
            assert y.dtype == expected.dtype
            np.testing.assert_array_equal(y, expected, err_msg=f"{isa}, {count} threads")


def test_outputs_are_spread() -> None:
    """The cases below say little unless their outputs take many values."""
    case = make(np.random.default_rng(0), 4, 16, (1, 12, 12), (16, 32))
    assert len(np.unique(contract.run(case))) > 100


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    tile, bits = draw(st.sampled_from(FORMS))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    height = draw(st.integers(max(1, 3 - pads[0] - pads[2]), 15))
    width = draw(st.integers(max(1, 3 - pads[1] - pads[3]), 15))
    # many channels: the products are then taken tap by tap and not by columns of taps
    channels = (draw(st.one_of(st.integers(1, 70), st.integers(193, 260))), draw(st.integers(1, 70)))
    case = make(
        np.random.default_rng(draw(st.integers(0, 2**32))),
        tile,
        bits,
        (draw(st.integers(1, 3)), height, width),
        channels,
        pads=pads,  # type: ignore[arg-type]
        x_zero=draw(st.sampled_from([0, 128, 255, 7])),
        x_signed=draw(st.booleans()),
        signed=draw(st.booleans()),
        image=draw(st.sampled_from(["random", "edges", "0", "255"])),
        extreme=draw(st.booleans()),
        saturate=draw(st.booleans()),
        relu=draw(st.booleans()),
        residual=draw(st.sampled_from([None, "unsigned", "signed"])),
        bias=draw(st.booleans()),
    )
    agree(case, (1, draw(st.sampled_from([2, 3]))))


@pytest.mark.parametrize(("tile", "bits"), FORMS)
@pytest.mark.parametrize(
    ("size", "channels"),
    [
        ((1, 1, 1), (1, 1)),
        ((1, 7, 7), (256, 160)),  # few tiles: threads share the output channels
        ((2, 14, 14), (64, 64)),
        ((1, 28, 30), (3, 33)),
        ((1, 56, 56), (16, 16)),  # several blocks of tiles, and a block of one column
        ((1, 5, 3), (131, 49)),
        ((1, 24, 20), (200, 40)),  # weights beyond the second-level cache: larger groups of tiles
        ((1, 9, 40), (32, 24)),
    ],
)
def test_sizes(tile: int, bits: int, size: tuple[int, int, int], channels: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(size) + channels[0])
    agree(make(rng, tile, bits, size, channels, x_zero=3, residual="unsigned", relu=True))


@pytest.mark.parametrize(("tile", "bits"), FORMS)
@pytest.mark.parametrize("x_zero", [0, 128, 255])
@pytest.mark.parametrize("image", ["0", "255", "edges"])
def test_extremes(tile: int, bits: int, x_zero: int, image: str) -> None:
    """Weights at the ends of their range, and accumulators at the ends of int32 where bits is 16."""
    rng = np.random.default_rng(x_zero)
    agree(make(rng, tile, bits, (1, 6, 9), (70, 40), x_zero=x_zero, image=image, extreme=True, saturate=True), (1,))


@pytest.mark.parametrize("tile", [2, 4])
def test_accumulator_at_the_bound(tile: int) -> None:
    """An image and weights for which sum(V * U) is as near to 2^31 as the bound lets it be, at both ends."""
    rng = np.random.default_rng(0)
    case = make(rng, tile, 16, (1, tile + 2, tile + 2), (1, 32), pads=(0, 0, 0, 0), extreme=True)
    rows = contract._B[tile]
    for tap in range((tile + 2) ** 2):
        pushes = np.outer(rows[tap // (tile + 2)], rows[tap % (tile + 2)])
        for sign in (1, -1):
            case.x = np.where(sign * pushes > 0, 255, 0).astype(np.uint8)[None, :, :, None]
            case.x = np.repeat(case.x, case.u.shape[2], axis=3)
            agree(case, (1,))


def test_the_clamp_is_before_the_conversion() -> None:
    """Values far outside int32 saturate to the right end."""
    for sign in (1, -1):
        case = make(np.random.default_rng(1), 2, 8, (1, 4, 4), (4, 4))
        case.us = np.full((16, 4), 1e18, np.float32)
        case.bias = np.full(4, sign * 1e20, np.float32)
        case.us *= np.float32(0)
        case.call = {"scale": 1e-6, "zero": 9, "low": 3, "high": 250}
        agree(case)
        assert set(np.unique(contract.run(case))) == {250 if sign > 0 else 3}


def test_narrow_output_levels() -> None:
    case = make(np.random.default_rng(2), 2, 8, (1, 8, 8), (32, 32), relu=True)
    case.call |= {"low": 2, "high": 14, "zero": 5}
    agree(case)
    case.call |= {"low": 0, "high": 4}  # below the zero point: ReLU leaves nothing but the upper limit
    agree(case)


def test_ties_round_to_even() -> None:
    """Halves, exactly: u of one tap, so that every output is acc / 2."""
    u = np.zeros((16, 1, 1), np.int8)
    u[5] = 1
    x = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    case = Case(2, 8, u, np.full((16, 1), 16384), np.full((16, 1), 0.5, np.float32), None, x, 0, (0, 0, 0, 0))
    agree(case)
    assert (np.diff(contract.run(case).ravel().astype(int)) % 2 == 0).any()


def test_inputs_are_unchanged_and_need_not_be_contiguous() -> None:
    case = make(np.random.default_rng(3), 4, 8, (2, 9, 9), (20, 20), residual="unsigned")
    before = {"x": case.x.copy(), "u": case.u.copy(), "r": case.call["residual"].copy()}
    layer = Winograd(**case.layer())
    y = layer(case.x, **case.call)
    wide = np.zeros((2, 9, 18, 20), np.uint8)
    wide[:, :, ::2] = case.x
    np.testing.assert_array_equal(layer(wide[:, :, ::2], **case.call), y)
    turned = Winograd(**(case.layer() | {"u": np.asfortranarray(case.u)}))
    np.testing.assert_array_equal(turned(case.x, **case.call), y)
    np.testing.assert_array_equal(case.x, before["x"])
    np.testing.assert_array_equal(case.u, before["u"])
    np.testing.assert_array_equal(case.call["residual"], before["r"])


def test_matches_a_plain_convolution() -> None:
    """F(2, 3) without rounding anywhere (weights that are multiples of 4, small images) is the convolution itself."""
    rng = np.random.default_rng(4)
    w = 4 * rng.integers(-3, 4, (5, 6, 3, 3))  # [K, C, 3, 3]
    g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    u = np.einsum("ia,kcab,jb->ijkc", g, w, g).reshape(16, 5, 6)
    assert (u == np.rint(u)).all()
    x = rng.integers(0, 32, (2, 7, 10, 6), np.uint8)
    # V = D / 2 must be exact as well: even pixels, and mul of a half
    x = x - x % 2
    layer = Winograd(2, 8, u.astype(np.int8), np.full((16, 6), 16384), np.full((16, 5), 2 / 64), None)
    y = layer(x, scale=1.0, signed=True)
    padded = np.pad(x.astype(int), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    plain = np.einsum("nyxcab,kcab->nyxk", windows, w)
    np.testing.assert_array_equal(y, np.clip(np.rint(plain / 64), -128, 127))
