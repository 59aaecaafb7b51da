"""The exported program as a file: whole, small, and traceable to its sites."""

from __future__ import annotations

import torch
from torch import nn

import bitsmith as bs


def test_it_loads_and_computes_what_was_simulated(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    target = bs.targets.OnnxRuntime(threads=1)
    net = bs.quantize(model, [(x, None)], target)
    artifact = bs.export(net, target, tmp_path / "net.pt2", x, batch=2)

    program = torch.export.load(str(artifact.path))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x), rtol=0, atol=1e-5)
    assert artifact.format == "pt2"
    assert bs.Artifact.load(artifact.path).nodes["0"] == artifact.nodes["0"]
    assert "0.weight" not in program.state_dict, "float weights whose integers ship must not ship too"
    assert any(value.dtype == torch.int8 for value in program.state_dict.values())
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("quantized_decomposed.dequantize_per_channel" in name for name in targets)
