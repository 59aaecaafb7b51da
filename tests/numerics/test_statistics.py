from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics.statistics import NonFiniteError, TensorStatistics


def _batches(seed: int, scales: list[float]) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(s / 3, abs(s), (7, 11)), dtype=torch.float32) for s in scales]


scales = st.lists(st.sampled_from([-40.0, -1.0, -0.01, 1e-6, 0.3, 2.0, 500.0]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scales=scales)
def test_extremes_and_cumulative_counts(seed: int, scales: list[float]) -> None:
    batches = _batches(seed, scales)
    statistics = TensorStatistics(histogram=True, bins=64)
    for batch in batches:
        statistics.update(batch)
    values = np.concatenate([b.numpy().ravel() for b in batches]).astype(np.float64)
    assert (statistics.minimum, statistics.maximum, statistics.count) == (values.min(), values.max(), values.size)
    assert statistics.histogram is not None
    assert statistics.low <= min(values.min(), 0) <= max(values.max(), 0) <= statistics.high
    assert statistics.high - statistics.low <= 4.0001 * (max(values.max(), 0) - min(values.min(), 0))
    # every count is in the bin that holds its value, after any number of widenings
    expected = np.histogram(values, statistics.edges.numpy())[0]
    width = (statistics.high - statistics.low) / 64
    near_edge = np.abs(values[:, None] - statistics.edges.numpy()).min(1) < 1e-9 * width
    assert np.abs(statistics.histogram.numpy() - expected).sum() <= 2 * near_edge.sum()
    assert float(statistics.histogram.sum()) == values.size


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), first=scales, second=scales)
def test_merge(seed: int, first: list[float], second: list[float]) -> None:
    a, b = TensorStatistics(histogram=True, bins=64), TensorStatistics(histogram=True, bins=64)
    everything = _batches(seed, first + second)
    for index, batch in enumerate(everything):
        (a if index < len(first) else b).update(batch)
    b_width = (b.high - b.low) / 64
    a.merge(b)
    values = np.sort(np.concatenate([x.numpy().ravel() for x in everything]).astype(np.float64))
    assert (a.minimum, a.maximum, a.count) == (values.min(), values.max(), values.size)
    assert a.histogram is not None
    assert float(a.histogram.sum()) == pytest.approx(values.size)
    # cumulative counts at the edges, up to what moved by one of b's bins
    cumulative = np.concatenate(([0.0], np.cumsum(a.histogram.numpy())))
    edges = a.edges.numpy()
    slack = b_width * 1.001
    assert np.all(cumulative >= np.searchsorted(values, edges - slack, "left") - 1e-6)
    assert np.all(cumulative <= np.searchsorted(values, edges + slack, "right") + 1e-6)


def test_merge_needs_the_same_kind_and_takes_nothing() -> None:
    full = TensorStatistics(histogram=True)
    full.update(torch.randn(100))
    before = json.dumps(full.to_json())
    full.merge(TensorStatistics(histogram=True))
    assert json.dumps(full.to_json()) == before
    with pytest.raises(ValueError, match="collect both alike"):
        full.merge(TensorStatistics())


def test_merge_of_zeros() -> None:
    a, b = TensorStatistics(histogram=True, bins=8), TensorStatistics(histogram=True, bins=8)
    a.update(torch.tensor([-1.0, 3.0]))
    b.update(torch.zeros(5))
    a.merge(b)
    assert a.histogram is not None
    assert a.zeros == 5
    assert a.histogram.tolist() == [1, 0, 5, 0, 0, 0, 0, 1]
    b.merge(a)
    assert b.count == 12
    assert float(b.histogram.sum()) == 12  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 70001, 100002])
