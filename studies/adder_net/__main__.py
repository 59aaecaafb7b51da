"""Adders beside convolutions, ablations, integers, modelled energy: ``python -m studies.adder_net``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import table

from bitsmith.zoo.data import data_root

from .._command import Study
from .._guided import RESULTS
from . import tables
from .networks import ADDER, CONV, FORMS, PLAIN_RATE, SIGN, Bed, Cell, Cifar, Fashion, Split, energies

SHARES = {"tune": 0.4, "fashion": 0.4, "cifar": 0.6}
"""Of the time, by part."""
DEFAULT = ("fashion", "cifar")

STEPS = {"Fashion-MNIST": 1200, "CIFAR-10": 1200}
"""Four times those that rates were chosen at."""
TUNING_STEPS = 300
FULL_STEPS = {"Fashion-MNIST": 20_000, "CIFAR-10": 156_000}
"""With ``--full``; of CIFAR-10 ResNet-20 for the published 400 epochs."""
TRAINED: Mapping[str, tuple[str, ...]] = {"fashion": tuple(FORMS), "cifar": (CONV, ADDER)}

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""SGD's, tried on Fashion-MNIST: the first three, and greater ones as long as the greatest is the best."""
TUNING_SEED = 100
"""No result has it."""
RATE = {CONV: 0.1, ADDER: 0.1, SIGN: 0.1, PLAIN_RATE: 0.3}
"""What the validation images of Fashion-MNIST chose, for both tasks."""


def run(study: Study, bed: Bed, cells: Sequence[Cell], split: Split) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells' records, from the store or made; a row of the results for each."""
    missing = [cell for cell in cells if study.store.get("adder", bed.key(cell, split)) is None]
    print(f"{bed.name}, {bed.network}, {split}: {len(cells)} networks, {len(missing)} to be trained", flush=True)
    jobs = [(bed.key(cell, split), cell.name, partial(bed.record, cell, split)) for cell in cells]
    records = study.every("adder", jobs)
    found = [(cell, record) for cell, record in zip(cells, records, strict=True) if record is not None]
    study.rows += [{**vars(cell), "network": bed.network, "split": split, **record} for cell, record in found]
    return found


def tune(study: Study, bed: Bed) -> None:
    """SGD's rate for each form, by the accuracy on held-out training images."""
    lines = []
    for form in FORMS:
        said: list[float] = []
        for rate in RATES:
            cell = Cell(bed.name, form, TUNING_SEED, TUNING_STEPS, rate)
            if len(said) > 2 and max(said) > said[-1]:
                break
            said += [record["accuracy"] for _, record in run(study, bed, [cell], "validation")]
        lines.append([form, *(f"{100 * right:.2f}" for right in said), *["-"] * (len(RATES) - len(said))])
    table(f"{bed.name}: accuracy in % on validation images, by SGD's rate", ["form", *(f"{r:g}" for r in RATES)], lines)


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "adder_net",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=3,
        full="every part, ResNet-20 and 400 epochs, no limit of time: weeks",
        store="adder_net",
        workers=True,
    )
    options = study.options
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    pj = energies(root)
    steps = FULL_STEPS if options.full else STEPS
    beds: dict[str, Bed] = {"fashion": Fashion(root), "cifar": Cifar(root, 20 if options.full else 8)}
    chosen = options.only or (tuple(SHARES) if options.full else DEFAULT)
    every: list[tuple[Cell, dict[str, Any]]] = []
    for name in SHARES:
        if name not in chosen:
            continue
        study.part(SHARES[name] / sum(SHARES[one] for one in chosen))
        if name == "tune":
            tune(study, beds["fashion"])
            continue
        bed = beds[name]
        cells = [
            Cell(bed.name, form, seed, steps[bed.name], RATE[form])
            for seed in range(options.seeds)
            for form in TRAINED[name]
        ]
        found = run(study, bed, cells, "test")
        title = f"{bed.name}, {bed.network}, {steps[bed.name]} steps of {bed.batch}"
        tables.forms(found, title, pj)
        tables.rounding(found, title)
        every += found
    if every:
        path = RESULTS / "adder_net.svg"
        tables.plot(every, path)
        print(f"plot: {path}")
    study.finish()


if __name__ == "__main__":
    main()
