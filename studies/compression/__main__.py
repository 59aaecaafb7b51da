"""Accuracy against bytes of quantized, shared and pruned weights: ``python -m studies.compression``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from bitsmith.zoo.data import data_root

from .._command import Study
from .._guided import RESULTS
from .cells import AFTER, DS_CNN, MOBILENET, NETWORKS, RESNET, STEPS, TRAINED, Bed, Cell
from .forms import FEW, FORMS, TRAINED_FORMS
from .tables import plot, told

PARTS = {"ds_cnn": DS_CNN, "resnet20": RESNET, "mobilenet": MOBILENET, "trained": None}


def wanted(part: str, seeds: int, full: bool) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds; what reads no data is the same for all."""
    network = PARTS[part]
    for seed in range(seeds):
        if network is None:
            yield from (Cell(name, form, TRAINED, seed) for name in STEPS for form in TRAINED_FORMS)
            continue
        for form in FEW if network == MOBILENET and not full else FORMS:
            if seed == 0 or FORMS[form].drawn:
                yield Cell(network, form, AFTER, seed)


def run(study: Study, bed: Bed, cells: Sequence[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells' records, from the store or made; a row of the results for each."""
    jobs = [(bed.key(cell), cell.name, partial(bed.record, cell)) for cell in cells]
    records = study.every("compression", jobs)
    found = [(cell, record) for cell, record in zip(cells, records, strict=True) if record is not None]
    study.rows += [{**vars(cell), **record} for cell, record in found]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "compression",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(PARTS),
        seeds=3,
        full="every form of MobileNetV1 on 700 images, no limit of time: hours",
        store="compression",
        workers=True,
    )
    options = study.options
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    bed = Bed(root, options.full)
    study.part(1.0)
    cells = [cell for part in study.chosen for cell in wanted(part, options.seeds, options.full)]
    found = run(study, bed, cells)
    for name in NETWORKS:
        told(found, name)
    if found:
        path = RESULTS / "compression.svg"
        plot(found, path)
        print(f"plot: {path}")
    study.finish()


if __name__ == "__main__":
    main()
