"""A loader's samples in random order: each once, with its own target, and None where that cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from bitsmith.data import Unlabelled
from bitsmith.sampling import Shuffled, shuffled


def numbered(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Sample k is [k, -k] with the target 10 k + 3."""
    found, first = [], 0
    for size in sizes:
        k = torch.arange(first, first + size)
        found.append((torch.stack([k, -k], 1).float(), 10 * k + 3))
        first += size
    return found


def collected(found: Shuffled, chunk: int | None = None) -> list[tuple[Any, Any]]:
    """All its batches, the last one shorter."""
    step = chunk or found.chunk
    return [found.batch(first, step) for first in range(0, found.total, step)]


def keys(x: Tensor, y: Tensor) -> list[int]:
    """Which samples of :func:`numbered` these are; fails if input and target do not belong together."""
    assert torch.equal(x[:, 1], -x[:, 0])
    assert torch.equal(10 * x[:, 0].long() + 3, y)
    return [int(k) for k in x[:, 0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**31), st.integers(1, 7))
def test_every_sample_comes_once_with_its_target(sizes: list[int], seed: int, chunk: int) -> None:
    found = shuffled(numbered(sizes), seed)
    assert found is not None
    assert found.total == sum(sizes)
    assert found.chunk == max(sizes)
    got = [key for x, y in collected(found, chunk) for key in keys(x, y)]
    assert got == found.order.tolist()
    assert sorted(got) == list(range(sum(sizes)))
    again = shuffled(numbered(sizes), seed)
    assert again is not None
    assert np.array_equal(again.order, found.order)


def test_the_order_is_random_and_the_seed_is_what_decides_it() -> None:
    orders = []
    for seed in (0, 0, 1):
        found = shuffled(numbered([50, 50]), seed)
        assert found is not None
        orders.append(found.order.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(range(100))
    # every seed puts the first sample somewhere else: over many its mean place is the middle
    places = [int(np.flatnonzero(s.order == 0)[0]) for k in range(200) if (s := shuffled(numbered([10]), k))]
    assert abs(np.mean(places) - 4.5) < 4 * np.sqrt((100 - 1) / 12 / 200)


def test_the_last_batches_are_cut_to_what_is_left() -> None:
    found = shuffled(numbered([4, 4, 1]), 0)
    assert found is not None
    assert [len(x) for x, _ in collected(found)] == [4, 4, 1]
    assert len(found.batch(7, 4)[0]) == 2


def test_tuples_mappings_and_what_is_inside_them() -> None:
    plain = numbered([3, 3, 2])
    nested = [
        ({"a": x, "more": (x + 1, {"b": -x})}, [y, {"kind": y % 2}])  # a list and a mapping as target
        for x, y in plain
    ]
    found = shuffled(nested, 5)
    assert found is not None
    for inputs, target in collected(found):
        keys(inputs["a"], target[0])
        assert torch.equal(inputs["more"][0], inputs["a"] + 1)
        assert torch.equal(inputs["more"][1]["b"], -inputs["a"])
        assert torch.equal(target[1]["kind"], target[0] % 2)
    pairs = shuffled([((x, 2 * x), y) for x, y in plain], 5)
    assert pairs is not None
    got = []
    for (x, twice), y in collected(pairs):
        got += keys(x, y)
        assert torch.equal(twice, 2 * x)
    assert sorted(got) == list(range(8))


def test_numpy_arrays_become_tensors() -> None:
    found = shuffled([({"x": x.numpy()}, y.numpy()) for x, y in numbered([4, 3])], 2)
    assert found is not None
    got = []
    for inputs, target in collected(found):
        assert isinstance(target, Tensor)
        got += keys(inputs["x"], target)
    assert sorted(got) == list(range(7))


@pytest.mark.parametrize("kind", [list, tuple])
def test_without_targets(kind: type) -> None:
    found = shuffled(Unlabelled(kind(x for x, _ in numbered([3, 2]))), 1)
    assert found is not None
    got = []
    for x, target in collected(found):
        assert target is None
        got += [int(k) for k in x[:, 0]]
    assert got == found.order.tolist()
    assert sorted(got) == list(range(5))
    # also where a labelled loader has no target, for a metric of the output alone
    bare = shuffled([(x, None) for x, _ in numbered([3, 2])], 1)
    assert bare is not None
    assert bare.batch(0, 5)[1] is None


def samples(count: int) -> TensorDataset:
    ((x, y),) = numbered([count])
    return TensorDataset(x, y)


def test_a_data_loader_over_single_samples() -> None:
    found = shuffled(DataLoader(samples(11), batch_size=4), 3)
    assert found is not None
    assert (found.total, found.chunk) == (11, 4)
    assert sorted(key for x, y in collected(found) for key in keys(x, y)) == list(range(11))


def test_a_data_loader_collates_as_it_does_itself() -> None:
    def together(rows: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], np.ndarray]:
        return {"x": torch.stack([x for x, _ in rows])}, np.array([int(y) for _, y in rows])

    loader = DataLoader(samples(7), batch_size=3, collate_fn=together)
    found = shuffled(loader, 3)
    assert found is not None
    assert sorted(k for inputs, y in collected(found) for k in keys(inputs["x"], y)) == list(range(7))


