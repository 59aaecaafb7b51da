"""Matrix products of values of one bit."""

from __future__ import annotations

import ctypes as c
import functools
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ._library import load, path

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


@functools.cache
def _library() -> c.CDLL:
    library = load()
    if not hasattr(library, "bitsmith_binary_multiply"):
        raise ImportError(
            f"bitsmith_kernels: {path()} has no products of one bit; install again with 'pip install ./kernels'"
        )
    library.bitsmith_binary_isas.restype = c.c_char_p
    library.bitsmith_binary_multiply.restype = c.c_int32
    library.bitsmith_binary_multiply.argtypes = [c.POINTER(_Product)]
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
