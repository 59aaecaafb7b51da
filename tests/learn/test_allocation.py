"""The allocation of bits: against all that could be chosen, and its costs against what noise really costs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.learn.allocation import WIDTHS, allocate
from bitsmith.numerics.grid import GAUSSIAN_STEPS, Grid
from bitsmith.site import Learn


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.floats(-1.0, 1e4), st.floats(0.1, 50), st.sampled_from([0.0, 1.0])), min_size=1, max_size=3),
    st.floats(1.5, 9.0),
    st.floats(1.5, 9.0),
)
def test_no_other_choice_of_bits_is_better(tensors: list[tuple[float, float, float]], all_: float, some: float) -> None:
    costs = [cost for cost, _, _ in tensors]
    rows = {"all": [size for _, size, _ in tensors], "some": [size * part for _, size, part in tensors]}
    room = {"all": all_ * sum(rows["all"]), "some": some * sum(rows["some"])}
    found = allocate(costs, rows, room)

    def loss(bits: tuple[int, ...]) -> float:
        return sum(max(cost, 0.0) * 4.0**-b for cost, b in zip(costs, bits, strict=True))

    def kept(bits: tuple[int, ...], tolerance: float) -> bool:
        return all(sum(r * b for r, b in zip(rows[name], bits, strict=True)) <= room[name] + tolerance for name in rows)

    every = [bits for bits in itertools.product(WIDTHS, repeat=len(costs)) if kept(bits, 1e-9)]
    if found is None:
        assert not [bits for bits in every if kept(bits, -1e-6)]
        return
    assert kept(tuple(found), 1e-4)
    if every:
        best = min(map(loss, every))
        assert loss(tuple(found)) <= best + 1e-4 * max(*costs, 1e-9, *costs) * 4.0**-2


def test_the_gradient_of_rounding_is_what_noise_costs() -> None:
    """``L = sum h x^2 / 2`` about its minimum: rounding costs ``h d^2 / 24`` a value, and the slope by log2 d is 2 ln 2
    times that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200_000, generator=generator) * 2 - 1
    curvature, step = 3.0, 0.05
    grid = Grid(Learn("step_range"), torch.tensor(step), torch.tensor(-32.0), torch.tensor(31.0), x.numel())
    grid.observe_bits()
    (0.5 * curvature * (grid(x) - x.detach()) ** 2).sum().backward()  # as a layer that x was trained for
    slope = grid.tie_gradients()
    assert slope / x.numel() == pytest.approx(2 * math.log(2) * curvature * step**2 / 24, rel=0.02)


def test_tied_gradients_are_those_of_the_learned_step_and_keep_the_levels() -> None:
    torch.manual_seed(0)
    x, levels = torch.randn(3, 200), (torch.full((3,), -8.0), torch.full((3,), 7.0))
    step = torch.tensor([0.1, 0.2, 0.4])
    whole = Grid(Learn("step"), step, *levels, elements=200)
    apart = Grid(Learn("step_range"), step, *levels, elements=200)
    apart.observe_bits()
    given = torch.randn(3, 200)
    for grid in (whole, apart):
        grid(x, (3, 1)).backward(given)
    apart.tie_gradients()
    assert isinstance(whole.log_step.grad, Tensor)
    assert isinstance(apart.log_step.grad, Tensor)
    torch.testing.assert_close(apart.log_step.grad, whole.log_step.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(apart.log_range.grad, apart.log_step.grad)
    optimizer = torch.optim.Adam(apart.parameters(), 0.3)
    for _ in range(5):
        optimizer.step()
    assert [level.tolist() for level in apart.levels()] == [[-8.0] * 3, [7.0] * 3]
    assert apart.bits().tolist() == [4.0] * 3


@pytest.mark.parametrize("low", [-8.0, 0.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_grid_takes_the_bits_it_is_given(low: float, bits: int) -> None:
    grid = Grid(Learn("step_range"), torch.tensor([0.1, 0.3]), torch.full((2,), low), torch.full((2,), 7.0), 10)
    before = int(grid.bits()[0])
    grid.observe_bits()
    grid.set_bits(bits)
    assert grid.bits().tolist() == [bits] * 2
    least, greatest = (level.tolist() for level in grid.levels())
    assert least == [-(2.0 ** (bits - 1)) if low else 0.0] * 2
    assert greatest == [2.0 ** (bits - 1) - 1 if low else 2.0**bits - 1] * 2
    ratio = GAUSSIAN_STEPS[bits] / GAUSSIAN_STEPS[before]
    assert grid.values()[0].tolist() == pytest.approx([0.1 * ratio, 0.3 * ratio])


def test_the_steps_of_a_normal_variable_are_those_of_least_error() -> None:
    x = torch.linspace(-9, 9, 360_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])

    def error(step: float, bits: int) -> float:
        half = 2 ** (bits - 1)
        level = (torch.floor(x / step) + 0.5).clamp(-half + 0.5, half - 0.5) * step
        return float(((level - x) ** 2 * density).sum())

    for bits, step in GAUSSIAN_STEPS.items():
        assert error(step, bits) <= min(error(0.99 * step, bits), error(1.01 * step, bits))


@pytest.mark.parametrize("low", [-3.0, 0.0])
def test_filled_levels_are_all_that_the_bits_hold_over_the_same_range(low: float) -> None:
    grid = Grid(Learn("step_range"), torch.tensor(0.2), torch.tensor(low), torch.tensor(5.0), 10)
    bits, before = int(grid.bits()), [float(value.detach()) for value in grid.values()[1:]]
    grid.hold_bits(True, fill=True)
    assert int(grid.bits()) == bits
    least, greatest = (int(level) for level in grid.levels())
    assert greatest - least + 1 == 2**bits
    _, below, above = (float(value.detach()) for value in grid.values())
    assert below <= before[0] + 1e-6
    assert above >= before[1] - 1e-6
    full = Grid(Learn("step_range"), torch.tensor(0.2), torch.tensor(-4.0), torch.tensor(3.0), 10)
    full.hold_bits(True, fill=True)
    assert float(full.values()[0].detach()) == pytest.approx(0.2)
