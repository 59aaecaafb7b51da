"""Opaque operations of an exported program as ordinary ones, for files that are sized and checked but not timed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..export.program import quiet
from ..numerics.winograd import Matrix, Tiling, accumulated, output_tiles, transforms
from ..numerics.winograd_operation import load


def ordinary(program: ExportedProgram) -> ExportedProgram:
    """The program with every ``bitsmith::winograd`` written out; another one as it is."""
    load()
    winograd = torch.ops.bitsmith.winograd.default
    if all(node.target is not winograd for node in program.graph.nodes):
        return program
    with quiet():
        found: ExportedProgram = program.run_decompositions({winograd: _winograd})
    return found


def _winograd(
    x: Tensor,
    u: Tensor,
    mul: Tensor,
    offset: Tensor,
    us: Tensor,
    bias: Tensor,
    scale: float,
    tile: int,
    kernel: list[int],
    pads: list[int],
    bits: int,
) -> Tensor:
    """As :func:`~bitsmith.numerics.winograd.integer_convolution`, its integers in float64: ONNX has no shift of signed
    ones. All stay below 2^53."""
    tiling = Tiling.of(tile, kernel, (pads[0], pads[1], pads[2], pads[3]))
    tap, along, filters = tiling.mean_tap, mul.double(), u.double()
    d = tiling.cut(torch.round(x / scale)).double()
    d = d.reshape(*tiling.taps, *d.shape[1:])
    for axis, size in enumerate(kernel):
        d = _rows(transforms(tile, size).bt, d, axis)
    d = d.flatten(0, 1)
    shift = offset.double() * along[tap]
    v = torch.stack([d[p] * along[p, :, None] - (shift[:, None] if p == tap else 0.0) for p in range(d.shape[0])])
    v = torch.floor((v + 2.0**14) / 2.0**15)
    v = v.clamp(-128, 127) if bits == 8 else v
    base = torch.floor(((filters[tap] * shift).sum(1) + 2.0**14) / 2.0**15)
    acc = accumulated(v, filters)
    sums = torch.stack([acc[p] + (base[:, None] if p == tap else 0.0) for p in range(acc.shape[0])]).float()
    found = tiling.join(output_tiles(sums * us[:, :, None], tiling.taps), x.shape[0], x.shape[2], x.shape[3])
    return found + bias.view(1, -1, 1, 1)


def _rows(matrix: Matrix, x: Tensor, axis: int) -> Tensor:
    """``matrix`` on one axis, term by term: a graph takes no new constants here."""
    parts = x.unbind(axis)
    sums = [sum(float(c) * part for c, part in zip(row, parts, strict=True) if c) for row in matrix]
    return torch.stack([value for value in sums if isinstance(value, Tensor)], axis)
