from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bitsmith.export.rewrite import initializer, replace, rewritten
from bitsmith.export.translations import DOMAIN
from bitsmith.export.winograd import Candidate, Packed, convolutions, name_of, own_kernels, with_kernels
from bitsmith.technique import No
from winograd_reference import BT, G

from .winograd_op import WinogradConv


def pack(what: Candidate, tile: int = 2, bits: int = 8) -> Packed:
    """Without calibration: multipliers from the bounds of the taps, no two channels alike, and some offsets."""
    reach = np.abs(BT[tile]).sum(1) * 255.0
    bound = np.outer(reach, reach).ravel() / 255.0
    limit = 127 if bits == 8 else 16383  # four channels of taps as they are: below 2^31
    channels = what.weight.shape[1]
    wide = np.floor((limit if bits == 8 else 2**15) / bound * 32768)[:, None] / (1 + 0.1 * np.arange(channels))
    mul = np.clip(wide, 1, 32767).astype(np.int16)
    offset = (np.arange(channels) * (3 if bits == 8 else 0)).astype(np.int16)
    taps = np.einsum("ia,kcab,jb->ijkc", G[tile], what.weight, G[tile]).reshape(len(mul), *what.weight.shape[:2])
    taps *= (32768.0 / mul)[:, None]
    scale = np.maximum(np.abs(taps).max(2), 1e-12) / limit
    u = np.rint(taps / scale[:, :, None]).astype(np.int8 if bits == 8 else np.int16)
    return Packed(tile, bits, u, mul, offset, (what.x.scale * scale).astype(np.float32))


class Graph:
    """A quantized graph, layer by layer, as tools write it."""

    def __init__(self, channels: int = 4, size: int = 6, signed: bool = False, seed: int = 0) -> None:
        self.draw = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.size, self.type = size, np.int8 if signed else np.uint8
        self.zero = -5 if signed else 3
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])]

    def add(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        out = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def quantized(self, value: str, scale: float = 0.03, zero: int | None = None) -> str:
        """Rounded to 8 bits and back."""
        parameters = [
            self.constant(np.float32(scale)),
            self.constant(self.type(self.zero if zero is None else zero)),
        ]
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [value, *parameters]), *parameters])

    def weight(self, shape: tuple[int, ...], folded: bool = True, per_channel: bool = True) -> str:
        scale = self.draw.uniform(0.001, 0.003, shape[0] if per_channel else ()).astype(np.float32)
        integers = self.draw.integers(-127, 128, shape).astype(np.int8)
        axis = {"axis": 0} if per_channel else {}
        parameters = [self.constant(scale), self.constant(np.zeros(scale.shape, np.int8))]
        if folded:
            return self.add("DequantizeLinear", [self.constant(integers), *parameters], **axis)
        along = scale.reshape(-1, 1, 1, 1) if per_channel else scale
        real = self.constant((integers * along).astype(np.float32))
        return self.add(
            "DequantizeLinear", [self.add("QuantizeLinear", [real, *parameters], **axis), *parameters], **axis
        )

    def conv(
        self, value: str, channels: tuple[int, int] = (4, 4), kernel: int = 3, bias: bool = True, **given: Any
    ) -> str:
        made = {name: given.pop(name) for name in ("folded", "per_channel") if name in given}
        inputs = [value, self.weight((channels[1], channels[0], kernel, kernel), **made)]
        inputs += [self.constant(self.draw.normal(0, 0.3, channels[1]).astype(np.float32))] if bias else []
        return self.add("Conv", inputs, **{"pads": [1, 1, 1, 1], **given})

    def model(self, *outputs: str) -> onnx.ModelProto:
        shown = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, shown, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)


def replaced(model: onnx.ModelProto, tile: int = 2, bits: int = 8) -> onnx.ModelProto:
    """With the kernel wherever it can be."""
    names = [name_of(node) for node, what in convolutions(ir.from_proto(model).graph) if isinstance(what, Candidate)]
    return rewritten(model, with_kernels(names, lambda what: pack(what, tile, bits)))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def outputs(model: onnx.ModelProto, seed: int = 0) -> list[Any]:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).normal(1.0, 1.0, shape).astype(np.float32)
    return list(ReferenceEvaluator(model, new_ops=[WinogradConv]).run(None, {"x": x}))


def check(model: onnx.ModelProto, count: int, tile: int = 2, bits: int = 16, steps: float = 1.01) -> onnx.ModelProto:
    """So many operations, and outputs within so many steps of the last quantizer (0.03)."""
    made = replaced(model, tile, bits)
    onnx.checker.check_model(made)
    assert kinds(made).count("WinogradConv") == count
    for expected, found in zip(outputs(model), outputs(made), strict=True):
        assert np.ptp(expected) > 1.0
        assert np.abs(expected - found).max() <= steps * 0.03
    return made


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("relu", [False, True])
def test_one_convolution(signed: bool, tile: int, relu: bool) -> None:
    g = Graph(signed=signed)
    y = g.conv(g.quantized("x"))
    y = g.quantized(g.add("Relu", [y]) if relu else y)
    made = check(g.model(y), 1, tile)
    assert "Conv" not in kinds(made)
    assert "Relu" not in kinds(made)


