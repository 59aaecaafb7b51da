"""The proof that a file runs as simulated, held against its bars."""

from __future__ import annotations

from collections.abc import Sequence

import bitsmith as bs

from .harness import Benchmark, table

LEAST_DB = 3.0
"""The run is at least this much nearer to the simulation than float is."""


def judge_checks(bench: Benchmark, part: str, title: str, checks: Sequence[tuple[str, bs.Check]]) -> None:
    """One line for each ``(what, check)``: run against simulation, simulation against float, precisions read back."""
    rows = []
    for what, check in checks:
        margin = check.whole_db - check.float_db
        asked = sum(row.asked != str(bs.Float()) for row in check.sites)
        classes = [f"{share:.1%}" if share is not None else "" for share in (check.same_class, check.float_same_class)]
        read_back = f"{asked - len(check.unrealised)} of {asked}"
        rows.append(
            (what, f"{check.whole_db:.1f}", f"{check.float_db:.1f}", *classes, f"{check.worst_agree:.4f}", read_back)
        )
        bench.row(part, name=what, check=check.to_json(), sites_asked=asked)
        bench.judge(f"{part}: {what}, run to simulation over simulation to float", margin, LEAST_DB, " dB", True)
        if check.same_class is not None and check.float_same_class is not None:
            behind = 100 * (check.float_same_class - check.same_class)
            bench.judge(f"{part}: {what}, classes: run as simulation behind simulation as float", behind, 0, " points")
        bench.judge(f"{part}: {what}, sites not read back as asked", len(check.unrealised), 0)
    samples = {check.samples for _, check in checks}
    columns = (
        "",
        "run to simulation, dB",
        "simulation to float, dB",
        "same class",
        "the same",
        "least within one step",
    )
    table(f"{title}, {min(samples, default=0)} samples", (*columns, "sites read back"), rows)
