"""Progress with and without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bitsmith.cli.progress import TerminalProgress
from bitsmith.progress import Progress


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def _plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def test_it_is_what_the_verbs_ask_for() -> None:
    progress: Progress = TerminalProgress(_plain())
    progress.start("a", 2)
    progress.advance()
    progress.note("b")


def test_without_a_terminal_lines_come_at_the_start_every_ten_seconds_and_at_the_end() -> None:
    console, clock = _plain(), _Clock()
    with TerminalProgress(console, clock) as progress:
        progress.start("measuring", 100)
        for _ in range(50):
            clock.now += 0.5
            progress.advance()
        progress.note("[red]layer1[0] is not markup, and this line is longer than the console is wide, by far")
    assert _lines(console) == [
        "measuring (100)",
        "measuring: 20/100, about 40 s left",
        "measuring: 40/100, about 30 s left",
        "[red]layer1[0] is not markup, and this line is longer than the console is wide, by far",
        "measuring: 50/100 in 25.0 s",
    ]


def test_work_of_unknown_length_is_counted() -> None:
    console, clock = _plain(), _Clock()
    with TerminalProgress(console, clock) as progress:
        progress.start("reading")
        clock.now = 11.0
        progress.advance(7)
        progress.start("next", 1)
    assert _lines(console) == ["reading", "reading: 7", "reading: 7 in 11.0 s", "next (1)"]


def test_reports_of_what_done_total_become_pieces_of_work() -> None:
    console, clock = _plain(), _Clock()
    with TerminalProgress(console, clock) as progress:
        for done in range(3):
            progress.told("frontier", done, 2)
        progress.told("whole plans", 1, 5)
        progress.told("whole plans", 0, 5)
    assert _lines(console) == [
        *("frontier (2)", "frontier: 2/2 in 0.0 s"),
        *("whole plans (5)", "whole plans: 1/5 in 0.0 s", "whole plans (5)"),
    ]


def test_an_error_writes_no_line_that_says_done() -> None:
    console = _plain()

    def work() -> None:
        with TerminalProgress(console, _Clock()) as progress:
            progress.start("measuring", 3)
            progress.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert _lines(console) == ["measuring (3)"]


def test_in_a_terminal_bars_are_drawn_and_the_cursor_comes_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    with TerminalProgress(console) as progress:
        progress.start("measuring [conv1]", 4)
        progress.advance(3)
        progress.note("a note")
        progress.start("searching")
        progress.advance()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "measuring [conv1]" in text
    assert "3/4" in text
    assert "a note" in text
    assert "searching" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
