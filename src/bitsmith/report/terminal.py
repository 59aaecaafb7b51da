"""The report in a terminal: the result, the limits, and the sites to look at first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import text
from .data import Report, SiteRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table


def summary(report: Report, console: Console | None = None) -> None:
    """Print headline, verdict, asked against got, the worst sites, verify and notes. Names are never read as markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    console.print(Text(report.title, style="dim"))
    console.print(Text(text.headline(report), style="bold red" if text.slower(report) else "bold"))
    colour = "dim" if not report.budget else "green" if report.met else "red"
    console.print(Text(text.verdict(report), style=colour))
    if report.budget:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading, side in (
            ("limit", "left"),
            ("asked", "right"),
            ("got", "right"),
            ("met", "left"),
            ("with it", "left"),
        ):
            table.add_column(heading, justify="right" if side == "right" else "left")
        for name, asked, got, met, remark in text.limits(report):
            style = {"yes": "green", "NO": "bold red"}.get(met, "yellow")
            table.add_row(name, asked, got, Text(met, style=style), Text(remark, style="dim"))
        console.print(table)
    rows = [
        ("time", f"{text.timing(report.float_ms)} → {text.timing(report.plan_ms)}", report.plan_ms),
        (report.metric, f"{text.interval(report.plan_metric) or 'no interval'}; {report.split}", report.plan_metric),
        ("parts", text.time_sum(report), report.time_whole),
        ("training", text.training(report), report.training or None),
    ]
    for name, line, known in rows:
        if known is not None:
            console.print(Text.assemble((f"{name}: ", "dim"), line))
    if "passed" in report.verify:
        passed = bool(report.verify["passed"])
        verdict = str(report.verify.get("verdict", "passed" if passed else "FAILED"))
        style = "green" if passed else "bold red" if verdict.startswith("FAILED") else "yellow"
        console.print(Text(f"simulated against run: {verdict}", style=style))
    worst = text.worst(report.sites)
    if worst:
        changed = sum(bool(row.why) for row in report.sites)
        console.print(Text(f"\nSites to look at first ({changed} of {len(report.sites)} are not what was asked for)"))
        console.print(site_table(worst, wide=console.width >= 120))
    for note in report.notes:
        console.print(Text.assemble(("note: ", "yellow"), note))


def site_table(rows: Sequence[SiteRow], wide: bool = False) -> Table:
    """One line per site, 80 columns; ``wide`` adds kind, gap, agreement and weights. Each reason stands below once."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.why:
            reasons.setdefault(row.why, []).append(row.site)
    caption = "\n".join(f"{', '.join(sites)}: {why}" for why, sites in reasons.items())
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=Text(caption, style="yellow") if caption else None,
        caption_justify="left",
    )
    for heading in ("site", *(("kind",) if wide else ()), "asked", "realised"):
        table.add_column(heading, overflow="fold", ratio=1 if heading == "site" else None)
    for heading in ("SQNR dB", *(("gap dB", "agree", "weights") if wide else ()), "loss", "float ms", "plan ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.site, *((row.kind,) if wide else ()), row.asked, row.realised, text.number(row.sqnr_db)]
        if wide:
            cells += [text.number(row.gap_db), text.score(row.agree, "fraction", 2000), text.size(row.bytes)]
        cells += map(text.number, (row.loss, row.float_ms, row.ms))
        table.add_row(*map(Text, cells), style="bold" if row.why else "")
    return table
