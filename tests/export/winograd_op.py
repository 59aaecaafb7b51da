"""The Winograd operation for the ONNX reference evaluator: the plain NumPy convolution, and what is fused behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from winograd_reference import convolution


class WinogradConv(OpRun):  # type: ignore[misc]
    op_domain = "bitsmith"

    def _run(self, x: Any, *arrays: Any, **given: Any) -> Any:
        u, mul, offset, us, bias, residual = (*arrays, None)[:6]
        channels_first = x.transpose(0, 3, 1, 2)
        settings = (given["tile"], tuple(given["pads"]), given["bits"])
        y = convolution(channels_first, given["x_zero"], u, mul, offset, us, bias, *settings).transpose(0, 2, 3, 1)
        if residual is not None:
            levels = residual.astype(np.float32) - np.float32(given["residual_zero"])
            y = y + levels * np.float32(given["residual_scale"])
        steps = np.clip(y * (np.float32(1) / np.float32(given["y_scale"])), -4096, 4096)
        levels = (np.rint(steps) + given["y_zero"]).clip(given["low"], given["high"])
        return (levels.astype(np.int8 if given["y_signed"] else np.uint8),)
