from __future__ import annotations

import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.store import Measurement, Store, StoreError, machine_key

VALUES = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "$float"), inner),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@given(value=VALUES, key=st.dictionaries(st.sampled_from("abc"), VALUES))
def test_any_json_value_comes_back_as_it_was(value: Any, key: dict[str, Any]) -> None:
    with Store(None) as store:
        store.put("loss", key, value)
        assert same(store.get("loss", dict(reversed(key.items()))), value)
        (row,) = store.rows("loss")
        assert same(row.key, key)
        assert same(row.value, value)


def test_a_measurement_is_taken_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.db"
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"ms": [1.5, 2.5], "nothing": None}

    with Store(path) as store:
        assert store.get("time", {"site": "a"}) is None
        assert store.get_or("time", {"site": "a"}, measure) == measure()
        assert (store.hits, store.misses) == (0, 2)
    calls.clear()
    with Store(str(path)) as store:
        assert store.get_or("time", {"site": "a"}, measure) == {"ms": [1.5, 2.5], "nothing": None}
        assert store.get("loss", {"site": "a"}) is None  # kinds are apart
        assert store.get("time", {"site": "b"}) is None
        assert (store.hits, store.misses, calls) == (1, 2, [])
        store.put("time", {"site": "b"}, 0.5)
        store.put("time", {"site": "b"}, 0.25)
        assert store.get("time", {"site": "b"}) == 0.25
        assert store.rows("time")[-1] == Measurement({"site": "b"}, 0.25)
        assert len(store.rows("time")) == 2
    assert sorted(item.name for item in path.parent.iterdir()) == ["runs.db"]


def test_a_failed_measurement_stores_nothing() -> None:
    with Store(None) as store:
        with pytest.raises(ZeroDivisionError):
            store.get_or("loss", {}, lambda: 1 / 0)
        assert store.rows("loss") == []
        assert store.get_or("loss", {}, lambda: 2) == 2


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ({"a": object()}, 1, "object cannot be written as JSON"),
        ({1: 2}, 1, "1 cannot be a key"),
        ({}, {"$float": "nan"}, "cannot be a key"),
        ({}, {1, 2}, "set cannot be written"),
    ],
)
def test_what_is_no_json_is_refused(key: Any, value: Any, says: str) -> None:
    with Store(None) as store, pytest.raises(TypeError, match=says):
        store.put("loss", key, value)


def test_none_is_refused_and_a_closed_store_says_so() -> None:
    store = Store(None)
    with pytest.raises(ValueError, match="not measured"):
        store.put("loss", {}, None)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.get("loss", {})


