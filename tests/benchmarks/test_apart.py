"""Timing in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest

from repository import load

apart = load("benchmarks.apart")


def waiting(seconds: float):  # type: ignore[no-untyped-def]
    return partial(time.sleep, seconds)


def numbered(folder: str):  # type: ignore[no-untyped-def]
    def call() -> None:
        with (Path(folder) / str(os.getpid())).open("a") as log:
            log.write(".")

    return call


def failing(at: int):  # type: ignore[no-untyped-def]
    if at == 0:
        raise ValueError("no such file")
    return partial(int, "x")


def test_each_has_a_process_and_the_second_call_is_timed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = apart.interleaved_apart({name: partial(numbered, str(tmp_path)) for name in "abc"}, rounds=4, warm=1)
    assert [len(samples.ms) for samples in found.values()] == [4, 4, 4]
    calls = {int(path.name): path.stat().st_size for path in tmp_path.iterdir()}
    assert list(calls.values()) == [10, 10, 10]  # two in each of five rounds
    assert os.getpid() not in calls
    assert not any(process.pid in calls for process in multiprocessing.active_children())


def test_times_are_those_of_the_callable() -> None:
    found = apart.interleaved_apart({"short": partial(waiting, 0.001), "long": partial(waiting, 0.02)}, rounds=3)
    assert min(found["long"].ms) >= 20.0
    assert min(found["short"].ms) >= 1.0


@pytest.mark.parametrize(("at", "message"), [(0, "b: ValueError: no such file"), (1, "b: ValueError: invalid literal")])
def test_what_fails_there_is_raised_here(at: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        apart.interleaved_apart({"a": partial(waiting, 0.0), "b": partial(failing, at)}, rounds=2)


def test_a_process_that_ends_is_told() -> None:
    with pytest.raises(RuntimeError, match="a: its process ended"):
        apart.interleaved_apart({"a": partial(os._exit, 3)}, rounds=1)
