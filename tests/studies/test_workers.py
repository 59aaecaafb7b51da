"""What a study computes in worker processes."""

from __future__ import annotations

import json
import math
import pickle
import time
from functools import partial
from typing import Any

import pytest

from repository import ROOT, load

load("benchmarks.harness")
workers, command = load("studies._workers"), load("studies._command")


class Opened(workers.Reopened):  # type: ignore[misc, name-defined]
    times = 0

    def __init__(self, base: float) -> None:
        Opened.times += 1
        self.base, self.held = base, lambda: None  # a function of its own cannot be sent

    def power(self, exponent: float) -> float:
        return float(self.base**exponent)


def test_what_is_sent_is_opened_once() -> None:
    sent = pickle.dumps([partial(Opened(2.0).power, exponent) for exponent in (1.0, 3.0)])
    before = Opened.times
    first, second = pickle.loads(sent)
    third, _ = pickle.loads(sent)
    assert (first(), second(), third()) == (2.0, 8.0, 2.0)
    assert Opened.times == before + 1


def test_two_processes_compute_what_the_store_lacks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # where a new process finds the studies

    def begun(*options: str) -> Any:
        study = command.Study.start("mock", "", 1.0, options, parts=("all",), store="mock", workers=True)
        study.part(1.0)
        return study

    jobs = [({"x": x}, f"root of {x}", partial(math.sqrt, x)) for x in (4.0, 9.0, 16.0)]
    begun("--workers", "1").every("root", jobs[:1])
    capsys.readouterr()
    study = begun("--workers", "2")
    assert study.every("root", jobs) == [2.0, 3.0, 4.0]
    said = capsys.readouterr().out
    assert "root of 4.0" not in said
    assert "root of 9.0" in said
    assert json.loads(study.finish().read_text())["left_out"] == []


def test_nothing_is_begun_after_the_end() -> None:
    assert list(workers.computed([partial(math.sqrt, 4.0)], 2, 1, time.time() - 1.0)) == []
