"""What a Winograd convolution computes, counted for models of hardware: products by tap, transforms' additions.

Lavin and Gray 2016 (arXiv:1509.09308) give the same counts for tiles of 2 (32 additions in, 24 out) and 4 (144, 100).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..numerics.winograd import Tiling, transforms

Matrix = Sequence[Sequence[Fraction]]


def additions(matrix: Matrix) -> int:
    """Additions of one matrix-vector product. Rows that differ in signs only share their two halves (``e + o`` and
    ``e - o``); products with constants are shifts, wiring, or folded elsewhere, and are not counted.

    >>> additions(transforms(2).bt), additions(transforms(4).bt)
    (4, 12)
    """
    total, left = 0, [tuple(row) for row in matrix]
    while left:
        row = left.pop(0)
        size = sum(value != 0 for value in row)
        twin = next((other for other in left if list(map(abs, other)) == list(map(abs, row)) and other != row), None)
        same = 0 if twin is None else sum(a == b != 0 for a, b in zip(row, twin, strict=True))
        if twin is not None and 0 < same < size:
            left.remove(twin)
            total += (same - 1) + (size - same - 1) + 2
        else:
            total += size - 1
    return total


def additions_back(matrix: Matrix) -> int:
    """Of a matrix whose columns come in such pairs: by transposition, ``additions(M^T) + columns - rows``.

    >>> additions_back(transforms(2).at), additions_back(transforms(4).at)
    (4, 10)
    """
    columns = list(zip(*matrix, strict=True))
    return additions(columns) + len(columns) - len(matrix)


@dataclass(frozen=True)
class TileCount:
    """One call. ``taps`` P products of [``tiles``, C] @ [C, K]; ``into``, ``back``: additions of one tile and channel
    by ``B^T d B`` and ``A^T f A``; ``*_multiplied``: multiplications of trained transforms, which are no shifts;
    ``weights``: additions of ``G w G^T`` of one kernel."""

    taps: int
    tiles: int
    into: int
    back: int
    into_multiplied: int
    back_multiplied: int
    weights: int


def counted(tile: int, kernel: tuple[int, int], tiling: Tiling, shape: Sequence[int], trained: bool) -> TileCount:
    """Of outputs [N, K, H, W], or [N, K, W] in one dimension. A transform of both axes is one down the columns of a
    tile, then one along the rows of what that gives."""
    height, width = (1, shape[-1]) if len(shape) == 3 else (shape[-2], shape[-1])
    tiles = shape[0] * math.ceil(height / tiling.m[0]) * math.ceil(width / tiling.m[1])
    down, along = (transforms(tile, size) for size in kernel)

    def both(counts: tuple[int, int], vectors: tuple[int, int]) -> int:
        return vectors[0] * counts[0] + vectors[1] * counts[1]

    # (columns to transform, rows to transform afterwards)
    into, back = (tiling.taps[1], tiling.taps[0]), (tiling.taps[1], tiling.m[0])
    sizes = [matrix.sizes for matrix in (down, along)]
    if trained:
        dense_in = tuple(n * (n - 1) for _, n, _ in sizes)
        dense_out = tuple(m * (n - 1) for m, n, _ in sizes)
        times_in = tuple(n * n if n > 1 else 0 for _, n, _ in sizes)
        times_out = tuple(m * n if n > 1 else 0 for m, n, _ in sizes)
    else:
        dense_in = (additions(down.bt), additions(along.bt))
        dense_out = (additions_back(down.at), additions_back(along.at))
        times_in = times_out = (0, 0)
    return TileCount(
        taps=tiling.taps[0] * tiling.taps[1],
        tiles=tiles,
        into=both((dense_in[0], dense_in[1]), into),
        back=both((dense_out[0], dense_out[1]), back),
        into_multiplied=both((times_in[0], times_in[1]), into),
        back_multiplied=both((times_out[0], times_out[1]), back),
        weights=both((additions(down.g), additions(along.g)), (kernel[1], tiling.taps[0])),
    )
