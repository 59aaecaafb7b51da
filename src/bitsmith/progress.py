"""How long work shows itself: a protocol, and the one that shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """What a verb tells while it works. The command line's draws it; a user's may log it."""

    def start(self, task: str, total: int | None = None) -> None:
        """A new piece of work of ``total`` steps begins; the one before is over."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current piece are done."""

    def note(self, text: str) -> None:
        """Something worth reading."""


class Silent:
    """Shows nothing."""

    def start(self, task: str, total: int | None = None) -> None:
        return None

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        return None


def counted(progress: Progress) -> Callable[[str, int, int], None]:
    """The same for verbs that report ``(what, done, total)``."""
    seen: dict[str, int] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in seen:
            seen[what] = 0
            progress.start(what, total)
        progress.advance(done - seen[what])
        seen[what] = done

    return tell
