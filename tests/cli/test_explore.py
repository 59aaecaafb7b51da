"""The exploration on the command line: what it leaves in its folder, stopped and gone on with, and its page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitsmith.evaluate import Evaluator
from bitsmith.plan import Plan
from bitsmith.search.base import Evaluation
from bitsmith.store import Store

from .conftest import Run

pytest.importorskip("optuna", reason='needs Optuna: pip install "bitsmith[explore]"')

CHROMIUM = shutil.which("chromium")
ASK = ("explore", "net.py:build", "--data", "data.py:task", "--target", "target.py:mock", "--batch", 2)


@pytest.fixture
def target(files: Path) -> Path:
    """target.py beside net.py and data.py: a target of formulas, with energy."""
    (files / "target.py").write_text(
        "from bitsmith.testing import MockTarget\n\ndef mock():\n    return MockTarget(watts=2.0)\n\n"
        "def plain():\n    return MockTarget()\n"
    )
    return files


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each plan was evaluated whole."""
    counts: Counter[str] = Counter()
    real = Evaluator.__call__

    def call(self: Evaluator, plan: Plan) -> Evaluation:
        counts[plan.digest()] += 1
        return real(self, plan)

    monkeypatch.setattr(Evaluator, "__call__", call)
    return counts


def read(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "frontier.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


class _Parsed(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _opens_offline(path: Path, marks: int) -> None:
    source = path.read_text(encoding="utf-8")
    parsed = _Parsed(source)
    for tag, attrs in parsed.tags:
        assert tag not in ("iframe", "img", "object", "embed", "base")
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,"))
    found = [attrs["id"] for _, attrs in parsed.tags if re.fullmatch(r"pareto-point-\d+", attrs.get("id") or "")]
    assert len(found) == marks
    assert "measured plans are on the frontier of drop and ms and mib and mj" in source
    assert "hypervolume: " in source
    if CHROMIUM is None:
        return
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command += [f"--user-data-dir={path.parents[1] / 'profile'}", "--disable-background-networking", path.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    root = dict(_Parsed(done.stdout).tags)["html"]
    assert root.get("data-ready") == "yes"
    assert "data-error" not in root


def test_it_writes_the_frontier_its_plans_the_chosen_one_and_a_page(target: Path, run: Run) -> None:
    objectives = ("drop", "ms", "mib", "mj")
    said = run(*ASK, "--objective", *objectives, "--drop", 0.5, "--minimize", "ms", "--trials", 9, "-o", "out")
    assert said.code == 0, said.err
    # how long it will take is said before anything long begins
    estimate, profiled = said.err.index("9 of 9 plans are left to measure"), said.err.index("measuring what")
    assert re.search(r"at most about [\d.]+ minutes, the profile included", said.err)
    assert estimate < profiled < said.err.index("measuring whole plans")
    out = target / "out"
    found = read(out)
    assert (found["kind"], found["objectives"], found["minimize"]) == ("bitsmith.frontier", list(objectives), "ms")
    assert (found["complete"], found["evaluations"], found["trials"]) == (True, 9, 9)
    assert found["points"]
    for point in found["points"]:
        assert Plan.load(out / point["plan"]) is not None
        assert (point["source"], point["samples"]) == ("simulated", 32)
        assert all(point[name] is not None for name in (*objectives, "ms_spread", "float_ms", "metric"))
        low, high = point["drop_interval"]
        assert low <= point["drop"] <= high
        others = [[other[name] for name in objectives] for other in found["points"]]
        mine = [point[name] for name in objectives]
        assert not any(all(a <= b for a, b in zip(o, mine, strict=True)) and o != mine for o in others)
    (chosen,) = [point for point in found["points"] if point["chosen"]]
    assert chosen["ms"] == min(point["ms"] for point in found["points"] if not point["missed"])
    assert Plan.load(out / "plan.json") == Plan.load(out / chosen["plan"])
    assert found["hypervolume"]["value"] > 0
    assert sorted(path.name for path in (out / "plans").iterdir()) == [
        Path(point["plan"]).name for point in found["points"]
    ]
    # the table has a line for each, and says where the numbers come from
    assert said.out.count("evaluated") == len(found["points"]) + 1
    assert "n=32" in said.out
    assert "wrote out/frontier.html" in said.out
    assert (out / "runs.db").exists()
    assert (out / "study.db").exists()
    _opens_offline(out / "frontier.html", marks=9)


def test_interrupted_it_saves_what_it_has_and_goes_on_where_it_was(
    target: Path, run: Run, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (*ASK, "--objective", "drop", "ms", "--drop", "0.5", "--trials", "9")
    counting = Evaluator.__call__

    def stop(self: Evaluator, plan: Plan) -> Evaluation:
        if len(asked) == 6:
            raise KeyboardInterrupt
        return counting(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", stop)
        said = run(*argv, "-o", "out")
    assert said.code == 130
    # one of the six was the float network's, which is timed before
    assert "saved in out; 4 plans are left" in said.err
    assert "kept in out/runs.db" in said.err
    assert shlex.split(said.err.splitlines()[-1]) == ["bitsmith", *map(str, argv), "-o", "out"]
    found = read(target / "out")
    assert not found["complete"]
    assert sum(point["drop"] is not None for point in found["points"]) == len(found["points"]) <= 5
    assert Plan.load(target / "out" / "plan.json") is not None
    assert (
        "interrupted before 9 plans were measured: the same command goes on"
        in (target / "out" / "frontier.html").read_text()
    )
    before = set(asked)
    asked.clear()
    said = run(*argv, "-o", "out")
    assert said.code == 0, said.err
    assert "4 of 9 plans are left to measure" in said.err
    assert "the profile included" not in said.err
    assert len(asked) == sum(asked.values()) == 4
    assert not before & set(asked)
    # the same as in one go
    assert run(*argv, "-o", "whole").code == 0
    one, other = (read(target / name) for name in ("out", "whole"))
    assert one == other
    assert (target / "out" / "plan.json").read_bytes() == (target / "whole" / "plan.json").read_bytes()
    # and once more: nothing is measured
    asked.clear()
    with Store(target / "out" / "runs.db") as store:
        rows = len(store.rows("time"))
    assert run(*argv, "-o", "out").code == 0
    with Store(target / "out" / "runs.db") as store:
        assert len(store.rows("time")) == rows
    assert not asked
    # another question in the same folder is another study
    said = run(*ASK, "--objective", "drop", "mib", "--drop", "0.5", "--trials", "2", "-o", "out")
    assert said.code == 0, said.err
    assert "2 of 2 plans are left" in said.err
    assert len(list((target / "out" / "plans").iterdir())) == len(read(target / "out")["points"])


def test_a_budget_that_nothing_meets_is_code_3_with_everything_saved(target: Path, run: Run) -> None:
    said = run(*ASK, "--mib", "0.0001", "--trials", "3", "-o", "out")
    assert said.code == 3
    assert "over the limit of 0.0001" in said.err
    assert "the closest plan is saved: out/plan.json" in said.err
    assert read(target / "out")["missed"]["mib"] > 0
    assert (target / "out" / "frontier.html").exists()


def test_what_cannot_be_is_told_before_the_model_is_built(
    target: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target / "net.py").write_text("raise AssertionError('the model was built')")
    for argv, message in (
        (("--trials", "3"), "no limit was given"),
        (("--drop", "0.1", "--objective", "drop"), "two or more different"),
        (("--drop", "0.1", "--storage", target), "is a folder"),
        (("--drop", "0.1", "--storage", "postgresql+psycopg2://me:secret@127.0.0.1:1/x"), "me:***@127.0.0.1"),
    ):
        said = run(*ASK, *argv, "-o", "out")
        assert (said.code, message in said.err, "secret" in said.err) == (2, True, False), said.err
        assert "Traceback" not in said.err
    monkeypatch.setitem(sys.modules, "optuna", None)
    said = run(*ASK, "--drop", "0.1", "-o", "out")
    assert said.code == 2
    assert said.err.count('pip install "bitsmith[explore]"') == 1


def test_energy_where_there_is_none_is_an_error(target: Path, run: Run) -> None:
    argv = ("explore", "net.py:build", "--data", "data.py:task", "--target", "target.py:plain")
    said = run(*argv, "--objective", "drop", "mj", "--drop", "0.1", "-o", "out")
    assert said.code == 2
    assert "mock gives no energy" in said.err


def test_words_of_points_and_one_objective(target: Path, run: Run) -> None:
    argv = ("--accuracy-drop", 50, "--objective", "energy", "--techniques", "all", "--trials", 4)
    said = run(*ASK, *argv, "-o", "out")
    assert said.code == 0, said.err
    found = read(target / "out")
    assert (found["objectives"], found["minimize"], found["budget"]) == (["drop", "mj"], "mj", {"drop": 0.5})
    assert "evaluated, simulated" in said.out
    (chosen,) = [point for point in found["points"] if point["chosen"]]
    assert chosen["mj"] == min(point["mj"] for point in found["points"] if not point["missed"])
    # what became of each technique is printed, written and shown
    assert "lost by" in said.out
    rows = {row["technique"]: row for row in found["techniques"]}
    sites = len(json.loads((target / "out" / "plan.json").read_text())["sites"])
    assert sum(row["chosen"] for row in rows.values()) >= sites
    assert found["float"]["drop"] == 0.0
    page = (target / "out" / "frontier.html").read_text(encoding="utf-8")
    assert re.search(r"<code>Binary\(.*not supported.*it needs training before", page)
    said = run(*ASK, "--accuracy-drop", 1, "--drop", 0.01, "-o", "out")
    assert said.code == 2
    assert "the same limit" in said.err


def test_a_modelled_target_prints_what_it_assumes(target: Path, run: Run) -> None:
    (target / "chip.py").write_text(
        "from bitsmith.targets import DigitalAccelerator, EnergyTable, Entry\n\n"
        "NAMES = {'int_add': (32, 0.1), 'int_multiply': (8, 0.2),\n"
        "         'float_add': (32, 0.9), 'float_multiply': (32, 3.7),\n"
        "         'sram_read_8KiB': (64, 10.0), 'dram_read_low': (64, 1300.0)}\n\n"
        "def chip():\n"
        "    entries = tuple(Entry(name, *value) for name, value in NAMES.items())\n"
        "    return DigitalAccelerator(EnergyTable('toy', entries, 'made up'), rows=4, columns=4)\n"
    )
    ask = ("explore", "net.py:build", "--data", "data.py:task", "--target", "chip.py:chip")
    said = run(*ask, "--accuracy-drop", 50, "--objective", "energy", "--trials", 4, "-o", "out")
    assert said.code == 0, said.err
    assert "digital: modelled, not measured: 4 x 4 units" in said.out
    assert "evaluated, modelled" in said.out
    found = read(target / "out")
    assert found["references"][0] == "energy table: made up"
    assert all(point["source"] == "modelled" for point in found["points"])
    page = (target / "out" / "frontier.html").read_text(encoding="utf-8")
    assert "energy, mJ per batch (modelled)" in page
    assert "modelled, not measured" in page
    said = run(*ask, "--drop", 0.5, "--objective", "area", "--trials", 4, "-o", "out")
    assert said.code == 2
    assert "digital gives no area" in said.err
