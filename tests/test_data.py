from __future__ import annotations

import dataclasses
import itertools
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bitsmith.data import (
    DataError,
    ModelRunError,
    Unlabelled,
    batch_size,
    call,
    check_loader,
    describe,
    device_of,
    digest,
    first_inputs,
    items,
    to_device,
)

X, Y = torch.arange(24.0).reshape(8, 3), torch.arange(8)


def read(loader: Any) -> list[Any]:
    return list(items(loader, "validation"))


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        pytest.param([X], ["item 0 is Tensor[8, 3] float32", "Unlabelled(loader)"], id="bare tensor"),
        pytest.param((X, Y), ["item 0 is Tensor[8, 3]", "[(x, y)]"], id="the pair as the loader"),
        pytest.param([(X, Y, Y)], ["(Tensor[8, 3] float32, Tensor[8] int64", "for x, y, _ in loader"], id="three"),
        pytest.param([(X,)], ["(Tensor[8, 3] float32,)", "Unlabelled([x for x, in loader])"], id="one"),
        pytest.param([(X, X, X, Y)], ["for *xs, y in loader"], id="four"),
        pytest.param(
            [{"ids": X, "labels": Y}],
            ["ids: Tensor[8, 3]", "[({k: v for k, v in d.items() if k != 'labels'}, d['labels']) for d in loader]"],
            id="label inside",
        ),
        pytest.param([{"ids": X, "y": Y}], ["d['y']"], id="y inside"),
        pytest.param([{"ids": X}], ["Unlabelled(loader)"], id="mapping without label"),
        pytest.param([], ["validation loader is empty"], id="empty"),
        pytest.param(DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=2), ["is empty"], id="empty DataLoader"),
        pytest.param(iter([(X, Y)]), ["one-shot list_iterator", "list(loader)"], id="iterator"),
        pytest.param(((x, Y) for x in [X]), ["one-shot generator", "second time"], id="generator"),
        pytest.param(Unlabelled(x for x in [X]), ["one-shot generator"], id="unlabelled generator"),
        pytest.param(X, ["itself Tensor[8, 3]"], id="tensor as loader"),
        pytest.param({"x": X}, ["one mapping"], id="mapping as loader"),
        pytest.param(7, ["cannot be iterated"], id="number as loader"),
        pytest.param(TensorDataset(X, Y), ["single samples", "batch_size=32"], id="dataset"),
        pytest.param([(X[0], 5)], ["single sample", "DataLoader"], id="integer target"),
        pytest.param([(X[0], Y[0])], ["single sample"], id="0-d target"),
        pytest.param([("a text", Y)], ["the inputs are str"], id="text"),
        pytest.param([({1: X}, Y)], ["names of the model's arguments"], id="keys that are no names"),
        pytest.param([((), Y)], ["empty"], id="no inputs"),
        pytest.param([(np.array([object()]), Y)], ["dtype object"], id="array of objects"),
        pytest.param([object()], ["object", "take it apart"], id="some object"),
        pytest.param([(X, Y), X], ["item 1 is Tensor"], id="a later item"),
    ],
)
def test_bad_loaders_are_named_shown_and_mended(loader: Any, says: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read(loader)
    message = str(caught.value)
    assert "validation" in message
    for part in says:
        assert part in message


def test_the_mends_that_messages_offer_work() -> None:
    loader = [{"ids": X, "labels": Y}]
    read([({k: v for k, v in d.items() if k != "labels"}, d["labels"]) for d in loader])
    read([(x, y) for x, y, _ in [(X, Y, Y)]])
    read(Unlabelled([x for (x,) in [(X,)]]))
    read([(tuple(xs), y) for *xs, y in [(X, X, X, Y)]])
    read([(x[None], torch.as_tensor([y])) for x, y in [(X[0], 5)]])
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    fixed = list(itertools.islice(shuffled, 2))
    check_loader(fixed, "validation")
    assert digest(fixed) == digest(fixed)


def test_a_shuffling_loader_is_refused_only_where_order_matters() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    with pytest.raises(DataError, match=r"calibration loader shuffles.*islice"):
        check_loader(loader, "calibration")
    check_loader(loader, "training", fixed_order=False)


def test_default_collate_gives_valid_items() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    assert isinstance(next(iter(loader)), list)
    got = read(loader)
    assert torch.equal(torch.cat([x for x, _ in got]), X)
    assert torch.equal(torch.cat([y for _, y in got]), Y)
    assert len(read(loader)) == 3  # a second pass


def test_an_exhausted_stream_is_an_error_not_an_empty_result() -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rows = iter(zip(X, Y, strict=True))

        def __iter__(self) -> Any:
            return self.rows

    loader = DataLoader(Once(), batch_size=4)
    assert len(read(loader)) == 2
    with pytest.raises(DataError, match=r"empty.*only once"):
        read(loader)


def test_unlabelled_keeps_structure_and_length() -> None:
    assert [(describe(x), y) for x, y in read(Unlabelled([X, (X, X), {"a": X}]))] == [
        ("Tensor[8, 3] float32", None),
        ("(Tensor[8, 3] float32, Tensor[8, 3] float32)", None),
        ("{a: Tensor[8, 3] float32}", None),
    ]
    assert len(Unlabelled([X, X])) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Unlabelled([X]).loader = []  # type: ignore[misc]


def test_numpy_becomes_tensors_of_their_own() -> None:
    source = np.arange(6, dtype=">f4").reshape(2, 3)[::-1]
    source.flags.writeable = False
    pair = namedtuple("pair", "a b")(source, None)
    (x, y), (several, _), (named, _) = read(
        [(source, np.array([0, 1])), (pair, np.array([0, 1])), ({"m": {"deep": source}}, np.array([0, 1]))]
    )
    for got in (x, several[0], named["m"]["deep"]):
        assert got.dtype == torch.float32
        np.testing.assert_array_equal(got.numpy(), source)
    assert y.dtype == torch.int64
    x.zero_()
    assert source.any()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x)
        return out if mask is None else out * mask


