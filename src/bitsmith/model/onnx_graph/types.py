"""Element types of ONNX as torch's."""

from __future__ import annotations

import torch

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
}
"""``TensorProto.DataType`` of what can be computed with."""

HALF = {10: "float16", 16: "bfloat16", 17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz"}
"""Reduced floating types, which are refused with the reason."""

NAMES = {
    **HALF,
    **{number: str(kind).removeprefix("torch.") for number, kind in DTYPES.items()},
    8: "string",
    14: "complex64",
    15: "complex128",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
}
"""What an element type is called in messages."""
