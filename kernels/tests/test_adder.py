"""Adder layers: every instruction set against the sums written out in float64, and against the others bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitsmith_kernels import AdderLayer, adder_isas


def patches(x: NDArray[np.float64], layer: AdderLayer, kernel: tuple[int, int]) -> NDArray[np.float64]:
    """[n, c, kh, kw, h', w']."""
    top, bottom, left, right = layer.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, kernel, strict=True)]
    high, wide = ((padded.shape[2 + a] - reach[a]) // layer.stride[a] + 1 for a in (0, 1))
    found = np.empty((*x.shape[:2], *kernel, high, wide))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = i * layer.dilation[0] + np.arange(high) * layer.stride[0]
            columns = j * layer.dilation[1] + np.arange(wide) * layer.stride[1]
            found[:, :, i, j] = padded[:, :, rows][:, :, :, columns]
    return found


def forward(x: NDArray[np.float64], w: NDArray[np.float64], layer: AdderLayer) -> NDArray[np.float64]:
    outputs = []
    each = w.shape[1]
    for o, filters in enumerate(w):
        group = o // (len(w) // layer.groups)
        seen = patches(x[:, group * each : (group + 1) * each], layer, w.shape[2:])  # type: ignore[arg-type]
        outputs.append(-np.abs(seen - filters[None, :, :, :, None, None]).sum((1, 2, 3)))
    return np.stack(outputs, 1)


def input_gradient(
    x: NDArray[np.float64], w: NDArray[np.float64], g: NDArray[np.float64], layer: AdderLayer
) -> NDArray[np.float64]:
    top, bottom, left, right = layer.pads
    height, width = x.shape[2:]
    found = np.zeros((*x.shape[:2], height + top + bottom, width + left + right))
    each = w.shape[1]
    for o, filters in enumerate(w):
        group = o // (len(w) // layer.groups)
        own = slice(group * each, (group + 1) * each)
        seen = patches(x[:, own], layer, w.shape[2:])  # type: ignore[arg-type]
        pull = np.clip(filters[None, :, :, :, None, None] - seen, -1, 1) * g[:, o, None, None, None]
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                rows = i * layer.dilation[0] + np.arange(g.shape[2]) * layer.stride[0]
                columns = j * layer.dilation[1] + np.arange(g.shape[3]) * layer.stride[1]
                found[:, own, rows[:, None], columns] += pull[:, :, i, j]
    return found[:, :, top : top + height, left : left + width]


LAYERS = st.fixed_dictionaries(
    {
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "pads": st.tuples(*[st.integers(0, 2)] * 4),
        "groups": st.integers(1, 2),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    LAYERS,
    st.tuples(*[st.integers(1, 3)] * 2),
    st.integers(1, 3),
    st.integers(1, 11),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_against_the_sums_written_out(
    options: dict, kernel: tuple[int, int], channels: int, filters: int, seed: int, data: st.DataObject
) -> None:
    groups = options["groups"]
    size = [data.draw(st.integers(d * (k - 1) + 1, 14)) for d, k in zip(options["dilation"], kernel, strict=True)]
    images, threads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, channels * groups, *size)).astype(np.float32)
    w = rng.normal(size=(filters * groups, channels, *kernel)).astype(np.float32)
    made, pulled = [], []
    for isa in adder_isas():
        layer = AdderLayer(**options, isa=isa)
        made.append(layer.forward(x, w, threads=threads))
    g = rng.normal(size=made[0].shape).astype(np.float32)
    for isa in adder_isas():
        pulled.append(AdderLayer(**options, isa=isa).input_gradient(x, w, g, threads=threads))
    layer = AdderLayer(**options)
    np.testing.assert_allclose(made[0], forward(x.astype(float), w.astype(float), layer), rtol=1e-5, atol=1e-5)
    wanted = input_gradient(x.astype(float), w.astype(float), g.astype(float), layer)
    np.testing.assert_allclose(pulled[0], wanted, rtol=1e-4, atol=1e-4)
    assert all(np.array_equal(made[0], other) for other in made[1:])
    assert all(np.array_equal(pulled[0], other) for other in pulled[1:])


@pytest.mark.parametrize("size", [3, 5, 9])  # maps of less than a tile of 32 and of more
def test_the_gradient_is_the_same_with_any_number_of_threads(size: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 3, size, size)), rng.normal(size=(7, 3, 3, 3))
    layer = AdderLayer(pads=(1, 1, 1, 1))
    g = rng.normal(size=(5, 7, size, size)).astype(np.float32)
    found = [layer.input_gradient(x.astype(np.float32), w.astype(np.float32), g, threads=n) for n in (1, 2, 3)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("isa", adder_isas())
def test_what_is_not_a_number_stays_so(isa: str) -> None:
    layer = AdderLayer(isa=isa)
    x, w = np.zeros((40, 2, 1, 1), np.float32), np.ones((9, 2, 1, 1), np.float32)
    x[3, 1] = np.nan
    assert np.isnan(layer.forward(x, w)[3]).all()
    pulled = layer.input_gradient(x, w, np.ones((40, 9, 1, 1), np.float32))
    assert np.isnan(pulled[3, 1]).all()
    assert np.isfinite(np.delete(pulled, 3, 0)).all()


def test_refusals() -> None:
    x, w = np.zeros((1, 4, 5, 5), np.float32), np.zeros((2, 4, 3, 3), np.float32)
    with pytest.raises(ValueError, match="this CPU and build have"):
        AdderLayer(isa="neon")
    with pytest.raises(ValueError, match="1 or more"):
        AdderLayer(stride=(0, 1))
    with pytest.raises(ValueError, match="got shapes"):
        AdderLayer().forward(x, w[:, :3])
    with pytest.raises(ValueError, match="smaller than a patch"):
        AdderLayer().forward(x[:, :, :2], w)
    with pytest.raises(ValueError, match="g must be"):
        AdderLayer().input_gradient(x, w, np.zeros((1, 2, 5, 5), np.float32))
    with pytest.raises(ValueError, match="threads"):
        AdderLayer().forward(x, w, threads=0)
