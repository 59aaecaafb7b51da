"""Killed at any moment, a run goes on where it was: nothing that was measured is measured again, no file is half."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitsmith as bs
from bitsmith.testing import MockTarget
from smallnet import small, task

# what a user's script would be; every measured sensitivity and every call of the target leaves a line
SCRIPT = """
import os, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from smallnet import small, task
import bitsmith as bs
from bitsmith.testing import MockTarget

def log(text):
    with open({log!r}, "a") as file:
        file.write(text + chr(10))

def slowly(model, task, pairs, simulate):
    for pair, loss in zip(pairs, bs.output_error(model, task, pairs, simulate)):
        log(f"{{os.getpid()}} loss {{pair[0]}} {{pair[1]}}")
        time.sleep(0.03)
        yield loss

slowly.__name__ = "output_error"
target = MockTarget()
if __name__ == "__main__":
    bs.optimize(small(), task(), target, bs.Budget(drop=0.1), techniques=[bs.Int(8, 8), bs.Int(4, 8)],
                sensitivity=slowly, folder={folder!r}, seed=3)
    log(f"{{os.getpid()}} calls {{target.calls['measure']}}")
"""

Row = tuple[int, str, str, str]


def rows(path: Path) -> list[Row]:
    """All measurements of a store, in order; none while it does not exist yet."""
    if not path.exists():
        return []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20) as database:
        try:
            found = database.execute("SELECT rowid, kind, hash, value FROM measurements ORDER BY rowid").fetchall()
        except sqlite3.OperationalError:  # the table is not there yet
            found = []
    database.close()
    return found


def whole(folder: Path) -> set[str]:
    """The files under their final names; every one of them parses."""
    readers: dict[str, Callable[[Path], Any]] = {
        "plan.json": bs.Plan.load,
        "report.json": bs.Report.load,
        "report.html": lambda path: (
            path.read_text(encoding="utf-8").rstrip().endswith("</html>") or pytest.fail(str(path))
        ),
        "model.onnx.json": lambda path: json.loads(path.read_text(encoding="utf-8")),
        "runs.db": lambda path: bs.Store(path).close(),
    }
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in names & set(readers):
        readers[name](folder / name)
    if {"model.onnx", "model.onnx.json"} <= names:
        bs.Artifact.load(folder / "model.onnx")
    return names


def stopped(script: Path, store: Path, at: int, how: signal.Signals) -> int:
    """Run the script until its store has ``at`` rows, then send the signal; the exit code."""
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while process.poll() is None and len(rows(store)) < at:
        assert time.monotonic() < end, "the script hangs"
        time.sleep(0.005)
    if process.poll() is None:
        process.send_signal(how)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode in (0, -how, 130, 1), output
    if process.returncode == 1:
        assert "KeyboardInterrupt" in output
    return process.returncode


def test_killed_at_random_moments_it_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    folder, log = tmp_path / "out", tmp_path / "log.txt"
    script = tmp_path / "job.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, log=str(log), folder=str(folder)))
    store = folder / "runs.db"
    generator = random.Random(os.getpid())
    first, second, third = (generator.randint(*between) for between in ((1, 8), (10, 22), (24, 40)))
    finished: list[list[Row]] = []
    for at, how in ((first, signal.SIGKILL), (second, signal.SIGINT), (third, signal.SIGKILL)):
        stopped(script, store, at, how)
        finished.append(rows(store))
        whole(folder)
    assert stopped(script, store, 10**6, signal.SIGKILL) == 0
    final = rows(store)
    # what was finished stays as it was, and nothing appears twice
    for earlier in finished:
        assert final[: len(earlier)] == earlier
    assert len({(kind, digest) for _, kind, digest, _ in final}) == len(final)
    assert len(finished[0]) >= first
    # a loss that was in the store when a run began was not measured by that run
    losses: dict[str, list[str]] = {}
    for line in log.read_text().splitlines():
        process, what, *rest = line.split(maxsplit=2)
        if what == "loss":
            losses.setdefault(process, []).append(rest[0])
    measured = list(losses.values())
    for run, pairs in enumerate(measured):
        known = sum(kind == "sensitivity" for _, kind, _, _ in finished[run - 1]) if run else 0
        repeated = set(pairs) & {pair for earlier in measured[:run] for pair in earlier}
        assert len(repeated) <= run, "only the one that was being measured when it was killed may be measured again"
        assert known + len(pairs) <= 12
    assert sum(kind == "sensitivity" for _, kind, _, _ in final) == 12  # six sites, two techniques
    assert whole(folder) == {"plan.json", "model.onnx", "model.onnx.json", "report.html", "report.json", "runs.db"}
    # an uninterrupted run with the same seed gives the same bytes
    other, again = tmp_path / "other", tmp_path / "again.py"
    again.write_text(SCRIPT.format(tests=tests, log=str(tmp_path / "again.txt"), folder=str(other)))
    assert stopped(again, other / "runs.db", 10**6, signal.SIGKILL) == 0
    assert (other / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert bs.Report.load(other / "report.json").sites == bs.Report.load(folder / "report.json").sites


class Stopped(BaseException):
    """As a Ctrl-C: no ``except Exception`` may swallow it."""


@pytest.fixture(scope="module")
def fresh() -> bs.Profile:
    return bs.profile(small(), task(), [bs.Int(8, 8)], MockTarget())


@pytest.mark.parametrize("moment", [0, 3, 7, 9])
def test_ctrl_c_between_any_two_measurements(
    moment: int, fresh: bs.Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.db"
    techniques = [bs.Int(8, 8)]
    real = bs.Store._insert
    left = [moment]

    def insert(self: bs.Store, *args: Any) -> None:
        if not left[0]:
            raise Stopped
        left[0] -= 1
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(bs.Store, "_insert", insert)
        with pytest.raises(Stopped):
            bs.profile(small(), task(), techniques, MockTarget(), store=path)
    before = rows(path)
    assert len(before) == moment
    target = MockTarget()
    found = bs.profile(small(), task(), techniques, target, store=path)
    assert rows(path)[:moment] == before
    assert found.rows == fresh.rows
    assert found.edges == fresh.edges
    # and once more: all is known, nothing is spent
    again = MockTarget()
    assert bs.profile(small(), task(), techniques, again, store=path) == found
    assert again.calls["measure"] == again.calls["site_times"] == 0


@pytest.mark.parametrize("name", ["plan.json", "report.json", "report.html", "model.onnx"])
def test_stopped_while_a_file_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> bs.Optimized:
        return bs.optimize(small(), task(), MockTarget(), bs.Budget(drop=0.1), folder=tmp_path)

    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise Stopped
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Stopped):
            run()
    assert name not in whole(tmp_path)
    before = rows(tmp_path / "runs.db")
    run()
    assert rows(tmp_path / "runs.db")[: len(before)] == before
    assert name in whole(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
