"""The data of a training, and what can go wrong in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.learn.loader import Stream
from bitsmith.learn.state import tensors_of
from smallnet import Batch, batches, small


def sgd(lr: float = 0.05) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr)


def equal(a: nn.Module, b: nn.Module) -> bool:
    theirs = tensors_of(b)
    return all(torch.equal(value, theirs[name]) for name, value in tensors_of(a).items())


# -- the loader --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 6), at=st.integers(0, 20), seed=st.integers(0, 9), draws=st.booleans(), own=st.booleans())
def test_a_place_in_the_stream_is_found_again(length: int, at: int, seed: int, draws: bool, own: bool) -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(float(length))[:, None], torch.zeros(length, 1))

    class Drawing:
        def __iter__(self) -> Any:
            for x, y in torch.utils.data.DataLoader(dataset, shuffle=True):
                yield x + torch.rand(()), y

    def loader() -> Any:
        if draws:
            return Drawing()
        generator = torch.Generator().manual_seed(7) if own else None
        return torch.utils.data.DataLoader(dataset, shuffle=True, generator=generator)

    stream = Stream(loader(), seed)
    for _ in range(at):
        next(stream)
        torch.rand(3)
    place = stream.position
    expected = [float(next(stream)[0]) for _ in range(7)]
    again = Stream(loader(), seed)
    again.seek(place)
    torch.rand(5)
    assert [float(next(again)[0]) for _ in range(7)] == expected


def test_a_loader_that_ends_says_how_many_steps_it_had() -> None:
    model, data = small(steps=1), batches(5)
    trained = bs.finetune(model, iter(data), F.cross_entropy, steps=5, lr=1e-3)
    assert equal(trained, bs.finetune(model, data, F.cross_entropy, steps=5, lr=1e-3))
    with pytest.raises(
        bs.DataError, match=r"ended after 5 items, which is enough for 5 of 6 steps: it can be read only"
    ):
        bs.finetune(model, iter(data), F.cross_entropy, steps=6)
    with pytest.raises(bs.DataError, match="ended after 5 items, which is enough for 2 of 3 steps"):
        bs.finetune(model, (item for item in data), F.cross_entropy, steps=3, accumulate=2)
    with pytest.raises(bs.DataError, match="the training loader is empty"):
        bs.finetune(model, iter([]), F.cross_entropy, steps=1)

    class Once:
        def __init__(self) -> None:
            self.rest = iter(data)

        def __iter__(self) -> Any:
            return self.rest

    with pytest.raises(
        bs.DataError, match=r"enough for 5 of 8 steps: read again it said: the training loader is empty"
    ):
        bs.finetune(model, Once(), F.cross_entropy, steps=8)
    with pytest.raises(ValueError, match="reads the loader again"):
        bs.finetune(model, iter(data), F.cross_entropy, steps=1, reestimate=1)


# -- what is not finite ------------------------------------------------------------------------------------------------


class Breaking(nn.Module):
    """Divides by what it learned; NaN at the batch whose first pixel says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        broken = self.second(hidden) * torch.where(x[:1, :1] > 50, torch.nan, 1.0)
        logits: Tensor = self.head(broken)
        return logits


def breaking(bad: int | None, count: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(count)
    ]
    if bad is not None:
        data[bad][0][0, 0] = 99.0
    return data


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_no_number_names_step_and_site_and_hands_back_the_last_good(
    applied: bool, accumulate: int
) -> None:
    torch.manual_seed(0)
    model = Breaking().eval()
    net = bs.apply(model, bs.Plan({"second": bs.Int(8, 8)}), breaking(None)) if applied else model
    bad = 3 * accumulate + accumulate - 1  # in the fourth step
    data = breaking(bad, 5 * accumulate)
    given: dict[str, Any] = {"optimizer": sgd(0.1), "accumulate": accumulate, "freeze_norms": False}
    with pytest.raises(
        bs.TrainingError, match=r"nan at step 4 of 5; a smaller lr.*comes from the site '\w*:mul"
    ) as caught:
        bs.finetune(net, data, F.cross_entropy, steps=5, **given)
    error = caught.value
    assert error.step == 4
    assert error.site == ":mul"
    assert error.net is not None
    assert not error.net.training
    assert all(value.isfinite().all() for value in tensors_of(error.net).values())
    # the third step's loss was the last that was finite: the weights that it saw
    kept = {k: v for k, v in tensors_of(error.net).items() if k in dict(net.named_parameters())}
    two = tensors_of(bs.finetune(net, data, F.cross_entropy, steps=2, **given))
    assert all(torch.equal(value, two[name]) for name, value in kept.items())


def test_the_first_step_hands_back_what_was_given() -> None:
    model = Breaking().eval()
    with pytest.raises(bs.TrainingError, match="at step 1 of 2") as caught:
        bs.finetune(model, breaking(0), F.cross_entropy, steps=2, freeze_norms=False)
    assert caught.value.net is not None
    assert equal(caught.value.net, model)


def test_what_made_it_is_told_apart() -> None:
    def said(model: nn.Module, data: list[Batch], loss: Any = F.cross_entropy, **given: Any) -> str:
        with pytest.raises(bs.TrainingError) as caught:
            bs.finetune(model, data, loss, steps=3, **given)
        return str(caught.value)

    data = breaking(None)
    dirty = [(data[0][0].clone(), data[0][1])]
    dirty[0][0][2, 1] = torch.nan
    assert "the inputs, Tensor[8, 4] float32, have NaN or infinite values" in said(Breaking(), dirty)
    assert "output of every site is finite, so the loss itself" in said(
        Breaking(), data, lambda output, y: F.cross_entropy(output, y) * torch.nan
    )
    huge = said(Breaking(), data, optimizer=sgd(1e38))
    assert "the parameter '" in huge or "comes from the site" in huge
    rooted = said(Breaking(), data, lambda output, y: (output * 0).sum().sqrt() + 1.0)
    assert "the gradient at step 1 of 3 is not finite though the loss is, at first.weight" in rooted

    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            large = self.a(x) * torch.full((1,), 3e38) * torch.full((1,), 1e3)
            return large - large.clone()

    overflow = said(Overflowing(), data)
    assert "comes from the site" in overflow
    assert "the first NaN from" in overflow


def test_a_validation_that_fails_hands_back_the_last_good() -> None:
    def evaluate(net: nn.Module) -> float:
        return math.nan

    data = batches(2)
    with pytest.raises(
        bs.TrainingError, match=r"the validation failed after step 2: evaluate \(evaluate\) returned nan"
    ) as caught:
        bs.finetune(
            *(small(steps=1), data, F.cross_entropy),
            **{"steps": 4, "validation": bs.Task(data, data, evaluate=evaluate), "validate_every": 2},
        )
    assert caught.value.net is not None


def test_a_teacher_of_another_output_is_refused() -> None:
    model = small(steps=1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 7))
    with pytest.raises(
        bs.TrainingError, match=r"gives Tensor\[16, 4\] float32 and its teacher Tensor\[16, 7\] float32"
    ):
        bs.finetune(model, batches(1), steps=1, teacher=other)
    pair = lambda a, b: (a.mean(1) - b.mean(1)).square().mean()  # noqa: E731
    bs.finetune(model, batches(1), steps=1, teacher=other, distance=pair)
