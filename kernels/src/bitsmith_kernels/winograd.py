"""A 3x3 convolution of stride 1 by Winograd's algorithm on integers."""

from __future__ import annotations

import ctypes as c
import weakref
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._library import Call, Levels, Spec, error, load

_WEIGHTS = {8: np.dtype(np.int8), 16: np.dtype(np.int16)}
_LEVELS = (np.dtype(np.uint8), np.dtype(np.int8))


@final
class Winograd:
    """One layer: weights packed once, run on any number of images of any size, from any number of threads.

    ``tile``: 2 or 4, the outputs of a tile along each side: F(2x2, 3x3) or F(4x4, 3x3) of Lavin & Gray 2016
    (arXiv:1509.09308). There are P = (tile + 2)^2 taps, tap p = i * (tile + 2) + j. ``bits``: 8 or 16, of the
    transformed image V and weights U.

    ``u``: the transformed weights, integers [P, K, C] (K output and C input channels): int8 in -127 .. 127, or int16.
    ``mul``: integers [P, C] in 1 .. 32767; V[p, c] = (D[p, c] * mul[p, c] + 2^14) >> 15, D being B^T (x - x_zero) B.
    ``offset``: integers [C], by default 0, that are taken from D at tap (1, 1) first, the only one that keeps the mean
    of a tile; the sum starts at what they stand for, base[k] = (sum_c U * offset * mul + 2^14) >> 15, so the output is
    the same but for rounding. They must lie where D can. ``us``: float32 [P, K], the real value of one unit of sum(V *
    U), that is ``x_scale * weight_scale[p, k]`` where U is the transformed weight times 32768 / mul[p, c], in units of
    ``weight_scale``. ``bias``: float32 [K] in real units, or ``None``.

    ``x_zero``: the level of x that stands for 0, in the type of x; ``x_signed``: x is int8 and not uint8. ``pads``:
    top, left, bottom, right, each 0, 1 or 2, filled with ``x_zero``. ``isa``: one of :func:`~bitsmith_kernels.isas`,
    by default the best; all give the same bits.

    Raises ``ValueError`` on a wrong shape, type or range, on scales that are not finite or beyond 1e20, on an ``isa``
    that this CPU lacks, and where an accumulator could leave int32: for bits=8 above 132104 input channels (and fewer
    with an offset); for bits=16 unless |base| + sum_c |U[p, k, c]| * max|V[p, c]| < 2^31 for all p, k, max|V| being
    what any image could give.

    >>> import numpy as np
    >>> u = np.zeros((16, 1, 1), np.int8)
    >>> u[5] = 4  # of the taps of F(2, 3), this one alone: a quarter of the sum of 2 x 2 pixels, four times
    >>> layer = Winograd(2, 8, u, np.full((16, 1), 16384), np.full((16, 1), 0.5), None)
    >>> layer(np.full((1, 2, 2, 1), 10, np.uint8), scale=1.0)[0, :, :, 0]
    array([[40, 40],
           [40, 40]], dtype=uint8)
    """

    def __init__(
        self,
        tile: int,
        bits: int,
        u: NDArray[np.integer[Any]],
        mul: ArrayLike,
        us: ArrayLike,
        bias: ArrayLike | None,
        *,
        offset: ArrayLike | None = None,
        x_zero: int = 0,
        x_signed: bool = False,
        pads: Sequence[int] = (1, 1, 1, 1),
        isa: str | None = None,
    ) -> None:
        if tile not in (2, 4) or bits not in (8, 16):
            raise ValueError(f"Winograd(tile={tile}, bits={bits}): tile must be 2 or 4, and bits 8 or 16")
        taps = (tile + 2) ** 2
        u = np.asarray(u)
        if u.dtype != _WEIGHTS[bits] or u.ndim != 3 or u.shape[0] != taps:
            raise ValueError(f"Winograd: u is {u.dtype} {u.shape}; must be {_WEIGHTS[bits]} ({taps}, K, C) here")
        if len(pads) != 4:
            raise ValueError(f"Winograd: pads is {tuple(pads)}; must be (top, left, bottom, right)")
        weights = np.ascontiguousarray(u)
        channels_out, channels_in = weights.shape[1:]
        factors = _integers("mul", mul, (taps, channels_in), 1)
        means = None if offset is None else _integers("offset", offset, (channels_in,), -32768)
        scales = _reals("us", us, (taps, channels_out))
        offsets = None if bias is None else _reals("bias", bias, (channels_out,))
        spec = Spec(
            tile=tile,
            bits=bits,
            channels_in=channels_in,
            channels_out=channels_out,
            u=weights.ctypes.data,
            mul=factors.ctypes.data,
            offset=None if means is None else means.ctypes.data,
            us=scales.ctypes.data,
            bias=None if offsets is None else offsets.ctypes.data,
            x_zero=_small("x_zero", x_zero),
            x_signed=int(x_signed),
            pads=(c.c_int32 * 4)(*(_small("pads", pad) for pad in pads)),
            isa=None if isa is None else isa.encode(),
        )
        self._library = load()
        self._layer: int | None = self._library.bitsmith_layer_new(c.byref(spec))
        if self._layer is None:
            raise ValueError(f"Winograd: {error()}")
        weakref.finalize(self, self._library.bitsmith_layer_free, self._layer)
        self._tile, self._bits = tile, bits
        self._channels = (channels_in, channels_out)
        self._x_type = _LEVELS[int(x_signed)]
        self._pads = tuple(int(pad) for pad in pads)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: bytes = self._library.bitsmith_layer_isa(self._layer)
        return name.decode()

    @property
    def packed_bytes(self) -> int:
        """Memory that the packed layer holds, in bytes (large arrays are rounded up to pages of 2 MiB)."""
        return int(self._library.bitsmith_layer_bytes(self._layer))

    def multiply(self, rounds: int) -> int:
        """Do the products alone, of a few tiles and of whole blocks of output channels, ``rounds`` times.

        Returns how many multiply-adds that was: against :func:`~bitsmith_kernels.peak` the share that the innermost
        loop attains. 0 for the reference and for layers with fewer output channels than a block.
        """
        return int(self._library.bitsmith_layer_multiply(self._layer, _small("rounds", rounds)))

    def __repr__(self) -> str:
        channels_in, channels_out = self._channels
        form = f"tile={self._tile}, bits={self._bits}"
        return f"Winograd({form}, {channels_in} -> {channels_out} channels, isa={self.isa!r})"

    def __call__(
        self,
        x: NDArray[np.uint8] | NDArray[np.int8],
        *,
        scale: float,
        zero: int = 0,
        low: int | None = None,
        high: int | None = None,
        signed: bool = False,
        relu: bool = False,
        residual: NDArray[np.uint8] | NDArray[np.int8] | None = None,
        residual_scale: float = 1.0,
        residual_zero: int = 0,
        threads: int = 1,
    ) -> NDArray[np.uint8] | NDArray[np.int8]:
        """The layer's output on ``x``, [N, H', W', K], with H' = H + top + bottom - 2 and W' alike.

        ``x``: [N, H, W, C], uint8 (int8 for a layer with ``x_signed``); copied first if not contiguous. ``scale``
        (rounded to float32), ``zero``: of the output, whose levels are clamped to ``low`` .. ``high``, by default the
        range of its type: uint8, or int8 if ``signed``. ``residual``: uint8 or int8 of the output's shape, added before
        ``relu`` as ``residual_scale * (residual - residual_zero)``. ``threads``: used for this call, 1 .. 1024.

        ``level = clamp(rint(relu(y + residual) * (1 / scale)) + zero, low, high)``. Raises ``ValueError`` on a wrong
        type, shape, scale or range.
        """
        channels_in, channels_out = self._channels
        image: NDArray[Any] = np.asarray(x)
        if image.dtype != self._x_type or image.ndim != 4 or image.shape[3] != channels_in:
            raise ValueError(
                f"Winograd: x is {image.dtype} {image.shape}; must be {self._x_type} (N, H, W, {channels_in})"
            )
        image = np.ascontiguousarray(image)
        top, left, bottom, right = self._pads
        batch, height, width = image.shape[:3]
        shape = (batch, height + top + bottom - 2, width + left + right - 2, channels_out)
        kind = _LEVELS[int(signed)]
        limits = np.iinfo(kind)
        y: NDArray[Any] = np.empty([max(size, 0) for size in shape], kind)
        added: NDArray[Any] | None = None
        if residual is not None:
            added = np.asarray(residual)
            if added.dtype not in _LEVELS or added.shape != shape:
                raise ValueError(f"Winograd: residual is {added.dtype} {added.shape}; must be uint8 or int8 {shape}")
            added = np.ascontiguousarray(added)
        call = Call(
            x=image.ctypes.data,
            batch=batch,
            height=height,
            width=width,
            y=y.ctypes.data,
            y_levels=Levels(scale, _small("zero", zero), int(signed)),
            low=limits.min if low is None else _small("low", low),
            high=limits.max if high is None else _small("high", high),
            relu=int(relu),
            residual=None if added is None else added.ctypes.data,
            residual_levels=Levels(
                residual_scale,
                _small("residual_zero", residual_zero),
                0 if added is None else int(added.dtype == np.int8),
            ),
            threads=_small("threads", threads),
        )
        failure = self._library.bitsmith_layer_run(self._layer, c.byref(call))
        if failure == 1:
            raise ValueError(f"Winograd: {error()}")
        if failure:
            raise RuntimeError(f"Winograd: {error()}")
        return y


def _small(name: str, value: int) -> int:
    """An integer that the library may judge; ctypes would cut a larger one without a word."""
    if value != int(value) or not -(2**31) <= value < 2**31:
        raise ValueError(f"Winograd: {name} is {value!r}; must be an integer that fits in 32 bits")
    return int(value)


def _integers(name: str, values: ArrayLike, shape: tuple[int, ...], least: int) -> NDArray[np.int16]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.shape != shape:
        raise ValueError(f"Winograd: {name} is {array.dtype} {array.shape}; must be integers {shape}")
    if array.size and (array.min() < least or array.max() > 32767):
        raise ValueError(f"Winograd: {name} is in {array.min()} .. {array.max()}; must be in {least} .. 32767")
    return np.ascontiguousarray(array, np.int16)


def _reals(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or array.shape != shape:
        raise ValueError(f"Winograd: {name} is {array.dtype} {array.shape}; must be real numbers {shape}")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
        return np.ascontiguousarray(array, np.float32)
