"""Where a study is kept: addresses, and errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._files import check_writable
from .proposals import quiet, require

TIMEOUT_S = 60
"""Seconds to wait for a storage that is locked or does not answer."""

_DRIVERS = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


class StudyError(ValueError):
    """A study's storage that cannot be used, or a study of another search, and what to do about it."""


@contextmanager
def connected(storage: str | Path) -> Iterator[tuple[Any, Any, str]]:
    """The module ``optuna``, the open storage, and its name without a password."""
    require()
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    url = str(storage)
    if "://" not in url:
        path = Path(storage).resolve()
        if path.is_dir():
            raise StudyError(f"the storage {path} is a folder: give a file, such as {path / 'study.db'}")
        check_writable(path.parent)
        url = f"sqlite:///{path}".replace("{", "{{").replace("}", "}}")  # Optuna formats what it is given
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StudyError(
            "the storage's address cannot be read: give a file, or an address such as "
            "postgresql://user:password@host/database"
        ) from None
    where = parsed.database if parsed.drivername == "sqlite" and parsed.database else parsed.render_as_string()
    waits = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout"}
    wait = waits.get(parsed.drivername.replace("+psycopg2", "").replace("+psycopg", "").replace("+mysqldb", ""))
    with explained(where), quiet() as optuna:
        arguments = {"connect_args": {wait: TIMEOUT_S}} if wait else {}
        database = _made(lambda: optuna.storages.RDBStorage(url, engine_kwargs=arguments))
    try:
        yield optuna, database, where
    finally:
        database.remove_session()
        database.engine.dispose()


def _made(make: Callable[[], Any]) -> Any:
    """What ``make`` gives; once more if another process makes the same tables at that moment."""
    from sqlalchemy.exc import SQLAlchemyError

    for pause in (0.1, 0.3, 0.9, 2.7):
        try:
            return make()
        except SQLAlchemyError as error:
            if not any(word in str(error).lower() for word in ("already exists", "unique constraint")):
                raise
            time.sleep(pause)
    return make()


@contextmanager
def explained(where: str, note: str = "") -> Iterator[None]:
    """Errors of a storage say what to do; Optuna is quiet inside."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with quiet() as optuna:
            yield
    except ImportError as error:
        lacking = getattr(error.__cause__, "name", None) or error.name or "its driver"
        raise StudyError(
            f"the storage {where} needs {lacking}, which is not installed: pip install {_DRIVERS.get(lacking, lacking)}"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        said = " ".join(str(getattr(cause, "orig", None) or cause).split())
        if "locked" in said:
            advice = "is locked by another process: let it finish, or give another storage"
        else:
            advice = (
                f"cannot be used ({said}): check that it is there, can be reached and written and is no other "
                "program's, or give another storage"
            )
        raise StudyError(
            f"the storage {where} {advice}. What was measured is kept, and counts on the next run"
        ) from error
