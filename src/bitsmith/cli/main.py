"""``bitsmith``: the verbs on the command line, over the same files."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from . import demo, doctor, explore, faster, look, ship, tune

MENDABLE, BUDGET, INTERRUPTED, DEFECT = 2, 3, 130, 70
"""Exit codes. 70 is EX_SOFTWARE of sysexits.h: the fault is ours."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: done, and the answer is no (``verify``, ``doctor``). 2: something the caller can mend, said in one
    message on standard error. 3: no plan meets the budget; the closest one was saved. 70: a defect, with its
    traceback. 130: interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args(given)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        code: int = options.run(options)
        sys.stdout.flush()  # a closed pipe is met here, not while Python ends
    except KeyboardInterrupt:
        _tell(_interrupted(options, given))
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (head) has gone; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failed(error, options)
    return code


def parser() -> ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="bitsmith",
        description="Fits a trained neural network to the hardware it will run on.",
        epilog="MODEL, DATA and your own targets are named as file.py:function or package.module:function. "
        "Start with: bitsmith demo",
    )
    top.add_argument("--version", action="version", version=f"bitsmith {metadata.version('bitsmith')}")
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for group in (tune, explore, ship, faster, look, demo, doctor):
        group.add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=SUPPRESS, help="show tracebacks")
    return top


def _failed(error: Exception, options: Namespace) -> int:
    """Say what went wrong, and how badly."""
    code = _code(error)
    if options.debug or code == DEFECT:
        traceback.print_exception(error)
    if code == DEFECT:
        _tell(
            f"bitsmith: this looks like a defect of Bitsmith or of a package it uses ({type(error).__name__}). "
            "Please report it with the lines above and what 'bitsmith doctor' prints"
        )
    elif not options.debug:
        notes = getattr(error, "__notes__", [])
        _tell("\n".join([f"bitsmith: {_message(error)}", *notes]))
    return code


def _code(error: Exception) -> int:
    from ..search.base import BudgetError

    if isinstance(error, BudgetError):
        return BUDGET
    if _is_ours(type(error).__module__) or isinstance(error, (OSError, MemoryError)):
        return MENDABLE
    # a built-in error that Bitsmith itself raises is a message; one from anywhere else was not foreseen
    frames = list(traceback.walk_tb(error.__traceback__))
    origin = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    foreseen = isinstance(error, (ValueError, TypeError, ImportError)) and _is_ours(origin)
    return MENDABLE if foreseen else DEFECT


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "not enough memory; use smaller batches, or fewer calibration samples"
    if isinstance(error, ModuleNotFoundError) and error.name in doctor.EXTRAS:
        line = f'pip install "bitsmith[{doctor.EXTRAS[error.name][1]}]"'
        return str(error) if line in str(error) else f"{error}: {line}"
    return str(error) or type(error).__name__


def _interrupted(options: Namespace, given: Sequence[str]) -> str:
    store: Path | None = getattr(options, "store", None)
    again = shlex.join(["bitsmith", *given])
    if store is None or not store.exists():
        return f"\nbitsmith: interrupted, nothing was kept. Start again with:\n  {again}"
    return f"\nbitsmith: interrupted. What was measured is kept in {store}. Resume with:\n  {again}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


class _Parser(ArgumentParser):
    """Says where help is, beside what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(MENDABLE, f"bitsmith: {message}\nSee: {self.prog} --help\n")
