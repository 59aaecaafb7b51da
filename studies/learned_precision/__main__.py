"""Learned bits against the same bits everywhere, at equal size: ``python -m studies.learned_precision``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.harness import table

from bitsmith.cli.progress import TerminalProgress
from bitsmith.progress import Progress
from bitsmith.zoo.data import data_root

from .._command import Study, spread
from .._resnet20 import VALIDATION, network, task_of
from . import searched
from .cells import Bed, Cell

SHARES = {"tune": 0.4, "front": 0.55, "searched": 0.1, "ablations": 0.35}
"""Of the time, by part."""
DEFAULT = ("front", "searched", "ablations")
STEPS, FULL_STEPS = 90, 3000
PHASES = {"allocation": (1 / 9, 0.0), "penalty": (0.3, 0.3)}
"""Of the steps: before bits are learned, while they are. Then they are held."""
SECONDS = 0.45
"""Of one training step on one core of a Zen 5, for the estimate."""
UNIFORM = (2, 3, 4, 8)
SEARCHED = (2, 3, 4)
LEARNED = ((2, 1.0), (3, 1.0), (4, 1.0), (6, 1.0))
"""Bits, and the share of what they take everywhere."""
PUBLISHED: Mapping[str, Any] = {"method": "penalty", "weights": "ewgs", "activations": "inverse_tanh"}
# what moves the grids more rarely moves them further at once
ABLATED: tuple[Mapping[str, Any], ...] = (
    {},
    {"weights": "ewgs", "activations": "inverse_tanh"},
    {"grain": "per tensor"},
    {"moves": 3},
    PUBLISHED,
    {**PUBLISHED, "grain": "per tensor"},
    {"method": "penalty"},
    {**PUBLISHED, "rhythm": 5, "grid_rate": 0.15},
    {**PUBLISHED, "rhythm": 20, "grid_rate": 0.6},
)
ABLATED_AT = (3, 1.0)
TUNING_SEED = 100


def phases(steps: int, method: str = "allocation", moves: int = 1) -> tuple[int, int, int]:
    """
    >>> phases(90), phases(90, "penalty"), phases(90, moves=3)
    ((10, 0, 80), (27, 27, 36), (10, 30, 50))
    """
    before, while_ = PHASES[method]
    first, second = round(steps * before), round(steps * (while_ if moves == 1 else 1 / 3))
    return first, second, steps - first - second


def run(study: Study, bed: Bed, cells: Sequence[Cell], split: str, progress: Progress) -> list[tuple[Cell, Any]]:
    """The cells' records, from the store or made; a row of the results for each."""
    missing = [cell for cell in cells if study.store.get("learned precision", bed.key(cell, split)) is None]
    minutes = sum(sum(cell.steps) for cell in missing) * SECONDS / 60
    print(
        f"{len(cells)} networks, {len(missing)} to be trained, about {minutes:.0f} minutes on a quiet core", flush=True
    )
    progress.start("networks", len(missing))
    found = []
    for cell in cells:
        label = f"{cell.name}, seed {cell.seed}"
        record = study.row("learned precision", bed.key(cell, split), label, partial(bed.record, cell, split))
        if cell in missing:
            progress.advance()
        if record is not None:
            found.append((cell, record))
            top1 = record["right"].count("1") / len(record["right"])
            row = {"name": cell.name, "seed": cell.seed, "steps": cell.steps, "split": split, "top1": top1}
            sizes = {what: record[what] for what in ("weights", "activations")}
            study.rows.append({**row, **sizes, "samples": len(record["right"]), "bits": record.get("bits")})
    return found


Groups = dict[str, list[tuple[Any, Any]]]
"""By name: cells and their records."""


def grouped(found: Sequence[tuple[Any, Any]]) -> Groups:
    groups: Groups = {}
    for cell, record in found:
        groups.setdefault(cell.name, []).append((cell, record))
    return groups


def accuracy(records: Sequence[tuple[Any, Any]]) -> list[float]:
    return [100.0 * record["right"].count("1") / len(record["right"]) for _, record in records]


def kilobytes(records: Sequence[tuple[Any, Any]]) -> float:
    return statistics.fmean(record["weights"] + record["activations"] for _, record in records) / 1000


def standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the difference of two means over seeds, pooled, in points."""
    return float(np.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))) if min(len(a), len(b)) > 1 else 0.0


def told(groups: Groups, title: str) -> None:
    heads = ["network", "seeds", "top-1 %", "weights kB", "activations kB", "total kB"]
    lines = []
    for name, records in groups.items():
        sizes = [statistics.fmean(record[what] for _, record in records) / 1000 for what in ("weights", "activations")]
        shown = [f"{size:.1f}" for size in (*sizes, sum(sizes))]
        lines.append([name, str(len(records)), spread(accuracy(records)), *shown])
    table(title, heads, lines)


def front(study: Study, bed: Bed, progress: Progress) -> None:
    """Accuracy against size, and whether learned bits are anywhere worse than the same bits everywhere."""
    options = study.options
    cells = [
        *(Cell(bits, seed, (options.steps,)) for seed in range(options.seeds) for bits in UNIFORM),
        *(Cell(bits, seed, phases(options.steps), share) for seed in range(options.seeds) for bits, share in LEARNED),
    ]
    groups = grouped(run(study, bed, cells, "test", progress))
    count = len(next(iter(groups.values()))[0][1]["right"]) if groups else 0
    told(
        groups, f"ResNet-20 (reduced), {options.steps} steps, {count} test images: mean ± standard deviation over seeds"
    )
    heads = [
        "same bits everywhere",
        "kB",
        "top-1 %",
        "best learned that is no larger",
        "kB",
        "difference",
        "pooled error",
    ]
    lines = []
    learned = {name: records for name, records in groups.items() if records[0][0].share is not None}
    for name, records in groups.items():
        if records[0][0].share is not None:
            continue
        small = {n: r for n, r in learned.items() if kilobytes(r) <= kilobytes(records) * (1 + 1e-9)}
        if not small:
            lines.append([name, f"{kilobytes(records):.1f}", spread(accuracy(records)), "none", "", "", ""])
            continue
        best = max(small, key=lambda n: statistics.fmean(accuracy(small[n])))
        mine, theirs = accuracy(small[best]), accuracy(records)
        gain, error = statistics.fmean(mine) - statistics.fmean(theirs), standard_error(mine, theirs)
        shown = [best, f"{kilobytes(small[best]):.1f}", f"{gain:+.2f}", f"{error:.2f}"]
        lines.append([name, f"{kilobytes(records):.1f}", spread(theirs), *shown])
        verdict = {"part": "front", "uniform": name, "learned": best, "gain": gain, "error": error}
        study.rows.append({**verdict, "met": gain >= -error})
    table(
        "the learned front against each uniform point: below it by more than one pooled standard error?", heads, lines
    )
    plot(groups, Path(study.options.plot))


def plot(groups: Groups, path: Path) -> None:
    """Accuracy against size, as an SVG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, learned, marker in (("same bits everywhere", False, "o-"), ("learned bits", True, "s--")):
        chosen = [records for records in groups.values() if (records[0][0].share is not None) == learned]
        chosen.sort(key=kilobytes)
        means = [statistics.fmean(accuracy(records)) for records in chosen]
        spreads = [statistics.stdev(accuracy(records)) if len(records) > 1 else 0.0 for records in chosen]
        axes.errorbar([kilobytes(records) for records in chosen], means, spreads, fmt=marker, label=label, capsize=3)
    axes.set(xlabel="weights and activations of one image, kB", ylabel="top-1, %", xscale="log")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"plot: {path}")


def plans(study: Study, bed: Bed, progress: Progress) -> None:
    """What the search finds without training, at the weights' size of the same bits everywhere."""
    found = []
    for seed in range(study.options.seeds):
        for bits in SEARCHED:
            cell = searched.Searched(bits, seed)
            key, label = searched.key(bed, cell, "test"), f"{cell.name}, seed {seed}"
            record = study.row("learned precision", key, label, partial(searched.record, bed, cell, "test"))
            if record is not None:
                found.append((cell, record))
                row = {"name": cell.name, "seed": seed, "split": "test", "samples": len(record["right"])}
                sizes = {what: record[what] for what in ("weights", "activations", "bits")}
                study.rows.append({**row, "top1": record["right"].count("1") / len(record["right"]), **sizes})
    told(grouped(found), "post-training plans of the search, activations of 8 bits")


def ablations(study: Study, bed: Bed, progress: Progress) -> None:
    """What slices, gradients and the rhythm of the grids contribute at one size."""
    options, (bits, share) = study.options, ABLATED_AT
    cells = []
    for seed in range(options.seeds):
        for change in ABLATED:
            steps = phases(options.steps, change.get("method", "allocation"), change.get("moves", 1))
            cells.append(Cell(bits, seed, steps, share, **change))
    groups = grouped(run(study, bed, cells, "test", progress))
    told(groups, f"ablations (reduced), {options.steps} steps: the size of {bits} bits everywhere")


def tune(study: Study, bed: Bed, progress: Progress) -> None:
    """Adam's rates, on held-out training images, with a seed that no result has."""
    steps, lines = study.options.steps, []
    for rate in (3e-4, 1e-3, 3e-3):
        for grid_rate in (2e-2, 3e-2, 6e-2):
            cell = Cell(3, TUNING_SEED, phases(steps), 1.0, rate=rate, grid_rate=grid_rate)
            found = run(study, bed, [cell], "validation", progress)
            lines.append([f"{rate:g}", f"{grid_rate:g}", spread(accuracy(found))])
        found = run(study, bed, [Cell(3, TUNING_SEED, (steps,), rate=rate)], "validation", progress)
        lines.append([f"{rate:g}", "same bits everywhere", spread(accuracy(found))])
    table(f"top-1 on {VALIDATION} held-out training images", ["rate", "of the grids", "top-1 %"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "learned_precision",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=3,
        full=f"every part, {FULL_STEPS} steps, no limit of time: hours",
        store="learned_precision",
        more={
            "steps": (int, None, f"of each training ({STEPS}; {FULL_STEPS} with --full)"),
            "plot": (
                str,
                str(Path(__file__).parent.parent / "results" / "learned_precision.svg"),
                "where the plot goes",
            ),
        },
    )
    options = study.options
    options.steps = options.steps or (FULL_STEPS if options.full else STEPS)
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    bed = Bed(network(root), task_of(root))
    chosen = options.only or (tuple(SHARES) if options.full else DEFAULT)
    with TerminalProgress() as progress:
        for name, part in (("tune", tune), ("front", front), ("searched", plans), ("ablations", ablations)):
            if name in chosen:
                study.part(SHARES[name] / sum(SHARES[one] for one in chosen))
                part(study, bed, progress)
    study.finish()


if __name__ == "__main__":
    main()