def test_non_finite(dtype: torch.dtype, place: int) -> None:
    statistics = TensorStatistics(histogram=True)
    statistics.update(torch.ones(3))
    before = json.dumps(statistics.to_json())
    x = torch.randn(100003).to(dtype)
    x[place] = math.nan
    with pytest.raises(NonFiniteError, match="1 NaN among 100003") as caught:
        statistics.update(x)
    assert (caught.value.kind, caught.value.nans, caught.value.infs) == ("NaN", 1, 0)
    x[place], x[5] = -math.inf, math.inf
    with pytest.raises(NonFiniteError) as caught:
        statistics.update(x)
    assert (caught.value.kind, caught.value.infs) == ("inf", 2 if place != 5 else 1)
    assert json.dumps(statistics.to_json()) == before


def test_memory_does_not_grow() -> None:
    statistics = TensorStatistics(histogram=True, subsample=1000)
    sizes = set()
    for index in range(20):
        statistics.update(torch.randn(4, 3, 50, 20) * (index + 1))
        state = [value for value in vars(statistics).values() if isinstance(value, torch.Tensor)]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in state))
    assert sizes == {2048 * 8}
    assert not [value for value in vars(statistics).values() if isinstance(value, (list, dict))]


def test_subsample_is_even_over_channels_and_counts_add_up() -> None:
    # 64 channels last in memory: a stride that divides by 2 would see only some
    x = torch.arange(64.0).expand(8, 28, 28, 64).contiguous()
    statistics = TensorStatistics(histogram=True, bins=64, subsample=2000)
    statistics.update(x)
    assert statistics.histogram is not None
    assert float(statistics.histogram.sum()) == pytest.approx(x.numel())
    share = statistics.histogram.numpy() / x.numel() * 64
    assert share.min() > 0.9
    assert share.max() < 1.1


def test_layouts_agree() -> None:
    x = torch.randn(2, 8, 5, 5)
    results = []
    for view in (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3), x.expand(3, 2, 8, 5, 5)[0]):
        statistics = TensorStatistics(histogram=True)
        statistics.update(view)
        results.append(json.dumps(statistics.to_json()))
    assert len(set(results)) == 1


def test_zeros_and_empty() -> None:
    statistics = TensorStatistics(histogram=True, bins=4)
    statistics.update(torch.zeros(0, 3))
    assert statistics.count == 0
    statistics.update(torch.zeros(10))
    statistics.update(torch.tensor([0.0, 0.0, 4.0, 1.5]))
    assert statistics.histogram is not None
    assert (statistics.low, statistics.high, statistics.zeros) == (0.0, 4.0, 12.0)
    assert statistics.histogram.tolist() == [12, 1, 0, 1]
    assert statistics.nonzero_histogram.tolist() == [0, 1, 0, 1]


def test_without_histogram() -> None:
    statistics = TensorStatistics()
    statistics.update(torch.tensor(3, dtype=torch.int64))
    assert (statistics.minimum, statistics.maximum, statistics.histogram) == (3.0, 3.0, None)
    with pytest.raises(ValueError, match="histogram=True"):
        _ = statistics.nonzero_histogram


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scales=st.lists(st.floats(1e-30, 1e30), max_size=3), histogram=st.booleans())
def test_json_round_trip_is_exact(seed: int, scales: list[float], histogram: bool) -> None:
    statistics = TensorStatistics(histogram=histogram, bins=32, subsample=50)
    for batch in _batches(seed, scales):
        statistics.update(batch)
    text = json.dumps(statistics.to_json(), allow_nan=False)
    back = TensorStatistics.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text
    extra = torch.linspace(-1, 1, 77)
    statistics.update(extra)
    back.update(extra)
    assert json.dumps(back.to_json()) == json.dumps(statistics.to_json())


@pytest.mark.parametrize("change", [{"bins": 64}, {"minimum": None}, {"low": "x"}, {"histogram": [1.0]}])
def test_broken_json(change: dict[str, object]) -> None:
    statistics = TensorStatistics(histogram=True, bins=32)
    statistics.update(torch.randn(9))
    with pytest.raises(ValueError, match="collect them again"):
        TensorStatistics.from_json({**statistics.to_json(), **change})
    with pytest.raises(ValueError, match="collect them again"):
        TensorStatistics.from_json({})
