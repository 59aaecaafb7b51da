"""Products of one bit: every instruction set gives the integers that NumPy does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith_kernels import BinaryLinear, binary_isas, pack_signs


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
