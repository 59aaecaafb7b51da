"""Every measurement, once: a SQLite file keyed by content.

A measurement is named by a ``kind`` and a ``key``: a mapping of everything that its value depends on, content hashes
included (the helpers are re-exported here). Each :meth:`Store.put` is committed before it returns, so a process that is
killed loses the unfinished measurement and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ._files import check_writable
from ._hash import canonical as canonical
from ._hash import from_plain, to_plain
from ._hash import hash_function as hash_function
from ._hash import hash_json as hash_json
from ._hash import hash_source as hash_source
from ._hash import hash_state as hash_state
from ._hash import technique_key as technique_key

SCHEMA = 1
_APPLICATION = 0x42495453  # "BITS", in the file's header: tells our files from other SQLite files
_TIMEOUT_S = 60.0


class StoreError(ValueError):
    """A store that cannot be used, and what to do about it. Nothing is ever deleted."""


class Measurement(NamedTuple):
    """One stored row: ``key`` (readable) and ``value``."""

    key: dict[str, Any]
    value: Any


class Store:
    """Measurements in the SQLite file ``path`` (made if it is absent), or in memory for ``None``.

    Safe to share between threads; several processes may each open the same file. ``hits`` and ``misses`` count what
    :meth:`get` and :meth:`get_or` found since it was opened. Raises :class:`StoreError` for a file that is damaged,
    foreign or of a newer version, and for a place that cannot be written to.

    >>> with Store(None) as store:
    ...     store.get_or("loss", {"site": "conv1", "bits": 8}, lambda: 0.25)
    ...     store.get_or("loss", {"bits": 8, "site": "conv1"}, lambda: 1 / 0)
    ...     store.hits, store.misses
    0.25
    0.25
    (1, 1)
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.hits = 0
        self.misses = 0
        self._lock = threading.RLock()
        self._process = os.getpid()
        if self.path is not None:
            if self.path.is_dir():
                raise StoreError(f"store {self.path} is a folder: give a file, such as {self.path / 'runs.db'}")
            try:
                check_writable(self.path.parent)
            except PermissionError as error:
                raise StoreError(f"store {self.path}: {error}") from None
        self._open: sqlite3.Connection | None = None
        with self._explained():
            self._open = sqlite3.connect(
                ":memory:" if self.path is None else self.path,
                timeout=_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with self._explained():
                self._prepare(self._open)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path) if self.path is not None else None!r})"

    def close(self) -> None:
        """Close the file. Closing twice is no error."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def get(self, kind: str, key: Mapping[str, Any]) -> Any | None:
        """The stored value, or None. Sequences come back as lists."""
        digest = hash_json(key)
        with self._lock:
            value = self._find(kind, digest)
            self._count(value is not None)
        return value

    def look(self, kind: str, key: Mapping[str, Any]) -> Any | None:
        """As :meth:`get`, but None is no miss: for a list of which nobody knows the length, where it ends."""
        digest = hash_json(key)
        with self._lock:
            value = self._find(kind, digest)
            if value is not None:
                self._count(True)
        return value

    def put(self, kind: str, key: Mapping[str, Any], value: Any) -> None:
        """Store a value (numbers, strings, lists, mappings; NaN and infinities too), replacing an earlier one.

        ``None`` is refused: it is what :meth:`get` says for "not measured".
        """
        self._insert("REPLACE", kind, key, value)

    def get_or(self, kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The stored value, or what ``compute()`` returns, stored.

        If another thread or process stored one meanwhile, that first one stands and is returned.
        """
        digest = hash_json(key)
        with self._lock:
            value = self._find(kind, digest)
            self._count(value is not None)
        if value is not None:
            return value
        self._insert("IGNORE", kind, key, compute())
        return self._find(kind, digest)

    def rows(self, kind: str) -> list[Measurement]:
        """All measurements of that kind, in the order in which they were stored."""
        rows = self._run("SELECT key, value FROM measurements WHERE kind = ? ORDER BY rowid", (kind,))
        return [Measurement(self._parse(key), self._parse(value)) for key, value in rows]

    def _count(self, hit: bool) -> None:
        self.hits += hit
        self.misses += not hit

    def _find(self, kind: str, digest: str) -> Any | None:
        rows = self._run("SELECT value FROM measurements WHERE kind = ? AND hash = ?", (kind, digest))
        return self._parse(rows[0][0]) if rows else None

    def _insert(self, conflict: str, kind: str, key: Mapping[str, Any], value: Any) -> None:
        if value is None:
            raise ValueError(f"{kind}: None cannot be stored, it means 'not measured'")
        text = json.dumps(to_plain(value), separators=(",", ":"), allow_nan=False)
        self._run(
            f"INSERT OR {conflict} INTO measurements (kind, hash, key, value) VALUES (?, ?, ?, ?)",
            (kind, hash_json(key), canonical(key), text),
        )

    def _parse(self, text: str) -> Any:
        try:
            return from_plain(json.loads(text))
        except (ValueError, TypeError):
            raise StoreError(self._advice("holds a value that cannot be read")) from None

    def _run(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self._lock, self._explained():
            if self._open is None:
                raise StoreError(f"{self!r} is closed: open it again with Store(path)")
            if os.getpid() != self._process:
                raise StoreError(f"{self!r} was opened before this process was forked: open it again in the child")
            # autocommit: each statement is its own transaction and is on disk when this returns
            return self._open.execute(statement, values).fetchall()

    def _prepare(self, database: sqlite3.Connection) -> None:
        """Check what is there, and make the table in a new file."""
        damage = [row[0] for row in database.execute("PRAGMA quick_check(1)")]
        if damage != ["ok"]:
            raise StoreError(self._advice(f"is damaged ({' '.join(damage[0].split())})"))
        database.execute("BEGIN IMMEDIATE")
        try:
            application = database.execute("PRAGMA application_id").fetchone()[0]
            version = database.execute("PRAGMA user_version").fetchone()[0]
            empty = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if not empty and application != _APPLICATION:
                raise StoreError(self._advice("is a SQLite file of another program"))
            if version > SCHEMA:
                raise StoreError(
                    f"store {self.path} has schema {version}, this version reads up to {SCHEMA}: a newer Bitsmith "
                    "wrote it. pip install -U bitsmith, or give another path; nothing was changed"
                )
            if empty:
                database.execute(
                    "CREATE TABLE measurements (kind TEXT NOT NULL, hash TEXT NOT NULL, key TEXT NOT NULL, "
                    "value TEXT NOT NULL, UNIQUE (kind, hash))"
                )
                database.execute(f"PRAGMA application_id = {_APPLICATION}")
            # written even if it is there: says now, not after hours of measuring, that nothing can be written
            database.execute(f"PRAGMA user_version = {SCHEMA}")
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                waited = time.monotonic() - started
                raise StoreError(
                    f"store {self.path} was locked by another process for {waited:.0f} s: let it finish, "
                    "or give another path"
                ) from error
            raise StoreError(
                f"store {self.path}: {text}; check that the file and its folder can be written and that the disk "
                "is not full, or give another path"
            ) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(self._advice(f"is damaged or not a store ({error})")) from error

    def _advice(self, problem: str) -> str:
        return f"store {self.path} {problem}: move the file away and run again; nothing was deleted"


def machine_key(cpuinfo: str | Path = "/proc/cpuinfo") -> dict[str, Any]:
    """What identifies the machine in the key of a time: ``cpu`` (model name) and ``architecture``.

    The caller adds threads, batch size, runtime version and settings.
    """
    cpu = ""
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines()
        first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
        # ARM kernels give numbers instead of a name
        arm = (first.get(name, "") for name in ("CPU implementer", "CPU part", "CPU revision"))
        cpu = first.get("model name") or " ".join(filter(None, arm))
    except OSError:
        pass  # not Linux
    return {"cpu": cpu or platform.processor() or "unknown", "architecture": platform.machine()}
