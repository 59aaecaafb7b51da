"""Every operator of the table gives what ONNX Runtime gives, in the oldest and the newest opset."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from bitsmith.model.onnx_graph.table import FAMILIES
from model.onnx_graph.graphs import Array, compare, model_of, saved


def rand(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


X = rand(2, 3, 6, 7)
POSITIVE = np.abs(X) + 0.5
SMALL = np.clip(X, -0.9, 0.9)
FLAGS = X > 0
NUMBERS = np.random.default_rng(1).integers(-5, 9, (2, 3, 4)).astype(np.int64)


@dataclass
class Case:
    """One node. Inputs and constants in order of the node's inputs; None is one that is left out."""

    op: str
    inputs: tuple[Array, ...] = (X,)
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opsets: tuple[int, ...] = (13, 22)
    order: tuple[int, ...] | None = None

    def __str__(self) -> str:
        detail = "-".join(f"{k}={v}" for k, v in self.attributes.items() if isinstance(v, (int, str, list, float)))
        return f"{self.op}-{detail}".replace(" ", "").replace("[", "").replace("]", "") + f"-{len(self.constants)}"

    def model(self, opset: int) -> tuple[Any, dict[str, Array]]:
        inputs = {f"i{k}": a for k, a in enumerate(self.inputs)}
        constants = {f"c{k}": a for k, a in enumerate(self.constants) if a is not None}
        names = [*inputs, *(f"c{k}" if a is not None else "" for k, a in enumerate(self.constants))]
        names = [names[k] for k in self.order] if self.order else names
        outputs = [f"y{k}" for k in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, **self.attributes)
        return model_of([node], inputs, constants, outputs, opset), inputs


def case(
    op: str,
    *inputs: Array,
    c: tuple[Any, ...] = (),
    outputs: int = 1,
    opsets: tuple[int, ...] = (13, 22),
    order: tuple[int, ...] | None = None,
    **attributes: Any,
) -> Case:
    return Case(op, inputs or (X,), c, attributes, outputs, opsets, order)


W = rand(4, 3, 3, 3, seed=2)
B = rand(4, seed=3)
S = rand(3, seed=4)
V = np.abs(rand(3, seed=5)) + 0.5
I13, I18, I14, I16 = (13,), (18, 22), (14, 22), (16, 22)
SEQ = rand(5, 2, 3)


def recurrent(op: str, gates: int, **attributes: Any) -> list[Case]:
    found = []
    for direction in ("forward", "reverse", "bidirectional"):
        d = 2 if direction == "bidirectional" else 1
        w, r, b = rand(d, gates * 4, 3, seed=6), rand(d, gates * 4, 4, seed=7), rand(d, 8 * gates, seed=8)
        h = rand(d, 2, 4, seed=9)
        outputs = 3 if op == "LSTM" else 2
        common = {"hidden_size": 4, "direction": direction, **attributes}
        found.append(Case(op, (SEQ,), (w, r), common, outputs))
        found.append(Case(op, (SEQ,), (w, r, b, None, h, *([h] if op == "LSTM" else [])), common, outputs))
        given = (SEQ, h, h) if op == "LSTM" else (SEQ, h)
        order = (0, *range(len(given), len(given) + 4), *range(1, len(given)))
        found.append(Case(op, given, (w, r, b, None), common, outputs, order=order))
    return found


