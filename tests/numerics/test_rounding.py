"""The derivative of rounding: each factor against its equation in float64, and what holds for all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics.rounding import BACKWARDS, round_through
from bitsmith.site import Backward

STRENGTH = 0.3


def factor(backward: Backward, r: float, sign: float) -> float:
    """The equations as they are written in the docstring, one number at a time."""
    if backward == "psgd":
        return 1 + STRENGTH * abs(r)
    if backward == "ewgs":
        return 1 + STRENGTH * sign * r
    if backward == "tanh":
        return 1 + STRENGTH * sign * 0.5 * math.tanh(4 * r)
    if backward == "inverse_tanh":
        return 1 + STRENGTH * sign * 0.5 * math.atanh(1.9 * r) / math.atanh(0.95)
    return 1.0


@pytest.mark.parametrize("backward", [b for b in BACKWARDS if b != "noise"])
@settings(deadline=None)
@given(value=st.floats(-40, 40), gradient=st.floats(-3, 3))
def test_gradients_follow_the_equations(backward: Backward, value: float, gradient: float) -> None:
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    y = round_through(x, backward, STRENGTH)
    assert float(y.detach()) == round(value)
    y.backward(torch.tensor(gradient, dtype=torch.float64))
    sign = (gradient > 0) - (gradient < 0)
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(gradient * factor(backward, value - round(value), sign), abs=1e-9)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_at_full_strength_no_gradient_changes_its_sign(backward: Backward) -> None:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 4001, requires_grad=True)
    given = torch.randn(4001)
    round_through(x, backward, 2.0).backward(given)
    assert x.grad is not None
    assert bool((x.grad * given >= 0).all())
    assert bool(x.grad.isfinite().all())


def test_noise_is_bounded_seeded_and_not_the_residual() -> None:
    def gradients(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        x = torch.full((10000,), 0.25, requires_grad=True)
        round_through(x, "noise", STRENGTH).sum().backward()
        assert x.grad is not None
        return x.grad

    found = gradients(0)
    assert torch.equal(found, gradients(0))
    assert not torch.equal(found, gradients(1))
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(found.std()) == pytest.approx(STRENGTH / math.sqrt(12), rel=0.05)
