"""Accuracy against bytes of quantized, shared and pruned weights: ``python -m studies.compression``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from bitsmith.zoo.data import data_root

from .._command import Study
from .._guided import RESULTS
from .._workers import Job
from . import beside
from .cells import AFTER, DS_CNN, MOBILENET, NETWORKS, RESNET, STEPS, TRAINED, Bed, Cell
from .forms import FEW, FORMS, TRAINED_FORMS
from .peers import asked as peers
from .tables import Found, plot, told

PARTS = {"ds_cnn": DS_CNN, "resnet20": RESNET, "mobilenet": MOBILENET, "trained": None}
"""A network's forms, or what is trained."""
PEERS = "peers"
"""A part that runs only where it is named: peers need environments of their own."""


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


def run(study: Study, kind: str, jobs: Sequence[Job], cells: Sequence[Cell], make: bool) -> Found:
    """The cells' records, from the store or, with ``make``, computed; a row of the results for each."""
    records = study.every(kind, jobs) if make else [study.store.get(kind, key) for key, _, _ in jobs]
    found = [(cell, record) for cell, record in zip(cells, records, strict=True) if record is not None]
    study.rows += [{**vars(cell), **record} for cell, record in found]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "compression",
        __doc__ or "",
        25.0,
        argv,
        parts=(*PARTS, PEERS),
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
    named = options.only or []
    parts = [part for part in PARTS if part in named] or list(PARTS)
    cells = [cell for part in parts for cell in wanted(part, options.seeds, options.full)]
    ours = [(bed.key(cell), cell.name, partial(bed.record, cell)) for cell in cells]
    found = run(study, "compression", ours, cells, named != [PEERS])
    asked: Found = []
    if not named or PEERS in named:
        theirs = list(peers.wanted(options.seeds))
        jobs = [
            (peers.key(bed, cell), f"{cell.route}, {cell.name}", partial(peers.record, bed, cell)) for cell in theirs
        ]
        asked = run(study, "compression peers", jobs, theirs, PEERS in named)
    for name in NETWORKS:
        told(found, name)
    if found:
        path = RESULTS / "compression.svg"
        plot(found, path)
        print(f"plot: {path}")
    if asked:
        beside.show(found, asked, bed, peers.family, RESULTS / "compression_peers.svg")
    if PEERS in named:
        for peer in peers.missing():
            print(f"{peer.name} is not installed: {peer.install()}")
    study.finish()


if __name__ == "__main__":
    main()
