"""The example of the guide computes what its docstring says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bitsmith.site import Operand, Record, Site

PATH = Path(__file__).parents[2] / "examples" / "ternary.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ternary_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def site(kind: str = "conv2d", weight: bool = True) -> Site:
    operands = (
        Operand("input", "@x", (1, 3, 5, 5), "float32"),
        Operand("weight", "c<1", (4, 3, 3, 3), "float32", constant=weight),
    )
    return Site("c", kind, "c", "integer", operands, ("c",), ((1, 4, 5, 5),))


def test_scale_is_the_best_one_for_the_kept_weights(example: ModuleType) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = example.ternary(weight, 0.7)
    for row, out in zip(weight.flatten(1), got.flatten(1), strict=True):
        limit = 0.7 * row.abs().mean()
        pattern = torch.where(row > limit, 1.0, torch.where(row < -limit, -1.0, 0.0)).double()
        best = torch.linalg.lstsq(pattern[:, None], row[:, None]).solution.item()
        torch.testing.assert_close(out, pattern * best)


def test_zero_weights_stay_finite(example: ModuleType) -> None:
    assert torch.equal(example.ternary(torch.zeros(2, 3), 0.7), torch.zeros(2, 3))


def test_gradient_passes_straight_through(example: ModuleType) -> None:
    weight = torch.randn(2, 5, requires_grad=True)
    factor = torch.randn(2, 5)
    (example.ternary(weight, 0.7) * factor).sum().backward()
    torch.testing.assert_close(weight.grad, factor)


def test_cell_computes_the_operation_with_ternary_weights(example: ModuleType) -> None:
    technique = example.Ternary()
    cell = technique.build(site(), Record({}, {}), torch.Generator())
    x, weight, bias = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    want = F.conv2d(x, example.ternary(weight, 0.7), bias, padding=1)
    torch.testing.assert_close(cell(x, weight, bias=bias, padding=1), want)
    assert technique.bits(site()) == pytest.approx(108 * math.log2(3) + 4 * 32)


def test_refusals_say_why(example: ModuleType) -> None:
    assert example.Ternary().fits(site())
    assert "matmul" in example.Ternary().fits(site("matmul")).reason
    assert "no weight" in example.Ternary().fits(site(weight=False)).reason
    with pytest.raises(ValueError, match="threshold"):
        example.Ternary(threshold=math.nan)