def test_call_passes_tensor_tuple_and_mapping() -> None:
    model, mask = Two(), torch.tensor([[0.0], [2.0]]).repeat(4, 1)
    plain = model(X)
    assert torch.equal(call(model, X), plain)
    assert torch.equal(call(model, (X, mask)), plain * mask)
    assert torch.equal(call(model, [X, mask]), plain * mask)
    assert torch.equal(call(model, {"mask": mask, "x": X}), plain * mask)
    assert torch.equal(call(model, UserDict({"mask": mask, "x": X})), plain * mask)
    assert torch.equal(call(model, {"image": X}, lambda m, d: m(d["image"])), plain)
    assert torch.equal(call(lambda x: x + 1, X), X + 1)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"image": X}, ["unexpected keyword argument 'image'", "**{image: Tensor[8, 3] float32}", "forward="]),
        ((X, X, X, X), ["*(Tensor[8, 3]", "a tuple as model(*x)"]),
        (torch.zeros(2, 5), ["Tensor[2, 5] float32", "mat1 and mat2"]),
        (X.double(), ["float64", "the model is float32: convert"]),
    ],
)
def test_a_failing_model_shows_both_signatures(inputs: Any, says: list[str]) -> None:
    with pytest.raises(ModelRunError) as caught:
        call(Two(), inputs)
    assert isinstance(caught.value.__cause__, (TypeError, RuntimeError))
    for part in ["Two.forward(x:", "mask:", *says]:
        assert part in str(caught.value)


def test_a_failing_forward_is_named() -> None:
    with pytest.raises(ModelRunError, match="look at the forward="):
        call(Two(), X, lambda model, inputs: model(inputs["x"]))


def test_own_errors_and_exhausted_memory_pass_unchanged() -> None:
    for error in (DataError("ours"), MemoryError()):

        def raising(x: Tensor, error: Exception = error) -> Tensor:
            raise error

        with pytest.raises(type(error)) as caught:
            call(raising, X)
        assert caught.value is error


def test_devices() -> None:
    model = Two()
    assert device_of(model) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None
    inputs = {"a": (X, [None, 3])}
    assert to_device(inputs, torch.device("cpu")) is inputs
    moved = to_device(inputs, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == [None, 3]


def test_batch_size_and_first_inputs() -> None:
    assert batch_size({"flag": 3, "scale": torch.tensor(1.0), "x": X}) == 8
    with pytest.raises(DataError, match="batch axis"):
        batch_size((torch.tensor(1.0), None))
    assert torch.equal(first_inputs(DataLoader(TensorDataset(X, Y), batch_size=3)), X[:3])
    with pytest.raises(DataError, match="calibration loader is empty"):
        first_inputs([])


def test_digest_sees_order_bytes_shapes_dtypes_and_targets() -> None:
    base = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    changed = X.clone()
    changed.view(torch.uint8)[5, 1] ^= 1
    variants: list[Any] = [
        base,
        base[::-1],
        [(changed[:4], Y[:4]), (changed[4:], Y[4:])],
        [(X[:4].reshape(3, 4), Y[:4]), base[1]],
        [(X[:4].view(torch.int32), Y[:4]), base[1]],
        [(X[:4], Y[:4].flip(0)), base[1]],
        [((X[:4],), Y[:4]), base[1]],
        [({"x": X[:4]}, Y[:4]), base[1]],
        base[:1],
        Unlabelled([X[:4], X[4:]]),
    ]
    digests = [digest(variant) for variant in variants]
    assert len(set(digests)) == len(digests)
    same = DataLoader(TensorDataset(X.clone(), Y.clone()), batch_size=4)
    assert digest([(x, y) for x, y in same]) == digests[0]
    assert digest([(x.numpy(), y.numpy()) for x, y in base]) == digests[0]
    assert digest(same) == digest(same)


def test_digest_of_something_without_bytes_is_an_error() -> None:
    with pytest.raises(DataError, match=r"item 0.*object has no content"):
        digest([(X, object())])
