"""Accuracy against bytes of quantized, shared and pruned weights: ``python -m studies.compression``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import table

from bitsmith.zoo.data import data_root

from .._command import Study, spread
from .._guided import RESULTS
from .cells import AFTER, DS_CNN, FEW, FORMS, MOBILENET, NETWORKS, RESNET, TRAINED, TRAINED_FORMS, Bed, Cell

SHARES = {"ds_cnn": 0.2, "resnet20": 0.35, "mobilenet": 0.25, "trained": 0.2}
"""Of the time, by part."""
PARTS = {"ds_cnn": DS_CNN, "resnet20": RESNET, "mobilenet": MOBILENET}
MOBILENET_SEEDS = 2

Found = Sequence[tuple[Cell, Mapping[str, Any]]]


def after(name: str, seeds: int, full: bool) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds; what reads no data is the same for all."""
    if name == MOBILENET and not full:
        seeds = min(seeds, MOBILENET_SEEDS)
    for seed in range(seeds):
        for form in FEW if name == MOBILENET and not full else FORMS:
            if seed == 0 or FORMS[form].drawn:
                yield Cell(name, form, AFTER, seed)


def run(study: Study, bed: Bed, cells: Sequence[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells' records, from the store or made; a row of the results for each."""
    found = []
    for cell in cells:
        record = study.row("compression", bed.key(cell), cell.name, partial(bed.record, cell))
        if record is not None:
            found.append((cell, record))
            study.rows.append({**vars(cell), **record})
    return found


def told(found: Found, name: str) -> None:
    """One line for each form and route, the smallest file last."""
    lines = []
    for form, route in dict.fromkeys((cell.form, cell.route) for cell, _ in found):
        records = [record for cell, record in found if (cell.form, cell.route) == (form, route)]
        size = next((record for record in records if "bytes" in record), None)
        if size is not None:
            label = f"{form}, trained" if route == TRAINED else form
            lines.append((size["bytes"], label, records, size["coded"]))
    if not lines:
        return
    whole = max(bytes_ for bytes_, *_ in lines)
    samples = lines[0][2][0]["samples"]
    rows = [
        [
            label,
            f"{bytes_ / 1024:.1f}",
            f"{whole / bytes_:.2f}",
            f"{coded / 1024:.1f}",
            spread((record["accuracy"] for record in records), percent=True),
            str(len(records)),
        ]
        for bytes_, label, records, coded in sorted(lines, key=lambda line: -line[0])
    ]
    heads = ["form", "file, KiB", "smaller", "with Huffman-coded weights, KiB", "accuracy, %", "seeds"]
    table(f"{name}: ONNX files, top-1 on {samples} test samples, mean ± standard deviation over seeds", heads, rows)


def plot(found: Found, path: Path) -> None:
    """Accuracy by bytes of the file, a panel for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in NETWORKS if any(cell.network == name for cell, _ in found)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.4 * len(names), 3.6), squeeze=False)
    marks = {"float": "k*", "integers": "s", "palettes": "o", "pruned": "^", "composed": "D"}
    for axis, name in zip(axes[0], names, strict=True):
        points: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for form, route in dict.fromkeys((cell.form, cell.route) for cell, _ in found if cell.network == name):
            mine = [r for cell, r in found if (cell.network, cell.form, cell.route) == (name, form, route)]
            size = next((record["bytes"] for record in mine if "bytes" in record), None)
            if size is not None:
                values = [100 * record["accuracy"] for record in mine]
                family = (TRAINED_FORMS if route == TRAINED else FORMS)[form].family
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                points.setdefault((family, route), []).append((size / 1024, statistics.fmean(values), deviation))
        for (family, route), three in points.items():
            x, y, deviations = zip(*sorted(three), strict=True)
            label = f"{family}, trained" if route == TRAINED else family
            face = {"markerfacecolor": "none"} if route == TRAINED else {}
            axis.errorbar(x, y, deviations, fmt=marks[family], label=label, capsize=2, markersize=5, **face)
        everything = sorted((x, y) for three in points.values() for x, y, _ in three)
        front = [(x, y) for k, (x, y) in enumerate(everything) if all(y > before for _, before in everything[:k])]
        if front:
            axis.step(*zip(*front, strict=True), where="post", color="grey", linewidth=1, label="front")
        axis.set(xscale="log", xlabel="file, KiB", ylabel="top-1, %", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "compression",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=3,
        full="every form of MobileNetV1 on 700 images, no limit of time: hours",
        store="compression",
    )
    options = study.options
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    bed = Bed(root, options.full)
    chosen = study.chosen
    found: list[tuple[Cell, dict[str, Any]]] = []
    for part in chosen:
        study.part(SHARES[part] / sum(SHARES[one] for one in chosen))
        if part == "trained":
            cells = [
                Cell(name, form, TRAINED, seed)
                for seed in range(options.seeds)
                for name in (DS_CNN, RESNET)
                for form in TRAINED_FORMS
            ]
        else:
            cells = list(after(PARTS[part], options.seeds, options.full))
        found += run(study, bed, cells)
    for name in NETWORKS:
        told([one for one in found if one[0].network == name], name)
    if found:
        path = RESULTS / "compression.svg"
        plot(found, path)
        print(f"plot: {path}")
    study.finish()


if __name__ == "__main__":
    main()
