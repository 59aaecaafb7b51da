"""Statistics by tap and channel against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import winograd_reference as reference
from bitsmith.numerics.statistics import NonFiniteError
from bitsmith.numerics.taps import TapObserver


@pytest.mark.parametrize("tile", [2, 4])
def test_extremes_and_power_of_every_tap(tile: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5, 3, 7, 6)).astype(np.float32)
    statistics = TapObserver(tile, (3, 3), (1, 0, 1, 2)).start()
    for part in np.split(x, [2]):
        statistics.update(torch.from_numpy(part))
    down, across = -(-7 // tile), -(-6 // tile)
    d = np.zeros((5, 3, down * tile + 2, across * tile + 2))
    d[:, :, 1:8, :6] = x
    size = tile + 2
    tiles = np.stack([d[:, :, i * tile :, j * tile :][:, :, :size, :size] for i in range(down) for j in range(across)])
    taps = np.einsum("ia,tncab,jb->ijctn", reference.BT[tile], tiles, reference.BT[tile]).reshape(size * size, 3, -1)
    low, high = statistics.extremes
    np.testing.assert_allclose(low, np.minimum(taps.min(2), 0), rtol=1e-5)
    np.testing.assert_allclose(high, np.maximum(taps.max(2), 0), rtol=1e-5)
    np.testing.assert_allclose(statistics.power, np.square(taps).mean(2), rtol=1e-5)
    assert statistics.count == taps.shape[2]


def test_one_dimension_is_a_map_of_one_row() -> None:
    x = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    line, image = (TapObserver(4, (1, 3), (0, 1, 0, 1)).start() for _ in range(2))
    line.update(x)
    image.update(x[:, :, None])
    assert torch.equal(line.extremes, image.extremes)
    assert line.extremes.shape == (2, 6, 3)


def test_nothing_seen_and_nothing_finite() -> None:
    statistics = TapObserver(2, (3, 3), (1, 1, 1, 1)).start()
    assert statistics.count == 0
    assert statistics.power.shape == (16, 0)
    with pytest.raises(NonFiniteError, match="1 NaN"):
        statistics.update(torch.full((1, 1, 1, 1), float("nan")))
    assert statistics.count == 0
    statistics.update(torch.zeros(1, 2, 4, 4))
    assert torch.equal(statistics.extremes, torch.zeros(2, 16, 2, dtype=torch.float64))
    assert statistics.beyond == 1.0
    with pytest.raises(ValueError, match="2 channels were given 3"):
        statistics.update(torch.zeros(1, 3, 4, 4))


def test_equal_observers_collect_the_same_and_are_equal() -> None:
    assert TapObserver(2, (3, 3), (1, 1, 1, 1)) == TapObserver(2, (3, 3), (1, 1, 1, 1))
    assert len({TapObserver(2, (3, 3), (1, 1, 1, 1)), TapObserver(4, (3, 3), (1, 1, 1, 1))}) == 2


def test_growth_is_what_the_other_half_of_the_images_adds() -> None:
    """By hand, whatever the batches; images of even number reach 1, those of odd number 3 in one channel."""
    x = torch.zeros(6, 2, 2, 2)
    x[0, 0] = x[2, 1] = 1.0
    x[3, 0] = 3.0
    for parts in ([6], [1] * 6, [5, 1]):
        statistics = TapObserver(2, (3, 3), (1, 1, 1, 1)).start()
        for part in x.split(parts):
            statistics.update(part)
        low, high = statistics.extremes
        # a square of ones: the taps (1, 1) have 4, those beside a side 2, and so on; 3 times that in channel 0
        assert float(high[5, 0]) == 12.0
        assert float(high[5, 1]) == 4.0
        width = float((high - low)[:, 1].sum())
        assert float((high - low)[:, 0].sum()) == pytest.approx(3 * width)
        assert statistics.growth == pytest.approx((3 + 1) / ((1 + 1 + 3 + 0) / 2))
        assert statistics.beyond == statistics.growth**2
    single = TapObserver(2, (3, 3), (1, 1, 1, 1)).start()
    single.update(x[3:4])
    assert single.growth == 1.0
