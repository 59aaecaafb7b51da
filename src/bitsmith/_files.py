"""Files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomic_write(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it there: never half a file under its name."""
    path = Path(path)
    check_writable(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def atomic_folder(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """As :func:`atomic_write` for a folder: ``write`` makes one of the name it is given, which is then renamed.

    What was at ``path`` before, a folder or a file, is moved aside, and back again should the renaming fail.
    """
    path = Path(path)
    check_writable(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
        made, before = Path(aside) / path.name, Path(aside) / "before"
        write(made)
        if path.exists():
            path.replace(before)
        try:
            made.replace(path)
        except OSError:
            if before.exists():
                before.replace(path)
            raise
    return path


def check_writable(folder: str | Path) -> Path:
    """Make the folder if need be and raise at once, not at the end of a long job, if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder.resolve()}: {error.strerror or error}; choose another folder (-o DIR)"
        ) from None
    return folder


def data_root() -> Path | None:
    """The data folder, or None where there is none.

    ``BITSMITH_DATA`` if it is set (only there then), otherwise ``../shared/data`` beside the working directory or
    beside the repository that this file lies in.
    """
    given = os.environ.get("BITSMITH_DATA")
    if given:
        places = [Path(given).expanduser()]
    else:
        repository = Path(__file__).resolve().parents[2]
        places = [base.parent / "shared" / "data" for base in (Path.cwd(), repository)]
    return next((place.resolve() for place in places if place.is_dir()), None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
