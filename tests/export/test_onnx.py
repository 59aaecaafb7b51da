from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.export.onnx import conversions, site_map, to_onnx
from bitsmith.export.program import applied_program, exported_program

F = nn.functional


def test_the_file_computes_what_the_network_computes(conv_net: tuple[nn.Module, Tensor], execute: Any) -> None:
    net, x = conv_net
    (got,) = execute(to_onnx(exported_program(net, x)), x.numpy())
    steps = np.abs(got - net(x).detach().numpy()) / 0.02
    # float sums in another order flip a rounding here and there; a wrong graph is off everywhere
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.2


def test_nodes_are_named_after_their_sites_and_mapped_back(conv_net: tuple[nn.Module, Tensor]) -> None:
    net, x = conv_net
    model = to_onnx(exported_program(net, x))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    sites = ("block.conv1", "block.relu", "block.conv2", "block:add", "pool", "fc")
    nodes, values = site_map(model, sites)
    assert nodes["block.conv2"] == (
        "block.conv2/DequantizeLinear",
        "block.conv2/DequantizeLinear.1",
        "block.conv2/Conv",
    )
    assert nodes["block:add"] == ("block:add/Add",)
    assert nodes["block.relu"] == ()  # implied by the quantizer behind it
    assert set(values) == {"@x", *sites}
    operations = {output: node.op_type for node in model.graph.node for output in node.output}
    assert {tensor: operations[name] for tensor, name in values.items()} == {
        **dict.fromkeys(values, "DequantizeLinear"),
        "block.conv1": "Conv",
    }
    assert set(conversions(model).values()) == {"@x", "block.relu", "block.conv2", "block:add", "pool", "fc"}


def test_values_hold_what_the_sites_computed(build: Any, execute: Any) -> None:
    q = build.quantizer(0.05, 10)
    cells = {"a": build.cell(F.linear, (q,), torch.randn(4, 6), torch.randn(4)), "a:tanh": build.cell(torch.tanh)}
    net = build.network(cells, {"@x|u8": q}, lambda call, x: call("a:tanh", call("a", x)) * 2)
    x = torch.randn(3, 6)
    model = to_onnx(exported_program(net, x))
    _, values = site_map(model)
    for name in values.values():
        if name not in {value.name for value in model.graph.output}:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    found = dict(zip([value.name for value in model.graph.output], execute(model, x.numpy()), strict=True))
    read = q(x)
    linear = cells["a"](x)
    for tensor, expected in {"@x": read, "a": linear, "a:tanh": torch.tanh(linear)}.items():
        np.testing.assert_allclose(found[values[tensor]], expected.numpy(), atol=1e-6)


def test_a_folded_normalisation_is_its_layers_node_but_its_own_value(build: Any, execute: Any) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    cells = {
        "conv": build.cell(
            lambda x, w, b: F.conv2d(x, cells_weight, None), (None,), cells_weight := torch.randn(5, 3, 3, 3)
        ),
        "bn": build.cell(norm.eval()),
    }
    net = build.network(cells, {}, lambda call, x: call("bn", call("conv", x)) + 1)
    x = torch.randn(1, 3, 6, 6)
    model = to_onnx(exported_program(net, x))
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 0
    nodes, values = site_map(model, ["conv", "bn"])
    assert nodes == {"conv": ("conv/Conv",), "bn": ()}
    assert "conv" not in values
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(values["bn"]))
    (_, got) = execute(model, x.numpy())
    np.testing.assert_allclose(got, norm(F.conv2d(x, cells_weight)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_activations_below_8_bits_keep_their_levels(build: Any, execute: Any, bits: int) -> None:
    high = 2**bits - 1
    q = build.quantizer(2.0 / high, high // 2, 0, high)
    net = build.network({"a": build.cell(torch.neg, (q,))}, {"@x|u": q}, lambda call, x: call("a", x))
    x = torch.linspace(-4, 4, 1000)
    (got,) = execute(to_onnx(exported_program(net, x)), x.numpy())
    np.testing.assert_allclose(got, net(x).numpy(), atol=1e-6)
    assert len(np.unique(got)) == high + 1


def test_16_bit_activations(build: Any, execute: Any) -> None:
    q = build.quantizer(0.001, 0, -32768, 32767, torch.int16)
    net = build.network({"a": build.cell(torch.neg, (q,))}, {"@x|i16": q}, lambda call, x: call("a", x))
    x = torch.linspace(-40, 40, 1000)
    model = to_onnx(exported_program(net, x))
    assert model.opset_import[0].version == 21
    np.testing.assert_allclose(execute(model, x.numpy())[0], net(x).numpy(), atol=1e-6)


@pytest.mark.parametrize("group", [0, 8], ids=["channel", "group"])
def test_4_bit_weights_take_half_a_byte(build: Any, execute: Any, group: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    net = build.network(
        {"fc": build.cell(F.linear, (None,), weight, torch.randn(64), bits=4, group=group)},
        {},
        lambda call, x: call("fc", x),
    )
    x = torch.randn(2, 3, 96)
    model = to_onnx(exported_program(net, x))
    stored = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT4 and len(i.dims) == 2]
    assert max(len(i.raw_data) for i in stored) == weight.numel() // 2
    assert not any(i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2 for i in model.graph.initializer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's sums change with the number of threads, by more than the bound
    try:
        expected = net(x).detach().numpy()
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(execute(model, x.numpy())[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("technique", "integers"),
    [
        (bs.Int(8, 8), True),
        (bs.Int(8, None, granularity="tensor"), True),
        (bs.Int(8, 8, affine_weights=True), False),
        (bs.Int(4, None), False),
        (bs.Int(4, None, granularity="group", group=4), False),
    ],
    ids=repr,
)
def test_a_table_of_symmetric_bytes_is_looked_up_as_such(technique: bs.Int, integers: bool, execute: Any) -> None:
    torch.manual_seed(0)
    rows = torch.randint(0, 10, (4, 3))
    net = bs.apply(nn.Sequential(nn.Embedding(10, 8)), bs.Plan({"0": technique}), [(rows, torch.zeros(4))])
    program, _ = applied_program(net, rows, None)
    model = to_onnx(program)
    assert ("DequantizeLinear" not in [node.op_type for node in model.graph.node]) == integers
    np.testing.assert_allclose(execute(model, rows.numpy())[0], net(rows).detach().numpy(), rtol=1e-6)
