"""Sparse from scratch along Sobol' paths, random ones, and by pruning: ``python -m studies.sparse_paths``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import table

from bitsmith.zoo.data import data_root

from .._command import Study
from .._guided import RESULTS
from . import tables
from .training import DENSE, FILES, FIXED, NORMAL, PRUNED, RANDOM, SOBOL, Bed, Cell, Split

SHARES = {"tune": 0.3, "mlp": 0.6, "starts": 0.15, "conv": 0.25}
"""Of the time, by part."""
DEFAULT = ("mlp", "starts", "conv")

PATHS, FULL_PATHS = (512, 2048, 8192, 16384), (512, 1024, 2048, 4096, 8192, 16384)
START_PATHS = (2048,)
CONV_PATHS, FULL_CONV_PATHS = (256,), (256, 512, 1024)
EPOCHS, FULL_EPOCHS = 2, 30
CONV_EPOCHS = 1

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Adam's, all tried."""
TUNING_SEED, TUNING_PATHS = 100, {"MLP": 2048, "convolutional": 256}
"""Of the cells that rates are chosen with; no result has that seed."""

RATE: Mapping[tuple[str, str], float] = {
    ("MLP", DENSE): 3e-3,
    **{("MLP", form): 3e-2 for form in (SOBOL, RANDOM, FIXED, NORMAL)},
    ("convolutional", DENSE): 1e-2,
    ("convolutional", SOBOL): 3e-2,
    ("convolutional", RANDOM): 3e-2,
}
"""What was chosen, by the mean error over the data sets."""


def rate_of(network: str, form: str) -> float:
    """Pruned networks go on as the dense one was trained."""
    return RATE[network, DENSE if form == PRUNED else form]


def run(study: Study, bed: Bed, cells: Sequence[Cell], split: Split, what: str) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells' records, from the store or made; a row of the results for each."""
    missing = [cell for cell in cells if study.store.get("sparse paths", bed.key(cell, split)) is None]
    print(f"{what}: {len(cells)} networks, {len(missing)} to be trained")
    found = []
    for cell in cells:
        label = f"{what}, {cell.name}"
        record = study.row("sparse paths", bed.key(cell, split), label, partial(bed.record, cell, split))
        if record is not None:
            found.append((cell, record))
            study.rows.append({"part": what, **vars(cell), "split": split, **record})
    return found


def grid(
    data: Sequence[str], network: str, forms: Sequence[str], paths: Sequence[int], seeds: int, epochs: int
) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds; the pruned ones of a dense network together."""
    for seed in range(seeds):
        for name in data:
            for form in forms:
                for count in (0,) if form == DENSE else paths:
                    yield Cell(name, network, form, count, seed, epochs, rate_of(network, form))


def tune(study: Study, bed: Bed) -> None:
    """Adam's rate for each network and form, by the error on held-out training images."""
    lines = []
    for network, form in RATE:
        paths = 0 if form == DENSE else TUNING_PATHS[network]
        data = list(FILES) if network == "MLP" else ["Fashion-MNIST"]
        epochs = study.options.epochs if network == "MLP" else CONV_EPOCHS
        said = []
        for rate in RATES:
            cells = [Cell(name, network, form, paths, TUNING_SEED, epochs, rate) for name in data]
            found = run(study, bed, cells, "validation", "tune")
            said.append(" / ".join(f"{100 * (1 - record['accuracy']):.2f}" for _, record in found) or "-")
        lines.append([network, form, *said])
    heads = ["network", "form", *(f"{rate:g}" for rate in RATES)]
    table("error in % on 10000 held-out training images, MNIST / Fashion-MNIST, by Adam's rate", heads, lines)


def dense_network(study: Study, bed: Bed) -> None:
    options = study.options
    paths = FULL_PATHS if options.full else PATHS
    cells = list(grid(list(FILES), "MLP", (DENSE, PRUNED, SOBOL, RANDOM), paths, options.seeds, options.epochs))
    found = run(study, bed, cells, "test", "mlp")
    for name in FILES:
        mine = [(cell, record) for cell, record in found if cell.data == name]
        tables.at_equal_weights(mine, f"{name}, 784-256-256-10, {options.epochs} epochs")
    if found:
        path = RESULTS / "sparse_paths.svg"
        tables.plot(found, path)
        print(f"plot: {path}")


def starts(study: Study, bed: Bed) -> None:
    options = study.options
    cells = grid(list(FILES), "MLP", (SOBOL, FIXED, NORMAL), START_PATHS, options.seeds, options.epochs)
    found = run(study, bed, list(cells), "test", "starts")
    for name in FILES:
        tables.starts([one for one in found if one[0].data == name], f"{name}, {options.epochs} epochs")


def convolutional(study: Study, bed: Bed) -> None:
    options = study.options
    epochs = FULL_EPOCHS if options.full else CONV_EPOCHS
    paths = FULL_CONV_PATHS if options.full else CONV_PATHS
    forms = (DENSE, PRUNED, SOBOL, RANDOM)
    cells = list(grid(["Fashion-MNIST"], "convolutional", forms, paths, options.seeds, epochs))
    found = run(study, bed, cells, "test", "conv")
    tables.at_equal_weights(found, f"Fashion-MNIST, convolutions of 32, 64 and 64 channels, {epochs} epochs")


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "sparse_paths",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=3,
        full=f"every part, {FULL_EPOCHS} epochs, no limit of time: hours",
        store="sparse_paths",
        more={"epochs": (int, None, f"of each training of the MLP ({EPOCHS}; {FULL_EPOCHS} with --full)")},
    )
    options = study.options
    options.epochs = options.epochs or (FULL_EPOCHS if options.full else EPOCHS)
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    bed = Bed(root)
    chosen = options.only or (tuple(SHARES) if options.full else DEFAULT)
    for name, part in (("tune", tune), ("mlp", dense_network), ("starts", starts), ("conv", convolutional)):
        if name in chosen:
            study.part(SHARES[name] / sum(SHARES[one] for one in chosen))
            part(study, bed)
    study.finish()


if __name__ == "__main__":
    main()
