"""``bitsmith::winograd``: the integer path as one operation of ``torch.library``, so that an exported graph has one
node for which a runtime may have a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .winograd import Tiling, input_matrix, integer_convolution

FORM = "bitsmith::winograd"

_SCHEMA = (
    "(Tensor x, Tensor u, Tensor mul, Tensor offset, Tensor us, Tensor bias, "
    "float scale, int tile, int[] kernel, int[] pads, int bits) -> Tensor"
)
_loaded = False


def load() -> None:
    """Register the operation; free after the first time.

    ``torch.ops.bitsmith.winograd(x, u, mul, offset, us, bias, scale, tile, kernel, pads, bits)``: ``x`` float32 [N, C,
    H, W] on the grid of its quantizer, so that ``x / scale`` are integers less their zero point; ``u`` int8 or int16
    [P, K, C], ``mul`` int16 [P, C], ``offset`` int16 [C], ``us`` float32 [P, K], ``bias`` float32 [K] as
    :func:`~.winograd.integer_convolution` has them; ``kernel``: 3 or 1 weights by axis; ``pads``: top, left, bottom,
    right. Gives float32 [N, K, H', W'].
    """
    global _loaded
    if not _loaded:
        torch.library.custom_op(FORM, _compute, mutates_args=(), schema=_SCHEMA).register_fake(_shape)
        _loaded = True


def _compute(
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
    tiling = Tiling.of(tile, kernel, (pads[0], pads[1], pads[2], pads[3]))
    d = torch.round(x / scale)
    return integer_convolution(d, u, mul, offset, us, bias, input_matrix(tile, kernel).to(x), tiling, bits)


def _shape(
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
    height = x.shape[2] + pads[0] + pads[2] - (kernel[0] - 1)
    width = x.shape[3] + pads[1] + pads[3] - (kernel[1] - 1)
    return x.new_empty((x.shape[0], us.shape[1], height, width), dtype=torch.float32)
