"""Matrix products and convolutions of values of one bit."""

from __future__ import annotations

import ctypes as c
import functools
import weakref
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ._library import error, load, path

_LANES = 8
_MOST = 2**30
"""Values of a row: their sum is an int32."""


class _Product(c.Structure):
    """``bitsmith_binary`` (``cpp/binary_c_abi.h``)."""

    _fields_ = (
        ("a", c.c_void_p),
        ("b", c.c_void_p),
        ("y", c.c_void_p),
        ("rows", c.c_int64),
        ("columns", c.c_int64),
        ("words", c.c_int64),
        ("length", c.c_int32),
        ("threads", c.c_int32),
        ("isa", c.c_char_p),
    )


class _Spec(c.Structure):
    """``bitsmith_binary_spec``."""

    _fields_ = (
        ("channels_in", c.c_int64),
        ("channels_out", c.c_int64),
        ("kernel", c.c_int64 * 2),
        ("strides", c.c_int64 * 2),
        ("dilations", c.c_int64 * 2),
        ("pads", c.c_int64 * 4),
        ("bits", c.c_void_p),
        ("scale", c.c_void_p),
        ("shift", c.c_void_p),
        ("isa", c.c_char_p),
    )


@functools.cache
def _library() -> c.CDLL:
    library = load()
    if not hasattr(library, "bitsmith_binary_conv_new"):
        raise ImportError(
            f"bitsmith_kernels: {path()} has no products of one bit; install again with 'pip install ./kernels'"
        )
    library.bitsmith_binary_isas.restype = c.c_char_p
    library.bitsmith_binary_multiply.restype = c.c_int32
    library.bitsmith_binary_multiply.argtypes = [c.POINTER(_Product)]
    library.bitsmith_binary_conv_new.restype = c.c_void_p
    library.bitsmith_binary_conv_new.argtypes = [c.POINTER(_Spec)]
    library.bitsmith_binary_conv_free.restype = None
    library.bitsmith_binary_conv_free.argtypes = [c.c_void_p]
    library.bitsmith_binary_conv_isa.restype = c.c_char_p
    library.bitsmith_binary_conv_isa.argtypes = [c.c_void_p]
    library.bitsmith_binary_conv_run.restype = c.c_int32
    library.bitsmith_binary_conv_run.argtypes = [
        *(c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p, c.c_int32)
    ]
    return library


def binary_isas() -> tuple[str, ...]:
    """Instruction sets for products of one bit that this CPU and this build have, best first.

    Some of ``"avx512_vpopcntdq"`` and ``"avx2"``, and always ``"reference"`` at the end. Raises ``ImportError`` where
    the shared library is missing or has none.
    """
    names: bytes = _library().bitsmith_binary_isas()
    return tuple(names.decode().split(","))


