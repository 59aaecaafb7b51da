from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.numerics import dialect
from bitsmith.numerics.ranges import weight_qparams
from bitsmith.site import Format, Range


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 4, 8, 16]),
    symmetric=st.booleans(),
    form=st.sampled_from(["tensor", "channel", "channel1", "group", "conv group"]),
)
def test_dequantize_weight(seed: int, bits: int, symmetric: bool, form: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn((4, 6, 3, 3) if "conv" in form else (4, 6), generator=generator)
    axis = {"tensor": None, "channel1": 1}.get(form, 0)
    group = 3 if "group" in form else None
    scale, zero_point = weight_qparams(w, bits, symmetric, axis, group, Range())
    if group:
        s, z = (t.repeat_interleave(3, 1).reshape(4, 6, *[1] * (w.dim() - 2)) for t in (scale, zero_point))
    elif axis is None:
        s, z = scale, zero_point
    else:
        s, z = (t.reshape([-1 if d == axis else 1 for d in range(w.dim())]) for t in (scale, zero_point))
    low, high = Format(bits, signed=symmetric).levels
    q = (torch.round(w.double() / s.double()) + z).clamp(low, high)
    values = dialect.dequantize_weight(q.to(dialect.storage(bits, symmetric)), scale, zero_point, axis, bits)
    assert values.dtype == torch.float32
    assert values.shape == w.shape
    expected = ((q.numpy() - z.numpy()) * s.double().numpy()).astype(np.float32)
    np.testing.assert_array_equal(values.numpy(), expected)
    assert float((values - w).abs().max()) <= float(scale.max()) * 1.001


def test_dequantize_weight_errors() -> None:
    q = torch.zeros(4, 6, dtype=torch.int8)
    one = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"torch\.float32"):
        dialect.dequantize_weight(q.float(), *one, 0, 8)
    with pytest.raises(ValueError, match="needs an axis"):
        dialect.dequantize_weight(q, *one, None, 8)
    with pytest.raises(ValueError, match="does not group"):
        dialect.dequantize_weight(q, torch.ones(4, 4), torch.zeros(4, 4, dtype=torch.int64), 0, 8)


@pytest.mark.parametrize("form", ["tensor", "channel", "group"])
def test_weight_survives_export(form: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            axis, group = (None if form == "tensor" else 0), (4 if form == "group" else None)
            scale, zero_point = weight_qparams(torch.randn(4, 8), 8, True, axis, group, Range())
            self.axis = axis
            self.register_buffer("q", torch.randint(-127, 128, (4, 8)).to(torch.int8))
            self.register_buffer("s", scale)
            self.register_buffer("z", zero_point)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ dialect.dequantize_weight(self.q, self.s, self.z, self.axis, 8).T

    layer, x = Layer(), torch.randn(2, 8)
    program = torch.export.export(layer, (x,), strict=False)
    name = {"tensor": "dequantize_per_tensor.tensor", "channel": "dequantize_per_channel.default"}.get(
        form, "dequantize_per_channel_group.default"
    )
    assert f"quantized_decomposed.{name}" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


def test_loaded_only_when_used() -> None:
    code = (
        "import sys, torch; import bitsmith.numerics.quantizer as q; from bitsmith.site import Format\n"
        "name = 'torch.ao.quantization.fx._decomposed'\n"
        "assert name not in sys.modules; q.Quantizer(Format(8), 1.0, 0); assert name in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
