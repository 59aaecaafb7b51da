"""The shared library, opened when first needed, and the layouts of its structures (``cpp/c_abi.h``)."""

from __future__ import annotations

import ctypes as c
import functools
import sys
from pathlib import Path

_ABI = 3


class Spec(c.Structure):
    """``bitsmith_spec``."""

    _fields_ = (
        ("tile", c.c_int32),
        ("bits", c.c_int32),
        ("channels_in", c.c_int64),
        ("channels_out", c.c_int64),
        ("u", c.c_void_p),
        ("mul", c.c_void_p),
        ("offset", c.c_void_p),
        ("us", c.c_void_p),
        ("bias", c.c_void_p),
        ("x_zero", c.c_int32),
        ("x_signed", c.c_int32),
        ("pads", c.c_int32 * 4),
        ("isa", c.c_char_p),
    )


class Levels(c.Structure):
    """``bitsmith_levels``."""

    _fields_ = (("scale", c.c_float), ("zero", c.c_int32), ("is_signed", c.c_int32))


class Call(c.Structure):
    """``bitsmith_call``."""

    _fields_ = (
        ("x", c.c_void_p),
        ("batch", c.c_int64),
        ("height", c.c_int64),
        ("width", c.c_int64),
        ("y", c.c_void_p),
        ("y_levels", Levels),
        ("low", c.c_int32),
        ("high", c.c_int32),
        ("relu", c.c_int32),
        ("residual", c.c_void_p),
        ("residual_levels", Levels),
        ("threads", c.c_int32),
    )


def folders() -> tuple[Path, ...]:
    """Where the libraries may lie: an editable install keeps what was built elsewhere on the package's path."""
    return (Path(__file__).parent, *(Path(p) for p in sys.modules[__package__].__path__))


def path() -> Path:
    """The file of the shared library. Raises ``ImportError`` where there is none."""
    name = "libbitsmith_kernels" + (".dylib" if sys.platform == "darwin" else ".so")
    for folder in folders():
        if (folder / name).is_file():
            return folder / name
    raise ImportError(
        f"bitsmith_kernels: {name} is not in {folders()[0]}; install it again with 'pip install ./kernels'"
    )


@functools.cache
def load() -> c.CDLL:
    """The library, with the types of its functions. Raises ``ImportError`` where it is missing or does not match."""
    library = c.CDLL(str(path()))
    library.bitsmith_abi.restype = c.c_int32
    if library.bitsmith_abi() != _ABI:
        raise ImportError(
            f"bitsmith_kernels: {path()} is of another version; install again with 'pip install ./kernels'"
        )
    library.bitsmith_isas.restype = c.c_char_p
    library.bitsmith_error.restype = c.c_char_p
    library.bitsmith_layer_new.restype = c.c_void_p
    library.bitsmith_layer_new.argtypes = [c.POINTER(Spec)]
    library.bitsmith_layer_free.restype = None
    library.bitsmith_layer_free.argtypes = [c.c_void_p]
    library.bitsmith_layer_bytes.restype = c.c_int64
    library.bitsmith_layer_bytes.argtypes = [c.c_void_p]
    library.bitsmith_layer_isa.restype = c.c_char_p
    library.bitsmith_layer_isa.argtypes = [c.c_void_p]
    library.bitsmith_layer_run.restype = c.c_int32
    library.bitsmith_layer_run.argtypes = [c.c_void_p, c.POINTER(Call)]
    library.bitsmith_layer_multiply.restype = c.c_int64
    library.bitsmith_layer_multiply.argtypes = [c.c_void_p, c.c_int32]
    library.bitsmith_peak.restype = c.c_double
    library.bitsmith_peak.argtypes = [c.c_char_p, c.c_int32]
    library.bitsmith_compiler.restype = c.c_char_p
    return library


def error() -> str:
    """The message of the last failure on this thread."""
    message: bytes = load().bitsmith_error()
    return message.decode()


def isas() -> tuple[str, ...]:
    """Instruction sets that this CPU and this build have, best first.

    Some of ``"avx512_vnni"``, ``"avx_vnni"`` and ``"avx2"``, and always ``"reference"`` (scalar code) at the end.
    Raises ``ImportError`` where the shared library is missing.
    """
    names: bytes = load().bitsmith_isas()
    return tuple(names.decode().split(","))


def peak(isa: str, bits: int) -> float:
    """Multiply-adds a second that one core does of the dot product alone, in registers. Measured when called: a second.

    ``bits``: 8 or 16, of the factors. 0 for ``"reference"``, which has none. Raises ``ValueError`` for what this CPU
    lacks.
    """
    if isa not in isas() or bits not in (8, 16):
        raise ValueError(f"peak({isa!r}, {bits}): isa is one of {', '.join(isas())} here, bits 8 or 16")
    return float(load().bitsmith_peak(isa.encode(), bits))


def compiler() -> str:
    """The compiler that built the library, with its version."""
    name: bytes = load().bitsmith_compiler()
    return name.decode()
