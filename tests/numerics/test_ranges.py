from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics import ranges
from bitsmith.numerics.ranges import MIN_SCALE, limits, qparams, weight_qparams
from bitsmith.numerics.statistics import TensorStatistics
from bitsmith.site import Format, Range, RangeMethod


def _statistics(x: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics(histogram=True)
    statistics.update(torch.tensor(x, dtype=torch.float32))
    return statistics


def _error(x: np.ndarray, low: float, high: float, fmt: Format) -> float:
    """Mean squared error by the plain equation."""
    scale, zero_point = qparams(low, high, fmt)
    least, greatest = fmt.levels
    q = np.clip(np.rint(x / scale) + zero_point, least, greatest)
    return float(np.mean((x - (q - zero_point) * scale) ** 2))


def _formats(*bits: int) -> st.SearchStrategy[Format]:
    return st.builds(Format, st.sampled_from(bits), st.booleans(), st.booleans())


magnitudes = st.floats(0.0, 2.0**30)


@settings(max_examples=300, deadline=None)
@given(low=magnitudes, high=magnitudes, fmt=_formats(2, 3, 4, 7, 8, 16))
def test_qparams(low: float, high: float, fmt: Format) -> None:
    low = 0.0 if fmt.symmetric and not fmt.signed else -low
    scale, zero_point = qparams(low, high, fmt)
    least, greatest = fmt.levels
    assert float(np.float32(scale)) == scale
    assert scale >= MIN_SCALE
    assert least <= zero_point <= greatest
    if fmt.symmetric:
        assert zero_point == 0
    # each end of the interval is within half a step of a level (and the zero point's own rounding, half a step)
    steps = [Fraction(x) / Fraction(scale) + zero_point for x in (low, high)]
    slack = Fraction(1, 2) + Fraction(1, 100)
    assert all(least - slack <= step <= greatest + slack for step in steps)
    if max(-low, high) > 1e-3:
        used = max(abs(steps[0] - zero_point), abs(steps[1] - zero_point)) if fmt.symmetric else steps[1] - steps[0]
        even = fmt.bits >= 8 and bool(np.isclose(-low, high, rtol=1e-6, atol=0.0))  # leaves one level out
        assert used >= (greatest if fmt.symmetric else greatest - least - even) * 0.999


def test_pixels_do_not_lie_half_way_between_levels() -> None:
    scale, zero_point = qparams(-1.0, 1.0, Format(8))
    assert zero_point == 127
    pixels = np.arange(256) / 127.5 - 1  # as MobileNet's
    from_tie = np.abs(np.abs(pixels / scale - np.rint(pixels / scale)) - 0.5)
    assert from_tie.min() > 1e-3
    assert _error(pixels, -1.0, 1.0, Format(8)) < 0.1 * (2 / 255) ** 2  # on ties it would be a quarter
    assert qparams(-1.0, 1.0, Format(2))[0] == float(np.float32(2 / 3)), "few levels are worth more than that"


def test_qparams_examples() -> None:
    assert qparams(-1.27, 1.0, Format(8, signed=True, symmetric=True)) == (float(np.float32(0.01)), 0)
    assert qparams(3.0, 5.1, Format(8)) == (float(np.float32(5.1 / 255)), 0)  # widened to hold 0
    assert qparams(-2.55, -1.0, Format(8)) == (float(np.float32(0.01)), 255)
    assert qparams(0.0, 0.0, Format(8)) == (float(np.float32(1 / 255)), 0)
    assert qparams(0.0, 1e-30, Format(8)) == (MIN_SCALE, 0)


def test_qparams_errors() -> None:
    with pytest.raises(ValueError, match="unsigned and has no zero point"):
        qparams(-0.1, 1.0, Format(8, symmetric=True))
    for low, high in ((float("nan"), 1.0), (0.0, float("inf")), (1.0, 0.0)):
        with pytest.raises(ValueError, match="finite"):
            qparams(low, high, Format(8))


def test_minmax() -> None:
    statistics = TensorStatistics()
    statistics.update(torch.tensor([0.5, 2.0]))
    assert limits(statistics, Format(8)) == (0.0, 2.0)
    statistics.update(torch.tensor([-3.0]))
    assert limits(statistics, Format(8)) == (-3.0, 2.0)


def test_limits_errors() -> None:
    with pytest.raises(ValueError, match="no values"):
        limits(TensorStatistics(), Format(8))
    statistics = TensorStatistics()
    statistics.update(torch.ones(2))
    with pytest.raises(ValueError, match="histogram=True"):
        limits(statistics, Format(8, range=Range("mse")))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_zeros_have_limits(method: RangeMethod) -> None:
    assert limits(_statistics(np.zeros(50)), Format(8, range=Range(method))) == (0.0, 0.0)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("shift", [0.0, 2.0, 50.0])
def test_percentile(percentile: float, shift: float) -> None:
    x = np.random.default_rng(1).normal(shift, 1.0, 30000).astype(np.float32).astype(np.float64)
    low, high = limits(_statistics(x), Format(8, range=Range("percentile", percentile)))
    bin_width = (max(x.max(), 0) - min(x.min(), 0)) / 2048
    ordered = np.sort(x)
    for found, q in ((low, 100 - percentile), (high, percentile)):
        rank = round(q / 100 * len(x))  # the fraction q of the values lies below: between two neighbours
        least, greatest = ordered[max(rank - 2, 0)], ordered[min(rank + 1, len(x) - 1)]
        if found != 0.0 or q > 50:
            assert least - bin_width <= found <= greatest + bin_width
        else:
            assert least > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    fmt=_formats(2, 3, 4, 8),
    kind=st.sampled_from(["normal", "heavy", "relu", "skewed"]),
)
def test_mse_is_near_the_best_of_a_fine_search(seed: int, fmt: Format, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = {
        "normal": rng.normal(0, 1, 8000),
        "heavy": rng.standard_t(3, 8000),
        "relu": np.maximum(rng.normal(0, 3, 8000), 0),
        "skewed": rng.gamma(2.0, 1.0, 8000) - 0.5,
    }[kind].astype(np.float32)
    if fmt.symmetric and not fmt.signed:
        x = np.abs(x)
    x = x.astype(np.float64)
    fmt = Format(fmt.bits, fmt.signed, fmt.symmetric, Range("mse"))
    low, high = limits(_statistics(x), fmt)
    assert low <= 0 <= high
    found = _error(x, low, high, fmt)
    floor, top = min(x.min(), 0.0), max(x.max(), 0.0)
    # an independent search: both ends on a grid of their own, scored on the data itself
    best = min(_error(x, floor * a, top * b, fmt) for a in np.linspace(0.03, 1, 25) for b in np.linspace(0.03, 1, 25))
    assert found <= best * 1.03 + 1e-12
    assert found <= _error(x, floor, top, fmt) * 1.01 + 1e-12


def test_entropy_cuts_an_outlier_and_keeps_a_uniform() -> None:
    rng = np.random.default_rng(2)
    fmt = Format(8, signed=True, symmetric=True, range=Range("entropy"))
    bulk = rng.normal(0, 1, 60000)
    low, high = limits(_statistics(np.append(bulk, 40.0)), fmt)
    assert low == -high
    assert 2.5 < high < 15.0
    uniform = limits(_statistics(rng.uniform(-1, 1, 60000)), fmt)
    assert uniform[1] > 0.95
    positive = limits(_statistics(np.append(np.abs(bulk), 40.0)), Format(8, range=Range("entropy")))
    assert positive[0] == 0.0
    assert 2.5 < positive[1] < 15.0


def _weight(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    return w * torch.rand((shape[0],) + (1,) * (len(shape) - 1), generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    axis=st.sampled_from([None, 0, 1, -1]),
    conv=st.booleans(),
)
def test_weight_minmax_is_qparams_of_each_channel(
    seed: int, bits: int, symmetric: bool, axis: int | None, conv: bool
) -> None:
    w = _weight(seed, (6, 4, 3, 3) if conv else (6, 8))
    scale, zero_point = weight_qparams(w, bits, symmetric, axis, None, Range())
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int64)
    assert scale.shape == zero_point.shape == (() if axis is None else (w.shape[axis],))
    channels = [w] if axis is None else list(w.unbind(axis))
    fmt = Format(bits, signed=symmetric, symmetric=symmetric)
    for channel, s, z in zip(channels, scale.reshape(-1), zero_point.reshape(-1), strict=True):
        assert qparams(min(float(channel.min()), 0.0), max(float(channel.max()), 0.0), fmt) == (float(s), int(z))


@pytest.mark.parametrize("shape", [(4, 12), (4, 12, 3, 3)])
def test_groups(shape: tuple[int, ...]) -> None:
    w = _weight(3, shape)
    scale, zero_point = weight_qparams(w, 4, True, 0, 4, Range())
    assert scale.shape == zero_point.shape == (4, 3)
    for o in range(4):
        for g in range(3):
            assert float(scale[o, g]) == pytest.approx(float(w[o, 4 * g : 4 * g + 4].abs().max()) / 7)


def test_weight_mse_beats_minmax_per_channel_and_finds_the_grid_optimum() -> None:
    w = _weight(5, (9, 64, 3, 3))
    for bits, symmetric in ((3, True), (4, False)):
        fmt = Format(bits, signed=symmetric, symmetric=symmetric)
        scale, zero_point = weight_qparams(w, bits, symmetric, 0, None, Range("mse"))
        for channel, s, z in zip(w.double().numpy(), scale.double().numpy(), zero_point.numpy(), strict=True):
            q = np.clip(np.rint(channel / s) + z, *fmt.levels)
            found = np.mean((channel - (q - z) * s) ** 2)
            ends = channel.min(), channel.max()
            best = min(_error(channel, ends[0] * i / 80, ends[1] * i / 80, fmt) for i in range(1, 81))
            assert found == pytest.approx(best, rel=1e-4)
            assert found < _error(channel, *ends, fmt)


def test_factors_of_a_weight_are_searched_once_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_shrunk", {})
    monkeypatch.setattr(ranges, "_REMEMBERED", 2)
    searched: list[int] = []
    real = ranges._shrink_factors

    def counted(values: Any, *rest: Any) -> Any:
        searched.append(len(values))
        return real(values, *rest)

    monkeypatch.setattr(ranges, "_shrink_factors", counted)
    weights = [torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = [weight_qparams(weights[k], 4, True, 0, None, Range("mse")) for k in (0, 0, 1, 0, 2, 0)]
    assert len(searched) == 3, "the last two used are known"
    assert all(torch.equal(found[k][0], found[0][0]) for k in (1, 3, 5))
    weight_qparams(weights[1], 4, True, 0, None, Range("mse"))  # forgotten
    weight_qparams(weights[0].clone(), 8, True, 0, None, Range("mse"))  # another format
    assert len(searched) == 5


def test_weight_mse_of_one_row_longer_than_a_block() -> None:
    w = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    scale, _ = weight_qparams(w, 3, True, None, None, Range("mse"))
    x, top = w.double().numpy(), float(w.abs().max())
    fmt = Format(3, signed=True, symmetric=True)
    best = min(range(1, 81), key=lambda i: _error(x, -top * i / 80, top * i / 80, fmt))
    assert float(scale) == pytest.approx(top * best / 80 / 3, rel=1e-6)


def test_weight_percentile_and_entropy() -> None:
    w = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    w[0, 0] = 100.0
    scale, _ = weight_qparams(w, 8, True, 0, None, Range("percentile", 99.0))
    ordered = np.sort(w.numpy(), axis=1)
    expected = np.maximum(ordered[:, 989], -ordered[:, 10]) / 127
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    scale, _ = weight_qparams(w, 8, True, None, None, Range("entropy"))
    assert 2.0 / 127 < float(scale) < 40.0 / 127
    with pytest.raises(ValueError, match="per tensor only"):
        weight_qparams(w, 8, True, 0, None, Range("entropy"))


def test_weight_zero_channels() -> None:
    w = torch.randn(3, 5)
    w[1] = 0
    scale, _ = weight_qparams(w, 8, True, 0, None, Range("mse"))
    assert float(scale[1]) == pytest.approx(max(float(scale[0]), float(scale[2])), rel=1e-6)
    scale, zero_point = weight_qparams(torch.zeros(2, 2), 8, False, 0, None, Range())
    assert scale.tolist() == pytest.approx([1 / 255] * 2)
    assert zero_point.tolist() == [0, 0]


def test_weight_errors() -> None:
    w = torch.randn(4, 6)
    for axis, group in ((0, 4), (1, 3), (None, 3), (0, 1)):
        with pytest.raises(ValueError, match="divide dimension 1"):
            weight_qparams(w, 8, True, axis, group, Range())
    with pytest.raises(ValueError, match="no axis 2"):
        weight_qparams(w, 8, True, 2, None, Range())
    w[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        weight_qparams(w, 8, True, 0, None, Range())
