"""Learned grids against the published gradients, written plainly in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.numerics.grid import Grid, uniform
from bitsmith.site import Learn

STEP_RANGE = Learn("step_range")


def grid(learn: Learn, step: Tensor | float, low: float, high: float, elements: int = 1) -> Grid:
    step = torch.as_tensor(step)
    return Grid(learn, step, torch.full_like(step, low), torch.full_like(step, high), elements)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    step=st.floats(0.01, 1.0),
    low=st.floats(-3, 0),
    high=st.floats(0.5, 3),
    signed=st.booleans(),
)
def test_values_and_gradients_of_the_step_and_the_limits(
    seed: int, step: float, low: float, high: float, signed: bool
) -> None:
    torch.manual_seed(seed)
    x = (2 * torch.randn(64)).requires_grad_()
    low = low if signed else 0.0
    # limits in the middle of two levels are a tie for all that is clipped
    assume(all(abs(limit / step % 1 - 0.5) > 1e-3 for limit in (low, high)))
    parts = [torch.tensor(value, requires_grad=True) for value in (step, low, high)]
    y = uniform(x, *parts)
    given = torch.randn(64)
    y.backward(given)
    # the same in float64, one value at a time
    d, a, b = (float(part.detach()) for part in parts)
    expected, to_x, to_step, to_low, to_high = [], [], 0.0, 0.0, 0.0
    for value, g in zip(x.detach().tolist(), given.tolist(), strict=True):
        clipped = min(max(value, a), b)
        level = round(clipped / d)
        expected.append(level * d)
        inside = a <= value <= b
        to_x.append(g if inside else 0.0)
        to_step += g * (level * d - value) / d if inside else 0.0
        to_low += g * (value < a)
        to_high += g * (value > b)
    torch.testing.assert_close(y.detach().double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5 + d, rtol=0)
    assert (y.detach().double() - torch.tensor(expected, dtype=torch.float64)).abs().gt(1e-5).sum() <= 1  # a tie
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), torch.tensor(to_x, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    found = [float(part.grad) if part.grad is not None else math.nan for part in parts]
    assert found[1:] == pytest.approx([to_low, to_high], abs=1e-4)
    assert found[0] == pytest.approx(to_step, abs=1e-3 + 3 * (d < 0.02))


def test_with_whole_limits_it_is_the_learned_step_size() -> None:
    """Esser et al. 2020, eq. 3 and section 2.2, times d step / d log2(step)."""
    torch.manual_seed(0)
    x, step, low, high = torch.randn(500), 0.17, -8, 7
    learned = grid(Learn(), step, low, high, elements=500)
    given = torch.randn(500)
    learned(x).backward(given)
    v = x.double() / float(learned.first_step)
    slope = torch.where(v <= low, float(low), torch.where(v >= high, float(high), torch.round(v) - v))
    expected = (given * slope).sum() / math.sqrt(500 * high) * step * math.log(2)
    assert isinstance(learned.log_step.grad, Tensor)
    assert float(learned.log_step.grad) == pytest.approx(float(expected), rel=1e-3)


def test_the_form_normalised_by_the_limit_has_the_gradient_of_the_step() -> None:
    """``c round(n clip(x / c, -1, 1)) / n`` in powers of two of c: PACT's and its like."""
    torch.manual_seed(0)
    x, n, c = torch.randn(300, dtype=torch.float64), 7, 1.3
    power = torch.zeros((), dtype=torch.float64, requires_grad=True)
    limit = c * torch.exp2(power)
    v = n * torch.clamp(x / limit, -1, 1)
    rounded = v + (torch.round(v) - v).detach()
    (limit * rounded / n).sum().backward()
    learned = grid(Learn(), c / n, -n, n)
    learned(x.float()).sum().backward()
    assert power.grad is not None
    assert isinstance(learned.log_step.grad, Tensor)
    assert float(learned.log_step.grad) / learned.factor == pytest.approx(float(power.grad), rel=1e-4)


