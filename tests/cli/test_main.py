"""Exit codes, messages, and the whole as a program of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import bitsmith as bs
from bitsmith.cli.main import parser
from bitsmith.data import DataError
from bitsmith.plan import Budget, Plan, PlanError
from bitsmith.search.base import BudgetError, Point, Result
from bitsmith.store import Store
from bitsmith.targets.base import TargetError
from bitsmith.techniques.int_ import Int

from .conftest import Run

COMMANDS = (
    *("quantize", "profile", "search", "optimize", "apply", "export", "verify", "report", "sites", "targets"),
    *("demo", "doctor", "explore", "accelerate"),
)


def _optimize(folder: Path) -> list[str]:
    return ["optimize", "net.py:build", "--data", "data.py:task", "--target", "onnxruntime", "-o", str(folder)]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make ``bitsmith.optimize`` raise what is given, after it has kept one measurement."""

    def replace(error: BaseException) -> None:
        def optimize(*args: Any, store: Any = None, **kwargs: Any) -> None:
            with Store(store) as open_store:
                open_store.put("loss", {"site": "0"}, 1.0)
            raise error

        monkeypatch.setattr(bs, "optimize", optimize)

    return replace


@pytest.mark.parametrize(
    "error",
    [
        DataError("the loader is empty"),
        PlanError("the plan is empty"),
        TargetError("the runtime is not installed: pip install it"),
        FileNotFoundError(2, "No such file or directory", "weights.npz"),
        MemoryError(),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_code_2(files: Path, run: Run, verb: Any, error: Exception) -> None:
    verb(error)
    said = run(*_optimize(files / "out"), "--drop", "0.01")
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("bitsmith: ")
    assert (str(error) or "not enough memory").split(":")[-1].strip(" '").split("] ")[-1] in said.err
    assert "Traceback" not in said.err


def test_a_built_in_error_that_bitsmith_raises_is_the_users_and_one_from_elsewhere_a_defect(
    files: Path, run: Run, verb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run(*_optimize(files / "out"), "--drop", "nan")
    assert (said.code, "must be a number" in said.err, "Traceback" in said.err) == (2, True, False)
    # the same kind of error, but raised by a line that is not Bitsmith's
    verb(ValueError("a surprise"))
    said = run(*_optimize(files / "out"), "--drop", "0.01")
    assert said.code == 70
    assert "a surprise" in said.err
    assert "Traceback" in said.err
    assert "defect" in said.err


def test_a_runtime_that_is_not_installed_comes_with_the_line_that_installs_it(
    files: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    said = run("demo", "-o", files / "demo")
    assert said.code == 2
    assert said.err.count('pip install "bitsmith[demo]"') == 1
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback_before_and_after_the_command(files: Path, run: Run, verb: Any) -> None:
    verb(DataError("the loader is empty"))
    for argv in (["--debug", *_optimize(files / "o")], [*_optimize(files / "o"), "--debug"]):
        said = run(*argv, "--drop", "0.01")
        assert said.code == 2
        assert "Traceback" in said.err
        assert said.err.count("the loader is empty") == 1


def test_a_missed_budget_is_code_3_after_the_best_plan_is_saved(files: Path, run: Run, verb: Any) -> None:
    plan = Plan({"0": Int(8, 8)})
    point = Point(plan, ms=2.5, bytes=100.0, loss=0.1)
    verb(BudgetError(Result(point, (point,), "ms", Budget(ms=2.0), missed={"ms": 0.5})))
    said = run(*_optimize(files / "out"), "--ms", "2.0", "--minimize", "drop")
    assert said.code == 3
    assert "over the limit of 2 by 0.5" in said.err
    assert f"the closest plan is saved: {files / 'out' / 'plan.json'}" in said.err
    assert Plan.load(files / "out" / "plan.json") == plan


def test_an_interrupt_says_what_is_kept_and_how_to_resume(files: Path, run: Run, verb: Any) -> None:
    verb(KeyboardInterrupt())
    argv = [*_optimize(files / "my out"), "--drop", "0.01", "--techniques", "Int(8, 8)"]
    said = run(*argv)
    assert said.code == 130
    assert f"kept in {files / 'my out' / 'runs.db'}" in said.err
    assert shlex.split(said.err.splitlines()[-1]) == ["bitsmith", *argv]
    with Store(files / "my out" / "runs.db") as store:
        assert store.get("loss", {"site": "0"}) == 1.0


def test_an_interrupt_before_anything_was_kept_says_so(files: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitsmith.model.load.load_model", interrupted)
    said = run(*_optimize(files / "out"), "--drop", "0.01")
    assert (said.code, "nothing was kept" in said.err) == (130, True)


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_built(files: Path, run: Run) -> None:
    (files / "file").write_text("")
    (files / "net.py").write_text("raise AssertionError('the model was built')")
    said = run(*_optimize(files / "file"), "--drop", "0.01")
    assert said.code == 2
    assert "choose another folder (-o DIR)" in said.err


def test_the_store_is_where_it_is_said(files: Path, run: Run, verb: Any) -> None:
    verb(DataError("stop"))
    run(*_optimize(files / "out"), "--drop", "0.01", "--store", files / "elsewhere" / "mine.db")
    assert (files / "elsewhere" / "mine.db").exists()
    assert not (files / "out" / "runs.db").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: COMMAND"),
        (["optimise"], "invalid choice"),
        (["sites", "net.py:build"], "required: --data"),
        (
            ["optimize", "net.py:build", "--data", "d", "--target", "t", "-o", "o", "--batch", "0"],
            "whole number from 1",
        ),
    ],
)
def test_a_wrong_command_line_is_code_2_and_says_where_help_is(run: Run, argv: list[str], said: str) -> None:
    got = run(*argv)
    assert got.code == 2
    assert said in got.err
    assert "--help" in got.err


def test_a_name_that_leads_nowhere_is_code_2(files: Path, run: Run) -> None:
    said = run("sites", "net.py:biuld", "--data", "data.py:task")
    assert said.code == 2
    assert "closest: build" in said.err


def test_the_users_own_error_is_shown_with_its_line(files: Path, run: Run) -> None:
    (files / "net.py").write_text("def build():\n    return 1 / 0\n")
    said = run("sites", "net.py:build", "--data", "data.py:task")
    assert said.code == 2
    assert "ZeroDivisionError" in said.err
    assert "line 2, in build" in said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    said = run(command, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: bitsmith {command}")


def test_there_is_no_command_without_a_test_above() -> None:
    help_text = parser().format_help()
    listed = {line.split()[0] for line in help_text.splitlines() if line.startswith("    ") and line[4] != " "}
    assert listed - {"COMMAND"} == set(COMMANDS)


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version").out == f"bitsmith {metadata.version('bitsmith')}\n"


def test_the_command_line_itself_loads_nothing_heavy() -> None:
    # the package's own __init__ is left out: it is the parser that is looked at
    code = (
        "import sys, types; package = types.ModuleType('bitsmith'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['bitsmith'] = package; from bitsmith.cli.main import parser; parser().format_help(); "
        "print(sorted({'torch', 'numpy', 'onnx', 'rich', 'scipy'} & set(sys.modules)))"
    )
    folder = Path(bs.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_runs_as_a_module() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bitsmith", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("usage: bitsmith ")
    assert done.stderr == ""
