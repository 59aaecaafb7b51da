"""The report's plots as SVG text: colours follow the page's light or dark scheme, marks carry their values.

Drawn by matplotlib's object interface (no pyplot, no global state but one ``rc_context``), byte for byte the same for
the same values. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from .data import FrontierPoint, SiteRow, TrainingPoint
from .text import number, points, size

TOP = 30
"""At most so many sites in a bar plot."""

BINS = 300
"""At most so many points in a curve of steps."""

# matplotlib needs concrete colours; the page's variables replace them afterwards, with these as their fallback
_COLOURS = {
    "ink": "#1b2330",
    "muted": "#5c6675",
    "grid": "#d9dee6",
    "paper": "#fdfdfe",
    "plan": "#0072b2",
    "float": "#98a1ae",
    "mark": "#d55e00",
}
_WIDTH = 7.6
_AXES = {
    "ms": ("time", "ms per batch", "time"),
    "mib": ("exported file", "MiB", "file size"),
    "mj": ("energy", "mJ per batch", "energy"),
    "mm2": ("area of the chip", "mm2", "area"),
}


def pareto(frontier: Sequence[FrontierPoint], unit: str = "fraction", minimize: str = "ms") -> str:
    """Drop (or, if no point has one, the predicted loss) against time, size, energy or area; a star is the chosen plan.

    Filled marks were evaluated, hollow ones only predicted; the axis says where its numbers come from. Each mark has
    the id ``pareto-point-<i>``.
    """
    measured = any(point.drop is not None for point in frontier)
    scale = 100.0 if unit == "fraction" and measured else 1.0
    shown = [(i, p, p.drop * scale if measured and p.drop is not None else p.loss) for i, p in enumerate(frontier)]
    shown = [(i, p, y) for i, p, y in shown if (p.drop is not None or not measured) and math.isfinite(y)]
    across = minimize if minimize in ("mib", "mj", "mm2") else "ms"
    if any(getattr(p, across) is None for _, p, _ in shown):
        across = "ms"
    named, unit_of, short = _AXES[across]
    sources = " and ".join(dict.fromkeys(p.source for _, p, _ in shown))
    # a file's size is counted, whatever the times are
    said = "" if across == "mib" or sources == "measured" else f" ({sources})"

    def x_of(point: FrontierPoint) -> float:
        return float(getattr(point, across))

    def more(point: FrontierPoint) -> str:
        values = [f"{number(v)} {u}, " for v, u in ((point.mj, "mJ"), (point.mm2, "mm2")) if v is not None]
        return "".join(values) + ("" if point.source == "measured" else f"{point.source}, ")

    def draw(figure: Any) -> Mapping[str, str]:
        axes = _axes(figure)
        line = sorted((x_of(p), y) for _, p, y in shown if p.evaluated or not measured)
        best, steps = math.inf, []
        for x, y in line:
            if y < best:
                best = y
                steps.append((x, y))
        axes.plot(
            *zip(*steps, strict=True),
            drawstyle="steps-post",
            color=_COLOURS["plan"],
            linewidth=1.2,
            alpha=0.45,
            zorder=2,
        )
        titles = {}
        for i, point, y in sorted(shown, key=lambda item: item[1].chosen):
            gid = f"point-{i}"
            axes.plot(
                [x_of(point)],
                [y],
                linestyle="none",
                gid=gid,
                marker="*" if point.chosen else "o",
                markersize=17 if point.chosen else 7,
                markeredgewidth=1.4,
                markeredgecolor=_COLOURS["paper"] if point.chosen else _COLOURS["plan"],
                markerfacecolor=_COLOURS["mark"]
                if point.chosen
                else _COLOURS["plan"]
                if point.evaluated
                else _COLOURS["paper"],
                zorder=4 if point.chosen else 3,
            )
            drop = f", drop {points(point.drop, unit)}" if point.drop is not None else ""
            how = "evaluated" if point.evaluated else "predicted"
            chosen = ", chosen" if point.chosen else ""
            titles[gid] = (
                f"{point.label}: {number(point.ms)} ms{drop}, {size(point.mib * 2**20)}, {more(point)}"
                f"loss {number(point.loss)} ({how}{chosen})"
            )
        axes.set_xlabel(f"{named}, {unit_of}{said}")
        lost = "drop of the metric" if measured else "predicted loss"
        axes.set_ylabel(f"{lost}, points" if scale == 100 else lost)
        axes.grid(True, color=_COLOURS["grid"], linewidth=0.7)
        axes.margins(0.08, 0.12)
        _legend(
            axes,
            [
                ("o", _COLOURS["plan"], "evaluated"),
                ("o", _COLOURS["paper"], "predicted"),
                ("*", _COLOURS["mark"], "chosen"),
            ],
        )
        return titles

    if not shown:
        return ""
    return _svg("pareto", f"Plans found by the search: {'drop' if measured else 'loss'} against {short}", 3.6, draw)


def time_bars(sites: Sequence[SiteRow], source: str = "measured") -> str:
    """Where the time goes: ms per site in float and under the plan, the ``TOP`` slowest, slowest first.

    Bars have the ids ``time-float-<i>`` and ``time-plan-<i>``.
    """

    def longest(row: SiteRow) -> float:
        return max(row.ms or 0.0, row.float_ms or 0.0)

    rows = sorted((r for r in sites if longest(r) > 0), key=lambda r: (-longest(r), r.site))[:TOP]

    def draw(figure: Any) -> Mapping[str, str]:
        axes = _axes(figure)
        titles = {}
        for i, row in enumerate(rows):
            for kind, ms, shift in (("float", row.float_ms, -0.2), ("plan", row.ms, 0.2)):
                if ms is None:
                    continue
                gid = f"{kind}-{i}"
                axes.barh([i + shift], [ms], height=0.36, color=_COLOURS[kind])[0].set_gid(gid)
                titles[gid] = (
                    f"{row.site}: {number(ms)} ms {'in float' if kind == 'float' else f'under the plan ({row.asked})'}"
                )
        _name_rows(axes, rows)
        said = f" ({source})" if source and source != "measured" else ""
        axes.set_xlabel(f"time, ms per batch{said}")
        _legend(axes, [("s", _COLOURS["float"], "float"), ("s", _COLOURS["plan"], "plan")])
        return titles

    return _svg("time", "Time of each site in float and under the plan", _height(len(rows)), draw) if rows else ""


def sensitivity(sites: Sequence[SiteRow], loss_name: str) -> str:
    """What each site loses under the plan, the ``TOP`` largest first; a logarithmic axis where they differ much.

    Dots have the ids ``loss-dot-<i>``; a site that is not what was asked is drawn in the warning colour.
    """
    known = [(row, row.loss) for row in sites if row.loss is not None and math.isfinite(row.loss) and row.loss > 0]
    known.sort(key=lambda item: (-item[1], item[0].site))
    known = known[:TOP]

    def draw(figure: Any) -> Mapping[str, str]:
        axes = _axes(figure)
        low, high = known[-1][1], known[0][1]
        wide = high > 100 * low
        if wide:
            axes.set_xscale("log")
            axes.set_xlim(low / 2, high * 1.6)
        titles = {}
        for i, (row, loss) in enumerate(known):
            gid = f"dot-{i}"
            colour = _COLOURS["mark" if row.why else "plan"]
            # a dot on a thin line: the length of a bar means nothing on a logarithmic axis
            axes.plot([low / 2 if wide else 0, loss], [i, i], color=colour, linewidth=1.1, alpha=0.4, zorder=2)
            axes.plot([loss], [i], gid=gid, linestyle="none", marker="o", markersize=7, color=colour, zorder=3)
            titles[gid] = f"{row.site}: {number(loss)} ({row.asked})"
        if not wide:
            axes.set_xlim(0, high * 1.06)
        _name_rows(axes, [row for row, _ in known])
        axes.set_xlabel(loss_name + (" (logarithmic)" if wide else ""), parse_math=False)
        if any(row.why for row, _ in known):
            _legend(axes, [("o", _COLOURS["plan"], "as asked"), ("o", _COLOURS["mark"], "not as asked")])
        return titles

    return _svg("loss", f"Loss of each site: {loss_name}", _height(len(known), 0.2), draw) if known else ""


def training(points: Sequence[TrainingPoint], metric: str = "") -> str:
    """Loss by step, and below it the validation score where it was taken; the weights that came back are a star.

    More than ``BINS`` steps are drawn as means of as many equal parts. Scores have the ids ``training-score-<i>``.
    """
    scored = [point for point in points if point.validation is not None]

    def draw(figure: Any) -> Mapping[str, str]:
        rows = 2 if scored else 1
        axes = _axes(figure, (rows, 1, 1))
        steps, losses = _binned([point.step for point in points], [point.loss for point in points])
        axes.plot(steps, losses, color=_COLOURS["plan"], linewidth=1.3)
        axes.set_ylabel("training loss")
        axes.grid(True, color=_COLOURS["grid"], linewidth=0.7)
        axes.margins(0.03, 0.1)
        titles = {}
        if scored:
            below = _axes(figure, (rows, 1, 2))
            below.sharex(axes)
            below.plot([p.step for p in scored], [p.validation for p in scored], color=_COLOURS["plan"], linewidth=0.8)
            for i, point in enumerate(scored):
                gid = f"score-{i}"
                below.plot(
                    [point.step],
                    [point.validation],
                    linestyle="none",
                    gid=gid,
                    marker="*" if point.kept else "o",
                    markersize=15 if point.kept else 5,
                    color=_COLOURS["mark" if point.kept else "plan"],
                    zorder=4 if point.kept else 3,
                )
                titles[gid] = f"step {point.step}: {number(point.validation, 4)}{', came back' if point.kept else ''}"
            below.set_ylabel(f"validation: {metric}" if metric else "validation", parse_math=False)
            below.grid(True, color=_COLOURS["grid"], linewidth=0.7)
            below.margins(0.03, 0.15)
            axes.tick_params(labelbottom=False)
            _legend(below, [("o", _COLOURS["plan"], "validated"), ("*", _COLOURS["mark"], "came back")])
        (below if scored else axes).set_xlabel("step")
        return titles

    title = "Training: loss and validation by step" if scored else "Training: loss by step"
    return _svg("training", title, 4.4 if scored else 2.6, draw) if points else ""


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over at most ``BINS`` parts of about equal length.

    >>> _binned([1, 2, 3], [4.0, 5.0, 6.0])
    ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    """
    count = min(len(steps), BINS)
    ends = [round(i * len(steps) / count) for i in range(count + 1)]
    parts = list(itertools.pairwise(ends))
    return [fmean(steps[a:b]) for a, b in parts], [fmean(values[a:b]) for a, b in parts]


