"""The network that a graph becomes: its names, its weights, its sizes, and how Bitsmith sees it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn

import bitsmith as bs
from bitsmith.export.program import exported_program
from model.onnx_graph.graphs import compare, model_of, runtime, same, saved

N = helper.make_node


def rand(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def chain(
    folder: Path, nodes: list[onnx.NodeProto], x: Any, constants: dict[str, Any] | None = None, **more: Any
) -> nn.Module:
    return compare(saved(model_of(nodes, {"x": x}, constants, **more), folder), {"x": x})


def test_paths_are_legal_unique_and_keep_the_originals(tmp_path: Path) -> None:
    nodes = [
        N("Relu", ["x"], ["/layer.1/act/Relu_output_0"], name="/layer.1/act/Relu"),
        N("Sigmoid", ["/layer.1/act/Relu_output_0"], ["layer/1.act:Relu"]),
        N("Tanh", ["layer/1.act:Relu"], ["7"], name="twice"),
        N("Neg", ["7"], ["forward"], name="twice"),
        N("Exp", ["forward"], ["y"]),
    ]
    # ONNX Runtime refuses two nodes of one name; exporters write them
    net: Any = bs.load(saved(model_of(nodes, {"x": rand(2, 3)}), tmp_path))
    assert net.onnx_names == {
        "layer_1_act_Relu": "/layer.1/act/Relu",
        "layer_1_act_Relu_1": "layer/1.act:Relu",
        "_7": "twice",
        "forward_1": "twice",
        "y": "y",
    }
    assert list(dict(net.named_children())) == list(net.onnx_names)
    assert set(bs.sites(net, torch.zeros(2, 3))) <= set(net.onnx_names)


def test_weights_are_parameters_other_constants_buffers_and_shared_ones_are_tied(tmp_path: Path) -> None:
    nodes = [
        N("Transpose", ["table"], ["table_t"], perm=[1, 0]),
        N("Gather", ["table", "ids"], ["e"]),
        N("Mul", ["e", "scale"], ["s"]),
        N("MatMul", ["s", "table_t"], ["logits"]),
        N("MatMul", ["s", "w"], ["a"]),
        N("MatMul", ["a", "w"], ["y"]),
    ]
    constants = {"table": rand(9, 4), "scale": rand(4, seed=1), "w": rand(4, 4, seed=2)}
    ids = np.array([[0, 3, 8], [1, 1, 2]])
    path = saved(model_of(nodes, {"ids": ids}, constants, outputs=("logits", "y")), tmp_path)
    net: Any = compare(path, {"ids": ids})
    # the table is the classifier, as in the network that was exported; one matrix serves two products
    assert net.logits.weight is net.e.weight
    assert net.a.weight is net.y.weight
    assert torch.equal(net.a.weight, torch.from_numpy(constants["w"]).t())
    assert {name for name, _ in net.named_parameters()} == {"e.weight", "a.weight"}
    assert {name for name, _ in net.named_buffers()} == {"s.b"}
    twin = copy.deepcopy(net)
    assert twin.logits.weight is twin.e.weight is not net.e.weight
    sites = bs.sites(net, torch.from_numpy(ids))
    assert {name: site.kind for name, site in sites.items()} == {
        "e": "embedding", "logits": "linear", "a": "linear", "y": "linear",
    }  # fmt: skip


def test_deepcopy_and_state_dict_give_the_same_network(tmp_path: Path) -> None:
    x = rand(2, 3, 8, 8)
    nodes = [N("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), N("Relu", ["c"], ["y"])]
    net = chain(tmp_path, nodes, x, {"w": rand(4, 3, 3, 3), "b": rand(4)})
    assert not net.training
    twin = copy.deepcopy(net)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    given_x = torch.from_numpy(x)
    assert not torch.equal(twin(given_x), net(given_x))
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(given_x), net(given_x))
    assert set(net.state_dict()) == {"c.weight", "c.bias"}


def test_a_normalisation_folds_into_its_convolution(tmp_path: Path) -> None:
    x = rand(4, 3, 6, 6)
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], epsilon=1e-3),
        N("Clip", ["n", "zero", "six"], ["r"]),
        N("GlobalAveragePool", ["r"], ["y"]),
    ]
    constants = {"w": rand(4, 3, 3, 3), "g": rand(4), "b": rand(4, seed=1), "m": rand(4, seed=2), "v": rand(4) ** 2 + 1}
    constants |= {"zero": np.float32(0), "six": np.float32(6)}
    net = chain(tmp_path, nodes, x, constants)
    sites = bs.sites(net, torch.from_numpy(x))
    assert sites["c"].epilogue == ("n", "r")
    fold = sites["c"].fold
    assert fold is not None
    assert (fold.module, fold.eps) == ("n", pytest.approx(1e-3))
    assert [sites[name].kind for name in ("c", "n", "r", "y")] == [
        "conv2d",
        "batch_norm",
        "relu6",
        "adaptive_avg_pool2d",
    ]
    q = bs.quantize(net, [(torch.from_numpy(x), torch.zeros(4))])
    with torch.no_grad():
        exact, near = net(torch.from_numpy(x)), q(torch.from_numpy(x))
    assert float((near - exact).norm() / exact.norm()) < 0.05
    assert not torch.equal(near, exact)


FUSIONS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], dict[str, str]]] = {
    "linear": (
        [N("MatMul", ["x", "w"], ["m"]), N("Add", ["b", "m"], ["y"])],
        {"w": rand(6, 5), "b": rand(5)},
        {"m": "linear"},
    ),
    "conv bias": (
        [N("Unsqueeze", ["x", "at"], ["u"]), N("Conv", ["u", "k"], ["c"]), N("Add", ["c", "cb"], ["y"])],
        {"at": ints(2), "k": rand(7, 3, 1, 2), "cb": rand(1, 7, 1, 1)},
        {"c": "conv2d"},
    ),
    "silu": ([N("Sigmoid", ["x"], ["s"]), N("Mul", ["s", "x"], ["y"])], {}, {"y": "silu"}),
    "hard swish": (
        [
            N("Add", ["x", "three"], ["a"]),
            N("Clip", ["a", "zero", "six"], ["c"]),
            N("Div", ["c", "six"], ["d"]),
            N("Mul", ["x", "d"], ["y"]),
        ],
        {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)},
        {"y": "hardswish"},
    ),
    "gelu, half last": (
        [
            N("Div", ["x", "root"], ["d"]),
            N("Erf", ["d"], ["e"]),
            N("Add", ["e", "one"], ["a"]),
            N("Mul", ["x", "a"], ["m"]),
            N("Mul", ["m", "half"], ["y"]),
        ],
        {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
        {"y": "gelu"},
    ),
    "gelu, half first": (
        [
            N("Mul", ["x", "half"], ["h"]),
            N("Mul", ["x", "root"], ["d"]),
            N("Erf", ["d"], ["e"]),
            N("Add", ["one", "e"], ["a"]),
            N("Mul", ["h", "a"], ["y"]),
        ],
        {"root": np.float32(0.5**0.5), "one": np.float32(1), "half": np.float32(0.5)},
        {"y": "gelu"},
    ),
    "layer norm": (
        [
            N("ReduceMean", ["x"], ["m"], axes=[-1]),
            N("Sub", ["x", "m"], ["c"]),
            N("Pow", ["c", "two"], ["p"]),
            N("ReduceMean", ["p"], ["v"], axes=[-1]),
            N("Add", ["v", "eps"], ["ve"]),
            N("Sqrt", ["ve"], ["s"]),
            N("Div", ["c", "s"], ["d"]),
            N("Mul", ["d", "g"], ["gd"]),
            N("Add", ["gd", "b"], ["y"]),
        ],
        {"two": np.float32(2), "eps": np.float32(1e-5), "g": rand(6), "b": rand(6, seed=1)},
        {"d": "layer_norm"},
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_several_nodes_are_the_one_operation_that_they_were(name: str, tmp_path: Path) -> None:
    nodes, constants, kinds = FUSIONS[name]
    x = rand(2, 3, 6, 4)[..., 0] if name == "conv bias" else rand(2, 3, 6)
    net = chain(tmp_path, nodes, x, constants, opset=13)
    assert {k: site.kind for k, site in bs.sites(net, torch.from_numpy(x)).items()} == kinds


@pytest.mark.parametrize("name", [n for n in FUSIONS if n != "conv bias"])
def test_what_somebody_else_reads_is_not_fused_away(name: str, tmp_path: Path) -> None:
    nodes, constants, kinds = FUSIONS[name]
    inner = nodes[-2].output[0]
    x = rand(2, 3, 6)
    path = saved(model_of(nodes, {"x": x}, constants, outputs=("y", inner), opset=13), tmp_path)
    net = compare(path, {"x": x})
    if name not in ("layer norm", "linear"):  # without the shift they are still what they were
        assert {k: s.kind for k, s in bs.sites(net, torch.from_numpy(x)).items()} != kinds


def test_a_linear_layer_is_quantized_along_its_outputs(tmp_path: Path) -> None:
    w = rand(6, 5) * np.array([1e-3, 1, 10, 100, 1000], np.float32)
    x = rand(8, 6)
    net = chain(tmp_path, [N("MatMul", ["x", "w"], ["m"]), N("Add", ["m", "b"], ["y"])], x, {"w": w, "b": rand(5)})
    q = bs.apply(net, bs.Plan({"m": bs.Int(8, None)}), [(torch.from_numpy(x), torch.zeros(8))])
    with torch.no_grad():
        exact, near = net(torch.from_numpy(x)), q(torch.from_numpy(x))
    # with one scale for the whole matrix the first column would be lost
    assert float(((near - exact).norm(dim=0) / exact.norm(dim=0)).max()) < 0.02


def flexible(folder: Path) -> Path:
    """Reshape and Expand to sizes that are computed from the input's, as exporters write them."""
    nodes = [
        N("Shape", ["x"], ["s"]),
        N("Gather", ["s", "zero"], ["n"]),
        N("Gather", ["s", "one"], ["t"]),
        N("Unsqueeze", ["n", "axis"], ["n1"]),
        N("Unsqueeze", ["t", "axis"], ["t1"]),
        N("Div", ["six", "two"], ["three"]),
        N("Concat", ["n1", "t1", "two", "three"], ["to"], axis=0),
        N("Reshape", ["x", "to"], ["r"]),
        N("Transpose", ["r"], ["p"], perm=[0, 2, 1, 3]),
        N("MatMul", ["p", "w"], ["m"]),
        N("Shape", ["to"], ["k"]),
        N("ConstantOfShape", ["k"], ["ones"], value=onnx.numpy_helper.from_array(ints(1))),
        N("Mul", ["ones", "minus"], ["neg"]),
        N("Concat", ["n1", "two", "minus", "three"], ["wide"], axis=0),
        N("Equal", ["wide", "neg"], ["eq"]),
        N("Where", ["eq", "ones", "wide"], ["final"]),
        N("Expand", ["m", "final"], ["e"]),
        N("Range", ["zero", "t", "one"], ["steps"]),
        N("Cast", ["steps"], ["f"], to=1),
        N("Unsqueeze", ["f", "axis1"], ["f1"]),
        N("Add", ["e", "f1"], ["y"]),
    ]
    constants = {
        "zero": np.int64(0), "one": np.int64(1), "axis": ints(0), "axis1": ints(1), "six": ints(6), "two": ints(2),
        "minus": ints(-1), "w": rand(3, 3),
    }  # fmt: skip
    x = rand(2, 4, 6)
    return saved(model_of(nodes, {"x": x}, constants, shapes={"x": ["batch", "time", 6]}), folder)


