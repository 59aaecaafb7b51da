"""What peers made beside what we made: accuracy by bytes of weights and biases."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import table

from .._command import spread
from .cells import NETWORKS, TRAINED, Bed, Cell
from .forms import FORMS, TRAINED_FORMS, Form
from .tables import MARKS, SHOWN, Found, front, plain_ticks

OURS = "Bitsmith"
COLOURS = {OURS: "silver", "coremltools": "tab:blue", "NNCF": "tab:purple", "Neural Compressor": "tab:red"}


@dataclass(frozen=True)
class Point:
    """One form of one library over its seeds. ``bytes``: of weights and biases as it encodes them, no graph;
    ``file``: of what it gives ONNX Runtime, if anything."""

    who: str
    label: str
    family: str
    bytes: float
    file: int | None
    accuracies: Sequence[float]

    @property
    def mean(self) -> float:
        """%."""
        return 100 * statistics.fmean(self.accuracies)


def points(found: Found, name: str, families: Callable[[Cell], str], weights: Callable[[Cell], float]) -> list[Point]:
    """One for each form and route of a network; ``families`` and ``weights`` say what a cell belongs to and takes.
    Forms that take channels out are left out: their layers are others."""
    mine = [(cell, record) for cell, record in found if cell.network == name and "accuracy" in record]
    made = []
    for form, route in dict.fromkeys((cell.form, cell.route) for cell, _ in mine):
        cells = [(cell, record) for cell, record in mine if (cell.form, cell.route) == (form, route)]
        first, record = cells[0]
        peer = "weights" in record
        if not peer and of(first).technique is None and of(first).steps:
            continue
        size = record["weights"] if peer else weights(first)
        file = record.get("file" if peer else "bytes")
        label = f"{form}, trained" if route == TRAINED else form
        accuracies = [one["accuracy"] for _, one in cells]
        made.append(Point(route if peer else OURS, label, families(first), size, file, accuracies))
    return made


def of(cell: Cell) -> Form:
    return (TRAINED_FORMS if cell.route == TRAINED else FORMS)[cell.form]


def told(given: Sequence[Point], name: str) -> None:
    """All that peers made, and of ours what is on our own front."""
    ours = front([point for point in given if point.who == OURS])
    shown = ours + [point for point in given if point.who != OURS]
    everything = front(given)
    rows = [
        [
            point.who,
            point.label,
            f"{point.bytes / 1024:.1f}",
            "-" if point.file is None else f"{point.file / 1024:.1f}",
            spread(point.accuracies, percent=True),
            str(len(point.accuracies)),
            "x" if point in everything else "",
        ]
        for point in sorted(shown, key=lambda point: -point.bytes)
    ]
    heads = ["library", "form", "weights and biases, KiB", "ONNX file, KiB", "accuracy, %", "seeds", "front"]
    table(f"{name}: peers, and what is on our own front", heads, rows)


def plot(given: Mapping[str, Sequence[Point]], path: Path) -> None:
    """A panel for each network, a colour for each library, a mark for each family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in NETWORKS if given.get(name)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(max(5.2 * len(names), 8.0), 5.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        floor = max(0.0, max(point.mean for point in given[name]) - SHOWN)
        for point in given[name]:
            if point.mean >= floor:
                ours = point.who == OURS
                axis.plot(
                    point.bytes / 1024,
                    point.mean,
                    MARKS.get(point.family, "P"),
                    color=COLOURS[point.who],
                    markersize=5 if ours else 7,
                    zorder=2 if ours else 3,
                )
        line = [point for point in front([one for one in given[name] if one.who == OURS]) if point.mean >= floor]
        sizes, means = [point.bytes / 1024 for point in line], [point.mean for point in line]
        axis.step(sizes, means, where="post", color="grey", zorder=1)
        below = sum(point.mean < floor and point.who != OURS for point in given[name])
        said = name + (f"\n{below} forms of peers are below {floor:.0f} %" if below else "")
        axis.set(xscale="log", xlabel="weights and biases, KiB", ylabel="top-1, %", ylim=(floor, None))
        plain_ticks(axis)
        axis.set_title(said, fontsize=10)
        axis.grid(alpha=0.25, which="both")
    handles = [
        pyplot.Line2D([], [], color=colour, marker="o", linestyle="", label=who) for who, colour in COLOURS.items()
    ]
    handles += [
        pyplot.Line2D([], [], color="black", marker=mark, linestyle="", label=family) for family, mark in MARKS.items()
    ]
    handles.append(pyplot.Line2D([], [], color="grey", label="our front"))
    figure.legend(handles=handles, ncols=5, fontsize=9, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def show(found: Found, asked: Found, bed: Bed, families: Callable[[Cell], str], path: Path) -> None:
    """Tables, plot, and what peers could not do, in their own words."""
    given = {
        name: points([*found, *asked], name, families, lambda cell: bed.weights(cell.network, of(cell)))
        for name in NETWORKS
        if any(cell.network == name for cell, _ in asked)
    }
    for name, one in given.items():
        told(one, name)
    for cell, record in asked:
        if "error" in record:
            print(f"{cell.route}, {cell.network}, {cell.form}: {record['error']}")
    if any(given.values()):
        plot(given, path)
        print(f"plot: {path}")