def pack_signs(x: NDArray[Any]) -> NDArray[np.uint64]:
    """Signs of the rows of ``x`` [n, C], +1 where a value is 0 or more, as words of 64 bits [n, ceil(C / 64)]: bit k of
    word w is 1 where value 64 w + k is +1, and 0 beyond the row. NaN counts as negative.

    >>> pack_signs(np.array([[1.0, -1.0, 0.0, -2.0]]))
    array([[5]], dtype=uint64)
    """
    if x.ndim != 2:
        raise ValueError(f"pack_signs: rows of values [n, C] are packed, got shape {x.shape}")
    packed = np.packbits(x >= 0, axis=1, bitorder="little")
    bytes_ = np.zeros((x.shape[0], -(-x.shape[1] // 64) * 8), np.uint8)
    bytes_[:, : packed.shape[1]] = packed
    return bytes_.view("<u8").astype(np.uint64, copy=False)


@final
class BinaryLinear:
    """Signs of weights, packed once, times signs of inputs: exclusive or, and counted ones (Rastegari et al. 2016,
    arXiv:1603.05279, section 3.2).

    ``weights``: [K, C], of which the signs count; up to 2^30 columns. ``isa``: one of
    :func:`~bitsmith_kernels.binary_isas`, by default the best; all give the same integers.

    >>> layer = BinaryLinear(np.array([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]))
    >>> layer(np.array([[0.5, -2.0, -0.1]]))
    array([[1, 1]], dtype=int32)
    """

    def __init__(self, weights: NDArray[Any], isa: str | None = None) -> None:
        if weights.ndim != 2 or 0 in weights.shape or weights.shape[1] > _MOST:
            raise ValueError(f"BinaryLinear: weights must be [K, C] with C up to 2^30, got shape {weights.shape}")
        known = binary_isas()
        if isa is not None and isa not in known:
            raise ValueError(f"BinaryLinear(isa={isa!r}): this CPU and build have {', '.join(known)}")
        self.isa = isa or known[0]
        self.channels_out, self.channels_in = weights.shape
        words = pack_signs(weights)
        blocks = -(-self.channels_out // _LANES)
        padded = np.zeros((blocks * _LANES, words.shape[1]), np.uint64)
        padded[: self.channels_out] = words
        self._packed = np.ascontiguousarray(padded.reshape(blocks, _LANES, -1).transpose(0, 2, 1))

    @property
    def packed_bytes(self) -> int:
        """Bytes that the packed weights take."""
        return int(self._packed.nbytes)

    def __call__(self, x: NDArray[Any], threads: int = 1) -> NDArray[np.int32]:
        """[n, C] -> int32 [n, K]: the exact sums of products of signs. Raises ``ValueError`` for another shape."""
        if x.ndim != 2 or x.shape[1] != self.channels_in:
            raise ValueError(f"BinaryLinear: x must be [n, {self.channels_in}], got shape {x.shape}")
        return self.multiply(pack_signs(x), threads)

    def multiply(self, words: NDArray[np.uint64], threads: int = 1) -> NDArray[np.int32]:
        """The same of inputs that :func:`pack_signs` packed, bits beyond C being 0."""
        count = self._packed.shape[1]
        if words.ndim != 2 or words.shape[1] != count or words.dtype != np.uint64:
            raise ValueError(
                f"BinaryLinear.multiply: words must be uint64 [n, {count}], got {words.dtype} {words.shape}"
            )
        if not 1 <= threads <= 1024:
            raise ValueError(f"BinaryLinear(threads={threads}): must be 1 to 1024")
        given = np.ascontiguousarray(words)
        y = np.empty((len(given), self.channels_out), np.int32)
        product = _Product(
            *(given.ctypes.data, self._packed.ctypes.data, y.ctypes.data),
            *(len(given), self.channels_out, count, self.channels_in, threads, self.isa.encode()),
        )
        if len(given) and _library().bitsmith_binary_multiply(c.byref(product)):
            raise RuntimeError(f"BinaryLinear: the product failed on {self.isa}")
        return y


@final
class BinaryConv:
    """A convolution of signs by signs, in two dimensions and one group: ``sum * scale + shift`` by output channel, each
    operation rounded once to float32. Zeros that it pads with count as 0, neither -1 nor +1.

    ``weights``: [K, C, kh, kw], of which the signs count, up to 2^24 products to a sum. ``scale``, ``shift``: float32
    [K], by default 1 and 0. ``strides``, ``dilations``: by height and width. ``pads``: top, left, bottom, right.
    ``isa``: one of :func:`~bitsmith_kernels.binary_isas`, by default the best; all give the same bits.

    >>> layer = BinaryConv(np.ones((1, 2, 3, 3)), pads=(1, 1, 1, 1))
    >>> layer(np.ones((1, 2, 2, 3), np.float32))
    array([[[[ 8., 12.,  8.],
             [ 8., 12.,  8.]]]], dtype=float32)
    """

    def __init__(
        self,
        weights: NDArray[Any],
        scale: NDArray[Any] | None = None,
        shift: NDArray[Any] | None = None,
        strides: Sequence[int] = (1, 1),
        dilations: Sequence[int] = (1, 1),
        pads: Sequence[int] = (0, 0, 0, 0),
        isa: str | None = None,
    ) -> None:
        if weights.ndim != 4 or 0 in weights.shape:
            raise ValueError(f"BinaryConv: weights must be [K, C, kh, kw], got shape {weights.shape}")
        if (len(strides), len(dilations), len(pads)) != (2, 2, 4):
            raise ValueError("BinaryConv: strides and dilations are by height and width, pads top, left, bottom, right")
        self.channels_out, self.channels_in = weights.shape[:2]
        self._sizes = tuple(
            (size, stride, dilation, pads[axis] + pads[axis + 2])
            for axis, (size, stride, dilation) in enumerate(zip(weights.shape[2:], strides, dilations, strict=True))
        )
        bits = np.ascontiguousarray(np.packbits(np.moveaxis(weights >= 0, 1, -1), axis=-1, bitorder="little"))
        factors = [
            np.ascontiguousarray(
                np.broadcast_to(np.float32(default) if one is None else one, (self.channels_out,)), "f4"
            )
            for one, default in ((scale, 1), (shift, 0))
        ]
        spec = _Spec(
            *(self.channels_in, self.channels_out),
            *((c.c_int64 * 2)(*pair) for pair in (weights.shape[2:], strides, dilations)),
            (c.c_int64 * 4)(*pads),
            *(bits.ctypes.data, factors[0].ctypes.data, factors[1].ctypes.data),
            None if isa is None else isa.encode(),
        )
        library = _library()
        self._layer = library.bitsmith_binary_conv_new(c.byref(spec))
        if not self._layer:
            raise ValueError(f"BinaryConv: {error()}")
        weakref.finalize(self, library.bitsmith_binary_conv_free, self._layer)
        self.isa = library.bitsmith_binary_conv_isa(self._layer).decode()

    def __call__(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """float32 [n, C, H, W] -> float32 [n, K, H', W']. Raises ``ValueError`` for another type or shape."""
        if x.dtype != np.float32 or x.ndim != 4 or x.shape[1] != self.channels_in:
            raise ValueError(f"BinaryConv: x must be float32 [n, {self.channels_in}, H, W], got {x.dtype} {x.shape}")
        if not 1 <= threads <= 1024:
            raise ValueError(f"BinaryConv(threads={threads}): must be 1 to 1024")
        given = np.ascontiguousarray(x)
        sides = (
            max(size + pads - (kernel - 1) * dilation - 1, -stride) // stride + 1
            for size, (kernel, stride, dilation, pads) in zip(x.shape[2:], self._sizes, strict=True)
        )
        y = np.empty((len(x), self.channels_out, *sides), np.float32)
        shape = (len(x), x.shape[2], x.shape[3])
        if _library().bitsmith_binary_conv_run(self._layer, given.ctypes.data, *shape, y.ctypes.data, threads):
            raise ValueError(f"BinaryConv: {error()}")
        return y
