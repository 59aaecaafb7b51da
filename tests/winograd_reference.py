"""The native kernels' integer Winograd convolution in plain NumPy, step by step and tile by tile, to compare with.

Nothing of the package is used. Integers are int64, so nothing can overflow unseen; floats are float32, one operation at
a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

BT = {
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
G = {
    2: np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]]),
    4: np.array(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    ),
}
AT = {
    2: np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    4: np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
}


def scaled(d: Array, mul: Array, bits: int) -> Array:
    """``vpmulhrsw`` and, with 8 bits, saturation."""
    v = (d * mul + 2**14) >> 15
    return np.clip(v, -128, 127) if bits == 8 else v


def output(f: Array) -> Array:
    """A^T of the first axis, in the kernels' order; float32."""
    assert f.dtype == np.float32
    if len(f) == 4:
        t, u = f[1] + f[2], f[1] - f[2]
        return np.stack([f[0] + t, u - f[3]])
    a, b, c, e = f[1] + f[2], f[1] - f[2], f[3] + f[4], f[3] - f[4]
    two, four, eight = np.float32(2), np.float32(4), np.float32(8)
    return np.stack([(f[0] + a) + c, b + two * e, a + four * c, (b + eight * e) + f[5]])


def convolution(
    x: Array,
    zero: int,
    u: Array,
    mul: Array,
    offset: Array,
    us: Array,
    bias: Array,
    tile: int,
    pads: tuple[int, ...],
    bits: int,
) -> Array:
    """``v`` before residual and ReLU, [N, K, H', W'] float32. ``x``: integers of the input [N, C, H, W]; ``u`` [P, K,
    C]; ``mul`` [P, C]; ``offset`` [C] of tap (1, 1); ``us`` [P, K] and ``bias`` [K] float32; ``pads``: top, left,
    bottom, right."""
    n, channels, height, width = x.shape
    top, left, bottom, right = pads
    rows, columns = height + top + bottom - 2, width + left + right - 2
    down, across = -(-rows // tile), -(-columns // tile)
    size = tile + 2
    d = np.zeros((n, channels, down * tile + 2, across * tile + 2), np.int64)
    inside = x.astype(np.int64) - zero
    h, w = min(height, d.shape[2] - top), min(width, d.shape[3] - left)
    d[:, :, top : top + h, left : left + w] = inside[:, :, :h, :w]
    bt, out = BT[tile], u.shape[1]
    v = np.zeros((n, out, down * tile, across * tile), np.float32)
    for image in range(n):
        for i in range(down):
            for j in range(across):
                part = d[image, :, i * tile : i * tile + size, j * tile : j * tile + size]
                taps = np.stack([bt @ plane @ bt.T for plane in part]).reshape(channels, size * size)
                assert np.abs(taps).max(initial=0) < 2**15
                f = np.zeros((size * size, out), np.float32)
                taps[:, size + 1] -= offset
                for p in range(size * size):
                    factor = mul[p].astype(np.int64)
                    acc = u[p].astype(np.int64) @ scaled(taps[:, p], factor, bits)
                    if p == size + 1:
                        acc = acc + ((u[p].astype(np.int64) @ (offset.astype(np.int64) * factor) + 2**14) >> 15)
                    assert np.abs(acc).max(initial=0) < 2**31
                    f[p] = acc.astype(np.float32) * us[p]
                columns_first = output(f.reshape(size, size, out))  # [m, size, K]
                found = output(columns_first.swapaxes(0, 1)).swapaxes(0, 1)  # [m, m, K]
                v[image, :, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] = found.transpose(2, 0, 1)
    cropped: Array = v[:, :, :rows, :columns] + bias.astype(np.float32).reshape(1, -1, 1, 1)
    return cropped
