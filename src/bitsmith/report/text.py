"""Numbers as words: units, significant digits, and sentences that say slower when it is slower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from .data import Measure, Report, SiteRow

NOTHING = "–"  # noqa: RUF001 - an en dash marks a value that was not measured


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, without an exponent between 1e-4 and 1e6.

    >>> number(12.3456), number(0.00123456), number(1234.6), number(float("inf")), number(4e-9)
    ('12.3', '0.00123', '1235', '∞', '4e-09')
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-4 or size >= 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def count(value: float | None) -> str:
    """A large count with a decimal prefix.

    >>> count(4_880_000), count(12), count(3.2e9)
    ('4.88 M', '12', '3.20 G')
    """
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value is not None and value >= scale:
            return f"{number(value / scale)} {prefix}"
    return NOTHING if value is None else f"{value:.0f}"


def size(count: float | None) -> str:
    """Bytes in B, KiB (2^10) or MiB (2^20).

    >>> size(14336), size(3 * 2**20), size(500), size(None) == NOTHING
    ('14.0 KiB', '3.00 MiB', '500 B', True)
    """
    if count is None:
        return NOTHING
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} B"


def score(value: float | None, unit: str, n: int = 0) -> str:
    """A metric's value; a fraction in per cent, with the digits that ``n`` samples can carry.

    >>> score(0.97772, "fraction", 359), score(0.97772, "fraction", 10000), score(1.2345, "")
    ('97.8 %', '97.77 %', '1.234')
    """
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{100 * value:.{2 if n >= 2000 else 1}f} %" if unit == "fraction" else number(value, 4)


def points(value: float | None, unit: str) -> str:
    """A difference of metrics; of fractions in points (hundredths).

    >>> points(0.0028, "fraction"), points(0.5, "")
    ('0.28 points', '0.5000')
    """
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{100 * value:.2f} points" if unit == "fraction" else number(value, 4)


def interval(measure: Measure | None, difference: bool = False) -> str:
    """The 95 % interval, or an empty string where there is none.

    >>> interval(Measure(0.978, low=0.957, high=0.989, n=359, unit="fraction"))
    '95 % interval 95.7 % to 98.9 %'
    """
    if measure is None or measure.low is None or measure.high is None:
        return ""
    if difference:
        low = points(measure.low, measure.unit).removesuffix(" points")
        return f"95 % interval {low} to {points(measure.high, measure.unit)}"
    ends = (score(end, measure.unit, measure.n) for end in (measure.low, measure.high))
    return "95 % interval " + " to ".join(ends)


def timing(measure: Measure | None, unit: str = "ms") -> str:
    """A time or an energy with spread, source and samples.

    >>> timing(Measure(1.234, spread=0.05, n=30))
    '1.23 ± 0.050 ms (measured, n=30)'
    """
    if measure is None:
        return NOTHING
    spread = f" ± {number(measure.spread, 2)}" if measure.spread is not None else ""
    count = f", n={measure.n}" if measure.n else ""
    return f"{number(measure.value)}{spread} {measure.unit or unit} ({measure.source}{count})"


def slower(report: Report) -> bool:
    """Whether the plan takes longer than float by more than the spread of both."""
    return report.speedup is not None and report.speedup < 1 and not _within_spread(report)


def _within_spread(report: Report) -> bool:
    if report.float_ms is None or report.plan_ms is None:
        return False
    spread = (report.float_ms.spread or 0.0) + (report.plan_ms.spread or 0.0)
    return abs(report.float_ms.value - report.plan_ms.value) <= spread


def speed(report: Report) -> str:
    """``2.1x faster``, ``1.7x SLOWER than float`` or ``as fast as float within the spread``; empty if not timed."""
    ratio = report.speedup
    if ratio is None:
        return ""
    if _within_spread(report):
        text = f"as fast as float within the spread ({ratio:.2f}x)"
    elif ratio < 1:
        text = f"{_ratio(1 / ratio)}x SLOWER than float"
    else:
        text = f"{_ratio(ratio)}x faster"
    return text if report.time_source == "measured" else f"{text} ({report.time_source})"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 1.95 else f"{value:.2f}"


def headline(report: Report) -> str:
    """The result in one line: speed, accuracy with its sample size, size, where."""
    parts = [speed(report)]
    before, after = report.float_metric, report.plan_metric
    if before is not None and after is not None:
        scores = " → ".join(score(m.value, m.unit, m.n) for m in (before, after))
        parts.append(f"{report.metric} {scores} (n={after.n})")
    if report.float_bytes is not None and report.plan_bytes is not None:
        parts.append(f"{size(report.float_bytes)} → {size(report.plan_bytes)}")
    said = ", ".join(part for part in parts if part)
    return f"{said or 'Nothing was measured'} on {report.target}"


def verdict(report: Report) -> str:
    """Whether the limits hold, in one line."""
    if not report.budget:
        return "No limit was asked."
    if report.over:
        over = (f"{limit_name(name)} by {limit_value(report, name, excess)}" for name, excess in report.over.items())
        return f"Missed: {', '.join(over)}."
    unknown = [limit_name(name) for name in report.budget if report.got(name) is None]
    return f"Not checked: {', '.join(unknown)} was not measured." if unknown else "Every limit is met."


def limit_name(name: str) -> str:
    return {
        "ms": "time per batch",
        "mib": "file size",
        "mj": "energy per batch",
        "mm2": "area of the chip",
        "drop": "drop of the metric",
    }[name]


def limit_value(report: Report, name: str, value: float | None) -> str:
    """A limit, or what was got, with its unit."""
    if value is None:
        return "not measured"
    if name == "drop":
        measure = report.drop or report.plan_metric
        return points(value, measure.unit if measure is not None else "")
    return f"{number(value)} { {'ms': 'ms', 'mib': 'MiB', 'mj': 'mJ', 'mm2': 'mm2'}[name] }"


def limits(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Rows of asked against got: limit, asked, got, ``yes``, ``NO`` or ``unknown``, and what must be said with it."""
    rows = []
    for name, asked in report.budget.items():
        got = report.got(name)
        met = "unknown" if got is None else "NO" if name in report.over else "yes"
        remark = ""
        if name == "drop" and report.drop is not None:
            remark = f"{interval(report.drop, difference=True)} (n={report.drop.n})".strip()
            if met == "yes" and report.drop.high is not None and report.drop.high > asked:
                remark += "; the mean holds, the interval reaches beyond the limit"
        elif name in ("ms", "mj", "mm2"):
            measure = getattr(report, f"plan_{name}")
            remark = timing(measure, name.replace("mj", "mJ")) if measure is not None else ""
        elif name == "mib":
            remark = "the exported file"
        if name in report.over:
            remark = f"over by {limit_value(report, name, report.over[name])}" + (f"; {remark}" if remark else "")
        rows.append(
            (limit_name(name), f"≤ {limit_value(report, name, asked)}", limit_value(report, name, got), met, remark)
        )
    return rows