def test_the_first_of_two_racing_measurements_stands(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.db") as one, Store(tmp_path / "runs.db") as two:

        def slow() -> float:
            two.put("time", {}, 1.0)
            return 2.0

        assert one.get_or("time", {}, slow) == 1.0
        assert two.get("time", {}) == 1.0


SERVER = """
import os, sys, time
from bitsmith.store import Store

def child(path, log, count, pause):
    log = open(log, "a", buffering=1)
    with Store(path) as store:
        for i in range(count):
            def measure():
                print("start", i, file=log)
                time.sleep(pause)
                return {"ms": [i] * 50}
            assert store.get_or("time", {"i": i}, measure) == {"ms": [i] * 50}
            print("done", i, file=log)

for line in sys.stdin:
    words = line.rstrip("\\n").split("\\t")
    if words[0] == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(words[1]), 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(words[0], words[1], int(words[2]), float(words[3]))
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
"""


class Processes:
    """Starts processes that measure, by forking one that has imported torch already."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def _ask(self, *words: Any) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write("\t".join(map(str, words)) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, path: Path, log: Path, count: int, pause: float) -> int:
        return self._ask(path, log, count, pause)

    def wait(self, pid: int) -> int:
        return self._ask("wait", pid)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Processes(server)


def lines(log: Path, word: str) -> list[int]:
    if not log.exists():
        return []
    complete = log.read_text().rpartition("\n")[0].splitlines()
    return [int(line.split()[1]) for line in complete if line.startswith(word)]


@pytest.mark.parametrize(("count", "pause", "kill_after"), [(12, 0.03, 5), (3000, 0.0, 100), (3000, 0.0, 101)])
def test_a_killed_run_resumes_and_repeats_nothing(
    tmp_path: Path, processes: Processes, count: int, pause: float, kill_after: int
) -> None:
    path, first, second = tmp_path / "runs.db", tmp_path / "first", tmp_path / "second"
    pid = processes.start(path, first, count, pause)
    deadline = time.monotonic() + 60
    while len(lines(first, "done")) < kill_after and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert processes.wait(pid) == -signal.SIGKILL
    done = lines(first, "done")
    assert kill_after <= len(done) < count
    again = min(max(lines(first, "start")) + 5, count)
    assert processes.wait(processes.start(path, second, again, pause)) == 0
    assert not set(lines(second, "start")) & set(done)
    assert again - 1 in lines(second, "start")
    with Store(path) as store:
        assert [row.key["i"] for row in store.rows("time")] == list(range(again))


def test_several_processes_share_one_file(tmp_path: Path, processes: Processes) -> None:
    # all of them make the file at once
    pids = [processes.start(tmp_path / "runs.db", tmp_path / f"log{i}", 40, 0.002) for i in range(3)]
    assert [processes.wait(pid) for pid in pids] == [0, 0, 0]
    with Store(tmp_path / "runs.db") as store:
        assert sorted(row.key["i"] for row in store.rows("time")) == list(range(40))


@pytest.mark.parametrize("memory", [True, False])
def test_threads_share_one_store(tmp_path: Path, memory: bool) -> None:
    barrier = threading.Barrier(6)
    with Store(None if memory else tmp_path / "runs.db") as store:

        def work(worker: int) -> list[int]:
            barrier.wait()
            return [store.get_or("time", {"i": i}, lambda i=i: i * i) for i in range(25)]

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(work, range(6))) == [[i * i for i in range(25)]] * 6
        assert len(store.rows("time")) == 25
        assert store.hits + store.misses == 150


def filled(path: Path) -> Path:
    with Store(path) as store:
        for i in range(60):
            store.put("time", {"i": i}, ["x" * 300])
    return path


def test_damaged_files_are_refused_and_kept(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole.db").read_bytes()
    cases = {
        "text": b"this is not a database, it is a text of some length" * 40,
        "cut": whole[: len(whole) // 2],
        "cut inside a page": whole[: len(whole) - 100],
        "overwritten": whole[:4096] + b"\xff" * (len(whole) - 4096),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.db"
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"is damaged.*move the file away.*nothing was deleted"):
            Store(path)
        assert path.read_bytes() == content
    empty = tmp_path / "empty.db"
    empty.touch()
    Store(empty).close()  # an empty file is what a crash right after creation leaves


def test_a_value_that_was_tampered_with_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path / "runs.db")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE measurements SET value = '[1,' WHERE rowid = 1")
    with Store(path) as store, pytest.raises(StoreError, match="cannot be read"):
        store.get("time", {"i": 0})


def test_newer_and_foreign_files_are_refused(tmp_path: Path) -> None:
    newer, foreign = filled(tmp_path / "newer.db"), tmp_path / "foreign.db"
    with contextlib.closing(sqlite3.connect(newer)) as database:
        database.execute("PRAGMA user_version = 7")
    with contextlib.closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE other (x)")
    with pytest.raises(StoreError, match=r"schema 7, this version reads up to 1.*pip install -U"):
        Store(newer)
    with pytest.raises(StoreError, match="another program"):
        Store(foreign)
    with contextlib.closing(sqlite3.connect(foreign)) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Root may write anywhere: be another user for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is a folder.*runs\.db"):
        Store(tmp_path)
    with tempfile.TemporaryDirectory() as name:  # tmp_path's parents are closed to other users
        folder = Path(name)
        filled(folder / "runs.db").chmod(0o444)
        folder.chmod(0o555)
        with nobody(), pytest.raises(StoreError, match=f"{folder}.*cannot write"):
            Store(folder / "runs.db")
        folder.chmod(0o777)
        with nobody(), pytest.raises(StoreError, match=r"readonly.*can be written"):
            Store(folder / "runs.db")
        folder.chmod(0o755)


def test_a_lock_that_is_held_ends_in_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsmith.store._TIMEOUT_S", 0.2)
    path = filled(tmp_path / "runs.db")
    with Store(path) as store, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by another process"):
            store.put("time", {"i": 99}, 1)
        other.execute("ROLLBACK")
        store.put("time", {"i": 99}, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_to_open_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path / "runs.db") as store:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # what the child of a fork would see: another id
        with pytest.raises(StoreError, match="open it again in the child"):
            store.get("time", {})
        monkeypatch.undo()
        assert store.get("time", {}) is None


def test_machine_key_reads_the_model_name(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\ncpu MHz : 1.5\n\nprocessor\t: 1\nmodel name\t: B\n")
    arm.write_text("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd0c\nCPU revision : 1\n")
    assert machine_key(x86)["cpu"] == "Some CPU @ 3 GHz"
    assert machine_key(arm)["cpu"] == "0x41 0xd0c 1"
    assert machine_key(tmp_path / "absent")["cpu"]
    assert machine_key() == machine_key()
