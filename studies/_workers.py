"""Cells of a study in worker processes: what is sent there, and what each process opens once."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from typing import Any, Self

import torch

Job = tuple[Mapping[str, Any], str, Callable[[], Any]]
"""Key of a row, its label, and what computes it."""


class Reopened:
    """Sent to another process as the arguments it was made from; each process opens it once, data and all."""

    _made_from: tuple[Any, ...]

    def __new__(cls, *made_from: Any) -> Self:
        self = super().__new__(cls)
        self._made_from = made_from
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _opened, (type(self), *self._made_from)


@cache
def _opened(kind: Callable[..., Any], *made_from: Any) -> Any:
    return kind(*made_from)


def computed(
    tasks: Sequence[Callable[[], Any]], workers: int, threads: int, end: float
) -> Iterator[tuple[int, Any, float]]:
    """Number, result and seconds of each task as it is done, begun in order by ``workers`` processes of ``threads``
    each; none is begun after ``end`` (as ``time.time`` counts)."""
    remaining = iter(enumerate(tasks))
    running: dict[Future[tuple[Any, float]], int] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,))
    try:
        while True:
            while len(running) < workers and time.time() < end:
                number, task = next(remaining, (-1, None))
                if task is None:
                    break
                running[pool.submit(_timed, task)] = number
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), *done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _timed(task: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return task(), time.perf_counter() - start
