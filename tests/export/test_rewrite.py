from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitsmith.export.rewrite import (
    drop_identity_gathers,
    drop_implied_clips,
    fold_casts,
    fold_weight_transposes,
    look_up_integers,
    merge_duplicates,
    merge_requantization,
    pack_int4,
    rewritten,
)

Array = np.ndarray[Any, Any]


def make(nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: tuple[int, ...], outputs: list[str]) -> Any:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def operations(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def test_a_tensor_is_quantized_once_for_all_its_readers(execute: Any) -> None:
    constants = {"s": np.float32(0.1), "t": np.float32(0.1), "u": np.float32(0.2), "z": np.uint8(7)}
    nodes = []
    for k, scale in enumerate("stu"):
        nodes += [node("QuantizeLinear", f"x {scale} z", f"q{k}"), node("DequantizeLinear", f"q{k} {scale} z", f"d{k}")]
        nodes.append(node(("Neg", "Abs", "Neg")[k], f"d{k}", f"y{k}"))
    model = make(nodes, {k: np.asarray(v) for k, v in constants.items()}, (50,), ["y0", "y1", "y2"])
    after = rewritten(model, merge_duplicates)
    assert operations(after).count("QuantizeLinear") == 2
    assert operations(after).count("DequantizeLinear") == 2
    x = np.linspace(-9, 60, 50, dtype=np.float32)
    for a, b in zip(execute(model, x), execute(after, x), strict=True):
        np.testing.assert_array_equal(a, b)
    assert operations(model).count("QuantizeLinear") == 3  # the model given is not changed


@given(st.floats(2.0**-20, 2.0**13, width=32), st.integers(0, 255), st.sampled_from([np.uint8, np.int8, np.int16]))
@settings(max_examples=30, deadline=None)
def test_quantizing_again_changes_nothing(scale: float, zero: int, dtype: Any) -> None:
    limits = np.iinfo(dtype)
    zero = min(zero, limits.max)
    constants = {"s": np.asarray(scale, np.float32), "z": np.asarray(zero, dtype)}
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("QuantizeLinear", "d s z", "q2"),
        node("DequantizeLinear", "q2 s z", "d2"),
        node("Neg", "d2", "y"),
    ]
    integers = np.arange(limits.min, limits.max + 1, max(1, (limits.max - limits.min) // 4096))
    model = make(nodes, constants, (len(integers),), ["y"])
    after = rewritten(model, merge_requantization, merge_duplicates)
    assert operations(after) == ["QuantizeLinear", "DequantizeLinear", "Neg"]
    x = ((integers - zero) * np.float64(scale)).astype(np.float32)
    np.testing.assert_array_equal(_execute(model, x), _execute(after, x))


def test_another_scale_is_another_quantization() -> None:
    constants = {"s": np.asarray(0.1, np.float32), "t": np.asarray(0.11, np.float32), "z": np.asarray(0, np.uint8)}
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("QuantizeLinear", "d t z", "q2"),
        node("DequantizeLinear", "q2 t z", "y"),
    ]
    assert len(operations(rewritten(make(nodes, constants, (4,), ["y"]), merge_requantization))) == 4


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("is_output", [True, False])
def test_transposed_weights_are_stored_transposed(per_channel: bool, is_output: bool, execute: Any) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (5, 3)).astype(np.int8),
        "s": rng.random(5 if per_channel else ()).astype(np.float32),
        "z": np.zeros(5 if per_channel else (), np.int8),
    }
    axis = {"axis": 0} if per_channel else {}
    nodes = [
        node("DequantizeLinear", "w s z", "d", **axis),
        node("Transpose", "d", "t", perm=[1, 0]),
        node("MatMul", "x t", "y"),
    ]
    model = make(nodes, constants, (2, 3), ["y", "t"] if is_output else ["y"])
    after = rewritten(model, fold_weight_transposes)
    assert operations(after) == ["DequantizeLinear", "MatMul"]
    assert [o.name for o in after.graph.output] == [o.name for o in model.graph.output]
    x = rng.standard_normal((2, 3)).astype(np.float32)
    for a, b in zip(execute(model, x), execute(after, x), strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    st.floats(0.001, 0.2),
    st.integers(0, 255),
    st.one_of(st.none(), st.tuples(st.floats(-20, 5), st.floats(0, 20))),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_only_a_clip_that_saturation_implies_is_dropped(
    scale: float, zero: int, bounds: tuple[float, float] | None, two_readers: bool
) -> None:
    low, high = bounds or (0.0, np.inf)
    if high < low:
        low, high = high, low
    constants = {
        "s": np.asarray(scale, np.float32),
        "z": np.asarray(zero, np.uint8),
        "low": np.asarray(low, np.float32),
        "high": np.asarray(high, np.float32),
    }
    first = node("Clip", "x low high", "c") if bounds else node("Relu", "x", "c")
    nodes = [first, node("QuantizeLinear", "c s z", "q"), node("DequantizeLinear", "q s z", "y")]
    if two_readers:
        nodes.append(node("Neg", "c", "n"))
    model = make(nodes, constants, (4001,), ["y", "n"] if two_readers else ["y"])
    after = rewritten(model, drop_implied_clips)
    x = np.linspace(-60, 60, 4001, dtype=np.float32)
    np.testing.assert_array_equal(_execute(model, x), _execute(after, x))
    # dropped exactly when nothing could tell: the quantizer alone gives the same
    alone = make(
        [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")], constants, (4001,), ["y"]
    )
    wide = np.concatenate([x, [-1e6, 1e6]]).astype(np.float32)[-4001:]
    same = np.array_equal(_execute(alone, wide), _execute(model, wide)) and np.array_equal(
        _execute(alone, x), _execute(model, x)
    )
    assert (first.op_type not in operations(after)) == (same and not two_readers)


@pytest.mark.parametrize(
    ("indices", "left"),
    [
        (np.arange(24).reshape(2, 3, 4), []),
        (np.arange(24).reshape(6, 4), ["Reshape"]),
        (np.arange(24)[::-1].reshape(2, 3, 4), ["Reshape", "Gather"]),
        (np.arange(12).reshape(3, 4), ["Reshape", "Gather"]),
    ],
    ids=["same", "reshaped", "reversed", "part"],
)
def test_only_a_gather_of_everything_in_order_is_dropped(indices: Array, left: list[str], execute: Any) -> None:
    nodes = [node("Abs", "x", "a"), node("Reshape", "a one", "f"), node("Gather", "f i", "g"), node("Neg", "g", "y")]
    model = make(nodes, {"one": np.array([-1]), "i": indices}, (2, 3, 4), ["y"])
    model = onnx.shape_inference.infer_shapes(model)
    after = rewritten(model, drop_identity_gathers)
    assert operations(after) == ["Abs", *left, "Neg"]
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(execute(after, x)[0], execute(model, x)[0])


def _lookup(scale: Array, zero: Array, indices: Array, axis: int = 0) -> onnx.ModelProto:
    table = np.random.default_rng(0).integers(-128, 128, (5, 6), dtype=np.int8)
    nodes = [
        node("DequantizeLinear", "table scale zero", "rows", axis=axis),
        node("Gather", "rows indices", "found"),
        node("Add", "found x", "y"),
    ]
    constants = {"table": table, "scale": scale, "zero": zero, "indices": indices}
    return make(nodes, constants, (6,), ["y"])


@pytest.mark.parametrize("scale", [np.float32(0.3), np.linspace(0.1, 0.5, 5, dtype=np.float32)], ids=["one", "by row"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_rows_are_looked_up_as_integers(scale: Array, shape: tuple[int, ...], execute: Any) -> None:
    indices = np.random.default_rng(1).integers(-5, 5, shape)  # ONNX counts negative ones from the end
    model = _lookup(np.asarray(scale), np.zeros(np.shape(scale), np.int8), indices)
    after = rewritten(model, look_up_integers)
    assert "DequantizeLinear" not in operations(after)
    (lookup,) = (n for n in after.graph.node if n.op_type == "Gather" and n.input[0] == "table")
    assert next(n.op_type for n in after.graph.node if lookup.output[0] in n.input) == "Cast"
    x = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(execute(model, x)[0], execute(after, x)[0])


def test_a_cast_of_a_constant_is_one(execute: Any) -> None:
    nodes = [
        node("Cast", "zeros", "zero", to=TensorProto.INT8),
        node("Cast", "x", "kept", to=TensorProto.FLOAT),
        node("QuantizeLinear", "kept scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "y"),
    ]
    model = make(nodes, {"zeros": np.array([3, -4]), "scale": np.float32([0.1, 0.2])}, (7, 2), ["y"])
    after = rewritten(model, fold_casts)
    assert operations(after) == ["Cast", "QuantizeLinear", "DequantizeLinear"]
    x = np.linspace(-20, 20, 14, dtype=np.float32).reshape(7, 2)
    np.testing.assert_array_equal(execute(model, x)[0], execute(after, x)[0])


@pytest.mark.parametrize(
    ("scale", "zero", "axis"),
    [(np.linspace(0.1, 0.6, 6), np.zeros(6), 1), (np.linspace(0.1, 0.5, 5), np.arange(5), 0)],
    ids=["scales along a row", "zero points"],
)
def test_other_tables_stay_as_they_are(scale: Array, zero: Array, axis: int) -> None:
    model = _lookup(scale.astype(np.float32), zero.astype(np.int8), np.array([1, 2]), axis)
    assert operations(rewritten(model, look_up_integers)) == ["DequantizeLinear", "Gather", "Add"]


def test_int4_refuses_what_does_not_fit() -> None:
    constants = {
        "a.weight_q4": np.array([[1, 9]], np.int8),
        "s": np.ones(1, np.float32),
        "z": np.zeros(1, np.int8),
    }
    nodes = [node("DequantizeLinear", "a.weight_q4 s z", "d", axis=0), node("Mul", "x d", "y")]
    with pytest.raises(ValueError, match="4 bits but holds values from 1 to 9"):
        rewritten(make(nodes, constants, (1, 2), ["y"]), pack_int4)


def test_int4_refuses_another_reader() -> None:
    constants = {"a.weight_q4": np.array([[1, 7]], np.int8)}
    nodes = [node("Cast", "a.weight_q4", "d", to=TensorProto.FLOAT), node("Mul", "x d", "y")]
    with pytest.raises(ValueError, match="4 bits but Cast reads it"):
        rewritten(make(nodes, constants, (1, 2), ["y"]), pack_int4)


def _execute(model: onnx.ModelProto, x: Array) -> Array:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    array: Array = session.run(None, {"x": x})[0]
    return array
