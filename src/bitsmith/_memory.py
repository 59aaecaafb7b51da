"""Memory that tensors free, kept for the next ones; and exports without the collector of cycles.

glibc gives large blocks back to the system at once, which clears each page anew when it is asked for it again: with one
thread a convolution of a large batch can spend most of its time so.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**30
"""Blocks of up to so many bytes are kept, and so many free bytes at the end of the heap."""


def keep_freed() -> bool:
    """Have this process keep what is freed; whether that could be done. Nothing is changed where the environment says
    what glibc has to do, nor without glibc; another allocator that took its place does as it likes."""
    libc = _glibc()
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if libc is None or told:
        return False
    # both: otherwise the end of the heap is given back in the place of the blocks
    return bool(libc.mallopt(_MMAP_THRESHOLD, _KEPT) and libc.mallopt(_TRIM_THRESHOLD, _KEPT))


def give_back() -> None:
    """Return what is free now to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector of cycles, which comes round often while torch builds a graph, visits all that is loaded,
    and finds next to nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None