def _height(rows: int, each: float = 0.27) -> float:
    return 1.0 + each * rows


def _axes(figure: Any, place: tuple[int, int, int] = (1, 1, 1)) -> Any:
    axes = figure.add_subplot(*place)
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_COLOURS["grid"])
    axes.tick_params(which="both", colors=_COLOURS["muted"], length=0, labelsize=9)
    axes.xaxis.label.set_color(_COLOURS["muted"])
    axes.yaxis.label.set_color(_COLOURS["muted"])
    return axes


def _name_rows(axes: Any, rows: Sequence[SiteRow]) -> None:
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([_short(row.site) for row in rows])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a site name may hold a dollar sign
        label.set_color(_COLOURS["ink"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(True, axis="x", color=_COLOURS["grid"], linewidth=0.7)
    axes.spines["left"].set_visible(False)


def _short(name: str, longest: int = 38) -> str:
    """The name on one line, its middle left out if it is long: both ends of a module path tell sites apart."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-(longest // 2) :]}"


def _legend(axes: Any, entries: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    def handle(marker: str, colour: str) -> Any:
        edge = _COLOURS["plan"] if colour == _COLOURS["paper"] else colour
        size_ = 12 if marker == "*" else 7
        return Line2D(
            [], [], linestyle="none", marker=marker, markersize=size_, markerfacecolor=colour, markeredgecolor=edge
        )

    axes.legend(
        handles=[handle(marker, colour) for marker, colour, _ in entries],
        labels=[label for *_, label in entries],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=_COLOURS["ink"],
        handletextpad=0.2,
        borderaxespad=0.1,
    )


def _svg(name: str, title: str, height: float, draw: Callable[[Any], Mapping[str, str]]) -> str:
    """Render, then fit it to a page: own ids, the page's colours, a title per mark, no prolog, no outside address."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever style the user has set
        matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})
        # the browser has the glyph; only the width that matplotlib reserves for it is a guess
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        titles = draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda match: _tag(match.group(), name), text)
    for gid, words in titles.items():
        text = text.replace(f'<g id="{name}-{gid}">', f'<g id="{name}-{gid}"><title>{escape(words)}</title>', 1)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view.group()} role="img"'
    )
    opened = f'{head} aria-label="{escape(title)}"><title>{escape(title)}</title>'
    return re.sub(r"<svg[^>]*>", lambda _: opened, text, count=1).strip()


def _tag(tag: str, name: str) -> str:
    """One SVG tag (never text between tags) with ids of its own plot and the page's colours."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", tag)
    for variable, colour in _COLOURS.items():
        tag = tag.replace(colour, f"var(--{variable}, {colour})") if 'style="' in tag else tag
    return tag
