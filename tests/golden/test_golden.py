"""The numbers that each runtime gives stay what they were."""

from __future__ import annotations

import json

import pytest
import torch

import bitsmith as bs
from golden.regenerate import HERE, TARGETS, computed, data, seeded


@pytest.mark.parametrize("name", TARGETS)
def test_golden_numbers(name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    kept = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    got = computed(name)
    assert got["plan"] == kept["plan"]
    assert got["realised"] == kept["realised"]
    outputs, expected = torch.tensor(got["outputs"]), torch.tensor(kept["outputs"])
    # another processor may round a few integers the other way: 1 % of the range
    assert (outputs - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("name", TARGETS)
def test_golden_numbers_are_near_float(name: str) -> None:
    kept = torch.tensor(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["outputs"])
    with torch.no_grad():
        floating = seeded()(data(2)[0][0])
    error = (kept - floating).square().sum() / floating.square().sum()
    assert 1e-8 < error < 1e-2  # quantized, and not wrong


def test_a_change_of_one_weight_moves_them() -> None:
    kept = torch.tensor(json.loads((HERE / "onnxruntime.json").read_text(encoding="utf-8"))["outputs"])
    model = seeded()
    with torch.no_grad():
        model.right.weight[0].mul_(1.2)
        moved = bs.quantize(model, data(1))(data(2)[0][0])
    assert (moved - kept).abs().max() > 0.01 * kept.abs().max()
