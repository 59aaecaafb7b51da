"""One self-contained page: opens offline, loads nothing, reads well on a phone, in the light and in the dark."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from . import plots, text
from .data import Report, SiteRow


def page(report: Report) -> str:
    """The report as HTML. All text is escaped; a content security policy lets only the page's own script run."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = text.size
    environment.filters["number"] = text.number
    environment.filters["points"] = text.points
    environment.filters["said"] = _said
    environment.filters["words"] = _words
    environment.filters["key"] = _sort_key
    script = _own("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    metric_unit = report.plan_metric.unit if report.plan_metric is not None else "fraction"
    return environment.from_string(_own("page.html.j2")).render(
        r=report,
        t=text,
        headline=re.sub(r"(?<=\d) (?=%|[MK]?i?B\b)", "\u00a0", text.headline(report)),  # no line break before a unit
        css=Markup(_own("page.css")),
        script=Markup(script),
        script_hash=digest,
        pareto=Markup(plots.pareto(report.frontier, metric_unit, report.minimize)),
        time_bars=Markup(plots.time_bars(report.sites, report.time_source)),
        sensitivity=Markup(plots.sensitivity(report.sites, report.loss_name)),
        training=Markup(plots.training(report.training, report.training_metric)),
        unplaced=sum(point.drop is None for point in report.frontier),
        top=plots.TOP,
        columns=_columns(report),
        changed=[row for row in report.sites if row.why],
        data=Markup(_script_safe(report.to_json())),
    )


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script_safe(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever the strings in it say."""
    written = json.dumps(data, ensure_ascii=False, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return written


def _columns(report: Report) -> list[tuple[str, str, str]]:
    """Field, heading and unit of the per-site table; a column that nothing fills is left out."""
    known = [
        ("sqnr_db", "SQNR", "dB, simulated against float"),
        ("gap_db", "Gap", "dB, run against simulated"),
        ("agree", "Agree", "integers within one step"),
        ("loss", "Loss", report.loss_name),
        ("float_ms", "Float ms", "per batch"),
        ("ms", "Plan ms", "per batch"),
        ("float_mj", "Float mJ", f"per batch, {report.time_source}"),
        ("mj", "Plan mJ", f"per batch, {report.time_source}"),
        ("bytes", "Weights", "in the file"),
        ("macs", "MACs", "per batch"),
    ]
    return [column for column in known if any(getattr(row, column[0]) for row in report.sites)]


def _sort_key(row: SiteRow, field: str) -> str:
    value = getattr(row, field)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _words(name: Any) -> str:
    """``whole_network_db`` as ``whole network (dB)``."""
    words = str(name).replace("_", " ")
    for suffix, unit in ((" db", " (dB)"), (" ms", " (ms)"), (" mib", " (MiB)")):
        if words.endswith(suffix):
            return words.removesuffix(suffix) + unit
    return words


def _said(value: Any) -> str:
    """Any JSON value in words."""
    if value is None:
        return text.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else text.number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_said(item)}" for key, item in value.items()) or text.NOTHING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value)) or text.NOTHING
    return str(value)
