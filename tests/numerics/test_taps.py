"""Statistics by tap against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import winograd_reference as reference
from bitsmith.numerics.statistics import NonFiniteError
from bitsmith.numerics.taps import TapObserver
from bitsmith.site import Range


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


def test_limits_by_squared_error_are_those_of_a_search() -> None:
    """Over values themselves instead of a histogram; the second batch goes far beyond the first one's range."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(8, 8, 32, 32, generator=generator) * k for k in (0.3, 1.0, 0.7, 0.7, 0.7)]
    statistics = TapObserver(2, (3, 3), (1, 1, 1, 1)).start()
    for part in parts:
        statistics.update(part)
    assert torch.equal(statistics.limits(Range()), statistics.peaks)
    matrix = torch.from_numpy(np.kron(reference.BT[2], reference.BT[2])).double()
    d = torch.cat([matrix @ statistics.tiling.cut(part).double().flatten(1) for part in parts], 1).abs()

    def error(limit: torch.Tensor) -> torch.Tensor:
        return (d - limit[:, None]).clamp_min(0).square().mean(1) + (limit / 127).square() / 12

    chosen = statistics.limits(Range("mse"))
    assert bool((chosen < 0.85 * statistics.peaks).any())
    best = torch.stack([error(f * statistics.peaks) for f in torch.linspace(0.2, 1.0, 33)]).amin(0)
    assert bool((error(chosen) <= 1.05 * best).all())
    assert int(statistics.histograms.sum()) == d.numel()
    with pytest.raises(ValueError, match="percentile"):
        statistics.limits(Range("percentile"))
