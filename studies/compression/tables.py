"""Tables and plot of what was found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.harness import table

from .._command import spread
from .cells import NETWORKS, TRAINED, Cell
from .forms import FORMS, TRAINED_FORMS

Found = Sequence[tuple[Cell, Mapping[str, Any]]]

COLOURS = {"float": "black", "integers": "tab:blue", "palettes": "tab:orange", "pruned": "tab:green"}
MARKS = {"float": "*", "integers": "s", "palettes": "o", "pruned": "^", "composed": "D"}
SHOWN = 40.0
"""Points below the float network's accuracy that a panel of the plot reaches."""


class Made(Protocol):
    """What has a size and a mean accuracy."""

    @property
    def bytes(self) -> float: ...

    @property
    def mean(self) -> float: ...


Sized = TypeVar("Sized", bound=Made)


@dataclass(frozen=True)
class Line:
    """One form over its seeds; ``label`` as in the tables."""

    label: str
    family: str
    trained: bool
    bytes: int
    coded: float
    accuracies: Sequence[float]
    samples: int

    @property
    def mean(self) -> float:
        """%."""
        return 100 * statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        return 100 * statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def lines(found: Found, name: str) -> list[Line]:
    """One for each form and route of a network whose size is known, the greatest file first."""
    mine = [(cell, record) for cell, record in found if cell.network == name]
    return sorted(_lines(mine), key=lambda line: -line.bytes)


def _lines(found: Found) -> Iterator[Line]:
    for form, route in dict.fromkeys((cell.form, cell.route) for cell, _ in found):
        records = [record for cell, record in found if (cell.form, cell.route) == (form, route)]
        size = next((record for record in records if "bytes" in record), None)
        if size is None:
            continue
        trained = route == TRAINED
        family = (TRAINED_FORMS if trained else FORMS)[form].family
        label = f"{form}, trained" if trained else form
        accuracies = [record["accuracy"] for record in records]
        yield Line(label, family, trained, size["bytes"], size["coded"], accuracies, records[0]["samples"])


def front(points: Sequence[Sized]) -> list[Sized]:
    """Those that nothing smaller or of equal size is as good as, the smallest first."""
    best: list[Sized] = []
    for point in sorted(points, key=lambda point: (point.bytes, -point.mean)):
        if not best or point.mean > best[-1].mean:
            best.append(point)
    return best


def told(found: Found, name: str) -> None:
    """One line for each form and route, the smallest file last."""
    mine = lines(found, name)
    if not mine:
        return
    whole, best = mine[0].bytes, front(mine)
    rows = [
        [
            line.label,
            f"{line.bytes / 1024:.1f}",
            f"{whole / line.bytes:.2f}",
            f"{line.coded / 1024:.1f}",
            spread(line.accuracies, percent=True),
            str(len(line.accuracies)),
            "x" if line in best else "",
        ]
        for line in mine
    ]
    heads = ["form", "file, KiB", "smaller", "with Huffman-coded weights, KiB", "accuracy, %", "seeds", "front"]
    title = f"{name}: ONNX files, top-1 on {mine[0].samples} test samples, mean ± standard deviation over seeds"
    table(title, heads, rows)


def plain_ticks(axis: Any) -> None:
    """Sizes as people write them: 1, 2, 5, 10."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def plot(found: Found, path: Path) -> None:
    """Accuracy by bytes of the file, a panel for each network, one front over all; numbers on it are named below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in NETWORKS if lines(found, name)]
    width = max(5.2 * len(names), 8.0)
    figure, axes = pyplot.subplots(1, len(names), figsize=(width, 7.4), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, name in zip(axes[0], names, strict=True):
        mine = lines(found, name)
        floor = max(0.0, max(line.mean for line in mine) - SHOWN)
        for line in mine:
            if line.mean < floor:
                continue
            kind = f"{line.family}, trained" if line.trained else line.family
            colour = COLOURS.get(line.family, "tab:red")
            handles[kind] = axis.errorbar(
                line.bytes / 1024,
                line.mean,
                line.deviation or None,
                fmt=MARKS.get(line.family, "P"),
                color=colour,
                markerfacecolor="white" if line.trained else colour,
                markersize=9 if line.family == "float" else 6,
                capsize=2,
                elinewidth=0.8,
                zorder=3,
            )
        best = [line for line in front(mine) if line.mean >= floor]
        (handles["front"],) = axis.step(
            [line.bytes / 1024 for line in best], [line.mean for line in best], where="post", color="grey", zorder=1
        )
        for number, line in enumerate(best, 1):
            # neighbours are close: above and below in turn
            at, where = (line.bytes / 1024, line.mean), (-5, 6) if number % 2 else (5, -12)
            side = "right" if number % 2 else "left"
            axis.annotate(str(number), at, textcoords="offset points", xytext=where, ha=side, fontsize=8)
        below = sum(line.mean < floor for line in mine)
        said = f"{name}, {mine[0].samples} test samples" + (f"\n{below} forms are below {floor:.0f} %" if below else "")
        axis.set(xscale="log", xlabel="ONNX file, KiB", ylabel="top-1, %", ylim=(floor, None))
        plain_ticks(axis)
        axis.set_title(said, fontsize=10)
        axis.grid(alpha=0.25, which="both")
        named = "\n".join(f"{number}  {line.label}" for number, line in enumerate(best, 1))
        axis.text(0, -0.17, named, transform=axis.transAxes, fontsize=8, va="top")
    figure.legend(handles.values(), handles.keys(), ncols=5, fontsize=9, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.91))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
