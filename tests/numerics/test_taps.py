"""Statistics by tap against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import winograd_reference as reference
from bitsmith.numerics.statistics import NonFiniteError
from bitsmith.numerics.taps import TapObserver


@pytest.mark.parametrize("tile", [2, 4])
def test_peaks_and_power_of_every_tap(tile: int) -> None:
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
    taps = np.einsum("ia,tncab,jb->ijtnc", reference.BT[tile], tiles, reference.BT[tile]).reshape(size * size, -1)
    np.testing.assert_allclose(statistics.peaks, np.abs(taps).max(1), rtol=1e-5)
    np.testing.assert_allclose(statistics.power, np.square(taps).mean(1), rtol=1e-5)
    assert statistics.count == taps.shape[1]


def test_one_dimension_is_a_map_of_one_row() -> None:
    x = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    line, image = (TapObserver(4, (1, 3), (0, 1, 0, 1)).start() for _ in range(2))
    line.update(x)
    image.update(x[:, :, None])
    assert torch.equal(line.peaks, image.peaks)
    assert len(line.peaks) == 6


def test_nothing_seen_and_nothing_finite() -> None:
    statistics = TapObserver(2, (3, 3), (1, 1, 1, 1)).start()
    assert statistics.count == 0
    assert torch.equal(statistics.power, torch.zeros(16, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="1 NaN"):
        statistics.update(torch.full((1, 1, 1, 1), float("nan")))
    assert statistics.count == 0


def test_equal_observers_collect_the_same_and_are_equal() -> None:
    assert TapObserver(2, (3, 3), (1, 1, 1, 1)) == TapObserver(2, (3, 3), (1, 1, 1, 1))
    assert len({TapObserver(2, (3, 3), (1, 1, 1, 1)), TapObserver(4, (3, 3), (1, 1, 1, 1))}) == 2