@pytest.mark.parametrize("signed", [True, False])
@settings(deadline=None)
@given(step=st.floats(0.005, 2.0), limit=st.floats(0.01, 4.0))
def test_bits_are_those_of_the_published_equation(signed: bool, step: float, limit: float) -> None:
    low = -1.0 if signed else 0.0
    learned = grid(STEP_RANGE, limit, low, 1.0)
    with torch.no_grad():
        learned.log_step.copy_(torch.log2(torch.tensor(step / limit)))
    d, least, greatest = (float(value.detach()) for value in learned.values())
    n = round(greatest / d)
    assert round(least / d) == (-n if signed else 0)
    assert int(learned.bits().detach()) == max(math.ceil(math.log2(n + 1) - 1e-9) + signed, 1)
    assert d == pytest.approx(min(max(step, 2 * limit / 254 if signed else limit / 255), limit), rel=1e-4)
    assert int(learned.bits().detach()) <= 8


def test_fewer_bits_follow_from_a_greater_step_and_a_smaller_range() -> None:
    learned = grid(STEP_RANGE, torch.full((3,), 0.1), -7, 7)
    assert learned.bits().tolist() == [4, 4, 4]
    learned.bits().sum().backward()
    assert isinstance(learned.log_step.grad, Tensor)
    assert isinstance(learned.log_range.grad, Tensor)
    assert bool((learned.log_step.grad < 0).all())
    assert bool((learned.log_range.grad > 0).all())


def test_gradients_of_inferred_bits_are_clipped_to_the_step() -> None:
    learned = grid(STEP_RANGE, 0.1, -7, 7)
    learned(torch.full((1000,), 5.0)).sum().backward()
    assert isinstance(learned.log_range.grad, Tensor)
    assert isinstance(learned.log_step.grad, Tensor)
    # 1000 by the upper limit, times d limit / d log2
    assert float(learned.log_range.grad) == pytest.approx(1000 * 0.7 * math.log(2), rel=1e-4)
    learned.clip_gradient()
    assert float(learned.log_range.grad) == pytest.approx(0.1 * 0.7 * math.log(2), rel=1e-4)
    learned.log_step.grad.fill_(-5.0)
    learned.clip_gradient()
    assert float(learned.log_step.grad) == pytest.approx(-0.1 * 0.1 * math.log(2), rel=1e-4)


def test_held_bits_stay_while_the_step_is_trained_and_values_go_on() -> None:
    torch.manual_seed(0)
    x, learned = torch.randn(200), grid(STEP_RANGE, 0.1, -7, 7)
    with torch.no_grad():
        learned.log_step.add_(0.4)
        learned.log_range.sub_(0.3)
        (least, greatest), step = learned.levels(), learned.values()[0]
    learned.hold_bits(True)
    torch.testing.assert_close(learned.values()[0], step)
    assert [float(level) for level in (least, greatest)] == [float(level.detach()) for level in learned.levels()]
    before = learned.bits().tolist()
    learned(x).sum().backward()
    assert isinstance(learned.log_step.grad, Tensor)
    assert learned.log_range.grad is None
    with torch.no_grad():
        learned.log_step.add_(0.7)
    assert learned.bits().tolist() == before
    values = learned(x).detach()
    learned.hold_bits(False)
    torch.testing.assert_close(learned(x).detach(), values)
    learned.bits().sum().backward()
    assert isinstance(learned.log_range.grad, Tensor)


def test_what_is_fixed_trains_nothing_but_passes_gradients_on() -> None:
    learned = grid(Learn("fixed", "ewgs", 0.5), 0.1, -7, 7)
    assert list(learned.parameters()) == []
    x = torch.tensor([0.14, 0.16], requires_grad=True)
    learned(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1 + 0.5 * 0.4, 1 - 0.5 * 0.4], rel=1e-3)


@pytest.mark.parametrize("view", [(1, 3, 1), (3, 1, 1)])
def test_each_slice_has_its_own(view: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 4)
    learned = grid(Learn(), torch.tensor([0.1, 0.2, 0.4]), -8, 7)
    found = learned(x, view)
    axis = view.index(3)
    for k in range(3):
        alone = grid(Learn(), float(learned.first_step[k]), -8, 7)
        torch.testing.assert_close(found.select(axis, k), alone(x.select(axis, k)))


@pytest.mark.parametrize("bad", [{"form": "bits"}, {"backward": "straight"}, {"strength": 3.0}, {"strength": -1.0}])
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Learn"):
        Learn(**bad)  # type: ignore[arg-type]