def test_sizes_stay_numbers_and_both_axes_stay_dynamic(tmp_path: Path) -> None:
    path = flexible(tmp_path)
    for shape in ((2, 4, 6), (5, 4, 6), (3, 9, 6)):
        net = compare(path, {"x": rand(*shape)})
    x = torch.from_numpy(rand(4, 4, 6))
    program = exported_program(net, x, dynamic_batch=True)
    many = torch.from_numpy(rand(11, 4, 6))
    torch.testing.assert_close(program.module()(many), net(many))


def test_a_loaded_network_can_be_written_again(tmp_path: Path) -> None:
    net = bs.load(flexible(tmp_path))
    x = torch.from_numpy(rand(4, 4, 6))
    artifact = bs.export(net, bs.targets.OnnxRuntime(), tmp_path / "again.onnx", x, batch=4)
    (made,) = runtime(artifact.path, {"x": x.numpy()})
    with torch.no_grad():
        same(net(x), made)
    same(bs.load(artifact.path)(x).detach(), made)


def test_compile_gives_the_same(tmp_path: Path) -> None:
    net = bs.load(flexible(tmp_path))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.from_numpy(rand(4, 4, 6))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))


def test_outputs_may_be_inputs_constants_and_sizes(tmp_path: Path) -> None:
    x = rand(2, 3)
    nodes = [
        N("Identity", ["x"], ["a"]),
        N("Shape", ["x"], ["s"]),
        N("Identity", ["c"], ["k"]),
        N("Relu", ["x"], ["r"]),
    ]
    model = model_of(nodes, {"x": x}, {"c": rand(4)}, outputs=("a", "s", "k", "r"), shapes={"x": ["n", 3]})
    net: Any = compare(saved(model, tmp_path), {"x": x})
    assert net.output_names == ("a", "s", "k", "r")


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = [N("Sigmoid", ["a"], ["s"]), N("Mul", ["a", "s"], ["b"])]
    function = helper.make_function("my", "Swish", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph(
        [N("Swish", ["x"], ["h"], domain="my"), N("Swish", ["h"], ["y"], domain="my")],
        "graph",
        [helper.make_tensor_value_info("x", 1, [2, 3])],
        [helper.make_tensor_value_info("y", 1, [2, 3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    net = compare(saved(model, tmp_path), {"x": rand(2, 3)})
    assert [site.kind for site in bs.sites(net, torch.zeros(2, 3)).values()] == ["silu", "silu"]


def test_an_lstm_is_the_composite_of_torch_and_opens(tmp_path: Path) -> None:
    x = rand(5, 2, 3)
    constants = {"w": rand(2, 16, 3), "r": rand(2, 16, 4, seed=1), "b": rand(2, 32, seed=2)}
    nodes = [N("LSTM", ["x", "w", "r", "b"], ["y", "", "h"], hidden_size=4, direction="bidirectional")]
    path = saved(model_of(nodes, {"x": x}, constants, outputs=("y",)), tmp_path)
    net = compare(path, {"x": x})
    given_x = torch.from_numpy(x)
    assert {k: s.kind for k, s in bs.sites(net, given_x).items()} == {"y": "lstm"}
    inside = [name for name, site in bs.sites(net, given_x, inside=True).items() if site.kind == "linear"]
    assert len(inside) == 4
    plan = bs.Plan(dict.fromkeys(inside, bs.Int(8, 8)))
    applied = bs.apply(net, plan, [(given_x, torch.zeros(5))])
    with torch.no_grad():
        exact, near = net(given_x), applied(given_x)
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_sequences_of_different_lengths(op: str, direction: str, tmp_path: Path) -> None:
    gates, d = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    x, lengths = rand(6, 3, 2), np.array([6, 2, 4], np.int32)
    constants = {"w": rand(d, gates * 4, 2), "r": rand(d, gates * 4, 4, seed=1), "b": rand(d, gates * 8, seed=2)}
    more = {"linear_before_reset": 1} if op == "GRU" else {}
    node = N(op, ["x", "w", "r", "b", "lengths"], ["y", "h"], hidden_size=4, direction=direction, **more)
    inputs = {"x": x, "lengths": lengths}
    compare(saved(model_of([node], inputs, constants, outputs=("y", "h")), tmp_path), inputs)


def test_layout_with_the_batch_first_agrees_with_the_other(tmp_path: Path) -> None:
    # ONNX Runtime has no kernel for layout 1
    x = rand(5, 2, 3)
    constants = {
        "w": rand(1, 16, 3),
        "r": rand(1, 16, 4, seed=1),
        "h": rand(1, 2, 4, seed=2),
        "c": rand(1, 2, 4, seed=3),
    }
    made = []
    for layout in (0, 1):
        given_x = x.transpose(1, 0, 2).copy() if layout else x
        states = {k: v.transpose(1, 0, 2).copy() if layout and k in "hc" else v for k, v in constants.items()}
        node = N("LSTM", ["x", "w", "r", "", "", "h", "c"], ["y", "yh"], hidden_size=4, layout=layout)
        model = model_of([node], {"x": given_x}, states, outputs=("y", "yh"))
        made.append([t.detach().numpy() for t in bs.load(saved(model, tmp_path))(torch.from_numpy(given_x))])
    np.testing.assert_allclose(made[1][0], made[0][0].transpose(2, 0, 1, 3), rtol=1e-6)
    np.testing.assert_allclose(made[1][1], made[0][1].transpose(1, 0, 2), rtol=1e-6)


# -- attributes that vary ----------------------------------------------------------------------------------------------

VARIED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@VARIED
@given(st.data())
def test_convolutions_and_pooling_of_any_attributes(tmp_path: Path, data: st.DataObject) -> None:
    draw = data.draw
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    strides = [draw(st.integers(1, 3)) for _ in range(2)]
    op = draw(st.sampled_from(["Conv", "MaxPool", "AveragePool", "ConvTranspose"]))
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    mode = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if mode == "NOTSET":
        # a pad as large as the kernel leaves a window without one pixel
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attributes["auto_pad"] = mode
    constants = {}
    if op == "Conv":
        group = draw(st.sampled_from([1, 2, 4]))
        constants["w"] = rand(4, 4 // group, *kernel)
        attributes |= {"group": group}
        if not mode.startswith("SAME"):  # ONNX Runtime refuses dilations there
            attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(2)]
    elif op == "ConvTranspose":
        group = draw(st.sampled_from([1, 2, 4]))
        constants["w"] = rand(4, 3, *kernel)
        attributes |= {"group": group}
        if mode == "NOTSET":
            attributes["output_padding"] = [draw(st.integers(0, s - 1)) for s in strides]
        elif mode != "VALID":  # the output has to be a multiple of the stride
            attributes["strides"] = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
    else:
        # ONNX Runtime computes negative pads and refuses them
        attributes["strides"] = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
        if mode == "NOTSET":
            attributes["ceil_mode"] = draw(st.integers(0, 1))
        if op == "AveragePool":
            attributes["count_include_pad"] = draw(st.integers(0, 1))
    x = rand(1, 4, draw(st.integers(7, 9)), draw(st.integers(7, 9)))
    node = N(op, ["x", *constants], ["y"], **attributes)
    compare(saved(model_of([node], {"x": x}, constants, opset=draw(st.sampled_from([13, 22]))), tmp_path), {"x": x})


@VARIED
@given(
    st.integers(-9, 9),
    st.one_of(st.integers(-9, 9), st.sampled_from([2**31 - 1, 2**63 - 1, -(2**63)])),
    st.sampled_from([-3, -2, -1, 1, 2, 3]),
    st.sampled_from([0, 1, -1]),
)
def test_slices_of_any_bounds(tmp_path: Path, start: int, end: int, step: int, axis: int) -> None:
    x = rand(5, 6)
    constants = {"s": ints(start), "e": ints(end), "a": ints(axis), "t": ints(step)}
    compare(saved(model_of([N("Slice", ["x", "s", "e", "a", "t"], ["y"])], {"x": x}, constants), tmp_path), {"x": x})


@VARIED
@given(st.lists(st.integers(-2, 3), min_size=4, max_size=4), st.sampled_from(["constant", "edge", "reflect"]))
def test_pads_of_any_sizes(tmp_path: Path, pads: list[int], mode: str) -> None:
    if mode != "constant":  # ONNX Runtime leaves cropping and mirroring together undefined
        pads = [abs(p) for p in pads]
    x = rand(5, 6)
    compare(saved(model_of([N("Pad", ["x", "p"], ["y"], mode=mode)], {"x": x}, {"p": ints(*pads)}), tmp_path), {"x": x})