def time_sum(report: Report) -> str:
    """The sum of the parts and the whole, both."""
    if not report.time_parts and report.time_whole is None:
        return ""
    source = report.time_source or "source unknown"
    whole = f"The whole run takes {number(report.time_whole)} ms ({source})." if report.time_whole is not None else ""
    if not report.time_parts:
        return whole
    parts = ", ".join(f"{name} {number(ms)} ms" for name, ms in report.time_parts.items())
    added = f"The parts add up to {number(sum(report.time_parts.values()))} ms ({parts})."
    if not whole:
        return f"{added} The whole run was not timed."
    if source == "modelled":
        return f"{added} {whole}"
    return f"{added} {whole} The parts are timed under a profiler, the whole without it, so the two differ."


def training(report: Report) -> str:
    """How a training went, in one line; empty where there was none. Losses are means of a tenth of the steps."""
    steps = report.training
    if not steps:
        return ""
    tenth = max(1, len(steps) // 10)
    first, last = (fmean(point.loss for point in part) for part in (steps[:tenth], steps[-tenth:]))
    said = f"{len(steps)} steps: loss {number(first)} → {number(last)} (means of the first and the last {tenth})"
    kept = next((point for point in steps if point.kept and point.validation is not None), None)
    if kept is None:
        return f"{said}."
    scores = sum(point.validation is not None for point in steps)
    named = report.training_metric or "validation"
    return f"{said}; {named} {number(kept.validation, 4)} after step {kept.step}, the best of {scores}, came back."


def worst(rows: Sequence[SiteRow], count: int = 5) -> list[SiteRow]:
    """The sites to look at first: those that are not what was asked, then the largest loss; ties by name."""

    def key(row: SiteRow) -> tuple[bool, float, str]:
        return (not row.why, -row.loss if row.loss is not None and not math.isnan(row.loss) else math.inf, row.site)

    return sorted((row for row in rows if row.why or (row.loss or 0) > 0), key=key)[:count]
