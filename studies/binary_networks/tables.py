"""What the records say together: tables, and two plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table

import bitsmith as bs

from .._command import spread
from .nets import CLIPPINGS
from .parts import RATES, TRAINED_WITH
from .train import FLOAT, OPTIMIZERS, SCRATCH, Setting, reached

Records = Sequence[tuple[Setting, Mapping[str, Any]]]


def chosen(records: Records, **wanted: Any) -> list[Mapping[str, Any]]:
    """The records whose settings have these values."""
    return [one for setting, one in records if all(getattr(setting, name) == value for name, value in wanted.items())]


def grid(records: Records, wanted: float, title: str) -> None:
    """One line for each optimizer, clipping and start."""
    lines = []
    for start in (SCRATCH, FLOAT):
        for optimizer in OPTIMIZERS:
            for clipping in CLIPPINGS:
                found = chosen(records, start=start, optimizer=optimizer, clipping=clipping)
                if found:
                    lines.append([start, optimizer, clipping, *_cells(found, wanted)])
    heads = ["start", "optimizer", "clipping", "seeds", f"steps to {wanted:.0%}", "best %", "last %", "test % (last)"]
    table(title, [*heads, "signs turned a step, first fifth, 1e-3", "last fifth, 1e-3"], lines)


def _cells(found: Sequence[Mapping[str, Any]], wanted: float) -> list[str]:
    steps = [reached(one, wanted) for one in found]
    known = [step for step in steps if step is not None]
    never = len(steps) - len(known)
    said = spread(known, digits=0) + (f" ({never} never)" if never else "")
    turned = [[look[3] for look in one["looks"]] for one in found]
    fifths = [(1e3 * _mean(one[: len(one) // 5]), 1e3 * _mean(one[-(len(one) // 5) :])) for one in turned]
    return [
        str(len(found)),
        said,
        *(spread((one[name] for one in found), percent=True) for name in ("best", "last", "test")),
        *(spread(values) for values in zip(*fifths, strict=True)),
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def apart(records: Records, title: str) -> None:
    """Differences of one choice with everything else equal, paired by seed: last validation accuracy, points."""
    lines = []
    questions = (
        *(("optimizer", "Adam", other) for other in ("SGD", "momentum", "RMSprop")),
        ("optimizer", "momentum", "SGD"),
        ("optimizer", "RMSprop", "SGD"),
        ("clipping", "from half", "from the start"),
        ("clipping", "no clipping", "from the start"),
        ("clipping", "from half", "no clipping"),
        ("start", FLOAT, SCRATCH),
    )
    known = {_key(setting): one for setting, one in records}
    for name, better, worse in questions:
        pairs = []
        for setting, one in records:
            if getattr(setting, name) == better:
                other = known.get(_key(setting, **{name: worse}))
                if other is not None:
                    pairs.append((one, other))
        if pairs:
            halves = [[_at(one, part) - _at(other, part) for one, other in pairs] for part in (0.25, 0.5)]
            last = [one["last"] - other["last"] for one, other in pairs]
            cells = [spread(values, percent=True) for values in (*halves, last)]
            lines.append([f"{better} - {worse}", str(len(pairs)), *cells, f"{sum(d > 0 for d in last)}/{len(last)}"])
    heads = ["what against what", "pairs", "after a quarter", "after half", "after the last step", "better at the end"]
    table(title, heads, lines)


def _key(setting: Setting, **changes: Any) -> tuple[Any, ...]:
    names = ("optimizer", "clipping", "start", "seed")
    return tuple(changes.get(name, getattr(setting, name)) for name in names)


def _at(record: Mapping[str, Any], part: float) -> float:
    looks = record["looks"]
    return float(looks[max(0, round(part * len(looks)) - 1)][2])


def errors(records: Sequence[Mapping[str, Any]], title: str) -> None:
    lines = []
    for place, rate in enumerate(RATES):
        cells = [spread((a for one in records for a in one[name][place]), percent=True) for name in ("without", "with")]
        lines.append([f"{rate:g}", str(sum(len(one["with"][place]) for one in records)), *cells])
    table(title, ["bit error rate", "memories", "trained without errors, %", f"with {TRAINED_WITH:g} errors, %"], lines)


def memory_cells() -> None:
    """What error rates the two cells have, by the spread of the high resistance: the formula, nothing measured."""
    lines = []
    for spread_off in (0.3, 0.6, 0.9, 1.2):
        cell = bs.ResistiveBit(on=5.0, off=50.0, on_spread=0.3, off_spread=spread_off)
        lines.append([f"{spread_off:g}", f"{cell.single_error_rate():.1e}", f"{cell.pair_error_rate():.1e}"])
    title = "Modelled: bit error rate, 5 and 50 kOhm, spread of ln R_on 0.3"
    table(title, ["spread of ln R_off", "one device (1T1R)", "a pair (2T2R)"], lines)


def row_of_tasks(records: Mapping[tuple[float, float], Sequence[Mapping[str, Any]]], title: str) -> None:
    """By rate and m: after the last task, of each task; and of the newest, when it was the newest."""
    lines = []
    for (rate, m), found in records.items():
        if not found:
            continue
        last = [one["accuracy"][-1] for one in found]
        tasks = [spread((row[k] for row in last), percent=True) for k in range(len(last[0]))]
        newest = spread((_mean([row[-1] for row in one["accuracy"]]) for one in found), percent=True)
        lines.append([f"{rate:g}", f"{m:g}", str(len(found)), *tasks, spread(map(_mean, last), percent=True), newest])
    count = len(lines[0]) - 5
    heads = ["rate", "m", "seeds", *(f"task {k + 1}" for k in range(count)), "mean", "each when it was new"]
    table(title, heads, lines)


def resnets(records: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    lines = [
        [name, str(len(found)), *(spread((one[what] for one in found), percent=True) for what in ("before", "after"))]
        for name, found in records.items()
    ]
    table(title, ["scales", "seeds", "not trained, top-1 %", "trained, top-1 %"], lines)


# -- plots -------------------------------------------------------------------------------------------------------------

COLOURS = {"SGD": "#7f7f7f", "momentum": "#1f77b4", "RMSprop": "#2ca02c", "Adam": "#d62728"}
STYLES = {"no clipping": ":", "from the start": "--", "from half": "-"}


def curves(records: Records, path: Path) -> None:
    """Validation accuracy over steps, the mean over seeds: by optimizer and clipping, one panel for each start."""
    figure = _figure(9.0)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, start in zip(panels, (SCRATCH, FLOAT), strict=True):
        for optimizer, colour in COLOURS.items():
            for clipping, style in STYLES.items():
                found = chosen(records, start=start, optimizer=optimizer, clipping=clipping)
                if found:
                    steps = [look[0] for look in found[0]["looks"]]
                    seen = [100 * _mean(values) for values in zip(*_seen(found), strict=True)]
                    axes.plot(steps, seen, style, color=colour, linewidth=1.2, label=f"{optimizer}, {clipping}")
        axes.set_title(f"from {'random weights' if start == SCRATCH else 'a float network'}", fontsize=10)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy, %")
    panels[1].legend(fontsize=6, ncols=2, loc="lower right")
    _saved(figure, path)


def _seen(found: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    return [[look[2] for look in one["looks"]] for one in found]


def error_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Test accuracy against the bit error rate; the points are memories."""
    figure = _figure(5.0)
    axes = figure.subplots()
    for name, colour in (("without", "#1f77b4"), ("with", "#d62728")):
        label = "trained without errors" if name == "without" else f"trained with {TRAINED_WITH:g}"
        means = [100 * _mean([a for one in records for a in one[name][k]]) for k in range(1, len(RATES))]
        axes.plot(RATES[1:], means, "-", color=colour, label=label)
        for k, rate in enumerate(RATES[1:], 1):
            drawn = [100 * a for one in records for a in one[name][k]]
            axes.plot([rate] * len(drawn), drawn, ".", color=colour, alpha=0.4, markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("bit error rate")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _saved(figure, path)


def _figure(width: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 3.6), layout="constrained")


def _saved(figure: Any, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    print(f"plot: {path}")