CASES = [
    *(case(op, X, rand(6, 7, seed=1)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")),
    *(case(op, X, c=(rand(3, 1, 1, seed=1),)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")),
    *(case(op, X, c=(np.float32(1.5),)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")),
    *(case(op, X, c=(np.float32(1.5),), order=(1, 0)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(case(op, NUMBERS, c=(ints(3),)) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Mod")),
    case("Mod", X, c=(np.float32(0.7),), fmod=1),
    case("Pow", POSITIVE, c=(np.float32(2.0),)),
    case("Pow", POSITIVE, rand(7)),
    case("Pow", X, c=(np.float32(2.0),), order=(1, 0)),
    *(case(op, X, rand(6, 7, seed=1)) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(case(op, FLAGS, np.roll(FLAGS, 1)) for op in ("And", "Or", "Xor")),
    case("Not", FLAGS),
    *(case(op, NUMBERS, c=(ints(6),), opsets=I18) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    *(case("BitShift", np.arange(8, dtype=np.uint8), c=(np.uint8(2),), direction=d) for d in ("LEFT", "RIGHT")),
    case("BitwiseNot", NUMBERS, opsets=I18),
    case("Where", FLAGS, X, c=(np.float32(-np.inf),)),
    case("Where", FLAGS, X, rand(7)),
    case("Cast", X * 3, to=7),
    case("Cast", NUMBERS, to=1),
    case("Cast", NUMBERS, to=9),
    case("CastLike", NUMBERS, X, opsets=(15, 22)),
    *(case(op) for op in ("Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Reciprocal", "Exp", "Erf", "Relu")),
    case("Round", np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)),
    *(case(op) for op in ("Sigmoid", "Tanh", "HardSigmoid", "Elu", "LeakyRelu", "Selu", "Softplus", "Softsign")),
    *(case(op) for op in ("Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh", "Celu", "ThresholdedRelu", "Shrink")),
    *(case(op, SMALL) for op in ("Asin", "Acos", "Atanh")),
    case("Acosh", POSITIVE + 1),
    *(case(op, POSITIVE) for op in ("Sqrt", "Log")),
    case("IsNaN", np.where(FLAGS, X, np.nan).astype(np.float32)),
    case("IsInf", np.where(FLAGS, X, -np.inf).astype(np.float32)),
    case("IsInf", np.where(FLAGS, np.inf, -np.inf).astype(np.float32), detect_negative=0),
    case("Clip", c=(np.float32(0), np.float32(6))),
    case("Clip", c=(np.float32(-0.5), np.float32(0.25))),
    case("Clip", c=(np.float32(0),)),
    case("Clip", c=(None, np.float32(0.5))),
    case("Clip", NUMBERS, c=(np.int64(0), np.int64(3))),
    case("HardSigmoid", alpha=1 / 6, beta=0.5),
    case("HardSwish", opsets=I14),
    case("Mish", opsets=I18),
    case("Gelu", opsets=(20, 22)),
    case("Gelu", opsets=(20, 22), approximate="tanh"),
    case("Elu", alpha=0.5),
    case("Celu", alpha=0.5),
    case("LeakyRelu", alpha=0.2),
    case("Shrink", lambd=0.3, bias=0.1),
    case("PRelu", c=(rand(3, 1, 1, seed=1),)),
    *(case(op, axis=a) for op in ("Softmax", "LogSoftmax", "Hardmax") for a in (-1, 1)),
    # matrix products
    case("MatMul", X, rand(7, 5)),
    case("MatMul", X, c=(rand(7, 5),)),
    case("MatMul", X, c=(rand(2, 1, 7, 5),)),
    case("MatMul", rand(6, 7), c=(rand(4, 6),), order=(1, 0)),
    case("MatMul", rand(7), c=(rand(7, 5),)),
    *(
        case("Gemm", rand(*((4, 6) if a else (6, 4))), c=(rand(*((5, 4) if b else (4, 5))), *bias), transA=a, transB=b)
        for a in (0, 1)
        for b in (0, 1)
        for bias in ((), (rand(5),), (rand(1, 5),), (rand(6, 5),), (rand(1),))
    ),
    case("Gemm", rand(6, 4), c=(rand(4, 5), rand(5)), alpha=0.5, beta=2.0),
    case("Gemm", rand(6, 4), rand(4, 5), rand(6, 1), alpha=0.5, beta=2.0),
    case("Einsum", rand(2, 3, 4), rand(2, 4, 5), equation="bij,bjk->bik"),
    case("Einsum", rand(2, 3, 4), c=(rand(4, 5),), equation="bij,jk->bik"),
    # convolution
    case("Conv", c=(W,)),
    case("Conv", c=(W, B), strides=[2, 1], pads=[1, 1, 1, 1]),
    case("Conv", c=(W, B), pads=[0, 1, 2, 1], dilations=[2, 1]),
    *(case("Conv", c=(W, B), auto_pad=p, strides=[2, 3]) for p in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    case("Conv", X, W),
    case("Conv", c=(rand(6, 1, 3, 3), rand(6)), group=3),
    case("Conv", rand(2, 3, 9), c=(rand(4, 3, 3),), pads=[1, 1]),
    case("Conv", rand(2, 3, 5, 6, 7), c=(rand(4, 3, 2, 2, 2),)),
    case("ConvTranspose", c=(rand(3, 4, 3, 3), B), strides=[2, 2]),
    case("ConvTranspose", c=(rand(3, 4, 3, 3), B), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    case("ConvTranspose", c=(rand(3, 4, 3, 3),), strides=[2, 2], pads=[0, 1, 2, 1]),
    case("ConvTranspose", c=(rand(3, 4, 3, 3),), strides=[2, 2], output_shape=[13, 15]),
    *(case("ConvTranspose", c=(rand(3, 4, 3, 3),), strides=[2, 2], auto_pad=p) for p in ("SAME_UPPER", "SAME_LOWER")),
    case("ConvTranspose", c=(rand(3, 2, 3, 3),), group=3, dilations=[2, 1]),
    case("ConvTranspose", rand(2, 3, 9), c=(rand(3, 4, 3),), strides=[2]),
    # pooling
    *(
        case(op, kernel_shape=[3, 2], strides=[2, 2], **more)
        for op in ("MaxPool", "AveragePool")
        for more in (
            {},
            {"pads": [1, 1, 1, 1]},
            {"pads": [0, 1, 1, 0]},
            {"ceil_mode": 1},
            {"auto_pad": "SAME_UPPER"},
            {"auto_pad": "SAME_LOWER"},
        )
    ),
    case("MaxPool", kernel_shape=[2, 2], dilations=[2, 1]),
    case("MaxPool", rand(2, 3, 9), kernel_shape=[3]),
    case("AveragePool", kernel_shape=[3, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 1, 2], count_include_pad=1, strides=[2, 2]),
    case("LpPool", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 1, 1, 1], p=2),
    *(case(op) for op in ("GlobalAveragePool", "GlobalMaxPool")),
    case("GlobalAveragePool", rand(2, 3, 9)),
    case("GlobalLpPool", p=2, opsets=(13, 20)),
    # normalisation
    case("BatchNormalization", c=(S, S + 1, S - 1, V), epsilon=1e-3),
    case("LayerNormalization", c=(rand(7), rand(7, seed=1)), opsets=(17, 22)),
    case("LayerNormalization", c=(rand(6, 7),), axis=2, opsets=(17, 22)),
    case("InstanceNormalization", c=(S, S + 1)),
    case("GroupNormalization", rand(2, 6, 4, 4), c=(rand(6), rand(6, seed=1)), num_groups=3, opsets=(21, 22)),
    case("LRN", rand(2, 7, 4, 4), size=3, alpha=0.5, beta=0.75, bias=1.0),
    case("LRN", rand(2, 7, 4, 4), size=5),
    case("LpNormalization", axis=1, p=2),
    case("LpNormalization", axis=-1, p=1),
    # recurrent
    *recurrent("LSTM", 4),
    *recurrent("GRU", 3, linear_before_reset=1),
    *recurrent("GRU", 3, linear_before_reset=0),
    *recurrent("RNN", 1),
    case("RNN", SEQ, c=(rand(1, 4, 3), rand(1, 4, 4), rand(1, 8)), hidden_size=4, activations=["Relu"], outputs=2),
    # reductions
    *(
        case(op, POSITIVE, axes=[2, 3], keepdims=keep, opsets=I13)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
        for keep in (0, 1)
    ),
    *(
        case(op, POSITIVE, c=(ints(1, -1),), keepdims=keep, opsets=I18)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "ReduceL2")
        for keep in (0, 1)
    ),
    case("ReduceSum", c=(ints(1),)),
    case("ReduceSum", c=(), keepdims=0),
    case("ReduceSum", c=(ints(),), noop_with_empty_axes=1),
    case("ReduceMean", NUMBERS, c=(ints(1),), opsets=I18),
    # shapes
    case("Shape"),
    case("Shape", start=1, end=-1, opsets=(15, 22)),
    case("Size"),
    case("Reshape", c=(ints(0, -1, 7),)),
    case("Reshape", rand(0, 3, 4), c=(ints(4, 0, 3),), allowzero=1, opsets=I14),
    *(case("Flatten", axis=a) for a in (0, 1, 2, -1)),
    case("Transpose"),
    case("Transpose", perm=[0, 2, 3, 1]),
    case("Squeeze", rand(1, 3, 1, 4)),
    case("Squeeze", rand(1, 3, 1, 4), c=(ints(0, -2),)),
    case("Unsqueeze", c=(ints(0, -1),)),
    case("Unsqueeze", c=(ints(5, 1),)),
    case("Expand", rand(3, 1), c=(ints(2, 1, 4),)),
    case("Tile", rand(2, 3), c=(ints(2, 3),)),
    case("Concat", X, X + 1, axis=1),
    case("Concat", X, c=(X[:, :2],), axis=-3),
    case("Split", X, outputs=3, axis=1, opsets=I13),
    case("Split", X, outputs=3, axis=1, num_outputs=3, opsets=I18),
    case("Split", rand(7, 2), outputs=3, num_outputs=3, opsets=I18),
    case("Split", X, c=(ints(1, 5),), outputs=2, axis=2),
    case("Split", X, c=(ints(7),), outputs=1, axis=3),
    case("Slice", c=(ints(1, -3), ints(9223372036854775807, -1), ints(2, 3))),
    case("Slice", c=(ints(0), ints(5), ints(-1), ints(2))),
    case("Slice", c=(ints(-1, 4), ints(-9223372036854775808, 0), ints(2, 3), ints(-1, -2))),
    case("Slice", c=(ints(1), ints(2))),
    *(
        case("Pad", c=(ints(0, 0, 1, 2, 0, 0, 3, 1),), mode=mode)
        for mode in ("constant", "reflect", "edge")
    ),
    case("Pad", c=(ints(0, 0, 1, 2, 0, 0, 3, 1),), mode="wrap", opsets=(19, 22)),
    case("Pad", c=(ints(0, 1, -1, 2, 0, 0, 3, -1), np.float32(2.5))),
    case("Pad", c=(ints(1, 2, 0, 3), np.float32(1), ints(-1, 1)), opsets=I18),
    case("Range", np.array(1), np.array(9), c=(np.int64(3),)),
    case("ConstantOfShape", ints(2, 3), value=numpy_helper.from_array(np.array([7], np.int64))),
    case("EyeLike", rand(4, 5), k=1, dtype=7),
    case("Trilu", opsets=I14),
    case("Trilu", c=(np.int64(-1),), upper=0, opsets=I14),
    *(case("DepthToSpace", rand(2, 8, 3, 4), blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    case("SpaceToDepth", rand(2, 3, 4, 6), blocksize=2),
    case("Identity"),
    case("Dropout"),
    # indices
    case("Gather", c=(np.int64(1),), axis=2),
    case("Gather", c=(np.int64(-1),), axis=2),
    case("Gather", c=(ints(0, -1, 2),), axis=1),
    case("Gather", c=(ints(1),), axis=1),
    case("Gather", c=(np.array([[0, 1], [2, -1]]),), axis=1),
    case("Gather", NUMBERS % 5, c=(rand(5, 8),), order=(1, 0)),
    case("Gather", X, ints(2, -1), axis=3),
    case("GatherElements", rand(3, 4), c=(np.array([[0, -1], [2, 1]]),), axis=1),
    case("GatherND", X, c=(np.array([[0, 1], [-1, 2]]),)),
    case("GatherND", X, c=(np.array([[1], [-1]]),), batch_dims=1),
    case("ScatterElements", rand(3, 4), c=(np.array([[0, -1]]), rand(1, 2)), axis=1),
    *(
        case("ScatterElements", rand(3, 4), c=(np.array([[0, 0]]), rand(1, 2)), axis=1, reduction=r, opsets=o)
        for r, o in (("add", I16), ("mul", I16), ("max", I18), ("min", I18))
    ),
    case("ScatterND", X, c=(np.array([[0, 1], [-1, 2]]), rand(2, 6, 7))),
    *(
        case("ScatterND", X, c=(np.array([[0, 1], [0, 1]]), rand(2, 6, 7)), reduction=r, opsets=o)
        for r, o in (("add", I16), ("mul", I16), ("max", I18), ("min", I18))
    ),
    case("TopK", c=(ints(3),), outputs=2),
    case("TopK", NUMBERS, c=(ints(2),), outputs=2, axis=1, largest=0),
    case("OneHot", NUMBERS % 4 - 1, c=(ints(4), np.array([0.5, 2], np.float32)), axis=1),
    case("NonZero", FLAGS),
    *(case("CumSum", c=(np.int64(2),), exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)),
    *(case(op, axis=1, keepdims=k) for op in ("ArgMax", "ArgMin") for k in (0, 1)),
    case("ArgMax", NUMBERS // 4, axis=-1, select_last_index=1),
    case("ReverseSequence", rand(4, 3, 2), c=(ints(4, 1, 3),)),
    case("Compress", c=(np.array([True, False, True]),), axis=1),
    # sampling
    *(
        case("Resize", c=(None, np.array([1, 1, *s], np.float32)), mode=mode, coordinate_transformation_mode=place)
        for mode in ("nearest", "linear")
        for place in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
        for s in ((2, 2), (1.5, 0.6))
    ),
    *(
        case("Resize", c=(None, np.array([1, 1, 2, 1.5], np.float32)), nearest_mode=n, coordinate_transformation_mode=p)
        for n in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
        for p in ("asymmetric", "half_pixel")
    ),
    *(
        case("Resize", c=(None, None, ints(2, 3, 9, 11)), mode=mode, coordinate_transformation_mode="half_pixel")
        for mode in ("nearest", "linear", "cubic")
    ),
    case("Resize", c=(None, None, ints(12, 9)), mode="linear", axes=[2, 3], opsets=I18),
    case("GridSample", X, np.clip(rand(2, 4, 5, 2), -1.2, 1.2), opsets=(16, 20)),
]  # fmt: skip


@pytest.mark.parametrize("opset_index", [0, -1], ids=["oldest", "newest"])
@pytest.mark.parametrize("one", CASES, ids=lambda one: str(one))
def test_operator(one: Case, opset_index: int, tmp_path: Path) -> None:
    model, inputs = one.model(one.opsets[opset_index])
    compare(saved(model, tmp_path), inputs)


def test_every_operator_of_the_table_is_tested() -> None:
    table = {name for family in FAMILIES.values() for name in family}
    assert table == {one.op for one in CASES}
