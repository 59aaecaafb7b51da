"""Tables and the plot of the study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table

from .._command import spread
from .forms import BASIS1, BASIS8, DENSE, FILTER, FIRST, INTEGER, KERNEL, PALETTE, PRUNED, Cell

MARKS = {
    **{FILTER: "o-", BASIS8: "o--", BASIS1: "P", KERNEL: "s-", FIRST: "x--"},
    **{PRUNED: "^:", INTEGER: "d:", PALETTE: "v:"},
}

Found = Sequence[tuple[Cell, Mapping[str, Any]]]


def by_size(found: Found, title: str) -> None:
    """A line for each form and ratio, in order of appearance."""
    lines = []
    for form, ratio in dict.fromkeys((cell.form, cell.ratio) for cell, _ in found):
        mine = [record for cell, record in found if (cell.form, cell.ratio) == (form, ratio)]
        dense = {cell.seed: record["accuracy"] for cell, record in found if cell.form == DENSE}
        lost = [
            dense[cell.seed] - record["accuracy"]
            for cell, record in found
            if (cell.form, cell.ratio) == (form, ratio) and cell.seed in dense
        ]
        one = mine[0]
        lines.append(
            [
                form,
                f"{ratio:g}",
                str(len(mine)),
                f"{one['part']:.3f}",
                f"{one['bytes'] / 1000:.1f}",
                spread((record["before"] for record in mine), percent=True),
                spread((record["accuracy"] for record in mine), percent=True),
                spread(lost, percent=True),
                f"{one['additions'] / 1e6:.2f}",
                f"{one['macs'] / 1e6:.2f}",
            ]
        )
    if lines:
        heads = [
            "form",
            "ratio",
            "seeds",
            "bytes of the layers, of dense",
            "all, kB",
            "not trained, %",
            "trained, %",
            "behind dense, points",
            "additions, M",
            "MACs, M",
        ]
        table(f"{title}; test accuracy, {found[0][1]['samples']} samples", heads, lines)


def plot(found: Found, path: Path) -> None:
    """Test accuracy against bytes, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(cell.data for cell, _ in found))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.4 * len(names), 4.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [(cell, record) for cell, record in found if cell.data == name]
        for form, mark in MARKS.items():
            points = []
            for ratio in sorted({cell.ratio for cell, _ in mine if cell.form == form}):
                records = [record for cell, record in mine if (cell.form, cell.ratio) == (form, ratio)]
                values = [100 * record["accuracy"] for record in records]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((records[0]["bytes"] / 1000, statistics.fmean(values), deviation))
            if points:
                x, y, deviations = zip(*sorted(points), strict=True)
                axis.errorbar(x, y, deviations, fmt=mark, label=form, capsize=2, markersize=4, linewidth=1)
        dense = [100 * record["accuracy"] for cell, record in mine if cell.form == DENSE]
        if dense:
            axis.axhline(statistics.fmean(dense), color="grey", linewidth=1, label=DENSE)
        axis.set(xscale="log", xlabel="kB of all parameters", ylabel="test accuracy, %", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
