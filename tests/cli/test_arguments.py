"""Techniques, targets and budgets as they are written on the command line."""

from __future__ import annotations

import string
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitsmith.cli import arguments
from bitsmith.cli.arguments import ArgumentError
from bitsmith.plan import Budget
from bitsmith.site import Format, Range
from bitsmith.targets.base import Target
from bitsmith.technique import Technique
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Int(8,8)", Int(8, 8)),
        (" Int(4, a=None) ", Int(4, None)),
        ("Int", Int()),
        ("Float(dtype='bfloat16')", Float("bfloat16")),
        (
            "Int(4, 8, range=Range('mse'), out=Format(8, signed=True))",
            Int(4, 8, range=Range("mse"), out=Format(8, True)),
        ),
        ("Int(w=4, a=None, granularity='group', group=32)", Int(4, None, granularity="group", group=32)),
    ],
)
def test_a_technique_is_read_as_it_is_written(text: str, value: object) -> None:
    assert arguments.techniques([text]) == [value]


@given(st.integers(2, 8), st.sampled_from([2, 4, 8, 16, None]), st.sampled_from(["minmax", "mse"]))
def test_what_a_technique_prints_is_read_back(w: int, a: int | None, method: str) -> None:
    technique = Int(w, a, symmetric=True, range=Range(method))  # type: ignore[arg-type]
    assert arguments.techniques([repr(technique)]) == [technique]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "__import__('os')",
        "open('/etc/passwd')",
        "Int.__init__(8)",
        "Int(__import__('os'))",
        "Int(8, (lambda: 8)())",
        "Int(*[8, 8])",
        "Int(**{'w': 8})",
        "Int(8)(8)",
        "[Int(8)][0]",
        "Int(8) if True else 0",
        "Int(w := 8)",
        "Int(f'{8}')",
        "Int([x for x in (8,)][0])",
        "8",
        "Int(8",
        "",
        "Int(8); print(1)",
        "Technique()",
        "Range('mse')",
    ],
)
def test_code_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(ArgumentError):
        arguments.techniques([text])


def test_nothing_is_run_while_a_text_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for text in (f"Int(open({str(trap)!r}, 'w'))", f"open({str(trap)!r}, 'w')"):
        with pytest.raises(ArgumentError):
            arguments.techniques([text])
    assert not trap.exists()


@example("Adder")
@example("Int(4, 8)")
@given(st.text(string.ascii_letters + string.digits + "()[]{}.,=*'\"_:;+- \n\\\0", max_size=40))
def test_any_text_is_a_technique_or_an_error_to_mend(text: str) -> None:
    try:
        found = arguments.techniques([text])
    except ValueError:
        return
    assert found is not None
    assert isinstance(found[0], Technique)
    assert arguments.techniques([text]) == found


def test_a_wrong_field_and_a_wrong_value_are_told_in_the_words_of_the_technique() -> None:
    with pytest.raises(ArgumentError, match=r"Int\(\) got an unexpected keyword argument 'bits'"):
        arguments.techniques(["Int(bits=8)"])
    with pytest.raises(ValueError, match=r"weight bits must be 2 to 8"):
        arguments.techniques(["Int(9, 8)"])
    with pytest.raises(ArgumentError, match=r"'Itn' is none of Int$"):
        arguments.techniques(["Itn"])


def test_a_target_by_name_by_value_and_from_a_file(tmp_path: Path) -> None:
    named = arguments.target("onnxruntime", 1)
    assert (named.name, named.threads) == ("onnxruntime", 1)  # type: ignore[attr-defined]
    assert arguments.target("onnxruntime") == type(named)(threads=arguments.default_threads())  # type: ignore[call-arg]
    assert arguments.target("OnnxRuntime(threads=1)") == named
    file = tmp_path / "mine_target.py"
    file.write_text(
        "from bitsmith.targets.onnxruntime import OnnxRuntime\ndef mine(): return OnnxRuntime(1)\ndef no(): return 3\n"
    )
    assert arguments.target(f"{file}:mine") == named
    with pytest.raises(ArgumentError, match="gave int; a bitsmith Target was expected"):
        arguments.target(f"{file}:no")


def test_a_target_that_is_none_says_which_there_are() -> None:
    with pytest.raises(ArgumentError, match="'onxruntime' is none of onnxruntime"):
        arguments.target("onxruntime")
    with pytest.raises(ArgumentError, match="say the threads in one place"):
        arguments.target("OnnxRuntime(threads=1)", 2)


def test_every_target_file_is_offered() -> None:
    classes = arguments.target_classes()
    assert "OnnxRuntime" in classes
    assert "Target" not in classes
    assert all(issubclass(kind, Target) for kind in classes.values())


def test_a_budget_needs_one_limit() -> None:
    options = Namespace(ms=None, mib=2.0, mj=None, mm2=None, drop=0.0)
    assert arguments.budget(options) == Budget(mib=2.0, drop=0.0)
    with pytest.raises(ArgumentError, match=r"--drop 0\.01, --ms, --mib, --mj or --mm2"):
        arguments.budget(Namespace(ms=None, mib=None, mj=None, mm2=None, drop=None))
