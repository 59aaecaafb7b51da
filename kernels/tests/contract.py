"""The arithmetic of the README in NumPy: integers in int64, reals in float32 one operation at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_B = {
    2: np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    4: np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ]
    ),
}


@dataclass
class Case:
    """One layer and one call of it."""

    tile: int
    bits: int
    u: Array
    mul: Array
    us: Array
    bias: Array | None
    x: Array
    x_zero: int = 0
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    offset: Array | None = None
    call: dict[str, Any] = field(default_factory=lambda: {"scale": 1.0})

    def layer(self) -> dict[str, Any]:
        """Arguments of ``Winograd`` but for ``isa``."""
        names = ("tile", "bits", "u", "mul", "us", "bias", "x_zero", "pads", "offset")
        return {name: getattr(self, name) for name in names} | {"x_signed": self.x.dtype == np.int8}


def _mean_tap(case: Case) -> int:
    """Tap (1, 1)."""
    return case.tile + 3


def _offset(case: Case) -> Array:
    return np.zeros(case.u.shape[2], np.int64) if case.offset is None else case.offset.astype(np.int64)


def transformed(case: Case) -> Array:
    """V, int64 [P, N, tiles down, tiles across, C], before any saturation."""
    t, m = case.tile + 2, case.tile
    top, left, bottom, right = case.pads
    d = case.x.astype(np.int64) - case.x_zero
    height, width = d.shape[1] + top + bottom - 2, d.shape[2] + left + right - 2
    down, across = -(-height // m), -(-width // m)
    extra = ((0, 0), (top, bottom + down * m - height), (left, right + across * m - width), (0, 0))
    d = np.pad(d, extra)
    # [N, down, across, C, T, T]
    tiles = np.lib.stride_tricks.sliding_window_view(d, (t, t), axis=(1, 2))[:, ::m, ::m]
    b = _B[case.tile]
    taps = np.einsum("ia,nyxcab,jb->ijnyxc", b, tiles, b).reshape(t * t, *tiles.shape[:4])
    assert np.abs(taps).max(initial=0) < 2**15
    taps[_mean_tap(case)] -= _offset(case)
    return (taps * case.mul.astype(np.int64)[:, None, None, None, :] + 2**14) >> 15


def _transform_back(f: Array, tile: int) -> list[Array]:
    """A^T f along the first axis, in the stated order."""
    a, b = f[1] + f[2], f[1] - f[2]
    if tile == 2:
        return [f[0] + a, b - f[3]]
    c, e = f[3] + f[4], f[3] - f[4]
    two, four, eight = np.float32(2), np.float32(4), np.float32(8)
    return [(f[0] + a) + c, b + two * e, a + four * c, (b + eight * e) + f[5]]


def run(case: Case) -> Array:
    """The exact output, [N, H', W', K]."""
    v = transformed(case)
    if case.bits == 8:
        v = np.clip(v, -128, 127)
    acc = np.einsum("pnyxc,pkc->pnyxk", v, case.u.astype(np.int64))
    centre = _mean_tap(case)
    moved = case.u[centre].astype(np.int64) @ (_offset(case) * case.mul[centre].astype(np.int64))
    acc[centre] += (moved + 2**14) >> 15
    assert np.abs(acc).max(initial=0) < 2**31
    f = acc.astype(np.int32).astype(np.float32) * case.us.astype(np.float32)[:, None, None, None, :]
    t, m = case.tile + 2, case.tile
    half = np.stack(_transform_back(f.reshape(t, t, *f.shape[1:]), m))  # [m, T, N, down, across, K]
    o = np.stack(_transform_back(half.swapaxes(0, 1), m))  # [column, row, N, down, across, K]
    columns, rows, n, down, across, k = o.shape
    y = o.transpose(2, 3, 1, 4, 0, 5).reshape(n, down * rows, across * columns, k)
    top, left, bottom, right = case.pads
    y = y[:, : case.x.shape[1] + top + bottom - 2, : case.x.shape[2] + left + right - 2]
    if case.bias is not None:
        y = y + case.bias.astype(np.float32)
    call = case.call
    if call.get("residual") is not None:
        r = (call["residual"].astype(np.int32) - call.get("residual_zero", 0)).astype(np.float32)
        y = y + r * np.float32(call["residual_scale"])
    if call.get("relu"):
        y = np.maximum(y, np.float32(0))
    assert y.dtype == np.float32
    kind = np.dtype(np.int8 if call.get("signed") else np.uint8)
    limits = np.iinfo(kind)
    low = limits.min if call.get("low") is None else call["low"]
    high = limits.max if call.get("high") is None else call["high"]
    level = np.rint(y * (np.float32(1) / np.float32(call["scale"]))).astype(np.float64) + call.get("zero", 0)
    return np.clip(level, low, high).astype(kind)


def reach(case: Case) -> tuple[int, int]:
    """Least and greatest D at tap (1, 1)."""
    w = np.outer(_B[case.tile][1], _B[case.tile][1])
    zero = case.x_zero + (128 if case.x.dtype == np.int8 else 0)
    low, high = -w[w > 0].sum() * zero, w[w > 0].sum() * (255 - zero)
    return int(low + w[w < 0].sum() * (255 - zero)), int(high - w[w < 0].sum() * zero)


def largest(case: Case) -> Array:
    """max|V[p, c]| over all images and what an offset adds, [P, C], by the corners: each pixel at whichever end of its
    range pushes D furthest."""
    b = _B[case.tile]
    w = np.einsum("ia,jb->ijab", b, b).reshape(len(case.mul), -1)
    zero = case.x_zero + (128 if case.x.dtype == np.int8 else 0)
    ends = []
    for x in (np.where(w > 0, 255, 0), np.where(w > 0, 0, 255)):
        d = (w * (x - zero)).sum(1)[:, None] - np.zeros_like(case.mul, np.int64)
        d[_mean_tap(case)] -= _offset(case)
        ends.append(np.abs((d * case.mul.astype(np.int64) + 2**14) >> 15))
    most = np.maximum(*ends)
    # base, as one more V of the same weights
    most[_mean_tap(case)] += np.abs(_offset(case) * case.mul[_mean_tap(case)].astype(np.int64)) // 2**15 + 1
    return most
