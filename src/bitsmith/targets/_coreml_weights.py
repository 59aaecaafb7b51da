"""The forms in which Core ML stores a weight, and the smallest of them. Arrays only: no Core ML here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..export.constants import Weight, spread
from ..export.storage import indexed
from .base import Array

BLOCK = 64
"""Bytes to which every array of the weights file is filled up, and that its entry there takes."""

WIDTHS = {16: (1, 2, 4, 6, 8), 18: (1, 2, 3, 4, 6, 8)}
"""Bits of an index, by the version of iOS from which on."""


@dataclass(frozen=True)
class Form:
    """How a weight is stored. ``data``: all values, or those that are left where ``kept`` says so, by position; float
    or integers, which ``scale`` and ``offset`` turn to floats; or, with ``palettes`` (rows, 2^width), indices into
    them, each row for an equal number of first-axis entries. ``width``: bits of each of ``data``. ``bytes``: of all."""

    shape: tuple[int, ...]
    data: Array
    width: int
    kept: Array | None = None
    palettes: Array | None = None
    scale: Array | None = None
    offset: Array | None = None
    bytes: int = 0

    def decoded(self) -> Array:
        """The weight that it stands for."""
        found = self.data
        if self.palettes is not None:
            index = np.zeros(self.shape, np.int64)
            index[... if self.kept is None else self.kept] = found
            rows = np.arange(len(self.palettes)).reshape(-1, *[1] * (len(self.shape) - 1))
            found = self.palettes[spread(rows, self.shape), index]
            found = found if self.kept is None else found[self.kept]
        if self.kept is not None:
            whole = np.zeros(self.shape, found.dtype)
            whole[self.kept] = found
            found = whole
        if self.scale is not None:
            offset = 0.0 if self.offset is None else spread(self.offset, self.shape)
            found = (found.astype(self.scale.dtype) - offset) * spread(self.scale, self.shape)
        return found


def smallest(weight: Weight, rows: int, version: int, width: int) -> Form:
    """The form of least bytes. ``rows``: palettes it may have. ``version``: of iOS, 16 to 18. ``width``: bits of a
    float in the file."""
    return min(_forms(weight, rows, version, width), key=lambda form: form.bytes)


def needed(weights: Sequence[tuple[Weight, int]], width: int) -> int:
    """The lowest version of iOS that stores weights, each with the palettes it may have, in about as few bytes as any:
    not a quarter more for any of them."""
    for weight, rows in weights:
        now, then = (smallest(weight, rows, version, width).bytes for version in (16, 18))
        if now > 1.25 * then:
            return 18
    return 16


def _forms(weight: Weight, rows: int, version: int, width: int) -> Iterator[Form]:
    yield from _made(weight.values, None, rows, version, width)
    if weight.integers is not None and _holds_scale(weight, version):
        yield from _made(weight.integers, weight, rows, version, width)


def _made(values: Array, scaled: Weight | None, rows: int, version: int, width: int) -> Iterator[Form]:
    """``scaled``: the weight whose integers the values are; None: they are floats."""
    joint = version >= 18  # several constant expressions in a row
    bits = width if scaled is None else _integer_bits(values, scaled.offset, version)
    yield _sized(values.shape, values, bits, width, scaled)
    if scaled is not None and (scaled.offset is not None or not joint):
        return
    for count in dict.fromkeys((1, rows if joint else 1)):
        if (found := _indexed(values.reshape(count, -1), version)) is not None:
            palettes, index, bits_of_index = found
            yield _sized(values.shape, index.reshape(values.shape), bits_of_index, width, scaled, palettes=palettes)
    kept: Array = values != 0
    if kept.all() or not kept.any():
        return
    left = values[kept]
    yield _sized(values.shape, left, bits, width, scaled, kept=kept)
    if joint and (found := _indexed(left.reshape(1, -1), version)) is not None:
        palettes, index, bits_of_index = found
        yield _sized(values.shape, index.reshape(-1), bits_of_index, width, scaled, kept=kept, palettes=palettes)


def _sized(
    shape: tuple[int, ...],
    data: Array,
    bits: int,
    width: int,
    scaled: Weight | None = None,
    kept: Array | None = None,
    palettes: Array | None = None,
) -> Form:
    scale, offset = (scaled.scale, scaled.offset) if scaled is not None else (None, None)
    sizes = [data.size * bits]
    sizes += [kept.size] if kept is not None else []
    if palettes is not None:
        # behind a palette of integers, but for pruned weights, coremltools puts the scale into it: one for each channel
        rows = len(palettes) if scale is None or kept is not None else max(len(palettes), scale.size)
        sizes += [rows * palettes.shape[1] * (8 if scaled is not None else width)]
    sizes += [scale.size * width] if scale is not None else []
    sizes += [offset.size * 8] if offset is not None else []
    total = sum(BLOCK + BLOCK * math.ceil(size / 8 / BLOCK) for size in sizes)
    return Form(shape, data, bits, kept, palettes, scale, offset, total)


def _indexed(rows: Array, version: int) -> tuple[Array, Array, int] | None:
    """Palettes (rows, 2^width), ascending and filled up with their last value, indices and width; None: too many."""
    few = indexed(rows)
    if few is None:
        return None
    palettes, bits, index = few
    width = next(one for one in WIDTHS[18 if version >= 18 else 16] if one >= bits)
    return np.pad(palettes, ((0, 0), (0, 2**width - palettes.shape[1])), mode="edge"), index, width


def _holds_scale(weight: Weight, version: int) -> bool:
    """Before iOS 18 a scale has one axis, and a number for each entry of that."""
    assert weight.scale is not None
    axes = [axis for axis, size in enumerate(weight.scale.shape) if size > 1]
    return version >= 18 or not axes or (len(axes) == 1 and weight.scale.size == weight.values.shape[axes[0]])


def _integer_bits(values: Array, offset: Array | None, version: int) -> int:
    low, high = (-8, 7) if values.dtype.kind == "i" else (0, 15)
    arrays = [values] if offset is None else [values, offset]
    return 4 if version >= 18 and all(array.min() >= low and array.max() <= high for array in arrays) else 8


def packed(values: Array, width: int) -> Array:
    """Whole numbers below ``2^width`` as bytes: a stream of bits, the low ones first.

    >>> packed(np.array([1, 2, 3]), 6).tolist()
    [129, 48, 0]
    """
    bits = (values.reshape(-1, 1).astype(np.uint8) >> np.arange(width, dtype=np.uint8)) & 1
    found: Array = np.packbits(bits.ravel(), bitorder="little")
    return found
