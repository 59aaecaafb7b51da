from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitsmith.numerics.errors import relative_squared_error, sqnr_db


def test_against_numpy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 50)), rng.standard_normal((3, 50))
    ratio = np.sum((a - b) ** 2) / np.sum(a**2)
    assert relative_squared_error(torch.tensor(a), torch.tensor(b)) == pytest.approx(ratio)
    assert sqnr_db(torch.tensor(a), torch.tensor(b)) == pytest.approx(-10 * np.log10(ratio))


def test_extremes() -> None:
    x, zero = torch.ones(3), torch.zeros(3)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(zero, zero) == math.inf
    assert sqnr_db(zero, x) == -math.inf
    assert relative_squared_error(zero, x) == math.inf


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(1, 3\)"):
        sqnr_db(torch.ones(3), torch.ones(1, 3))


def test_float64_accumulation() -> None:
    x = torch.full((1000,), 1e25)  # squares overflow float32
    assert sqnr_db(x, x * 1.1) == pytest.approx(20.0, abs=1e-3)
