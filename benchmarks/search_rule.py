"""How near ``Exact`` comes to the fastest plan of its own ladder that keeps the drop, and how many samples that takes.

    python -m benchmarks.search_rule [--only NETWORK] [--full]

Every plan of the ladder of each modelled cell of ``mixed_precision`` is scored on the whole validation half. Then
searches are simulated on these scores, each in another random order: as they are, with other chances, and with the
rule before (a guess after half of the set). Full sets: samples forwarded over the set, the float pass left out. In the
folder that BITSMITH_WORK names, scores are kept and computed once.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith._files import atomic_write
from bitsmith.bench import Bench
from bitsmith.evaluate import Evaluator
from bitsmith.optimize import steps_for
from bitsmith.profile import measure
from bitsmith.search.exact import _everywhere, _frontier
from bitsmith.search.program import Program, additive
from bitsmith.searches import Exact

from .harness import Benchmark, table
from .known_ladder import RULE, KnownLadder, Vector, searched
from .mixed_cells import CELLS, SPACES, Cell, halves
from .mixed_ours import target_of

PARTS = {"resnet20": (2.0, 2.0), "ds_cnn": (1.0, 1.0), "mobilenet_v1": (15.0, 15.0), "minilm": (20.0, 20.0)}
ORDERS, ORDERS_FULL = 40, 200
"""Random orders of the samples."""

PASSES, OVER = 2.0, 1.05


RULES: dict[str, tuple[Exact, float | None]] = {
    "as it is": (Exact(), None),
    "chance=0.05": (Exact(chance=0.05), None),
    "chance=0.2": (Exact(chance=0.2), None),
    "passes=2.5": (Exact(passes=2.5), None),
    "a guess at half of the set": (Exact(), 0.5),
    "nothing but certainty": (Exact(chance=0.0), None),
}


@dataclasses.dataclass(frozen=True)
class Known:
    """The ladder of a cell from float on, and at the end the cheapest technique everywhere."""

    ms: Vector
    losses: Vector
    worse: Vector
    chunk: int


def known(cell: Cell, root: Path, folder: Path, threads: int) -> Known:
    """Every plan of the cell's ladder, scored whole."""
    kept = folder / f"{cell.folder}.ladder.npz"
    if not kept.exists():
        data = halves(cell.network, root, folder)
        bench = Bench.open(
            data.model, data.task, target_of("modelled", threads), folder=folder / f"{cell.folder}.ladder"
        )
        program = Program(additive(measure(bench, SPACES[cell.space])))
        last = _everywhere(program, "ms")
        points = [*_frontier(program, "ms", {}, RULE.points, None), *([last] if last is not None else [])]
        evaluate, reference = Evaluator(bench, steps_for(bench)), bench.score(None)
        plans = [evaluate.adapted(point.plan) for point in points]
        scores = [(reference if plan.empty else bench.score(plan)).scores.astype(float) for plan in plans]
        found = {
            "ms": np.array([point.ms for point in points]),
            "losses": np.array([point.loss for point in points]),
            "worse": reference.scores.astype(float) - np.array(scores),
            "chunk": np.array(data.task.validation.batch),  # type: ignore[union-attr]
        }
        atomic_write(kept, lambda path: _save(path, found))
    with np.load(kept) as file:
        return Known(file["ms"], file["losses"], file["worse"], int(file["chunk"]))


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def network(name: str, bench: Benchmark) -> None:
    root = bench.data()
    if root is None:
        return
    orders = ORDERS_FULL if bench.options.full else ORDERS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("BITSMITH_WORK") or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for cell in (cell for cell in CELLS if cell.network == name and not cell.measured):
            found = known(cell, root, folder, bench.threads)
            keeps = found.worse.mean(axis=1) <= cell.budget + 1e-12
            best = float(found.ms[keeps].min())
            for rule, (exact, share) in RULES.items():
                sets, times = [], []
                for seed in range(orders):
                    order = np.random.default_rng(seed).permutation(found.worse.shape[1])
                    ladder = KnownLadder(found.worse[:, order], found.ms.tolist(), found.chunk, share=share)
                    rung, used = searched(ladder, found.losses.tolist(), cell.budget, len(found.ms) - 1, exact)
                    sets.append(used)
                    times.append(float(found.ms[rung]) / best)
                bench.row(
                    name, cell=cell.name, rule=rule, sets=sets, times=times, plans=len(found.ms), keep=int(keeps.sum()),
                    n=found.worse.shape[1], orders=orders,
                )  # fmt: skip


def summary(bench: Benchmark) -> None:
    """Every rule in every cell, and the bars of the rule as it is."""
    cells = list(dict.fromkeys(row["cell"] for row in bench.rows))
    by = {(row["cell"], row["rule"]): row for row in bench.rows}
    for what, unit in (("sets", "full sets, median (mean)"), ("times", "time over the fastest that keeps the drop")):
        table(
            f"{unit}; {bench.rows[0]['orders'] if bench.rows else 0} random orders each",
            ("", *RULES),
            [(cell, *(_text(by[cell, rule][what]) for rule in RULES)) for cell in cells],
        )
    for rule in RULES:
        sets = [statistics.median(by[cell, rule]["sets"]) for cell in cells]
        times = [statistics.fmean(by[cell, rule]["times"]) for cell in cells]
        if not cells:
            break
        print(f"{rule}: {statistics.median(sets):.2f} full sets, {statistics.fmean(times):.3f} of the fastest's time")
        if rule == "as it is":
            bench.judge("full sets, median of the cells' medians", statistics.median(sets), PASSES)
            bench.judge("time over the fastest that keeps the drop, mean", statistics.fmean(times), OVER)


def _text(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({statistics.fmean(values):.3g})"


def main(argv: Sequence[str] | None = None) -> int:
    bench = Benchmark("search_rule", PARTS, (__doc__ or "").splitlines()[0])
    bench.start(argv)
    return bench.run({name: lambda b, name=name: network(name, b) for name in PARTS}, summary)  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