def test_eight_bits_in_the_transform_domain_are_near() -> None:
    g = Graph()
    check(g.model(g.quantized(g.conv(g.quantized("x")))), 1, bits=8, steps=12)


def test_layers_behind_one_another_hand_on_nhwc() -> None:
    g = Graph()
    y = g.quantized("x")
    for _ in range(3):
        y = g.quantized(g.add("Relu", [g.conv(y)]))
    made = check(g.model(y), 3, steps=3)
    assert kinds(made).count("Transpose") == 2  # one in, one out


def test_what_reads_integers_behind_it_dequantizes_first() -> None:
    g = Graph()
    y = g.quantized(g.conv(g.quantized("x")))
    made = check(g.model(g.add("MaxPool", [y], kernel_shape=[2, 2])), 1)
    order = {node.op_type: k for k, node in enumerate(made.graph.node)}
    (last,) = [node for node in made.graph.node if node.op_type == "MaxPool"]
    (before,) = [node for node in made.graph.node if node.output[0] == last.input[0]]
    assert before.op_type == "Transpose"
    assert [node.op_type for node in made.graph.node if node.output[0] == before.input[0]] == ["DequantizeLinear"]
    assert order["WinogradConv"] < order["MaxPool"]


def test_a_maximum_of_integers_is_one_of_them() -> None:
    g = Graph()
    x = g.add("MaxPool", [g.quantized("x")], kernel_shape=[2, 2], strides=[1, 1])
    first = g.quantized(g.add("Relu", [g.conv(x)]), zero=0)
    y = g.quantized(g.add("Relu", [g.add("Add", [g.conv(first), x])]))
    made = check(g.model(y), 2, steps=3)
    assert "Add" not in kinds(made)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_residual_is_added_inside(between: bool, swapped: bool) -> None:
    g = Graph()
    x = g.quantized("x")
    first = g.quantized(g.add("Relu", [g.conv(x)]), zero=0)
    branch = g.conv(first)
    branch = g.quantized(branch, 0.05, 128) if between else branch
    total = g.add("Add", [x, branch] if swapped else [branch, x])
    y = g.quantized(g.add("Relu", [total]))
    made = check(g.model(y), 2, steps=3)
    assert "Add" not in kinds(made)
    assert [len(node.input) for node in made.graph.node if node.domain == DOMAIN] == [6, 7]


def test_a_shortcut_that_skips_pixels_and_pads_channels() -> None:
    g = Graph(size=8)
    x = g.quantized("x")
    ends = [g.constant(np.array(v, np.int64)) for v in ([0, 0], [8, 8], [2, 3], [2, 2])]
    short = g.add("Pad", [g.add("Slice", [x, *ends]), g.constant(np.array([0, 2, 0, 0, 0, 2, 0, 0], np.int64))])
    first = g.quantized(g.conv(x, channels=(4, 8), strides=[2, 2]))
    y = g.quantized(g.add("Relu", [g.add("Add", [g.conv(first, channels=(8, 8)), short])]))
    made = check(g.model(y), 1)
    assert "Add" not in kinds(made)


def test_a_sum_that_is_read_in_float_stays_outside() -> None:
    g = Graph()
    x = g.quantized("x")
    total = g.add("Relu", [g.add("Add", [g.quantized(g.conv(x), 0.03), x])])
    made = check(g.model(g.quantized(total), g.add("Mul", [total, total])), 1)
    assert kinds(made).count("Add") == 1


def test_what_a_plan_rounds_before_a_sum_is_rounded() -> None:
    g = Graph()
    x = g.quantized("x")
    g.conv(x, bias=True)
    model = g.model(g.quantized(g.add("Relu", [g.add("Add", [g.quantized(g.nodes[-1].output[0], 0.03), x])])))

    def transformed(graph: ir.Graph) -> None:
        """As the technique exports it."""
        ((node, what),) = convolutions(graph)
        assert isinstance(what, Candidate)
        packed = pack(what)
        inputs = [node.inputs[0]]
        for name in ("u", "mul", "offset", "us"):
            inputs.append(initializer(graph, name, np.ascontiguousarray(getattr(packed, name))))
        inputs.append(initializer(graph, "b", what.bias))
        given = {"scale": what.x.scale, "tile": 2, "bits": 8, "kernel": [3, 3], "pads": list(what.pads)}
        made = ir.node("Winograd", inputs, given, domain=DOMAIN, name=node.name)
        made.outputs[0].name, made.outputs[0].shape = "made", node.outputs[0].shape
        graph.insert_before(node, made)
        replace(node.outputs[0], made.outputs[0])
        graph.opset_imports[DOMAIN] = 1

    own = rewritten(rewritten(model, transformed), own_kernels)
    assert kinds(own).count("WinogradConv") == kinds(own).count("Add") == 1
    assert "Add" not in kinds(replaced(model))


