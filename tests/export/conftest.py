"""Small networks in the quantized dialect, built by hand with the module layout that `apply` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

DECOMPOSED = torch.ops.quantized_decomposed


class Quantizer(nn.Module):
    """Simulates a per-tensor format, as ``bitsmith`` quantizers do in an exported network."""

    def __init__(
        self, scale: float, zero: int, low: int = 0, high: int = 255, dtype: torch.dtype = torch.uint8
    ) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(zero))
        self.limits = (low, high, dtype)

    def forward(self, x: Tensor) -> Tensor:
        q = DECOMPOSED.quantize_per_tensor.tensor(x, self.scale, self.zero, *self.limits)
        return DECOMPOSED.dequantize_per_tensor.tensor(q, self.scale, self.zero, *self.limits)


class Computation(nn.Module):
    """A cell: reads its activations through quantizers, its weight from int8, its bias as it is."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        quantizers: tuple[Quantizer | None, ...] = (),
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        group: int = 0,
        bits: int = 8,
    ) -> None:
        super().__init__()
        self.function = function
        self.quantizers = quantizers
        self.group = group
        self.high = 2 ** (bits - 1) - 1
        self.name = "weight_q4" if bits == 4 else "weight_q"
        self.weighted, self.bias = weight is not None, bias
        self.integer_bias = bias is not None and bool(quantizers) and quantizers[0] is not None and not group
        if weight is not None:
            rows = weight.reshape(-1, group) if group else weight.flatten(1)
            scale = rows.abs().amax(1).clamp(min=1e-8) / self.high
            integers = torch.round(rows / scale[:, None]).clamp(-self.high - 1, self.high)
            self.register_buffer("scale", scale.reshape(len(weight), -1) if group else scale)
            self.register_buffer("zeros", torch.zeros(self.scale.shape, dtype=torch.int64))
            self.register_buffer(self.name, integers.reshape(weight.shape).to(torch.int8))
            if self.integer_bias:
                step = scale * quantizers[0].scale
                self.register_buffer("bias_scale", step)
                self.register_buffer("bias_q", torch.round(bias.double() / step.double()).to(torch.int32))

    def forward(self, *operands: Tensor) -> Tensor:
        read = [
            operand if quantizer is None else quantizer(operand)
            for operand, quantizer in zip(operands, (*self.quantizers, *[None] * len(operands)), strict=False)
        ]
        if not self.weighted:
            return self.function(*read)
        integers, low = getattr(self, self.name), -self.high - 1
        if self.group:
            weight = DECOMPOSED.dequantize_per_channel_group(
                integers, self.scale, self.zeros.to(torch.int8), low, self.high, torch.int8, self.group, torch.float32
            )
        else:
            weight = DECOMPOSED.dequantize_per_channel(integers, self.scale, self.zeros, 0, low, self.high, torch.int8)
        bias = self.bias
        if self.integer_bias:
            bias = DECOMPOSED.dequantize_per_channel(
                self.bias_q, self.bias_scale, self.zeros, 0, -(2**31), 2**31 - 1, torch.int32
            )
        return self.function(*read, weight, bias)


class Network(nn.Module):
    """Runs ``forward(cells, x)``; the cells and quantizers lie where an applied network has them."""

    def __init__(self, cells: dict[str, nn.Module], tensors: dict[str, nn.Module], body: Callable[..., Any]) -> None:
        super().__init__()
        self._bitsmith = nn.Module()
        for kind, children in (("cells", cells), ("tensors", tensors)):
            holder = nn.Module()
            for name, module in children.items():
                holder.add_module(name.replace(".", "/"), module)
            self._bitsmith.add_module(kind, holder)
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> Any:
        cells = self._bitsmith.cells._modules
        return self.body(lambda name, *a: cells[name.replace(".", "/")](*a), x)


class Build:
    """What tests build networks from."""

    quantizer = Quantizer
    cell = Computation
    network = Network


@pytest.fixture
def build() -> type[Build]:
    return Build


@pytest.fixture
def conv_net() -> tuple[nn.Module, Tensor]:
    """conv, relu, conv, add, global mean, linear: all quantized, output formats everywhere."""
    return make_conv_net()


def make_conv_net(scale: float = 0.02) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    F = nn.functional
    tensors = {
        "@x|u8": Quantizer(0.03, 128),
        "block.relu|u8": Quantizer(scale, 0),
        "block.conv2|u8": Quantizer(0.03, 120),
        "block:add|u8": Quantizer(0.04, 90),
        "pool|u8": Quantizer(0.02, 100),
        "fc|u8": Quantizer(0.02, 110),
    }
    q = tensors.get

    def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1)

    def out(name: str, x: Tensor) -> Tensor:
        return q(name)(x)

    cells = {
        "block.conv1": Computation(conv, (q("@x|u8"),), torch.randn(16, 16, 3, 3) / 12, torch.randn(16) / 9),
        "block.relu": Computation(lambda x: out("block.relu|u8", F.relu(x))),
        "block.conv2": Computation(
            lambda x, w, b: out("block.conv2|u8", conv(x, w, b)),
            (q("block.relu|u8"),),
            torch.randn(16, 16, 3, 3) / 12,
            torch.randn(16) / 9,
        ),
        "block:add": Computation(lambda a, b: out("block:add|u8", a + b), (q("block.conv2|u8"), q("@x|u8"))),
        "pool": Computation(lambda x: out("pool|u8", F.adaptive_avg_pool2d(x, 1)), (q("block:add|u8"),)),
        "fc": Computation(
            lambda x, w, b: out("fc|u8", F.linear(x, w, b)), (q("pool|u8"),), torch.randn(10, 16) / 4, torch.randn(10)
        ),
    }

    def body(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        h = call("block.relu", call("block.conv1", x))
        h = call("block:add", call("block.conv2", h), x)
        return call("fc", call("pool", h).flatten(1))

    return Network(cells, tensors, body), torch.randn(2, 16, 12, 12)


def outputs_of(model: Any, *arrays: Any) -> list[Any]:
    """What the ONNX model computes in ONNX Runtime with every graph optimization off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)}))


@pytest.fixture
def execute() -> Callable[..., list[Any]]:
    return outputs_of
