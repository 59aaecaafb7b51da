"""Reads a Core ML package with protobuf and numpy alone, and computes it with torch, operation by operation.

The layout of ``weight.bin`` is that of coremltools' ``mlmodel/src/MILBlob``: a header of 64 bytes, and for each array
64 bytes (mark, type, bytes, place, bits of padding) in front of it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = "Data/com.apple.CoreML"
# MIL.proto DataType -> numpy type, bits
KINDS: dict[int, tuple[Any, int]] = {
    1: (np.bool_, 1),
    10: (np.float16, 16),
    11: (np.float32, 32),
    21: (np.int8, 8),
    22: (np.int16, 16),
    23: (np.int32, 32),
    25: (np.int8, 4),
    31: (np.uint8, 8),
    32: (np.uint16, 16),
    33: (np.uint32, 32),
    35: (np.uint8, 4),
    36: (np.uint8, 2),
    37: (np.uint8, 1),
    38: (np.uint8, 6),
    39: (np.uint8, 3),
}


class Package:
    """``operations`` in order; ``weights``: decoded value of every constant expression, by name."""

    def __init__(self, path: Path) -> None:
        from coremltools.proto import Model_pb2

        self.spec = Model_pb2.Model()
        self.spec.ParseFromString((path / FOLDER / "model.mlmodel").read_bytes())
        blob = path / FOLDER / "weights" / "weight.bin"
        self.blob = blob.read_bytes() if blob.exists() else b""
        (function,) = self.spec.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        self.operations = list(block.operations)
        self.outputs = list(block.outputs)
        self.constants: dict[str, Any] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.arrays: dict[str, int] = {}
        """Bytes of each array of weight.bin, by name of the constant or expression and its part."""
        for op in self.operations:
            if op.type == "const":
                self.constants[op.outputs[0].name] = self._value(op.attributes["val"], op.outputs[0].name)
            elif op.type.startswith("constexpr_"):
                made = EXPRESSIONS[op.type](**self._given(op))
                for output, value in zip(op.outputs, made if isinstance(made, tuple) else (made,), strict=True):
                    self.constants[output.name] = value
                self.weights[op.outputs[-1].name] = self.constants[op.outputs[-1].name]

    @property
    def kinds(self) -> list[str]:
        return [op.type for op in self.operations if op.type not in ("const", "cast")]

    def _given(self, op: Any) -> dict[str, Any]:
        name = op.outputs[-1].name
        found = {key: self._value(value, f"{name}/{key}") for key, value in op.attributes.items() if key != "name"}
        for key, argument in op.inputs.items():
            values = [
                self.constants[b.name] if b.name else self._value(b.value, f"{name}/{key}") for b in argument.arguments
            ]
            found[key] = values[0] if len(values) == 1 else values
        return found

    def _value(self, value: Any, name: str) -> Any:
        kind = value.type.tensorType
        shape = tuple(axis.constant.size for axis in kind.dimensions)
        if value.HasField("blobFileValue"):
            numpy_kind, bits = KINDS[kind.dataType]
            mark, _, size, place, padding = struct.unpack_from("<IIQQQ", self.blob, value.blobFileValue.offset)
            assert mark == 0xDEADBEEF
            self.arrays[name] = size
            raw = np.frombuffer(self.blob, np.uint8, size, place)
            if bits >= 8:
                return raw.view(numpy_kind).reshape(shape)
            stream = np.unpackbits(raw, bitorder="little")
            stream = stream[: len(stream) - padding].reshape(-1, bits).astype(np.int64)
            numbers = (stream << np.arange(bits)).sum(1)
            if numpy_kind is np.int8:
                numbers = np.where(numbers >= 2 ** (bits - 1), numbers - 2**bits, numbers)
            return numbers.astype(numpy_kind).reshape(shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        found = getattr(tensor, field).values
        if field == "strings":
            return found[0]
        numpy_kind = KINDS[kind.dataType][0]
        array = np.frombuffer(found, numpy_kind) if isinstance(found, bytes) else np.array(list(found), numpy_kind)
        return array.reshape(shape)

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs, in float32 whatever the file asks for."""
        values: dict[str, Any] = {entry.name: x for entry, x in zip(self.spec.description.input, inputs, strict=True)}
        for op in self.operations:
            if op.type == "const" or op.type.startswith("constexpr_"):
                continue
            given = {}
            for key, argument in op.inputs.items():
                found = [self._read(binding, values) for binding in argument.arguments]
                given[key] = found[0] if len(found) == 1 else found
            values[op.outputs[0].name] = COMPUTES[op.type](given)
        return [values[name] for name in self.outputs]

    def _read(self, binding: Any, values: dict[str, Any]) -> Any:
        if binding.name in values:
            return values[binding.name]
        found = self.constants[binding.name] if binding.name else self._value(binding.value, "")
        if isinstance(found, np.ndarray) and found.dtype.kind == "f":
            return torch.from_numpy(np.array(found, np.float32))
        return found


# -- constant expressions ------------------------------------------------------------------------------------------


