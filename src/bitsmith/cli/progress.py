"""How long it still takes, drawn in the terminal, or written line by line where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

EVERY_S = 10.0
"""Seconds between two lines about the same piece of work where there is no terminal."""


class TerminalProgress:
    """A ``bitsmith.progress.Progress`` on standard error; a context manager that leaves the terminal as it was.

    ``clock`` gives seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self._clock = clock
        self._task = ""
        self._total: int | None = None
        self._done = 0
        self._began = self._told = clock()
        self._bars: Bars | None = None
        self._bar: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        if self.console.is_terminal:
            from rich import progress as rich_progress

            self._bars = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}", markup=False),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TimeRemainingColumn(),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def start(self, task: str, total: int | None = None) -> None:
        self._finish()
        self._task, self._total, self._done = task, total, 0
        self._began = self._told = self._clock()
        if self._bars is not None:
            self._bar = self._bars.add_task(task, total=total)
        else:
            self._line(f"{task}{f' ({total})' if total is not None else ''}")

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._bars is not None:
            if self._bar is not None:
                self._bars.advance(self._bar, steps)
            return
        now = self._clock()
        if now - self._told >= EVERY_S:
            self._told = now
            self._line(f"{self._task}: {self._counted()}{self._left(now)}")

    def note(self, text: str) -> None:
        self._line(text)

    def told(self, task: str, done: int, total: int | None) -> None:
        """The same for verbs that report ``(what, done, total)``: a new ``what`` begins a new piece of work."""
        if task != self._task or done < self._done:
            self.start(task, total)
        if done > self._done:
            self.advance(done - self._done)

    def _finish(self) -> None:
        """The piece that was begun is over: its bar is full, or its line is written."""
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, total=self._total if self._total is not None else self._done)
            self._bars.stop_task(self._bar)
        elif self._bars is None and self._task and self._done:
            self._line(f"{self._task}: {self._counted()} in {self._clock() - self._began:.1f} s")
        self._bar, self._task = None, ""

    def _counted(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done}/{self._total}"

    def _left(self, now: float) -> str:
        if not self._total or not 0 < self._done < self._total:
            return ""
        return f", about {(now - self._began) / self._done * (self._total - self._done):.0f} s left"

    def _line(self, text: str) -> None:
        from rich.text import Text

        # as it is: names of sites and files may look like markup
        self.console.print(Text(text), soft_wrap=True)
