"""Guided mixed precision beside the tuners of NNCF, Neural Compressor, AIMET, ModelOpt and MCT, on four networks.

    python -m benchmarks.mixed_precision [--only NETWORK] [--ours] [--resume] [--threads 2]

The held-out samples of each network are cut in two: everybody tunes on the validation half, which also judges whether
a budget is met; the test half is only shown. Files run sample by sample on the runtime; times are interleaved, of one
run, beside the float network. Cells where the space's last technique everywhere meets the budget do not count. A peer
runs in an environment of its own: ``python -m benchmarks.peers.environment NAME DIR/NAME`` builds it, and
BITSMITH_PEERS names DIR; BITSMITH_WORK names a folder that keeps what peers made, so that they run once. ``full sets``:
samples forwarded to evaluate, over the set; ``sensitivity``: those that rank sites, a backward counted two. Nobody's
float pass and nobody's calibration counts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bitsmith as bs
from bitsmith._files import atomic_write
from bitsmith.bench import Bench

from . import harness
from .harness import Benchmark, table
from .mixed_cells import CELLS, Cell, Halves, halves, write_job
from .mixed_ours import Found, everywhere, modelled_ms, optimized, translated
from .runtimes import OFF, opened, opens

Array = NDArray[Any]

ROUNDS = 100
LIMIT_S = 600
"""A tuner that is not done after so long is stopped; the table says so."""

PARTS = {"resnet20": (25.0, 25.0), "ds_cnn": (20.0, 20.0), "mobilenet_v1": (60.0, 60.0), "minilm": (60.0, 60.0)}
PASSES, TOGETHER, OF_NNCF, COUNTED = 2.0, 4.0, 1 / 3, 6

TUNERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "nncf_accuracy_control": ("nncf", ("int8", "int8_tensor")),
    "nncf_accuracy_control_onnx": ("nncf", ("int8", "int8_tensor")),
    "neural_compressor_autotune": ("neural_compressor", ("int8", "int8_tensor")),
    "aimet_amp": ("aimet", ("w4", "modelled")),
    "modelopt_auto_quantize": ("modelopt", ("w4", "modelled")),
    "mct_mixed_precision": ("mct", ("w4", "modelled")),
}
"""Tuner -> its environment and the spaces that it can search. AIMET, ModelOpt and MCT give simulations, no files."""


FLOAT_PASS = (
    "nncf_accuracy_control",
    "nncf_accuracy_control_onnx",
    "neural_compressor_autotune",
    "aimet_amp",
)
"""Tuners that count exactly one pass of the float network among their evaluations."""


@dataclass
class Row:
    """One tool in one cell on one runtime. Accuracies are fractions of the validation and of the test half."""

    tool: str
    validation: float = math.nan
    test: float = math.nan
    ms: harness.Samples | float | None = None
    mib: float = math.nan
    passes: float = math.nan
    sensitivity: float = math.nan
    seconds: float = math.nan
    error: str = ""
    path: Path | None = None

    @property
    def median(self) -> float:
        return math.nan if self.ms is None else self.ms if isinstance(self.ms, float) else self.ms.median


@dataclass
class Work:
    """What the cells of one network share."""

    bench: Benchmark
    data: Halves
    folder: Path


def network(name: str, bench: Benchmark) -> None:
    root = bench.data()
    if root is None:
        return
    kept = os.environ.get("BITSMITH_WORK")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(kept or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(bench, halves(name, root, folder), folder)
        for cell in (cell for cell in CELLS if cell.network == name):
            _cell(cell, work)


def _cell(cell: Cell, work: Work) -> None:
    bench = work.bench
    runtimes = ("onnxruntime", "openvino") if cell.measured else ("modelled",)
    own: dict[str, tuple[Found, Bench, Found]] = {}
    for runtime in runtimes:
        folder = work.folder / cell.folder / runtime
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found, inside = optimized(cell, work.data, runtime, bench.threads, folder)
        own[runtime] = (found, inside, everywhere(cell, inside, folder))
    reference = next(iter(own.values()))[1].score(None)
    peers = {} if bench.options.ours else _peers(cell, work, reference.mean)
    rows = {runtime: _rows(cell, work, runtime, own[runtime], peers, reference.mean) for runtime in runtimes}
    _judge(cell, work, rows, reference.mean, reference.n)


def _peers(cell: Cell, work: Work, score: float) -> dict[str, tuple[dict[str, Any], Path]]:
    """What each tuner that knows this space made of the job, and its folder."""
    place = os.environ.get("BITSMITH_PEERS")
    job = write_job(cell, work.data, score, work.folder / cell.folder, work.bench.threads)
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    for tuner, (environment, spaces) in TUNERS.items():
        if cell.space not in spaces:
            continue
        out = work.folder / cell.folder / tuner
        said = out / "result.json"
        if not said.exists() or "before the tuner did" in said.read_text():
            own = None if place is None else Path(place) / environment / "bin" / "python"
            python = str(own) if own is not None and own.exists() else sys.executable
            print(f"{cell.name}: {tuner} with {python}", flush=True)
            threads = {"OMP_NUM_THREADS": str(work.bench.threads)}
            path = os.pathsep.join(["src", ".", *filter(None, [os.environ.get("PYTHONPATH")])])
            with (work.folder / cell.folder / f"{tuner}.log").open("w") as log:
                try:
                    subprocess.run(
                        [python, "-m", f"benchmarks.peers.{tuner}", str(job), str(out)],
                        check=False, timeout=LIMIT_S, stdout=log, stderr=log,
                        env={**os.environ, **threads, "PYTHONPATH": path},
                    )  # fmt: skip
                except subprocess.TimeoutExpired:
                    stopped = {"error": f"stopped after {LIMIT_S} s", "seconds": LIMIT_S}
                    atomic_write(said, lambda temporary, found=stopped: temporary.write_text(json.dumps(found)))
                    print(f"{tuner} was stopped after {LIMIT_S} s", flush=True)
        result = json.loads(said.read_text()) if said.exists() else {"error": "it wrote no result"}
        found[tuner] = result, out
    return found


def _rows(
    cell: Cell,
    work: Work,
    runtime: str,
    own: tuple[Found, Bench, Found],
    peers: Mapping[str, tuple[dict[str, Any], Path]],
    reference: float,
) -> list[Row]:
    """Float, the control, ours and every peer on one runtime: accuracies, times of one interleaved run, cost."""
    found, inside, control = own
    set_size = work.data.task.validation.samples  # type: ignore[attr-defined]
    plain = inside.artifact(bs.Plan())
    rows = [
        Row("float", path=plain.path),
        Row("everywhere", path=control.path),
        Row("Bitsmith", path=found.path, passes=found.passes, sensitivity=found.sensitivity, seconds=found.seconds),
    ]
    for tuner, (result, folder) in peers.items():
        # one that was stopped took at least so long
        row = Row(tuner, error=str(result.get("error") or ""), seconds=result.get("seconds", math.nan))
        if not row.error:
            # these forward the float network to know what they may lose; nobody's float pass counts
            own = set_size if tuner in FLOAT_PASS else 0
            row.passes = (result["evaluation_forwards"] - own) / set_size
            row.sensitivity = (result["sensitivity_forwards"] + 2 * result["sensitivity_backwards"]) / set_size
            if result.get("artifact"):
                row.path = folder / result["artifact"]
            if not cell.measured:
                with np.load(folder / "scores.npz") as scores:
                    row.validation, row.test = float(scores["validation"].mean()), float(scores["test"].mean())
                row.ms = modelled_ms(inside, translated(result["plan"], cell.space, inside, tuner))
        rows.append(row)
    if cell.measured:
        _run(work, runtime, rows)
    else:
        for row, plan in zip(rows, (bs.Plan(), control.plan, found.plan), strict=False):
            row.ms = modelled_ms(inside, plan)
            row.validation = inside.score(plan).mean
            row.test = inside.score(plan, "test").mean
    for row in rows:
        if row.path is not None:
            files = [row.path, row.path.with_suffix(".bin")] if row.path.suffix == ".xml" else [row.path]
            row.mib = sum(file.stat().st_size for file in files if file.exists()) / 2**20
    return rows


def _run(work: Work, runtime: str, rows: Sequence[Row]) -> None:
    """Scores and times of every file that the runtime opens."""
    threads = work.bench.threads
    runs = {}
    for row in rows:
        if row.path is None or not opens(runtime, row.path):
            continue
        ours = row.tool in ("float", "everywhere", "Bitsmith")
        run = opened(runtime, row.path, threads, disabled=OFF if ours else ())
        hits = []
        for part in ("validation", "test"):
            inputs, classes = work.data.arrays(part)
            hits.append(np.mean([run(x)[0].reshape(-1).argmax() == y for x, y in zip(inputs, classes, strict=True)]))
        row.validation, row.test = float(hits[0]), float(hits[1])
        example = work.data.arrays("validation")[0][0]
        runs[row.tool] = lambda run=run, example=example: run(example)
    times = harness.interleaved(runs, ROUNDS, warm=5)
    for row in rows:
        row.ms = times.get(row.tool)


def _judge(cell: Cell, work: Work, rows: Mapping[str, list[Row]], reference: float, samples: int) -> None:
    """Print the cell, and note what the bars need of it."""
    bench = work.bench

    def within(row: Row) -> bool:
        return reference - row.validation <= cell.budget + 1e-9

    # a runtime rounds otherwise than the simulation: the float network is judged where it ran
    counts = False
    for runtime, found in rows.items():
        control = found[1]
        counts = counts or not within(control)
        kind = "measured" if cell.measured else "modelled"
        table(
            f"{cell.name} on {runtime} ({kind}; n = {samples} to tune and judge, {work.data.task.test.samples} shown)",  # type: ignore[union-attr]
            ("", "validation", "test", "within", "ms", "MiB", "full sets", "sensitivity", "s"),
            [
                (
                    row.tool, f"{row.validation:.2%}", f"{row.test:.2%}", row.error[:60] or within(row), _ms(row.ms),
                    row.mib, row.passes, row.sensitivity, row.seconds,
                )
                for row in found
            ],
        )  # fmt: skip
        for row in found:
            bench.row(
                cell.network, cell=cell.name, space=cell.space, budget=cell.budget, runtime=runtime, tool=row.tool,
                validation=row.validation, test=row.test, within=within(row), ms=row.median, mib=row.mib,
                passes=row.passes, sensitivity=row.sensitivity, seconds=row.seconds, error=row.error, n=samples,
                source=kind,
            )  # fmt: skip
    best = min((found[2] for found in rows.values()), key=lambda row: (not within(row), row.median))
    runtime = next(name for name, found in rows.items() if found[2] is best)
    others = [row for found in rows.values() for row in found[3:] if within(row) and row.median == row.median]
    fastest = min(others, key=lambda row: row.median, default=None)
    ratio = best.median / fastest.median if fastest is not None else math.nan
    nncf = [row.seconds for row in next(iter(rows.values())) if row.tool == "nncf_accuracy_control"]
    outcome = {
        "part": cell.network, "cell": cell.name, "counts": counts, "outcome": True, "runtime": runtime,
        "within": within(best), "ratio": ratio, "peer": fastest.tool if fastest is not None else "",
        "passes": best.passes, "sensitivity": best.sensitivity, "seconds": best.seconds,
        "of_nncf": best.seconds / nncf[0] if nncf and nncf[0] == nncf[0] else math.nan,
    }  # fmt: skip
    bench.row(outcome.pop("part"), **outcome)
    said = "counts" if counts else "does not count: the last technique everywhere meets the budget"
    versus = f"{ratio:.3f} of {outcome['peer']}'s time" if fastest is not None else "no peer met the budget"
    print(f"{cell.name}: {said}; ours on {runtime} {'within' if within(best) else 'OVER'}, {versus}", flush=True)


def _ms(ms: harness.Samples | float | None) -> str:
    if ms is None:
        return ""
    if isinstance(ms, float):
        return f"{ms:.4f}"
    low, high = ms.quartiles
    return f"{ms.median:.4f} ({low:.4f} to {high:.4f})"


def summary(bench: Benchmark) -> None:
    """The bars, over the cells that count."""
    cells = [row for row in bench.rows if row.get("outcome") and row["counts"]]
    if not cells:
        bench.miss("not one cell counts")
        return
    table(
        "cells that count",
        ("cell", "ours on", "within", "time over the fastest peer's", "full sets", "sensitivity", "s", "of NNCF's s"),
        [
            tuple(c[k] for k in ("cell", "runtime", "within", "ratio", "passes", "sensitivity", "seconds", "of_nncf"))
            for c in cells
        ],
    )  # fmt: skip
    whole = len(bench.chosen) == len(bench.parts)
    if whole:
        bench.judge("cells that count", len(cells), COUNTED, at_least=True)
    bench.judge("cells in which ours is over the budget", sum(not c["within"] for c in cells), 0)
    compared = [c for c in cells if c["ratio"] == c["ratio"]]
    if compared:
        worst = max(compared, key=lambda c: c["ratio"])
        bench.judge(f"time over the fastest peer's, at most ({worst['cell']}, {worst['peer']})", worst["ratio"], 1.0)
    passes = statistics.median(c["passes"] for c in cells)
    bench.judge("full sets forwarded, median", passes, PASSES)
    together = statistics.median(c["passes"] + c["sensitivity"] for c in cells)
    bench.judge("with the sensitivity, median", together, TOGETHER)
    timed = [c["of_nncf"] for c in cells if c["of_nncf"] == c["of_nncf"]]
    if timed:
        bench.judge("wall-clock over NNCF accuracy control's, median", statistics.median(timed), OF_NNCF)


def main(argv: Sequence[str] | None = None) -> int:
    bench = Benchmark("mixed_precision", PARTS, (__doc__ or "").splitlines()[0], flags={"ours": "leave the peers out"})
    bench.start(argv)
    return bench.run({name: lambda b, name=name: network(name, b) for name in PARTS}, summary)  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
