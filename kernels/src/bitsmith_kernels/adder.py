"""Adder layers in float32: negative L1 distances, and their clipped gradient by the input."""

from __future__ import annotations

import ctypes as c
import functools
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ._library import load, path

_Pair = c.c_int64 * 2


class _Layer(c.Structure):
    """``bitsmith_adder`` (``cpp/adder_c_abi.h``)."""

    _fields_ = (
        ("x", c.c_void_p),
        ("w", c.c_void_p),
        ("g", c.c_void_p),
        ("y", c.c_void_p),
        ("images", c.c_int64),
        ("channels", c.c_int64),
        ("height", c.c_int64),
        ("width", c.c_int64),
        ("filters", c.c_int64),
        ("groups", c.c_int64),
        ("kernel", _Pair),
        ("stride", _Pair),
        ("dilation", _Pair),
        ("top", c.c_int64),
        ("left", c.c_int64),
        ("out", _Pair),
        ("threads", c.c_int32),
        ("isa", c.c_char_p),
    )


@functools.cache
def _library() -> c.CDLL:
    library = load()
    if not hasattr(library, "bitsmith_adder_run"):
        raise ImportError(f"bitsmith_kernels: {path()} has no adder layers; install again with 'pip install ./kernels'")
    library.bitsmith_adder_isas.restype = c.c_char_p
    library.bitsmith_adder_run.restype = c.c_int32
    library.bitsmith_adder_run.argtypes = [c.POINTER(_Layer)]
    return library


def adder_isas() -> tuple[str, ...]:
    """Instruction sets for adder layers that this CPU and this build have, best first.

    Some of ``"avx512"`` and ``"avx2"``, and always ``"reference"`` at the end; all give the same bits. Raises
    ``ImportError`` where the shared library is missing or has none.
    """
    names: bytes = _library().bitsmith_adder_isas()
    return tuple(names.decode().split(","))


@final
class AdderLayer:
    """An adder convolution (Chen et al. 2020, arXiv:1912.13200, eqs. 2 and 6), float32, of any stride and dilation.

    ``stride``, ``dilation``: by axis. ``pads``: rows and columns of zeros at the top, bottom, left and right. ``isa``:
    one of :func:`adder_isas`, by default the best. Beyond inputs and outputs it takes the memory of 32 patches a
    thread. A linear layer is one of 1x1 on maps of one pixel.

    >>> layer = AdderLayer()
    >>> layer.forward(np.array([[[[3.0]], [[1.0]]]], np.float32), np.array([[[[1.0]], [[2.0]]]], np.float32)).tolist()
    [[[[-3.0]]]]
    """

    def __init__(
        self,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
        groups: int = 1,
        isa: str | None = None,
    ) -> None:
        known = adder_isas()
        if isa is not None and isa not in known:
            raise ValueError(f"AdderLayer(isa={isa!r}): this CPU and build have {', '.join(known)}")
        if min(*stride, *dilation, groups) < 1 or min(pads) < 0:
            raise ValueError(
                f"AdderLayer(stride={stride}, dilation={dilation}, pads={pads}, groups={groups}): strides, dilations "
                "and groups are 1 or more, pads 0 or more"
            )
        self.stride, self.dilation, self.pads, self.groups = stride, dilation, pads, groups
        self.isa = isa or known[0]

    def forward(self, x: NDArray[np.float32], w: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """``-sum |X - W|``: [n, c, h, w] and [out, c / groups, kh, kw] -> [n, out, h', w']."""
        out = self._out(x, w)
        y = np.empty((len(x), len(w), *out), np.float32)
        self._run(x, w, None, y, out, threads)
        return y

    def input_gradient(
        self, x: NDArray[np.float32], w: NDArray[np.float32], g: NDArray[np.float32], threads: int = 1
    ) -> NDArray[np.float32]:
        """``sum g clamp(W - X, -1, 1)`` by pixel, of the shape of ``x``; ``g`` of the output's shape."""
        out = self._out(x, w)
        wanted = (len(x), len(w), *out)
        if g.shape != wanted:
            raise ValueError(f"AdderLayer: g must be {wanted}, got shape {g.shape}")
        y = np.empty(x.shape, np.float32)
        self._run(x, w, g, y, out, threads)
        return y

    def _out(self, x: NDArray[Any], w: NDArray[Any]) -> tuple[int, int]:
        whole = x.ndim == 4 and w.ndim == 4 and x.size and w.size
        if not whole or x.shape[1] != w.shape[1] * self.groups or len(w) % self.groups:
            raise ValueError(
                f"AdderLayer: x must be [n, c, h, w] and w [out, c / {self.groups}, kh, kw] with out a multiple of the "
                f"groups, got shapes {x.shape} and {w.shape}"
            )
        found = []
        for axis in (0, 1):
            room = x.shape[2 + axis] + self.pads[2 * axis] + self.pads[2 * axis + 1]
            found.append((room - self.dilation[axis] * (w.shape[2 + axis] - 1) - 1) // self.stride[axis] + 1)
        if min(found) < 1:
            raise ValueError(f"AdderLayer: maps of {x.shape[2:]} are smaller than a patch of {w.shape[2:]}")
        return found[0], found[1]

    def _run(
        self,
        x: NDArray[np.float32],
        w: NDArray[np.float32],
        g: NDArray[np.float32] | None,
        y: NDArray[np.float32],
        out: tuple[int, int],
        threads: int,
    ) -> None:
        if not 1 <= threads <= 1024:
            raise ValueError(f"AdderLayer(threads={threads}): must be 1 to 1024")
        held = [None if a is None else np.ascontiguousarray(a, np.float32) for a in (x, w, g)]
        layer = _Layer(
            *(None if a is None else a.ctypes.data for a in held),
            y.ctypes.data,
            *x.shape,
            len(w),
            self.groups,
            _Pair(*w.shape[2:]),
            _Pair(*self.stride),
            _Pair(*self.dilation),
            self.pads[0],
            self.pads[2],
            _Pair(*out),
            threads,
            self.isa.encode(),
        )
        if _library().bitsmith_adder_run(c.byref(layer)):
            raise RuntimeError(f"AdderLayer: it failed on {self.isa}")
