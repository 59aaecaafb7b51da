"""Tables and the plot of the study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table

from .._command import spread
from .networks import ADDER, CONV, PRECISIONS, ROUNDED, SCALES, Cell, microjoules

Found = Sequence[tuple[Cell, Mapping[str, Any]]]


def of(found: Found, form: str) -> list[Mapping[str, Any]]:
    return [record for cell, record in found if cell.form == form]


def forms(found: Found, title: str, pj: Mapping[tuple[str, int], float]) -> None:
    """A line for each form."""
    base = {cell.seed: record["accuracy"] for cell, record in found if cell.form == CONV}
    lines = []
    for form in dict.fromkeys(cell.form for cell, _ in found):
        mine = [(cell, record) for cell, record in found if cell.form == form]
        behind = [base[cell.seed] - record["accuracy"] for cell, record in mine if cell.seed in base]
        one = mine[0][1]
        lines.append(
            [
                form,
                f"{mine[0][0].rate:g}",
                str(len(mine)),
                spread((record["accuracy"] for _, record in mine), percent=True),
                spread(behind, percent=True),
                f"{microjoules(one, pj, False):.2f}",
                f"{microjoules(one, pj, True):.2f}",
            ]
        )
    if lines:
        heads = ["form", "rate", "seeds", "accuracy, %", "behind convolution, points", "uJ, float32", "uJ, int8"]
        samples = found[0][1]["samples"]
        table(f"{title}; test accuracy, {samples} samples; energy of arithmetic, modelled at 45 nm", heads, lines)


def rounding(found: Found, title: str) -> None:
    """Accuracy of integers, rounded after training."""
    lines = []
    for bits in PRECISIONS:
        line = [str(bits)]
        for form, scales in ((ADDER, SCALES[0]), (ADDER, SCALES[1]), (CONV, SCALES[1])):
            name = f"{bits} {scales}"
            line.append(spread((r["rounded"].get(name) for r in of(found, form)), percent=True))
        lines.append(line)
    if of(found, ADDER):
        forms_ = (ADDER, ADDER, CONV)
        floats = [spread((r["rounded"]["float"] for r in of(found, form)), percent=True) for form in forms_]
        heads = ["bits", "adder, one scale", "adder, two scales (control)", "convolution"]
        table(
            f"{title}; test accuracy in %, inner layers rounded after training, {ROUNDED} test images at most",
            heads,
            [["float", *floats], *lines],
        )


def plot(found: Found, path: Path) -> None:
    """Accuracy by bits, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(cell.data for cell, _ in found))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [(cell, record) for cell, record in found if cell.data == name]
        marks = ((ADDER, "shared", "o-"), (ADDER, "separate", "s--"), (CONV, "separate", "^:"))
        for form, scales, mark in marks:
            records = [record for record in of(mine, form) if record["rounded"]]
            if records:
                values = [[100 * r["rounded"][f"{bits} {scales}"] for r in records] for bits in PRECISIONS]
                deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
                label = form if form == CONV else f"{form}, {scales}"
                means = [statistics.fmean(v) for v in values]
                axis.errorbar(PRECISIONS, means, deviations, fmt=mark, label=label, capsize=2, markersize=4)
        axis.set(xlabel="bits", ylabel="test accuracy, %", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
