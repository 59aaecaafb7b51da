"""What each site and each change of format costs on a target: learned from the runtime's own profile of a few plans.

Every probe plan is profiled (kernel times per site, conversion times per tensor) and timed whole, all interleaved.
The profile gives a first table; a ridge regression over the whole times then corrects it, holding each entry to its
profiled value with a relative tolerance. So the sum is checked against the whole, and both are reported.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bench import Bench
from .plan import Plan
from .site import Edge
from .targets.base import SiteTimes
from .technique import Technique

FLOAT = "float"


@dataclass(frozen=True)
class Option:
    """One technique that may be chosen at one site, with the formats at its operands and its output."""

    site: str
    technique: Technique
    reads: tuple[str, ...]
    writes: str

    @property
    def is_float(self) -> bool:
        return self.writes == FLOAT and all(read == FLOAT for read in self.reads)


@dataclass(frozen=True)
class Costs:
    """``sites``: (site, technique) -> ms. ``edges``: (edge, produced, consumed) -> ms. ``fixed``: ms of every plan.

    ``fit_error``: median relative error over the probes the table was fitted on, ``probes`` of them.
    """

    sites: Mapping[tuple[str, Technique], float]
    edges: Mapping[tuple[Edge, str, str], float]
    fixed: float
    fit_error: float
    probes: int
    whole_float_ms: float
    sum_float_ms: float


def probe_plans(options: Mapping[str, Sequence[Option]], mixed: int, seed: int) -> list[Plan]:
    """The float plan, each technique wherever it is offered, and ``mixed`` random plans of evenly spread share."""
    techniques = list(dict.fromkeys(o.technique for rows in options.values() for o in rows if not o.is_float))
    plans = [Plan()]
    for technique in techniques:
        plans.append(Plan({site: technique for site, rows in options.items() if any(o.technique == technique for o in rows)}))
    generator = random.Random(seed)
    for index in range(mixed):
        share = (index + 1) / (mixed + 1)
        chosen: dict[str, Technique] = {}
        for site, rows in options.items():
            candidates = [o.technique for o in rows if not o.is_float]
            if candidates and generator.random() < share:
                chosen[site] = generator.choice(candidates)
        plans.append(Plan(chosen))
    return plans


def _everywhere(options: Mapping[str, Sequence[Option]]) -> Plan:
    """Every site under its first technique that is not float: the other probes are parts of it."""
    firsts = {site: next((o.technique for o in rows if not o.is_float), None) for site, rows in options.items()}
    return Plan({site: technique for site, technique in firsts.items() if technique is not None})


def learn(bench: Bench, options: Mapping[str, Sequence[Option]], edges: Sequence[Edge], mixed: int = 12) -> Costs:
    """Profile and time probe plans on a measured target, and fit the table."""
    asked = probe_plans(options, mixed, bench.seed)
    plans = [bench.target.adapt(plan, bench.net.record) for plan in asked]
    bench.everywhere(bench.target.adapt(_everywhere(options), bench.net.record))
    bench.progress.start(f"exporting and timing {len(plans)} probe plans on {bench.target.name}", len(plans))
    for plan in plans:
        bench.artifact(plan)
        bench.progress.advance()
    wholes = [timing.ms for timing in bench.times(plans)]
    profiles = [bench.site_times(plan) for plan in plans]
    chosen = [chosen_options(before, after, options) for before, after in zip(asked, plans, strict=True)]
    return fit(options, edges, chosen, profiles, wholes)


def fit(
    options: Mapping[str, Sequence[Option]],
    edges: Sequence[Edge],
    chosen: Sequence[Mapping[str, Option]],
    profiles: Sequence[SiteTimes],
    wholes: Sequence[float],
) -> Costs:
    """The table from the options chosen in each probe, their profiles and their whole times (ms); float first."""
    columns: dict[Any, int] = {}
    for site, rows in options.items():
        for option in rows:
            columns[site, option.technique] = len(columns)
    for edge in edges:
        for produced, consumed in meeting(edge, options):
            columns[edge, produced, consumed] = len(columns)
    present = np.zeros((len(chosen), len(columns)))
    for row, choice in enumerate(chosen):
        for site, option in choice.items():
            present[row, columns[site, option.technique]] = 1.0
        for edge in edges:
            key = (edge, *_crossing(edge, choice))
            if key in columns:
                present[row, columns[key]] = 1.0
    prior = _prior(columns, edges, chosen, profiles)
    table, fixed = _ridge(present, np.asarray(wholes), prior)
    predicted = present @ table + fixed
    error = float(np.median(np.abs(predicted - wholes) / np.asarray(wholes)))
    return Costs(
        {key: float(table[i]) for key, i in columns.items() if len(key) == 2},
        {key: float(table[i]) for key, i in columns.items() if len(key) == 3},
        float(fixed),
        error,
        len(chosen),
        float(wholes[0]),
        profiles[0].total,
    )


def meeting(edge: Edge, options: Mapping[str, Sequence[Option]]) -> list[tuple[str, str]]:
    """The pairs of different formats that can meet at an edge."""
    produced = {o.writes for o in options.get(edge.producer, ())} or {FLOAT}
    consumed = {_read(o, edge.operand) for o in options.get(edge.consumer, ())} or {FLOAT}
    return [(p, c) for p in sorted(produced) for c in sorted(consumed) if p != c]


def _read(option: Option, operand: int) -> str:
    return option.reads[operand] if operand < len(option.reads) else FLOAT


def chosen_options(asked: Plan, adapted: Plan, options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    """The option that each site really has once the target adapted the plan (it may have put a site back to float)."""
    found = {}
    for site, rows in options.items():
        wanted, kept = asked.get(site), adapted.get(site)
        match = next((o for o in rows if o.technique == wanted and type(kept) is type(wanted)), None)
        found[site] = match or next((o for o in rows if o.is_float), rows[0])
    return found


def _crossing(edge: Edge, choice: Mapping[str, Option]) -> tuple[str, str]:
    producer, consumer = choice.get(edge.producer), choice.get(edge.consumer)
    return (
        producer.writes if producer is not None else FLOAT,
        _read(consumer, edge.operand) if consumer is not None else FLOAT,
    )


def _prior(
    columns: Mapping[Any, int],
    edges: Sequence[Edge],
    chosen: Sequence[Mapping[str, Option]],
    profiles: Sequence[SiteTimes],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The profiled time of every entry: medians over the probes that contain it; unseen conversions by their kind."""
    seen: dict[Any, list[float]] = defaultdict(list)
    for choice, profile in zip(chosen, profiles, strict=True):
        for site, option in choice.items():
            seen[site, option.technique].append(profile.sites.get(site, 0.0))
        crossing: dict[str, list[Any]] = defaultdict(list)
        for edge in edges:
            formats = _crossing(edge, choice)
            if formats[0] != formats[1]:
                crossing[edge.tensor].append((edge, *formats))
        for tensor, keys in crossing.items():
            for key in keys:
                seen[key].append(profile.conversions.get(tensor, 0.0) / len(keys))
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for key, values in seen.items():
        if len(key) == 3:
            kinds[key[1:]].append(statistics.median(values))
    prior = np.zeros(len(columns))
    for key, column in columns.items():
        if seen.get(key):
            prior[column] = statistics.median(seen[key])
        elif len(key) == 3 and kinds.get(key[1:]):
            prior[column] = statistics.median(kinds[key[1:]])
    return prior


def _ridge(
    present: np.ndarray[Any, np.dtype[np.float64]],
    wholes: np.ndarray[Any, np.dtype[np.float64]],
    prior: np.ndarray[Any, np.dtype[np.float64]],
    noise: float = 0.01,
    tolerance: float = 0.5,
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
    """Least squares of the relative residuals plus ``((x - prior) / (tolerance * prior + floor))^2``; free intercept."""
    count = len(prior)
    floor = 0.02 * float(np.median(wholes)) / max(count, 1) ** 0.5
    weight = 1.0 / (noise * wholes)
    data = np.hstack([present, np.ones((len(wholes), 1))]) * weight[:, None]
    target = (wholes - present @ prior) * weight
    hold = np.zeros((count, count + 1))
    hold[np.arange(count), np.arange(count)] = 1.0 / (tolerance * prior + floor)
    solution, *_ = np.linalg.lstsq(np.vstack([data, hold]), np.concatenate([target, np.zeros(count)]), rcond=None)
    return prior + solution[:count], float(solution[count])
