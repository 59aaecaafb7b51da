"""How long work shows itself: a protocol, and the one that shows nothing."""

from __future__ import annotations

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
