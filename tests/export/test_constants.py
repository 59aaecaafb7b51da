"""Weights of an exported program as named constants: the same network, and the integers behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.export.constants import name_weights, site_of, spread
from bitsmith.export.program import applied_program
from bitsmith.model.apply import computer_of
from bitsmith.technique import Technique


@pytest.mark.parametrize("technique", [
    bs.Int(8, None), bs.Int(4, None, granularity="group", group=4), bs.Int(6, None, affine_weights=True),
    bs.Int(8, None, granularity="tensor"), bs.Palette(2), bs.Sparse(0.5),
], ids=str)  # fmt: skip
def test_the_program_computes_the_same_from_one_constant(technique: Technique) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 5, 5, generator=generator)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    applied = bs.apply(model, bs.Plan({"0": technique}), [(x, None)])
    program, _ = applied_program(applied, x)
    found = name_weights(program, {"0": computer_of(applied).record_sites["0"]})
    (weight,) = found.values()
    assert list(found) == ["weight_0"]
    assert weight.site == "0"
    with torch.no_grad():
        assert torch.allclose(program.graph_module(*_arguments(program, x))[0], applied(x), atol=1e-5)
    if isinstance(technique, bs.Int):
        assert weight.integers is not None
        assert weight.scale is not None
        offset = 0 if weight.offset is None else spread(weight.offset, weight.values.shape).astype(np.float32)
        steps = weight.integers.astype(np.float32) - offset
        assert np.array_equal(steps * spread(weight.scale, weight.values.shape), weight.values)
        assert len(np.unique(weight.integers)) <= 2**technique.w
        assert not any("dequantize" in str(node.target) for node in program.graph.nodes)
    else:
        assert weight.integers is None
    assert {site_of(node) for node in program.graph.nodes if "conv2d" in str(node.target)} == {"0", "3"}


def test_sites_that_were_not_asked_for_stay_as_they_are() -> None:
    x = torch.zeros(1, 6)
    applied = bs.apply(nn.Sequential(nn.Linear(6, 4)), bs.Plan({"0": bs.Int(8, None)}), [(x, None)])
    program, _ = applied_program(applied, x)
    before = len(program.graph.nodes)
    assert name_weights(program, {}) == {}
    assert any("dequantize" in str(node.target) for node in program.graph.nodes)
    assert len(program.graph.nodes) <= before


def _arguments(program: torch.export.ExportedProgram, x: torch.Tensor) -> list[torch.Tensor]:
    held = {**program.constants, **program.state_dict}
    return [held.get(str(spec.target), x) for spec in program.graph_signature.input_specs]
