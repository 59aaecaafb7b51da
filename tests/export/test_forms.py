from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitsmith.data import Unlabelled
from bitsmith.export.forms import onnxruntime_form
from bitsmith.export.onnx import site_map, to_onnx
from bitsmith.export.program import applied_program, exported_program
from bitsmith.model.apply import apply
from bitsmith.plan import Plan
from bitsmith.techniques.int_ import Int


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


@pytest.mark.parametrize(
    ("channels", "outputs", "rewritten"), [(3, 16, True), (3, 8, False), (1, 16, False), (4, 16, False)]
)
def test_convolutions_of_three_channels_read_four_and_compute_the_same(
    execute: Any, channels: int, outputs: int, rewritten: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, outputs, 3, 2, 1), nn.ReLU(), nn.Conv2d(outputs, 8, 1)).eval()
    x = torch.randn(2, channels, 9, 7)
    program, _ = applied_program(apply(net, Plan({"0": Int(8, 8), "2": Int(8, 8)}), Unlabelled([x])), x)
    model = to_onnx(program)
    form = onnxruntime_form(model)
    assert [node.op_type for node in form.graph.node].count("Pad") == rewritten
    shapes = {tuple(initializer.dims) for initializer in form.graph.initializer}
    assert ((outputs, 4, 3, 3) in shapes) == (rewritten or channels == 4)
    assert ((outputs, channels, 3, 3) in shapes) != rewritten  # the narrow weights are gone
    assert site_map(form)[1].keys() == site_map(model)[1].keys()
    np.testing.assert_array_equal(execute(form, x.numpy())[0], execute(model, x.numpy())[0])
