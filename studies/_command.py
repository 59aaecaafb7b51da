"""The command that the studies share: options, a store that a killed run goes on from, figures."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import machine

from bitsmith._files import atomic_write
from bitsmith.store import Store
from bitsmith.zoo.data import data_root

from . import _workers
from ._guided import RESULTS, SIZES, Cell, Place, Subject, library, opened, searched


@dataclass
class Study:
    """One run of one study. Once a part's time is over, only what is already in the store is told."""

    name: str
    options: argparse.Namespace
    store: Store
    parts: tuple[str, ...] = tuple(SIZES)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.time)
    _share: float = 0.0
    _end: float = float("inf")

    @classmethod
    def start(
        cls,
        name: str,
        about: str,
        minutes: float,
        argv: Sequence[str] | None = None,
        *,
        parts: Sequence[str] = tuple(SIZES),
        seeds: int = 5,
        full: str = "whole halves, every cell, no limit of time: hours",
        store: str = "guided",
        more: Mapping[str, tuple[type, Any, str]] | None = None,
        workers: bool = False,
    ) -> Study:
        """Read the command line, open the store, and say what is to come. ``parts``: what ``--only`` chooses among;
        ``seeds``: by default; ``full``: what that option means; ``store``: the file's name; ``more``: options of one
        study, name -> type, default, help; ``workers``: whether it computes its rows by :meth:`every`."""
        parser = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=about)
        parser.add_argument("--full", action="store_true", help=full)
        parser.add_argument("--only", action="append", choices=list(parts), help="this part only (repeatable)")
        parser.add_argument("--seeds", type=int, default=seeds, help=f"how many ({seeds})")
        parser.add_argument("--minutes", type=float, default=minutes, help=f"for all parts together ({minutes:g})")
        parser.add_argument("--threads", type=int, default=1, help="of the simulation and of the runtime (1)")
        if workers:
            default = min(2, os.cpu_count() or 1)
            parser.add_argument(
                "--workers", type=int, default=default, help=f"processes, of --threads each ({default})"
            )
        for option, (kind, default, text) in (more or {}).items():
            parser.add_argument(f"--{option}", type=kind, default=default, help=text)
        options = parser.parse_args(argv)
        torch.set_num_threads(options.threads)
        (RESULTS / "models").mkdir(parents=True, exist_ok=True)
        limit = "hours" if options.full else f"at most about {options.minutes:g} minutes; run again to go on"
        print(f"{name}{' (--full)' if options.full else ' (reduced)'}: {limit}")
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"{machine()}; torch {torch.__version__}; {options.threads} threads; load {load}", flush=True)
        return cls(name, options, Store(RESULTS / f"{store}.db"), tuple(parts))

    @property
    def chosen(self) -> list[str]:
        """The parts that are run."""
        return [name for name in self.parts if not self.options.only or name in self.options.only]

    def subject(self, name: str) -> Subject:
        root = data_root()
        if root is None:
            raise SystemExit("the data folder is missing: set BITSMITH_DATA")
        return opened(name, root, self.options.full, self.store)

    def part(self, share: float) -> None:
        """Begin a part that may take that share of the time, and what the parts before it have left."""
        self._share += share
        self._end = float("inf") if self.options.full else self._started + 60.0 * self.options.minutes * self._share

    def row(self, kind: str, key: Mapping[str, Any], label: str, compute: Callable[[], Any]) -> Any | None:
        """A record from the store, or computed and stored; None once the part's time is over."""
        found = self.store.get(kind, key)
        if found is None and time.time() > self._end:
            self.left_out.append(label)
            return None
        if found is None:
            start = time.perf_counter()
            found = self.store.get_or(kind, key, compute)
            print(f"  {label}: {time.perf_counter() - start:.0f} s", flush=True)
        return found

    def every(self, kind: str, jobs: Iterable[_workers.Job]) -> list[Any | None]:
        """:meth:`row` for each (key, label, compute), in their order; what the store lacks is computed by ``--workers``
        processes, to which ``compute`` is sent."""
        jobs = list(jobs)
        missing = [job for job in jobs if self.store.get(kind, job[0]) is None]
        if self.options.workers > 1 and len(missing) > 1:
            tasks = [compute for _, _, compute in missing]
            processes, threads = self.options.workers, self.options.threads
            for number, found, seconds in _workers.computed(tasks, processes, threads, self._end):
                self.store.put(kind, missing[number][0], found)
                print(f"  {missing[number][1]}: {seconds:.0f} s", flush=True)
        return [self.row(kind, key, label, compute) for key, label, compute in jobs]

    def search(self, subject: Subject, cell: Cell, places: Sequence[Place]) -> None:
        """One cell, as a row of the results."""
        how = {"target": repr(cell.place), "sensitivity": repr(cell.sensitivity), "method": repr(cell.method)}
        key = subject.key(cell=cell.name, library=library("", "search", "sensitivity", "techniques", "targets"), **how)
        label = f"{subject.name}, {cell.name}"
        found = self.row("searches", key, label, lambda: searched(subject, cell, places))
        if found is not None:
            settings = {"network": subject.name, "target": cell.place.name, "metric": cell.metric}
            method = type(cell.method).__name__
            self.rows.append({**settings, "search": method, "keep": cell.keep, "seed": cell.seed, **found})

    def finish(self) -> Path:
        """Write what was found; say what was not looked at."""
        seeds: dict[str, list[str]] = {}
        for label in self.left_out:
            what, _, seed = label.partition(", seed ")
            seeds.setdefault(what, []).append(seed)
        for what, missing in seeds.items():
            print(f"left out: {what}{', seed ' if missing[0] else ''}{', '.join(filter(None, missing))}")
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        result = {
            "study": self.name,
            "options": vars(self.options),
            "machine": machine(),
            "commit": commit.stdout.strip(),
            "seconds": time.time() - self._started,
            "rows": self.rows,
            "left_out": self.left_out,
        }
        text = json.dumps(result, indent=1)
        path = RESULTS / f"{self.name}{'.full' if self.options.full else ''}.json"
        print(f"commit {result['commit']}; {result['seconds']:.0f} s; {len(self.left_out)} cells left out; {path}")
        return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def spread(values: Iterable[float | None], percent: bool = False, digits: int = 2) -> str:
    """``mean ± standard deviation`` over seeds; "-" where there is none."""
    found = [100.0 * v if percent else v for v in values if v is not None and v == v]
    if not found:
        return "-"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.{digits}f}{deviation}"


def by(rows: Iterable[Mapping[str, Any]], *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Rows by the values of these columns, in order of appearance."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def search_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a table of searches says of the seeds of one setting."""
    return [
        str(len(rows)),
        spread((row["saved"] for row in rows), percent=True, digits=1),
        spread((row["drop"] for row in rows), percent=True),
        spread((row["test_drop"] for row in rows), percent=True),
        spread((row["evaluations"] for row in rows), digits=1),
        spread((row["passes"] for row in rows), digits=1),
        spread((row["sensitivity_passes"] for row in rows), digits=1),
    ]


SEARCH_COLUMNS = (
    "seeds",
    "saved %",
    "drop % (validation)",
    "drop % (test)",
    "plans evaluated",
    "sets forwarded",
    "sets for the metric",
)
