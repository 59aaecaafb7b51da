"""The Winograd operation in NumPy, for the ONNX reference evaluator: written from its definition, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

BT = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
G = {
    2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    4: np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
}


def along(f: list[Any]) -> list[Any]:
    if len(f) == 4:
        return [f[0] + (f[1] + f[2]), (f[1] - f[2]) - f[3]]
    a, b, c, e = f[1] + f[2], f[1] - f[2], f[3] + f[4], f[3] - f[4]
    return [(f[0] + a) + c, b + np.float32(2) * e, a + np.float32(4) * c, (b + np.float32(8) * e) + f[5]]


class WinogradConv(OpRun):  # type: ignore[misc]
    op_domain = "bitsmith"

    def _run(self, x: Any, u: Any, mul: Any, us: Any, bias: Any, residual: Any = None, **given: Any) -> Any:
        a = {name: given[name] for name in ("tile", "bits", "pads", "x_zero", "y_scale", "y_zero", "low", "high")}
        m = a["tile"]
        taps, (top, left, bottom, right) = m + 2, a["pads"]
        n, height, width, channels = x.shape
        rows, columns = height + top + bottom - 2, width + left + right - 2
        down, across = -(-rows // m), -(-columns // m)
        d = np.zeros((n, down * m + 2, across * m + 2, channels), dtype=np.int64)
        shown = x.astype(np.int64) - a["x_zero"]
        d[:, top : top + height, left : left + width] = shown[:, : d.shape[1] - top, : d.shape[2] - left]
        bt = np.array(BT[m], dtype=np.int64)
        y = np.zeros((n, down * m, across * m, u.shape[1]), dtype=np.float32)
        for i in range(down):
            for j in range(across):
                tile = d[:, i * m : i * m + taps, j * m : j * m + taps]
                big = np.einsum("ia,nabc,jb->ijnc", bt, tile, bt).reshape(taps * taps, n, channels)
                v = (big * mul.astype(np.int64)[:, None, None] + 2**14) >> 15
                v = v.clip(-128, 127) if a["bits"] == 8 else v
                acc = np.einsum("pnc,pkc->pnk", v, u.astype(np.int64))
                assert abs(acc).max() < 2**31
                f = (acc.astype(np.float32) * us[:, None]).reshape(taps, taps, n, -1)
                half = along([f[k] for k in range(taps)])
                for p in range(m):
                    for q, value in enumerate(along([half[p][k] for k in range(taps)])):
                        y[:, i * m + p, j * m + q] = value
        y = y[:, :rows, :columns] + bias
        if residual is not None:
            y = y + (residual.astype(np.float32) - np.float32(given["residual_zero"])) * np.float32(
                given["residual_scale"]
            )
        steps = np.clip(y * (np.float32(1) / np.float32(a["y_scale"])), -4096, 4096)
        return (
            (np.rint(steps) + a["y_zero"]).clip(a["low"], a["high"]).astype(np.int8 if given["y_signed"] else np.uint8),
        )
