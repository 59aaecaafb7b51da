"""Signs and their gradients against the definitions written in NumPy at float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bitsmith.numerics.binarize import binarize, binarize_at_random, channel_scale, signs

VALUES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=1, max_dims=3, max_side=5),
    elements=st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]),
)


@given(VALUES, st.booleans())
def test_the_sign_and_its_gradient(values: np.ndarray, cancel: bool) -> None:
    x = torch.tensor(values, requires_grad=True)
    weights = np.linspace(-2, 2, values.size).reshape(values.shape)
    got = binarize(x, cancel)
    (got * torch.from_numpy(weights)).sum().backward()
    exact = values.astype(np.float64)
    np.testing.assert_array_equal(got.detach().numpy(), np.where(exact >= 0, 1.0, -1.0))
    assert x.grad is not None
    wanted = np.where(np.abs(exact) > 1, 0.0, weights) if cancel else weights
    np.testing.assert_allclose(x.grad.numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_stays_and_nan_is_not_hidden(dtype: torch.dtype) -> None:
    x = torch.tensor([-0.0, 0.0, -1e-7, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    got = signs(x)
    assert got.dtype == dtype
    assert got[:5].tolist() == [1.0, 1.0, -1.0 if float(x[2]) < 0 else 1.0, 1.0, -1.0]
    assert got[5].isnan()
    drawn = binarize_at_random(x[2:], torch.full((4,), 0.25), cancel=False)
    assert drawn.dtype == dtype
    assert drawn[:3].tolist() == [1.0, 1.0, -1.0]
    assert drawn[3].isnan()


@given(VALUES, st.integers(0, 2**31), st.booleans())
def test_drawn_signs_are_the_hard_sigmoid_of_their_numbers(values: np.ndarray, seed: int, cancel: bool) -> None:
    numbers = np.random.default_rng(seed).random(values.shape)
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    got = binarize_at_random(x, torch.from_numpy(numbers), cancel)
    chance = np.clip((values.astype(np.float64) + 1) / 2, 0, 1)
    np.testing.assert_array_equal(got.detach().numpy(), np.where(numbers < chance, 1.0, -1.0))
    got.sum().backward()
    assert x.grad is not None
    inside = np.abs(values) <= 1 if cancel else np.ones_like(values)
    np.testing.assert_array_equal(x.grad.numpy(), inside)


def test_the_mean_of_many_draws_is_the_clipped_weight() -> None:
    x = torch.linspace(-1.5, 1.5, 7).expand(20_000, 7)
    numbers = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    mean = binarize_at_random(x, numbers, cancel=False).mean(0)
    assert torch.allclose(mean, x[0].clamp(-1, 1), atol=4 / 20_000**0.5)


@given(arrays.arrays(np.float64, (3, 2, 4), elements=st.floats(-2, 2)))
def test_the_scale_is_that_of_least_squared_error_with_its_exact_gradient(values: np.ndarray) -> None:
    w = torch.tensor(values, requires_grad=True)
    scale = channel_scale(w)
    bits = np.where(values >= 0, 1.0, -1.0).reshape(3, -1)
    flat = values.reshape(3, -1)
    best = (flat * bits).sum(1) / (bits * bits).sum(1)  # the projection of w on its signs
    np.testing.assert_allclose(scale.detach().numpy(), best, atol=1e-12)
    weights = np.array([1.0, -2.0, 3.0])
    (scale * torch.from_numpy(weights)).sum().backward()
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy().reshape(3, -1), weights[:, None] * np.sign(flat) / flat.shape[1])
