"""Accuracy against stored parameters: ``python -m studies.deterministic_binary_filters``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import table

from bitsmith.zoo.data import data_root

from .._command import Study
from .._guided import RESULTS
from . import tables
from .beds import Bed, Cifar, Keywords, Split
from .forms import BASIS1, BASIS8, CODES, DENSE, FILTER, FIRST, INTEGER, KERNEL, NARROW, PALETTE, PRUNED, SCRATCH, Cell

SHARES = {"tune": 0.4, "keywords": 0.4, "cifar": 0.6}
"""Of the time, by part."""
DEFAULT = ("keywords", "cifar")

START = 1000
"""Steps of the keyword network before any form is put in."""
STEPS = {"keywords": 200, "CIFAR-10": 120}
FULL = 10
"""Times as many with ``--full``."""

RATIOS = (1.0, 0.5, 0.25, 0.125)
COMMON = (
    (DENSE, (1.0,)),
    (FILTER, RATIOS),
    (PRUNED, RATIOS[1:]),
    (INTEGER, (0.25, 0.125, 0.0625)),
    (PALETTE, (0.125, 0.0625)),
    (KERNEL, (0.5, 0.25)),
    (FIRST, (0.5, 0.25)),
    (BASIS8, (0.125, 0.0625)),
    (BASIS1, (0.03125,)),
)
SHORT = (
    (DENSE, (1.0,)),
    (FILTER, RATIOS),
    (PRUNED, RATIOS[1:]),
    (INTEGER, (0.25, 0.125, 0.0625)),
    (PALETTE, (0.125, 0.0625)),
    (KERNEL, (0.25,)),
    (FIRST, (0.25,)),
    (BASIS8, (0.125, 0.0625)),
    (BASIS1, (0.03125,)),
)
FORMS = {"keywords": (*COMMON, (NARROW, RATIOS[2:]), (SCRATCH, (0.25,))), "CIFAR-10": SHORT}

RATES = (3e-4, 1e-3, 3e-3)
"""Adam's, all tried for each form, at a ratio of 0.25."""
TUNED = (DENSE, FILTER, PRUNED)
TUNING_SEED = 100
"""No result has it."""

RATE = {
    ("keywords", DENSE): 3e-3,
    ("keywords", FILTER): 3e-3,
    ("keywords", PRUNED): 3e-3,
    ("CIFAR-10", DENSE): 3e-4,
    ("CIFAR-10", FILTER): 1e-3,
    ("CIFAR-10", PRUNED): 1e-3,  # not tried: as of the codes
}
"""What the validation samples chose, by task and form."""


def rate_of(data: str, form: str) -> float:
    """A form that was not tuned has the rate of the one that it is like."""
    like = {PALETTE: DENSE, INTEGER: DENSE}.get(form, FILTER if form in CODES else form)
    return 2e-3 if form in (NARROW, SCRATCH) else RATE[data, like]


def run(study: Study, bed: Bed, cells: Sequence[Cell], split: Split) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells' records, from the store or made; a row of the results for each."""
    missing = [cell for cell in cells if study.store.get("dbf", bed.key(cell, split)) is None]
    print(f"{bed.name}, {split}: {len(cells)} networks, {len(missing)} to be trained", flush=True)
    jobs = [(bed.key(cell, split), cell.name, partial(bed.record, cell, split)) for cell in cells]
    records = study.every("dbf", jobs)
    found = [(cell, record) for cell, record in zip(cells, records, strict=True) if record is not None]
    study.rows += [{**vars(cell), "split": split, **record} for cell, record in found]
    return found


def grid(study: Study, bed: Bed) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds."""
    steps = STEPS[bed.name] * (FULL if study.options.full else 1)
    for seed in range(study.options.seeds):
        for form, ratios in FORMS[bed.name]:
            for ratio in ratios:
                yield Cell(bed.name, form, ratio, seed, steps, rate_of(bed.name, form))


def tune(study: Study, beds: Sequence[Bed]) -> None:
    """Adam's rate for each task and form, by the accuracy on validation samples."""
    lines = []
    for bed in beds:
        for form in TUNED:
            ratio = 1.0 if form == DENSE else 0.25
            cells = [Cell(bed.name, form, ratio, TUNING_SEED, STEPS[bed.name], rate) for rate in RATES]
            found = {cell.rate: record for cell, record in run(study, bed, cells, "validation")}
            said = [f"{100 * found[rate]['accuracy']:.2f}" if rate in found else "-" for rate in RATES]
            lines.append([bed.name, form, *said])
    table("accuracy in % on validation samples, by Adam's rate", ["task", "form", *(f"{r:g}" for r in RATES)], lines)


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "deterministic_binary_filters",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=3,
        full=f"every part, {FULL} times the steps, no limit of time: hours",
        store="deterministic_binary_filters",
        workers=True,
    )
    options = study.options
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    times = FULL if options.full else 1
    beds: dict[str, Bed] = {"keywords": Keywords(root, START * times), "cifar": Cifar(root)}
    chosen = options.only or (tuple(SHARES) if options.full else DEFAULT)
    found: list[tuple[Cell, dict[str, Any]]] = []
    for name in SHARES:
        if name not in chosen:
            continue
        study.part(SHARES[name] / sum(SHARES[one] for one in chosen))
        if name == "tune":
            tune(study, list(beds.values()))
            continue
        bed = beds[name]
        study.every("dbf start", bed.starts(options.seeds))
        mine = run(study, bed, list(grid(study, bed)), "test")
        tables.by_size(mine, f"{bed.name}, {STEPS[bed.name] * times} steps")
        found += mine
    if found:
        path = RESULTS / "deterministic_binary_filters.svg"
        tables.plot(found, path)
        print(f"plot: {path}")
    study.finish()


if __name__ == "__main__":
    main()
