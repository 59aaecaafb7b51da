"""Zero padding in front of convolutions and means: in the file it is theirs, and every number stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.export.forms import onnxruntime_form
from bitsmith.export.onnx import clean, raw_onnx, to_onnx
from bitsmith.export.program import exported_program
from export.conftest import Computation, Network, Quantizer, outputs_of

SIZES = st.integers(0, 4)


def operations(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def optimized(target: bs.targets.OnnxRuntime, artifact: Any, folder: Path) -> Counter[str]:
    target._open(artifact.path, optimized=folder / "optimized.onnx")
    return operations(onnx.load(str(folder / "optimized.onnx")))


@given(
    pads=st.lists(SIZES, min_size=6, max_size=6), own=st.integers(0, 2), rank=st.integers(1, 3), groups=st.booleans()
)
@settings(max_examples=6, deadline=None)
def test_a_float_convolution_pads_itself(pads: list[int], own: int, rank: int, groups: bool) -> None:
    torch.manual_seed(0)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    conv = kind(4, 4, 2, stride=2, padding=own, groups=4 if groups else 1)
    net = nn.Sequential(nn.ReLU(), Pad(pads[: 2 * rank]), conv).eval()
    x = torch.randn(1, 4, *(7, 6, 5)[:rank])
    model = to_onnx(exported_program(net, x))
    assert operations(model)["Pad"] == 0
    with torch.no_grad():
        np.testing.assert_allclose(outputs_of(model, x.numpy())[0], net(x).numpy(), rtol=0, atol=1e-5)


class Pad(nn.Module):
    def __init__(self, pads: list[int], value: float = 0.0, mode: str = "constant") -> None:
        super().__init__()
        self.pads, self.value, self.mode = pads, value, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, self.mode, self.value if self.mode == "constant" else None)


@pytest.mark.parametrize("order", ["behind", "before", "both"])
@given(pads=st.lists(SIZES, min_size=4, max_size=4), zero=st.integers(0, 255), bits=st.sampled_from([8, 4]))
@settings(max_examples=6, deadline=None)
def test_quantizers_on_either_side_keep_every_number(order: str, pads: list[int], zero: int, bits: int) -> None:
    """``Pad -> Q -> DQ -> Conv`` and ``Q -> DQ -> Pad -> Conv``, with integers clipped to fewer bits in between."""
    torch.manual_seed(0)
    high = 2**bits - 1
    reads = Quantizer(0.05, zero % (high + 1), 0, high)
    written = Quantizer(0.05, zero % (high + 1), 0, high)
    cells: dict[str, nn.Module] = {
        "a": Computation(lambda x: written(x * 1.5) if order != "behind" else x * 1.5),
        "b": Computation(
            lambda x, w, b: F.conv2d(x, w, b, stride=2),
            (reads if order != "before" else None,),
            torch.randn(5, 3, 3, 3),
        ),
    }
    tensors: dict[str, nn.Module] = {"a|u8": reads, "a|u8.1": written}
    net = Network(cells, tensors, lambda call, x: call("b", F.pad(call("a", x), pads)))
    x = 3 * torch.randn(2, 3, 8, 7)
    model = to_onnx(exported_program(net, x))
    found = operations(model)
    assert found["Pad"] == 0
    assert found["QuantizeLinear"] == found["DequantizeLinear"] - 1 == 1
    got = outputs_of(model, x.numpy())[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, net(x).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("pad", "layer"),
    [
        (Pad([1, 1, 1, 1], 0.5), nn.Conv2d(4, 4, 3)),
        (Pad([1, 1, 1, 1], mode="reflect"), nn.Conv2d(4, 4, 3)),
        (Pad([1, 1, 0, 0, 2, 2]), nn.Conv2d(8, 4, 3)),  # channels
        (Pad([-1, 1]), nn.Conv2d(4, 4, 3)),
        (Pad([1, 1, 1, 1]), nn.ConvTranspose2d(4, 4, 3)),
        (Pad([1, 1, 1, 1]), nn.MaxPool2d(3)),
        (Pad([2, 0, 0, 0]), nn.AvgPool2d(2)),  # as wide as the window, which ONNX Runtime refuses
        (Pad([1, 1, 1, 1]), nn.AvgPool2d(3, padding=1, count_include_pad=False)),
        (Pad([1, 1, 1, 1]), nn.AvgPool2d(3, 2, ceil_mode=True)),
    ],
)
def test_other_padding_stays(pad: nn.Module, layer: nn.Module) -> None:
    net, x = nn.Sequential(nn.Tanh(), pad, layer).eval(), torch.randn(1, 4, 8, 8)
    raw = raw_onnx(exported_program(net, x))
    model = clean(raw)
    assert operations(model)["Pad"] == operations(raw)["Pad"] > 0
    with torch.no_grad():
        np.testing.assert_allclose(outputs_of(model, x.numpy())[0], net(x).numpy(), rtol=0, atol=1e-5)


@given(pads=st.lists(st.integers(0, 2), min_size=4, max_size=4), own=st.integers(0, 1), counted=st.booleans())
@settings(max_examples=8, deadline=None)
def test_a_mean_counts_the_zeros_that_it_was_given(pads: list[int], own: int, counted: bool) -> None:
    net = nn.Sequential(Pad(pads), nn.AvgPool2d(3, 2, padding=own, count_include_pad=counted)).eval()
    x = torch.randn(1, 2, 7, 8)
    model = to_onnx(exported_program(net, x))
    folds = max(pads) + own < 3 and (counted or not own)
    assert folds is False or operations(model)["Pad"] == 0
    with torch.no_grad():
        np.testing.assert_allclose(outputs_of(model, x.numpy())[0], net(x).numpy(), rtol=0, atol=1e-6)


def test_a_padded_value_that_others_read_stays_padded_for_them(execute: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.pad(x, (0, 1, 0, 1))
            return self.conv(y), y.tanh()

    x = torch.randn(1, 3, 6, 6)
    model = to_onnx(exported_program(Two().eval(), x))
    assert operations(model)["Pad"] == 1
    for got, wanted in zip(execute(model, x.numpy()), Two()(x), strict=True):
        np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=0, atol=1e-5)


def test_onnx_runtime_pads_integers_where_nothing_takes_the_padding_in(execute: Any) -> None:
    """The shortcut of CIFAR's ResNets: channels of zeros before an addition."""
    a, b, out = Quantizer(0.05, 100), Quantizer(0.03, 128), Quantizer(0.06, 110)
    net = Network(
        {"a": Computation(lambda x: a(x * 1.5)), "s": Computation(lambda x, y: out(x + y)), "b": Computation(b)},
        {"a|u8": a, "b|u8": b, "s|u8": out},
        lambda call, x: call(
            "s", F.pad(call("a", x)[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)), call("b", x[:, [0, 1, 2, 0, 1], :4, :4])
        ),
    )
    x = torch.randn(1, 3, 8, 8)
    model = to_onnx(exported_program(net, x))
    form = onnxruntime_form(model)
    writers = {output: node for node in form.graph.node for output in node.output}
    (addition,) = (node for node in form.graph.node if node.op_type == "Add")
    assert [writers[name].op_type for name in addition.input] == ["DequantizeLinear"] * 2
    (pad,) = (node for node in form.graph.node if node.op_type == "Pad")
    assert writers[pad.input[0]].op_type == "QuantizeLinear"
    np.testing.assert_array_equal(execute(form, x.numpy())[0], execute(model, x.numpy())[0])


