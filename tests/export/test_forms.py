from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitsmith.export.forms import onnxruntime_form
from bitsmith.export.onnx import site_map, to_onnx
from bitsmith.export.program import exported_program


@pytest.mark.parametrize(
    ("mean", "count"),
    [
        (lambda x: x.mean((2, 3)), 1),
        (lambda x: x.mean((-1, -2), keepdim=True), 1),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), 1),
        (lambda x: x.mean(1), 0),
        (lambda x: x.mean((1, 2)), 0),
    ],
    ids=["dropped", "kept", "pool", "channels", "mixed"],
)
def test_spatial_means_become_global_average_pools(build: Any, execute: Any, mean: Any, count: int) -> None:
    torch.manual_seed(0)
    q, out = build.quantizer(0.03, 120), build.quantizer(0.01, 128)
    net = build.network(
        {"m": build.cell(lambda x: out(mean(x)), (q,))}, {"@x|u8": q, "m|u8": out}, lambda call, x: call("m", x) * 1
    )
    x = torch.randn(2, 8, 5, 7)
    model = to_onnx(exported_program(net, x))
    form = onnxruntime_form(model)
    operations = [node.op_type for node in form.graph.node]
    assert operations.count("GlobalAveragePool") == count
    if count:  # the kernel is chosen only if its own output is quantized
        pool = next(node for node in form.graph.node if node.op_type == "GlobalAveragePool")
        assert [n.op_type for n in form.graph.node if pool.output[0] in n.input] == ["QuantizeLinear"]
    before, after = execute(model, x.numpy())[0], execute(form, x.numpy())[0]
    assert after.shape == before.shape == net(x).shape
    # another order of summation may flip a rounding
    assert np.abs(after - before).max() <= 0.0101
    assert (np.abs(after - before) > 0.005).mean() < 0.1


def test_a_network_keeps_its_values_and_its_map(conv_net: tuple[nn.Module, Tensor], execute: Any) -> None:
    net, x = conv_net
    model = to_onnx(exported_program(net, x))
    form = onnxruntime_form(model)
    assert set(site_map(form)[1]) == set(site_map(model)[1])
    np.testing.assert_allclose(execute(form, x.numpy())[0], execute(model, x.numpy())[0], atol=0.0201)
