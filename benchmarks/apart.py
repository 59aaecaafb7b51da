"""Callables in processes of their own, called in turn and timed there.

In one process the thread pools of many opened networks get into each other's way: on two threads a ResNet-18 in
OpenVINO takes 0.2 to 0.3 ms longer once a dozen other files have run, a larger part of a fast file's time than of a
slow one's.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from .harness import Samples


def interleaved_apart(
    opens: Mapping[str, Callable[[], Callable[[], Any]]], rounds: int, warm: int = 2, seed: int = 0
) -> dict[str, Samples]:
    """As :func:`.harness.interleaved` with ``refill``, but for ``opens``: what opens each callable, to be pickled.

    One process computes at a time. Raises ``RuntimeError`` with the name and what was raised there.
    """
    # the main module is imported once, and nothing is opened before the fork: threads would not survive it
    context = multiprocessing.get_context("forkserver")
    names, order = list(opens), random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        ends: dict[str, Connection] = {}
        for name in names:
            ends[name], other = context.Pipe()
            process = context.Process(target=_serve, args=(other, opens[name]), daemon=True)
            process.start()
            other.close()
            stack.callback(_end, process, ends[name])
            _answer(name, ends[name])  # opened
        for index in range(warm + rounds):
            for name in order.sample(names, len(names)):
                ends[name].send(None)
                ms = _answer(name, ends[name])
                if index >= warm:
                    found[name].append(ms)
    return {name: Samples(tuple(ms)) for name, ms in found.items()}


def _answer(name: str, end: Connection) -> float:
    try:
        answer = end.recv()
    except EOFError:
        raise RuntimeError(f"{name}: its process ended") from None
    if isinstance(answer, str):
        raise RuntimeError(f"{name}: {answer}")
    return float(answer)


def _end(process: Any, end: Connection) -> None:
    end.close()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(end: Connection, opens: Callable[[], Callable[[], Any]]) -> None:
    """Open, say so, and time the second of two calls each time that something comes, until the other end is closed."""
    try:
        run = opens()
        end.send(0.0)
        while True:
            end.recv()
            run()
            start = time.perf_counter()
            run()
            end.send((time.perf_counter() - start) * 1e3)
    except EOFError:
        return
    except Exception as error:
        end.send(f"{type(error).__name__}: {error}")
