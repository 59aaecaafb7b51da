from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith import metrics
from bitsmith.metrics import Metric, MetricError, logits, metric, source_digest, squared_error, top1, top5


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), classes=st.integers(5, 9), seed=st.integers(0, 2**31))
def test_top_k_against_sorting(n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(classes, dtype=np.float32), (n, 1)), axis=1)
    target = rng.integers(0, classes, n)
    order = np.argsort(-scores, axis=1)
    for found, k in ((top1, 1), (top5, 5)):
        expected = [float(t in row[:k]) for row, t in zip(order, target, strict=True)]
        assert found(torch.from_numpy(scores), torch.from_numpy(target)).tolist() == expected


def test_top1_over_positions_is_their_fraction() -> None:
    target = torch.tensor([[0, 1, 2], [2, 2, 2]])
    onehot = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1], [2, 0, 0]]), 4).float()  # [2, 3, 4]
    expected = torch.tensor([2 / 3, 1 / 3])
    assert torch.allclose(top1(onehot, target), expected)
    assert torch.allclose(top1(onehot.movedim(-1, 1), target), expected)  # as segmentation has it


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(4,), (4, 1), (3, 5), (2, 3, 4)]))
def test_squared_error_against_float64(seed: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=shape), rng.normal(size=shape)
    expected = ((a - b) ** 2).reshape(shape[0], -1).mean(1)
    np.testing.assert_allclose(squared_error(torch.from_numpy(a), torch.from_numpy(b)), expected, rtol=1e-6)
    assert squared_error.lower
    assert not top1.lower


OUT, TARGET = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4)


@pytest.mark.parametrize(
    "output",
    [
        OUT,
        (OUT, "cache"),
        [OUT],
        {"loss": torch.tensor(0.0), "logits": OUT},
        SimpleNamespace(logits=OUT),
    ],
)
def test_logits_are_found(output: Any) -> None:
    assert logits(output) is OUT
    assert torch.equal(top1(output, TARGET), top1(OUT, TARGET))


@pytest.mark.parametrize(
    ("found", "output", "target", "says"),
    [
        (top1, {"out": OUT}, TARGET, r"no tensor of logits.*\{out: Tensor\[4, 10\]"),
        (top1, OUT, None, "needs class indices.*got None"),
        (top1, OUT, torch.zeros(4, 10), r"target\.argmax\(1\)"),
        (top1, OUT, TARGET[:3], "do not go together"),
        (top1, OUT[:, 0], TARGET, "do not go together"),
        (top1, OUT[:, :1], TARGET, "one logit"),
        (top5, OUT[:, :4], TARGET, "only 4 classes"),
        (top1, OUT, TARGET - 100, "run from -100 to -97"),
        (top1, OUT, TARGET + 8, "run from 8 to 11, classes from 0 to 9"),
        (squared_error, OUT[:, :1], TARGET.float(), "same shape"),  # would broadcast to [4, 4]
        (squared_error, OUT, None, "same shape"),
        (metric(lambda o, t: torch.tensor(0.5)), OUT, TARGET, r"4 samples.*do not average over the batch"),
        (metric(lambda o, t: (o > 0).float()), OUT, TARGET, r"shape \[4\]: keep the batch axis"),
        (metric(lambda o, t: torch.ones(3)), OUT, TARGET, r"Tensor\[3\]"),
        (metric(lambda o, t: 0.5), OUT, TARGET, r"returned 0\.5"),
        (metric(lambda o, t: o[:, 0] * math.nan), OUT, TARGET, "4 of 4 scores that are NaN"),
        (metric(lambda o, t: torch.tensor([1.0, math.inf, 0, 0])), OUT, TARGET, "1 of 4"),
    ],
)
def test_what_does_not_go_together_is_said(found: Metric, output: Any, target: Any, says: str) -> None:
    with pytest.raises(MetricError, match=says):
        found(output, target)


def test_plain_functions_become_metrics() -> None:
    def within(output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).abs() < 1

    made = metric(within, lower=True)
    assert (made.name, made.lower) == ("within", True)
    scores = made(OUT.requires_grad_(), TARGET)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert metric(top1) is top1
    OUT.requires_grad_(False)


def test_source_digest_follows_the_source() -> None:
    def maker(k: int) -> metrics.PerSample:
        return lambda output, target: output[:, k]

    a, b = (lambda o, t: o[:, 0]), (lambda o, t: o[:, 1])  # two on one line
    digests = [source_digest(f) for f in (top1, top5, squared_error, metric(maker(1)), metric(maker(2)), a, b)]
    assert len(set(digests)) == len(digests)
    assert source_digest(metric(maker(1))) == digests[3]
    assert source_digest(Metric("top1", top1.function, lower=True)) != source_digest(top1)
