"""Closed forms of the cells' error rates against Monte Carlo, and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitsmith as bs

SPREADS = st.floats(0.01, 1.5)
COUNT = 400_000


@pytest.mark.parametrize(("ratio", "on_spread", "off_spread"), [(10, 0.3, 0.9), (3, 0.5, 0.5), (2, 1.2, 0.1)])
def test_closed_forms_are_what_drawn_resistances_give(ratio: float, on_spread: float, off_spread: float) -> None:
    cell = bs.ResistiveBit(5.0, 5.0 * ratio, on_spread, off_spread)
    rng = np.random.default_rng(0)
    on, off = rng.lognormal(np.log(5.0), on_spread, COUNT), rng.lognormal(np.log(5.0 * ratio), off_spread, COUNT)
    reference = 5.0 * ratio ** (on_spread / (on_spread + off_spread))
    drawn = (on > off).mean(), ((on > reference).mean() + (off < reference).mean()) / 2
    for rate, found in zip((cell.pair_error_rate(), cell.single_error_rate()), drawn, strict=True):
        assert abs(rate - found) < 5 * math.sqrt(rate * (1 - rate) / COUNT)
    assert abs(cell.single_error_rate(8.0) - ((on > 8).mean() + (off < 8).mean()) / 2) < 5e-3


@given(st.floats(1.1, 100), SPREADS, SPREADS)
def test_a_pair_errs_less_than_one_device(ratio: float, on_spread: float, off_spread: float) -> None:
    """ln(off / on) over the root of the sum of squares, not over the sum, of the spreads."""
    cell = bs.ResistiveBit(1.0, ratio, on_spread, off_spread)
    assert 0 <= cell.pair_error_rate() <= cell.single_error_rate() <= 0.5


def test_without_spread_nothing_errs() -> None:
    cell = bs.ResistiveBit(1.0, 2.0, 0.0, 0.0)
    assert (cell.pair_error_rate(), cell.single_error_rate()) == (0.0, 0.0)


@pytest.mark.parametrize("values", [(2.0, 1.0, 0.1, 0.1), (0.0, 1.0, 0.1, 0.1), (1.0, 2.0, -0.1, 0.1)])
def test_impossible_cells(values: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="ResistiveBit"):
        bs.ResistiveBit(*values)
    with pytest.raises(ValueError, match="kOhm"):
        bs.ResistiveBit(1.0, 2.0, 0.1, 0.1).single_error_rate(0.0)
