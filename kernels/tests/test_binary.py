"""Products of one bit: every instruction set gives the integers that NumPy does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith_kernels import BinaryConv, BinaryLinear, binary_isas, pack_signs


def signs(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1, -1).astype(np.int64)


@pytest.mark.parametrize("isa", binary_isas())
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 300) | st.sampled_from([64, 512, 1984, 1985, 2048, 4608]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
)
def test_the_sums_are_exact(isa: str, rows: int, columns: int, length: int, seed: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(rows, length)).astype(np.float32), rng.normal(size=(columns, length))
    x[rng.random(x.shape) < 0.1] = 0.0
    got = BinaryLinear(weights, isa=isa)(x, threads=threads)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, signs(x) @ signs(weights).T)


@pytest.mark.parametrize("isa", binary_isas())
@pytest.mark.parametrize("length", [63, 64, 65, 31 * 64, 32 * 64, 20_000])
def test_extremes(isa: str, length: int) -> None:
    ones = np.ones((5, length))
    layer = BinaryLinear(np.concatenate([ones[:1], -ones[:1]]), isa=isa)
    np.testing.assert_array_equal(layer(ones), np.array([[length, -length]] * 5))
    np.testing.assert_array_equal(layer(-ones), np.array([[-length, length]] * 5))


@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_packing_is_bit_by_bit(rows: int, length: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(rows, length))
    wanted = [
        [
            sum(1 << k for k in range(64) if 64 * w + k < length and row[64 * w + k] >= 0)
            for w in range(-(-length // 64))
        ]
        for row in x
    ]
    assert pack_signs(x).tolist() == wanted


def test_nothing_in_nothing_out_and_one_bit_a_weight() -> None:
    layer = BinaryLinear(np.ones((16, 128)))
    assert layer(np.ones((0, 128))).shape == (0, 16)
    assert layer.packed_bytes == 16 * 128 / 8
    assert layer.isa == binary_isas()[0]
    assert binary_isas()[-1] == "reference"


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\[K, C\]"):
        BinaryLinear(np.ones(3))
    with pytest.raises(ValueError, match="this CPU and build have"):
        BinaryLinear(np.ones((1, 1)), isa="neon")
    layer = BinaryLinear(np.ones((2, 70)))
    with pytest.raises(ValueError, match=r"\[n, 70\]"):
        layer(np.ones((2, 71)))
    with pytest.raises(ValueError, match=r"uint64 \[n, 2\]"):
        layer.multiply(np.ones((2, 3), np.uint64))
    with pytest.raises(ValueError, match="threads"):
        layer(np.ones((2, 70)), threads=0)
    with pytest.raises(ValueError, match="rows of values"):
        pack_signs(np.ones(3))


def convolved(x: np.ndarray, weights: np.ndarray, strides: tuple, dilations: tuple, pads: tuple) -> np.ndarray:
    """The definition: sums of products of signs in int64 [n, K, H', W'], zeros outside the image."""
    top, left, bottom, right = pads
    padded = np.pad(signs(x), ((0, 0), (0, 0), (top, bottom), (left, right)))
    kernel = weights.shape[2:]
    sides = [
        (padded.shape[2 + axis] - (kernel[axis] - 1) * dilations[axis] - 1) // strides[axis] + 1 for axis in (0, 1)
    ]
    y = np.zeros((len(x), len(weights), *sides), np.int64)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i * dilations[0], i * dilations[0] + (sides[0] - 1) * strides[0] + 1, strides[0])
            columns = slice(j * dilations[1], j * dilations[1] + (sides[1] - 1) * strides[1] + 1, strides[1])
            y += np.einsum("nchw,kc->nkhw", padded[:, :, rows, columns], signs(weights[:, :, i, j]))
    return y


@pytest.mark.parametrize("isa", binary_isas())
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_convolution_is_exact_at_every_border(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    strides = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilations = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    pads = tuple(draw(st.integers(0, 4)) for _ in range(4))
    least = [max(1, (kernel[a] - 1) * dilations[a] + 1 - pads[a] - pads[a + 2]) for a in (0, 1)]
    height, width = (draw(st.integers(one, one + 40)) for one in least)
    channels = draw(st.integers(1, 40) | st.sampled_from([63, 64, 65, 130]))
    weights = rng.normal(size=(draw(st.integers(1, 20)), channels, *kernel))
    x = rng.normal(size=(draw(st.integers(1, 2)), channels, height, width)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = -0.0
    scale, shift = (rng.normal(size=len(weights)).astype(np.float32) for _ in range(2))
    sums = convolved(x, weights, strides, dilations, pads)
    layer = BinaryConv(weights, scale, shift, strides, dilations, pads, isa)
    got = layer(x, threads=draw(st.integers(1, 3)))
    # one rounding for the product, one for the sum
    wanted = sums.astype(np.float32) * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("isa", binary_isas())
def test_a_layer_takes_maps_of_any_size_in_turn(isa: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(70, 130, 3, 3))
    layer = BinaryConv(weights, pads=(1, 1, 1, 1), isa=isa)
    for height, width in [(28, 28), (7, 7), (1, 1), (33, 65), (7, 7)]:
        x = rng.normal(size=(1, 130, height, width)).astype(np.float32)
        np.testing.assert_array_equal(layer(x), convolved(x, weights, (1, 1), (1, 1), (1, 1, 1, 1)))


def test_one_layer_runs_in_many_threads_at_once() -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(40, 70, 3, 3))
    layer = BinaryConv(weights, strides=(1, 2), pads=(1, 1, 1, 1))
    images = [rng.normal(size=(1, 70, size, 19 - size)).astype(np.float32) for size in range(5, 13)] * 5
    wanted = [convolved(x, weights, (1, 2), (1, 1), (1, 1, 1, 1)) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for got, sums in zip(pool.map(lambda x: layer(x, threads=2), images), wanted, strict=True):
            np.testing.assert_array_equal(got, sums)


def test_a_nan_counts_as_negative() -> None:
    x = np.array([[[[np.nan, -1.0, 1.0]]]], np.float32)
    for isa in binary_isas():
        np.testing.assert_array_equal(BinaryConv(np.ones((1, 1, 1, 1)), isa=isa)(x), [[[[-1.0, -1.0, 1.0]]]])


def test_refusals_of_convolutions() -> None:
    ones = np.ones((2, 3, 3, 3))
    for wrong, says in (
        ({"strides": (0, 1)}, "a stride is 0"),
        ({"dilations": (1, -1)}, "a dilation is -1"),
        ({"pads": (0, 0, -1, 0)}, "a pad is -1"),
        ({"pads": (1, 1)}, "top, left, bottom, right"),
        ({"isa": "neon"}, "this CPU and build have"),
    ):
        with pytest.raises(ValueError, match=says):
            BinaryConv(ones, **wrong)
    with pytest.raises(ValueError, match=r"\[K, C, kh, kw\]"):
        BinaryConv(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"2\^24"):
        BinaryConv(np.ones((1, 2**14 + 1, 32, 32), np.int8))
    layer = BinaryConv(ones)
    with pytest.raises(ValueError, match=r"float32 \[n, 3, H, W\]"):
        layer(np.ones((1, 3, 4, 4)))
    with pytest.raises(ValueError, match="smaller, padded, than the kernel"):
        layer(np.ones((1, 3, 2, 9), np.float32))
    with pytest.raises(ValueError, match="threads"):
        layer(np.ones((1, 3, 4, 4), np.float32), threads=0)
    assert layer(np.ones((0, 3, 4, 4), np.float32)).shape == (0, 2, 2, 2)