class Padded(nn.Module):
    """MobileNetV1's first layers with TensorFlow's padding, a shortcut that pads channels, a mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, 2, groups=8), nn.ReLU6())
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.pointwise(self.depthwise(x))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


@pytest.mark.parametrize("make", [bs.targets.OnnxRuntime, bs.targets.OpenVino])
def test_a_padded_network_runs_in_integers_as_simulated(make: Callable[[], Any], tmp_path: Path) -> None:
    if make is bs.targets.OpenVino:
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 20, 20), torch.zeros(8))]
    target = make()
    net = bs.quantize(Padded().eval(), data, target)
    suffix = "onnx" if target.name == "onnxruntime" else "xml"
    artifact = bs.export(net, target, tmp_path / f"net.{suffix}", data[0][0])
    weighted = {"stem.1", "depthwise.1", "pointwise", "head", ":mean"}
    precisions = {site: found.precision for site, found in target.inspect(artifact).items()}
    assert {precisions[site] for site in weighted} == {"int8"}
    if target.name == "onnxruntime":
        left = optimized(target, artifact, tmp_path)
        assert precisions[":add"] == "int8"
        assert left["QLinearConv"] == 3
        assert left["QuantizeLinear"] == 1  # the input
        assert left["Conv"] == left["FusedConv"] == left["DequantizeLinear"] == 0
    else:
        layers = Counter(
            op.get_rt_info()["layerType"] for op in target._open(artifact.path).get_runtime_model().get_ops()
        )
        assert layers["Convolution"] == 3
        assert layers["Pad"] <= 1  # the channels of the shortcut
    check = bs.verify(net, artifact, data, target=target)
    assert check.passed, check
