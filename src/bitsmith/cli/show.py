"""Printing: tables that keep whole names, JSON, and what was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200
"""Columns where the output is no terminal: wide enough that a line stays a line for grep."""


def console() -> Console:
    """Standard output."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=PIPE_WIDTH)


def table(
    headings: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = (), caption: str = ""
) -> None:
    """Print a table; the columns named in ``numbers`` are set to the right. Cells are never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        right = heading in numbers
        drawn.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else Text(str(cell)) for cell in row))
    out = console()
    out.print(drawn)
    if caption:
        out.print(Text(caption))


def plain(text: str) -> None:
    """Print a line as it is, unwrapped."""
    from rich.text import Text

    console().print(Text(text), soft_wrap=True)


def as_json(value: Any) -> None:
    """Print JSON; what JSON cannot hold (a dtype, a slice) is written as text."""
    plain(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def written(*paths: Path) -> None:
    """Say which files lie where."""
    for path in paths:
        plain(f"wrote {path}")