def test_clips_become_limits_of_the_integers() -> None:
    g = Graph()
    low, high = g.constant(np.float32(0.5)), g.constant(np.float32(1.5))
    y = g.quantized(g.add("Clip", [g.conv(g.quantized("x")), low, high]))
    model = g.model(y)
    (_, what), *_ = convolutions(ir.from_proto(model).graph)
    assert isinstance(what, Candidate)
    assert (what.low, what.high) == (3 + 17, 3 + 50)
    expected, found = outputs(model)[0], outputs(replaced(model, bits=16))[0]
    assert np.abs(expected - found).max() <= 0.0301
    assert (found.min(), found.max()) == (expected.min(), expected.max())


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forms_of_weights(folded: bool, per_channel: bool, bias: bool) -> None:
    g = Graph()
    y = g.conv(g.quantized("x"), folded=folded, per_channel=per_channel, bias=bias)
    check(g.model(g.quantized(y)), 1)


@pytest.mark.parametrize("signed", [False, True])
def test_a_zero_point_that_is_left_out_is_0_of_the_integers_type(signed: bool) -> None:
    g = Graph(signed=signed)
    model = g.model(g.quantized(g.conv(g.quantized("x", zero=0)), zero=0))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            del node.input[2]
    model = onnx.shape_inference.infer_shapes(model)
    ((_, what),) = convolutions(ir.from_proto(model).graph)
    assert isinstance(what, Candidate)
    assert what.x.signed == what.y.signed == signed
    check(model, 1)


def test_some_convolutions_only() -> None:
    g = Graph()
    first = g.conv(g.quantized("x"))
    second = g.conv(g.quantized(first))
    model = g.model(g.quantized(second))
    made = rewritten(model, with_kernels([second], pack))
    assert kinds(made).count("Conv") == kinds(made).count("WinogradConv") == 1
    with pytest.raises(ValueError, match="nowhere cannot be computed by the Winograd kernel: the graph has no such"):
        rewritten(model, with_kernels(["nowhere"], pack))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stride": ({"strides": [2, 2]}, "stride 2x2"),
    "dilation": ({"dilations": [2, 2], "pads": [2, 2, 2, 2]}, "dilation 2x2"),
    "groups": ({"group": 2, "channels": (2, 4)}, "2 groups"),
    "kernel": ({"kernel": 1, "pads": [0, 0, 0, 0]}, "1x1, not 3x3"),
    "padding": ({"pads": [3, 3, 3, 3]}, "pads more than 2"),
    "channels": ({"channels": (65537, 1)}, "65537 input channels: a 32-bit accumulator has room for 65536"),
    "auto": ({"auto_pad": "SAME_UPPER", "pads": None}, "SAME_UPPER"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_convolutions_are_refused_with_the_reason(case: str) -> None:
    given, reason = REFUSED[case]
    g = Graph(given.get("channels", (4, 4))[0])
    y = g.quantized(g.conv(g.quantized("x"), **given))
    model = g.model(y)
    ((_, what),) = convolutions(ir.from_proto(model).graph)
    assert isinstance(what, No)
    assert reason in str(what)
    assert replaced(model) == rewritten(model)


def surroundings() -> dict[str, tuple[Graph, str, str]]:
    found = {}
    g = Graph()
    found["float in"] = (g, g.quantized(g.conv("x")), "its input is no 8-bit tensor")
    g = Graph()
    found["float out"] = (g, g.conv(g.quantized("x")), "its output is read as it is")
    g = Graph()
    found["float reader"] = (g, g.add("Sigmoid", [g.conv(g.quantized("x"))]), "Sigmoid reads its output")
    g = Graph()
    y = g.conv(g.quantized("x"))
    found["two readers"] = (g, g.add("Add", [g.quantized(y), g.add("Sigmoid", [y])]), "or more than once")
    g = Graph()
    y = g.add("Add", [g.conv(g.quantized("x")), "x"])
    found["float residual"] = (g, g.quantized(y), "what is added behind it is no 8-bit tensor")
    g = Graph()
    x = g.quantized("x")
    pooled = g.quantized(g.add("GlobalAveragePool", [x]))
    found["broadcast"] = (g, g.quantized(g.add("Add", [g.conv(x), pooled])), "another shape")
    return found


@pytest.mark.parametrize(
    "case", ["float in", "float out", "float reader", "two readers", "float residual", "broadcast"]
)
def test_other_surroundings_are_refused_with_the_reason(case: str) -> None:
    g, y, reason = surroundings()[case]
    ((_, what),) = convolutions(ir.from_proto(g.model(y)).graph)
    assert isinstance(what, No)
    assert reason in str(what)
