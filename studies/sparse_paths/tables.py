"""What the study says: tables of test errors, and the plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table

from .._command import spread
from .training import DENSE, FIXED, NORMAL, PRUNED, RANDOM, SOBOL, Cell

Found = Sequence[tuple[Cell, Mapping[str, Any]]]


def errors(found: Found, form: str, paths: int) -> list[float]:
    """1 - accuracy by seed."""
    return [1.0 - record["accuracy"] for cell, record in found if (cell.form, cell.paths) == (form, paths)]


def at_equal_weights(found: Found, title: str) -> None:
    """One line for each number of paths: test error in percent, mean and standard deviation over seeds."""
    of_dense = errors(found, DENSE, 0)
    if not of_dense:
        return
    all_weights = next(record["weights"] for cell, record in found if cell.form == DENSE)
    lines = []
    for paths in sorted({cell.paths for cell, _ in found if cell.paths}):
        records = [record for cell, record in found if (cell.form, cell.paths) == (SOBOL, paths)]
        random = [record for cell, record in found if (cell.form, cell.paths) == (RANDOM, paths)]
        if not records:
            continue
        weights = statistics.fmean(record["weights"] for record in records)
        lines.append(
            [
                str(paths),
                f"{weights:.0f}",
                f"{weights / all_weights:.1%}",
                *(spread(errors(found, form, paths), percent=True) for form in (SOBOL, RANDOM, PRUNED)),
                f"{statistics.fmean(record['paths'] for record in random):.0f}" if random else "-",
                spread(gaps(found, RANDOM, SOBOL, paths), percent=True),
            ]
        )
    lines.append(["dense", str(all_weights), "100.0%", spread(of_dense, percent=True), "", "", "", ""])
    heads = ["paths", "weights", "of dense", SOBOL, RANDOM, PRUNED, "random paths drawn", "random - Sobol', points"]
    table(f"{title}: test error in %, mean ± standard deviation over {len(of_dense)} seeds", heads, lines)


def gaps(found: Found, worse: str, better: str, paths: int) -> list[float]:
    """The difference of the errors, seed by seed."""
    by_seed = {
        form: {cell.seed: 1 - record["accuracy"] for cell, record in found if (cell.form, cell.paths) == (form, paths)}
        for form in (worse, better)
    }
    return [by_seed[worse][seed] - by_seed[better][seed] for seed in by_seed[worse] if seed in by_seed[better]]


def starts(found: Found, title: str) -> None:
    """The same paths begun otherwise, and with signs that stay."""
    lines = [
        [str(paths), *(spread(errors(found, form, paths), percent=True) for form in (SOBOL, FIXED, NORMAL))]
        for paths in sorted({cell.paths for cell, _ in found if cell.form in (FIXED, NORMAL)})
    ]
    if lines:
        heads = ["paths", "constant start", "constant start, signs fixed", "normal random start"]
        table(f"{title}: test error in %", heads, lines)


def plot(found: Found, path: Path) -> None:
    """Test error by number of weights, a panel for each data set of the MLP."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(cell.data for cell, _ in found))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [(cell, record) for cell, record in found if cell.data == name]
        for form, mark in ((SOBOL, "o-"), (RANDOM, "s--"), (PRUNED, "^:")):
            points = []
            for paths in sorted({cell.paths for cell, _ in mine if cell.paths}):
                values = [100 * error for error in errors(mine, form, paths)]
                sizes = [record["weights"] for cell, record in mine if (cell.form, cell.paths) == (form, paths)]
                if values:
                    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                    points.append((statistics.fmean(sizes), statistics.fmean(values), deviation))
            if points:
                x, y, deviations = zip(*points, strict=True)
                axis.errorbar(x, y, deviations, fmt=mark, label=form, capsize=2, markersize=4, linewidth=1)
        of_dense = [100 * error for error in errors(mine, DENSE, 0)]
        if of_dense:
            axis.axhline(statistics.fmean(of_dense), color="grey", linewidth=1, label=DENSE)
        axis.set(xscale="log", xlabel="weights", ylabel="test error, %", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