class Asked:
    """``samples``, ``batch`` and ``take``; remembers what it was asked for."""

    samples, batch = 9, 4

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def take(self, indices: Sequence[int]) -> tuple[Any, Any]:
        self.asked.append(list(indices))
        k = np.asarray(indices)
        return np.stack([k, -k], 1).astype(np.float32), 10 * k + 3


def test_a_loader_that_can_give_any_sample() -> None:
    loader = Asked()
    found = shuffled(loader, 0)
    assert found is not None
    assert (found.total, found.chunk) == (9, 4)
    assert not loader.asked  # nothing is read before it is needed
    got = [key for x, y in collected(found) for key in keys(x, y)]
    assert [index for indices in loader.asked for index in indices] == found.order.tolist() == got
    assert all(type(index) is int for index in loader.asked[0])
    assert sorted(got) == list(range(9))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        ((x, y),) = numbered([6])
        return iter(zip(x, y, strict=True))


class Generated:
    """Can be read any number of times, from the beginning only."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(numbered([3, 3]))


class Batched(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return numbered([3, 3])[index]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(samples(8), batch_size=4, sampler=RandomSampler(samples(8))),
        DataLoader(samples(8), batch_size=4, shuffle=True),
        DataLoader(samples(8), batch_size=4, drop_last=True),
        DataLoader(Batched(), batch_size=None),
        DataLoader(samples(8), batch_sampler=[[0, 1, 2], [3, 4, 5, 6, 7]]),
        DataLoader(Stream(), batch_size=3),
        Generated(),
        Unlabelled(Generated()),
    ],
    ids=["sampler", "shuffle", "drop_last", "batches", "batch_sampler", "iterable", "generator", "unlabelled"],
)
def test_none_where_samples_can_only_be_read_one_after_the_other(loader: Any) -> None:
    assert shuffled(loader, 0) is None


X, Y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "loader",
    [
        [(X, Y), (torch.zeros(3, 4), Y)],
        [(X, Y), (X.double(), Y)],
        [(X, Y), ({"x": X}, Y)],
        [({"x": X}, Y), ({"z": X}, Y)],
        [((X, X), Y), ((X,), Y)],
        [((X, torch.tensor(2.0)), Y)],
        [({"x": X, "scale": torch.ones(2)}, Y)],
        [(X, ["a", "b", "c"])],
        [(X, torch.zeros(2, dtype=torch.int64))],
        [({"x": X, "mode": "fast"}, Y)],
    ],
    ids=["shape", "dtype", "kind", "names", "count", "scalar", "not by sample", "strings", "targets", "setting"],
)
def test_none_for_batches_that_cannot_be_cut_and_mixed(loader: Any) -> None:
    assert shuffled(loader, 0) is None


class Ragged(Dataset[Any]):
    """Sorted by length, so that every batch of two has one shape."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((2 + index // 2,), float(index)), torch.tensor(index)


def test_samples_of_unlike_shapes_behind_a_data_loader() -> None:
    """It can be read as it is, two by two; in another order its own collate function raises."""
    loader = DataLoader(Ragged(), batch_size=2)
    assert [x.shape for x, _ in loader] == [(2, 2), (2, 3), (2, 4)]
    for seed in range(5):
        found = shuffled(loader, seed)
        for x, y in collected(found) if found is not None else []:
            assert torch.equal(x[:, 0].long(), y)