def spread(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    found = np.empty(shape, blocks.dtype)
    for place in np.ndindex(*shape):
        found[place] = blocks[tuple(i * b // s for i, b, s in zip(place, blocks.shape, shape, strict=True))]
    return found


def looked_up(indices: np.ndarray, lut: np.ndarray, shape: np.ndarray | None = None) -> np.ndarray:
    if shape is None:  # iOS 18: a table for each block
        tables = lut.reshape(-1, lut.shape[-2])
        which = spread(np.arange(len(tables)).reshape(lut.shape[:-2]), indices.shape)
        return tables[which, indices]
    bits, count = int(np.log2(lut.size)), int(np.prod(shape))
    stream = np.unpackbits(indices, bitorder="little")[: count * bits].reshape(-1, bits).astype(np.int64)
    return lut[(stream << np.arange(bits)).sum(1)].reshape(tuple(shape))


def filled(nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray | None = None) -> np.ndarray:
    if shape is not None:
        mask = np.unpackbits(mask, bitorder="little")[: int(np.prod(shape))].reshape(tuple(shape))
    found = np.zeros(mask.shape, nonzero_data.dtype)
    found[mask != 0] = nonzero_data
    return found


def affine(quantized_data: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: np.ndarray) -> np.ndarray:
    along = [-1 if k == int(axis) else 1 for k in range(quantized_data.ndim)]
    both = [x.reshape(along) if x.ndim else x for x in (scale, zero_point)]
    return (quantized_data.astype(scale.dtype) - both[1].astype(scale.dtype)) * both[0]


def scaled(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    whole = data.astype(scale.dtype)
    if offset is not None:
        whole = whole - spread(offset, data.shape).astype(scale.dtype)
    return whole * spread(scale, data.shape)


def looked_up_left(indices_mask: np.ndarray, indices_nonzero_data: np.ndarray, lut: np.ndarray) -> Any:
    return indices_mask, looked_up(filled(indices_nonzero_data, indices_mask), lut)[indices_mask != 0]


def scaled_left(data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray) -> Any:
    return data_mask, scaled(filled(nonzero_data, data_mask), scale)[data_mask != 0]


EXPRESSIONS: dict[str, Any] = {
    "constexpr_lut_to_dense": looked_up,
    "constexpr_sparse_to_dense": filled,
    "constexpr_affine_dequantize": affine,
    "constexpr_blockwise_shift_scale": scaled,
    "constexpr_lut_to_sparse": looked_up_left,
    "constexpr_sparse_blockwise_shift_scale": scaled_left,
}


# -- operations ----------------------------------------------------------------------------------------------------


def conv(given: dict[str, Any]) -> Tensor:
    x, pad = given["x"], [int(p) for p in given.get("pad", [0, 0, 0, 0])]
    if given["pad_type"] == "custom":
        x = padded(x, pad)
    else:
        assert given["pad_type"] == "valid"
    stride, dilation = (tuple(int(v) for v in given[key]) for key in ("strides", "dilations"))
    function = F.conv1d if x.dim() == 3 else F.conv2d
    return function(x, given["weight"], given.get("bias"), stride, 0, dilation, int(given["groups"]))  # type: ignore[arg-type]


def padded(x: Tensor, pad: Any) -> Tensor:
    """``pad``: before and after, of each of the last axes in order."""
    pairs = [[int(pad[k]), int(pad[k + 1])] for k in range(0, len(pad), 2)]
    return F.pad(x, [size for pair in reversed(pairs) for size in pair])


def sliced(given: dict[str, Any]) -> Tensor:
    x, rank = given["x"], given["x"].dim()
    masks = {key: given.get(key, [False] * rank) for key in ("begin_mask", "end_mask", "squeeze_mask")}
    assert not any(masks["squeeze_mask"])
    steps = given.get("stride", [1] * rank)
    parts = []
    for k in range(rank):
        begin = None if masks["begin_mask"][k] else int(given["begin"][k])
        end = None if masks["end_mask"][k] else int(given["end"][k])
        parts.append(slice(begin, end, int(steps[k])))
    found: Tensor = x[tuple(parts)]
    return found


def pool(given: dict[str, Any]) -> Tensor:
    sizes, strides = (tuple(int(v) for v in given[key]) for key in ("kernel_sizes", "strides"))
    assert given["pad_type"] == "valid" or not np.any(given["pad"])
    return F.avg_pool2d(given["x"], sizes, strides)  # type: ignore[arg-type]


def norm(given: dict[str, Any]) -> Tensor:
    eps = float(given["epsilon"])
    return F.batch_norm(given["x"], given["mean"], given["variance"], given["gamma"], given["beta"], eps=eps)


COMPUTES: dict[str, Any] = {
    "conv": conv,
    "batch_norm": norm,
    "avg_pool": pool,
    "pad": lambda given: padded(given["x"], given["pad"]),
    "slice_by_index": sliced,
    "concat": lambda given: torch.cat(given["values"], int(given["axis"])),
    "relu": lambda given: torch.relu(given["x"]),
    "add": lambda given: given["x"] + given["y"],
    "mul": lambda given: given["x"] * given["y"],
    "linear": lambda given: F.linear(given["x"], given["weight"], given.get("bias")),
    "reshape": lambda given: given["x"].reshape(tuple(int(v) for v in given["shape"])),
    "softmax": lambda given: torch.softmax(given["x"], int(given["axis"])),
    "cast": lambda given: given["x"],
    "gather": lambda given: given["x"][given["indices"].long()],
    "reduce_mean": lambda given: given["x"].mean([int(v) for v in given["axes"]], keepdim=bool(given["keep_dims"])),
}
