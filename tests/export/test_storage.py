"""Packed weights: every form gives the same numbers, the smallest is taken, and both runtimes compute with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import bitsmith as bs
from bitsmith.export.onnx import SCOPES
from bitsmith.export.storage import ONNX_NODE, pack, packed, planes, smallest

CELL = "['', 'w', '_bitsmith.cells.w']"
PLAN = bs.Plan({"w": bs.Palette(4)})


def graph(weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """A file that gives its weight, as if a cell had computed with it."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    node = helper.make_node("Identity", ["weight"], ["y"], name="n")
    entry = node.metadata_props.add()
    entry.key, entry.value = SCOPES, CELL
    out = helper.make_tensor_value_info("y", kind, weight.shape)
    made = helper.make_graph([node], "g", [], [out], [numpy_helper.from_array(weight, "weight")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def unpacked(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
    onnx.checker.check_model(model)
    found: np.ndarray[Any, Any] = ort.InferenceSession(model.SerializeToString()).run(None, {})[0]
    return found


@given(
    st.integers(1, 256),
    st.sampled_from([(24, 6, 3, 3), (101, 31), (64, 1, 5, 5), (7, 300)]),
    st.sampled_from([np.float32, np.int8]),
    st.sampled_from([0.0, 0.6, 0.95]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_numbers_come_back(count: int, shape: tuple[int, ...], kind: Any, zeros: float, whole: bool) -> None:
    rng = np.random.default_rng(count)
    own = rng.integers(-128, 128, count).astype(np.int8) if kind is np.int8 else rng.normal(size=count)
    weight = own.astype(kind)[rng.integers(0, count, shape)]
    rest = (shape[0], shape[1], *[1] * (len(shape) - 2)) if whole else shape
    weight = weight * (rng.random(rest) >= zeros).astype(kind)
    model = packed(graph(weight), PLAN)
    np.testing.assert_array_equal(unpacked(model), weight)
    form = smallest(weight)
    size = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    if form is None:
        assert size == weight.nbytes
    else:
        assert size <= form.bytes < weight.nbytes


def test_palettes_of_groups_of_channels() -> None:
    rng = np.random.default_rng(0)
    weight = np.stack([rng.normal(size=8)[rng.integers(0, 8, (2, 16, 3, 3))] for _ in range(32)])
    weight = weight.reshape(64, 16, 3, 3).astype(np.float32)
    model = packed(graph(weight), bs.Plan({"w": bs.Palette(3, group=2)}))
    np.testing.assert_array_equal(unpacked(model), weight)
    size = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert 64 * 16 * 9 * 3 / 8 + 32 * 8 * 4 <= size < 64 * 16 * 9 * 3 / 8 + 32 * 8 * 4 + 400


@given(st.integers(1, 8), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_bits_are_packed_without_a_gap(bits: int, count: int) -> None:
    numbers = np.random.default_rng(count).integers(0, 2**bits, count)
    assert sum(planes(bits)) == bits
    rest, found = bits, np.zeros(count, dtype=int)
    for width in planes(bits):
        rest -= width
        data = pack((numbers >> rest) & (2**width - 1), width)
        assert len(data) == math.ceil(count * width / 8)
        stream = np.unpackbits(data, bitorder="little").reshape(-1, width)[:count]
        found += (stream * (1 << np.arange(width))).sum(1) << rest
    np.testing.assert_array_equal(found, numbers)


def test_other_sites_and_many_values_stay_as_they_are() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    few = np.sign(weight)
    assert smallest(weight) is None
    assert smallest(few[:2, :2]) is None
    for model, plan in ((graph(weight), PLAN), (graph(few), bs.Plan()), (graph(few), bs.Plan({"v": bs.Palette(4)}))):
        assert [t.data_type for t in packed(model, plan).graph.initializer] == [TensorProto.FLOAT]
    assert smallest(few, node=ONNX_NODE) is not None
    assert smallest(few, node=10**6) is None


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 40),
    ).eval()
    return model, torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize(
    "technique",
    [
        bs.Palette(4),
        bs.Palette(3, group=8),
        bs.Sparse(0.25),
        bs.Sparse(0.25, "kernel"),
        bs.Palette(5, of=bs.Sparse(0.2)),
        bs.Int(8, 8, of=bs.Palette(4)),
        bs.Int(8, 8, of=bs.Palette(4, of=bs.Sparse(0.25))),
    ],
    ids=repr,
)
@pytest.mark.parametrize("target", [bs.targets.OnnxRuntime(threads=1), bs.targets.OpenVino(threads=1)], ids=str)
def test_runtimes_compute_with_them(technique: bs.Technique, target: Any, tmp_path: Path) -> None:
    if isinstance(target, bs.targets.OpenVino):
        pytest.importorskip("openvino")
    model, x = net()
    suffix = "xml" if isinstance(target, bs.targets.OpenVino) else "onnx"
    sites = {name: site for name, site in bs.sites(model, x).items() if technique.fits(site) and site.weight}
    record = bs.model.network.network(model, x).record
    sizes, outputs = {}, {}
    inner = technique if not isinstance(technique, bs.Int) else bs.Int(8, 8)
    for name, put in (("plain", inner), ("packed", technique)):
        if name == "plain" and not isinstance(technique, bs.Int):
            artifact = bs.export(model, target, tmp_path / f"{name}.{suffix}", x, batch=2)
        else:
            plan = target.adapt(bs.Plan(dict.fromkeys(sites, put)), record)
            applied = bs.apply(model, plan, [(x, None)]).eval()
            artifact = bs.export(applied, target, tmp_path / f"{name}.{suffix}", x, batch=2)
            with torch.no_grad():
                outputs[name] = applied(x).numpy()
        sizes[name] = artifact.bytes
    got = target.run(artifact, [x.numpy()])[0]
    assert np.abs(got - outputs["packed"]).max() < 0.03 * np.abs(outputs["packed"]).max()
    if isinstance(technique, bs.Int):
        assert all(target.inspect(artifact)[name].precision == "int8" for name in ("0", "3"))
        if isinstance(target, bs.targets.OpenVino):
            return  # its integers are stored as they are
    assert sizes["packed"] < sizes["plain"]
