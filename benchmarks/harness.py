"""What every benchmark shares: options, an estimate first, interleaved timing, a table, a JSON file, one verdict."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitsmith._files import atomic_write
from bitsmith.zoo.data import data_root

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Samples:
    """Wall-clock times of one callable, in ms, one per round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile: half of the rounds lie between."""
        if len(self.ms) < 2:
            return self.ms[0], self.ms[0]
        first, _, third = statistics.quantiles(self.ms, n=4, method="inclusive")
        return first, third

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.median:.4g} ms ({low:.4g} to {high:.4g})"


def interleaved(
    callables: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 2, refill: bool = False, seed: int = 0
) -> dict[str, Samples]:
    """Every callable once per round, in an order drawn anew for each, so that a machine that slows down slows all of
    them, and none always runs in the caches that one other left behind.

    ``warm`` rounds come first and are not counted. ``refill``: call each twice in turn and time the second.
    """
    if rounds < 1:
        raise ValueError(f"interleaved(rounds={rounds}): must be 1 or more")
    names = list(callables)
    found: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(seed)
    for index in range(warm + rounds):
        for name in order.sample(names, len(names)):
            if refill:
                callables[name]()
            start = time.perf_counter()
            callables[name]()
            if index >= warm:
                found[name].append((time.perf_counter() - start) * 1e3)
    return {name: Samples(tuple(ms)) for name, ms in found.items()}


def ratio(numerator: Samples, denominator: Samples) -> Samples:
    """The round-by-round ratio of two callables of one interleaved run (no unit, in spite of the name ``ms``)."""
    return Samples(tuple(a / b for a, b in zip(numerator.ms, denominator.ms, strict=True)))


@dataclass(frozen=True)
class Verdict:
    """A figure against its bar: it passes when ``figure <= bar`` (or ``>=`` with ``at_least``)."""

    what: str
    figure: float
    bar: float
    unit: str = ""
    at_least: bool = False

    @property
    def passed(self) -> bool:
        # a figure that is not a number falls short
        return self.figure >= self.bar if self.at_least else self.figure <= self.bar

    def __str__(self) -> str:
        sign, outcome = ">=" if self.at_least else "<=", "ok" if self.passed else "MISSED"
        return f"{self.what} {self.figure:.3g}{self.unit} (bar {sign} {self.bar:.3g}{self.unit}: {outcome})"


Record = dict[str, Any]
Part = Callable[["Benchmark"], None]


@dataclass
class Benchmark:
    """One run of one benchmark. ``parts``: name -> estimated minutes of that part by default and with ``--full``.

    ``flags``: the benchmark's own switches, name -> help; a run with one writes a JSON file of its own.
    """

    name: str
    parts: Mapping[str, tuple[float, float]]
    description: str = ""
    default_threads: int = 2
    flags: Mapping[str, str] = field(default_factory=dict)
    rows: list[Record] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    chosen: tuple[str, ...] = ()
    _load: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _started: float = 0.0

    def start(self, argv: Sequence[str] | None = None) -> None:
        """Read the command line, set the threads, and print the estimate and the machine."""
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}", description=self.description)
        parser.add_argument("--full", action="store_true", help="more rounds or samples; may take over 25 minutes")
        which = f"run this part only (repeatable): {', '.join(self.parts)}"
        parser.add_argument("--only", action="append", choices=list(self.parts), metavar="PART", help=which)
        parser.add_argument("--resume", action="store_true", help="keep the parts that a killed run has finished")
        parser.add_argument(
            "--threads",
            type=int,
            default=self.default_threads,
            help=f"threads of every measured library ({self.default_threads})",
        )
        for flag, text in self.flags.items():
            parser.add_argument(f"--{flag}", action="store_true", help=text)
        self.options = parser.parse_args(argv)
        self.chosen = tuple(part for part in self.parts if not self.options.only or part in self.options.only)
        torch.set_num_threads(self.threads)
        minutes = sum(self.parts[part][bool(self.options.full)] for part in self.chosen)
        self._load, self._started = os.getloadavg(), time.time()
        full = " (--full)" if self.options.full else ""
        print(f"{self.name}{full}: {', '.join(self.chosen)}; about {minutes:.3g} minutes on two quiet cores")
        print(f"machine: {machine()}; torch {torch.__version__}")
        print(f"threads: {self.threads}; load before: {_load_text(self._load)}", flush=True)

    @property
    def threads(self) -> int:
        return int(self.options.threads)

    def row(self, part: str, **values: Any) -> None:
        """Add one flat record."""
        self.rows.append({"part": part, **values})

    def judge(self, what: str, figure: float, bar: float, unit: str = "", at_least: bool = False) -> None:
        """Hold a figure against its bar."""
        self.verdicts.append(Verdict(what, figure, bar, unit, at_least))

    def miss(self, why: str) -> None:
        """Something that had to be measured could not be: the run fails and says why."""
        self.misses.append(why)

    def data(self) -> Path | None:
        """The data folder; where there is none the run fails and says so."""
        root = data_root()
        if root is None:
            self.miss("the data folder is missing: set BITSMITH_DATA")
        return root

    def run(self, parts: Mapping[str, Part], last: Part | None = None) -> int:
        """The chosen parts one after the other, each kept on disk once it is done; the exit status.

        ``last``: judges what all of them gave, those of a killed run included.
        """
        kept: Record = {}
        if self.options.resume and self._unfinished.exists():
            kept = json.loads(self._unfinished.read_text(encoding="utf-8"))
            if kept.pop("settings") != self._settings():
                print(f"nothing to resume: {self._unfinished} was measured under other settings")
                kept = {}
        for name in self.chosen:
            if name in kept:
                print(f"{name}: kept from the killed run")
                self.rows += kept[name]["rows"]
                self.verdicts += [Verdict(**verdict) for verdict in kept[name]["verdicts"]]
                self.misses += kept[name]["misses"]
                continue
            rows, verdicts, misses = len(self.rows), len(self.verdicts), len(self.misses)
            parts[name](self)
            new = [vars(verdict) for verdict in self.verdicts[verdicts:]]
            kept[name] = {"rows": self.rows[rows:], "verdicts": new, "misses": self.misses[misses:]}
            _write(self._unfinished, {"settings": self._settings(), **kept})
        if last is not None:
            last(self)
        status = self.finish()
        self._unfinished.unlink(missing_ok=True)
        return status

    @property
    def _unfinished(self) -> Path:
        return RESULTS / f"{self.name}{self._flagged}.unfinished.json"

    @property
    def _flagged(self) -> str:
        return "".join(f".{flag}" for flag in self.flags if getattr(self.options, flag))

    def _settings(self) -> Record:
        """What a measurement of this run belongs to."""
        full, versions = bool(self.options.full), {"torch": torch.__version__}
        return {"machine": machine(), "threads": self.threads, "full": full, **versions}

    def finish(self) -> int:
        """Write the JSON file, print load and verdict; the exit status (1 if a bar was missed)."""
        after, seconds = os.getloadavg(), time.time() - self._started
        passed = bool(self.verdicts) and all(v.passed for v in self.verdicts) and not self.misses
        result = {
            "benchmark": self.name,
            "parts": list(self.chosen),
            **self._settings(),
            "load_before": list(self._load),
            "load_after": list(after),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": seconds,
            "rows": self.rows,
            "verdicts": [{**vars(v), "passed": v.passed} for v in self.verdicts],
            "misses": self.misses,
            "passed": passed,
        }
        whole = len(self.chosen) == len(self.parts)
        path = RESULTS / f"{self.name}{self._flagged}{'' if whole else '.' + '+'.join(self.chosen)}.json"
        _write(path, result)
        print(f"load after: {_load_text(after)}; {seconds:.0f} s; rows in {path}")
        said = [*map(str, self.verdicts), *(f"MISSED: {why}" for why in self.misses)] or ["nothing was judged"]
        print(f"{'PASS' if passed else 'FAIL'} {self.name}: {'; '.join(said)}")
        return 0 if passed else 1


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1)
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on the terminal, plain enough to be pasted into Markdown: the first column left, the others right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(str(row[i])) for row in [list(columns), *cells]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(aligned)} |"

    print(f"\n{title}\n\n{line(list(columns))}")
    print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")
    for row in cells:
        print(line(row))
    print(flush=True)


def machine() -> str:
    """CPU model, cores this process may use, memory."""
    model = platform.processor() or platform.machine()
    memory = ""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), model)
    if meminfo.exists():
        kib = int(meminfo.read_text(encoding="utf-8").split()[1])
        memory = f", {kib / 2**20:.0f} GiB"
    return f"{model}, {len(os.sched_getaffinity(0))} cores{memory}, Python {platform.python_version()}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _load_text(load: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.2f}" for value in load)
