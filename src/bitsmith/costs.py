"""What each site and each change of format costs on a target: learned from whole times of probe plans.

Probe plans (share of changed sites spread evenly, scattered and in runs) are timed whole, interleaved; the runtime's
own profile of a few of them gives a first table. A ridge regression over the whole times corrects it: every entry may
move alone, with those of the same operation and shape, and with those of the same operation. How far is decided by
leaving out one probe at a time. So the sum is checked against the whole, and both are reported.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._hash import hash_json
from .bench import Bench
from .plan import Plan
from .site import Edge, Site
from .targets.base import CALM, SiteTimes, unrest
from .technique import Technique
from .techniques.float_ import Float

Vector = NDArray[np.float64]

FLOAT = "float"

_GOLDEN = 5**0.5 / 2 - 0.5
"""Multiples of it, modulo 1, are evenly spread however many are taken."""

_MIXED, _FEWEST = 32, 8
_PROBED_BYTES = 96 * 2**20
"""For each technique as many mixed probes as have so many bytes of float weights together, within these bounds: a file
of a small network costs next to nothing."""
_EXPORT_S, _TIMING_S, _NOISY_S = 60.0, 1.5, 30.0
"""Beyond ``_FEWEST`` mixed probes are exported for so long; rounds of timing take about so long on a quiet machine, and
on one that is not."""
_ROUNDS, _NOISY_ROUNDS = 60, 120
_PROFILED, _PROFILE_ROUNDS = 8, 20
"""One in so many of the mixed probes is profiled, at least one, in so many rounds."""

_OPEN_BYTES = 2**30
"""Files of about so many bytes together, had they float weights, are open at a time."""


@dataclass(frozen=True)
class Option:
    """One technique that may be chosen at one site, with the formats at its operands and its output."""

    site: str
    technique: Technique
    reads: tuple[str, ...]
    writes: str

    @property
    def is_float(self) -> bool:
        return self.technique == Float()


@dataclass(frozen=True)
class Costs:
    """``sites``: (site, technique) -> ms. ``edges``: (edge, produced, consumed) -> ms. ``fixed``: ms of every plan.

    ``fit_error``: median relative error over the ``probes`` probe plans, each predicted without itself.
    """

    sites: Mapping[tuple[str, Technique], float]
    edges: Mapping[tuple[Edge, str, str], float]
    fixed: float
    fit_error: float
    probes: int
    whole_float_ms: float
    sum_float_ms: float


def probe_plans(options: Mapping[str, Sequence[Option]], mixed: int, seed: int) -> list[Plan]:
    """The float plan, each technique wherever it is offered, and ``mixed`` random plans.

    The shares of changed sites are evenly spread, in every beginning of the list as well. Every second plan changes
    runs of neighbouring sites, as searches do; the others scattered ones, which meet more changes of format.
    """
    offered = {site: [o.technique for o in rows if not o.is_float] for site, rows in options.items()}
    changing = [site for site, techniques in offered.items() if techniques]
    plans = [Plan(), *everywhere(options)]
    generator = random.Random(seed)
    for index in range(mixed if changing else 0):
        share = (0.5 + index * _GOLDEN) % 1.0
        count = max(1, min(round(share * len(changing)), len(changing) - 1))
        runs = (
            [[site] for site in generator.sample(changing, count)] if index % 2 else _runs(changing, count, generator)
        )
        chosen: dict[str, Technique] = {}
        for run in runs:
            wanted = generator.choice(offered[run[0]])
            chosen.update(
                {site: wanted if wanted in offered[site] else generator.choice(offered[site]) for site in run}
            )
        plans.append(Plan({site: chosen[site] for site in changing if site in chosen}))
    return plans


def _runs(sites: Sequence[str], count: int, generator: random.Random) -> list[list[str]]:
    """``count`` of the sites in a few runs of neighbours (the last site's is the first), lengths at random."""
    rest = len(sites) - count
    number = max(1, round(min(count, rest) / 3))
    lengths, gaps = _parts(count, number, generator), _parts(rest, number, generator)
    at, runs = generator.randrange(len(sites)), []
    for length, gap in zip(lengths, gaps, strict=True):
        runs.append([sites[(at + k) % len(sites)] for k in range(length)])
        at += length + gap
    return runs


def _parts(total: int, number: int, generator: random.Random) -> list[int]:
    """``total`` as a sum of ``number`` integers of at least 1 (one part of 0 where there is nothing to divide)."""
    cuts = [0, *sorted(generator.sample(range(1, total), number - 1)), total] if total else [0, 0]
    return [high - low for low, high in itertools.pairwise(cuts)]


def everywhere(options: Mapping[str, Sequence[Option]]) -> list[Plan]:
    """Each technique but float wherever it is offered: every other plan's sites are parts of these."""
    offered = {site: [o.technique for o in rows if not o.is_float] for site, rows in options.items()}
    return [
        Plan({site: technique for site, techniques in offered.items() if technique in techniques})
        for technique in dict.fromkeys(t for techniques in offered.values() for t in techniques)
    ]


def learn(bench: Bench, options: Mapping[str, Sequence[Option]], edges: Sequence[Edge]) -> Costs:
    """Time and profile probe plans on a measured target, and fit the table."""
    record = bench.net.record
    whole = everywhere(options)
    mixed = min(max(_PROBED_BYTES // max(1, _float_bytes(bench)), _FEWEST) * max(1, len(whole)), _MIXED)
    asked = probe_plans(options, mixed, bench.seed)
    plans = [bench.adapted(plan) for plan in asked]
    bench.everywhere([bench.adapted(plan) for plan in whole])
    plans = _exported(bench, plans, len(plans) - mixed + _FEWEST)
    profiled = len(asked) - mixed + max(mixed // _PROFILED, 1)
    bench.progress.start(f"profiling and timing {len(plans)} probe plans on {bench.target.name}", profiled + 1)
    profiles = []
    for plan in plans[:profiled]:
        profiles.append(bench.site_times(plan, _PROFILE_ROUNDS))
        bench.progress.advance()
    wholes = _wholes(bench, plans, profiles[0].whole)
    bench.progress.advance()
    chosen = [chosen_options(before, after, options) for before, after in zip(asked, plans, strict=False)]
    return fit(record.sites, options, edges, chosen, profiles, wholes)


def _exported(bench: Bench, plans: Sequence[Plan], least: int) -> list[Plan]:
    """The plans that are exported in time, at least ``least``; how many is stored, so that a resumed run takes them."""
    key = {**bench.model_key, "target": bench.target.settings(), "plans": hash_json([plan.digest() for plan in plans])}
    known = bench.store.get("probes", key)
    if known is not None:
        return list(plans[:known])
    bench.progress.start(f"exporting {len(plans)} probe plans for {bench.target.name}", len(plans))
    end = time.perf_counter() + _EXPORT_S
    taken: list[Plan] = []
    for plan in plans:
        if len(taken) >= least and time.perf_counter() > end:
            break
        bench.artifact(plan)
        taken.append(plan)
        bench.progress.advance()
    bench.store.put("probes", key, len(taken))
    return taken


def _wholes(bench: Bench, plans: Sequence[Plan], float_ms: float) -> list[float]:
    """The whole time of each plan in ms, the float plan first; as many at a time as memory allows.

    Other work on the machine only ever adds time, so plans are compared by their lower quartiles, which it moves
    least, in parts each beside the float plan. The level common to all is that of the medians, unless they lie so far
    above that other work must have put them there.
    """
    rounds, most = (
        max(10, min(limit, int(seconds * 1e3 / (2 * float_ms * len(plans)))))
        for limit, seconds in ((_ROUNDS, _TIMING_S), (_NOISY_ROUNDS, _NOISY_S))
    )
    step = max(1, _OPEN_BYTES // max(1, _float_bytes(bench)))
    ratios, levels = [1.0], []
    for first in range(1, len(plans), step):
        timings = bench.steady_times([plans[0], *plans[first : first + step]], rounds, most)
        reference, *others = (timing.low for timing in timings)
        ratios += [ms / reference for ms in others]
        levels.append(reference * min(unrest(timings), CALM))
    return [statistics.median(levels) * ratio for ratio in ratios]


def _float_bytes(bench: Bench) -> int:
    return sum(tensor.nbytes for tensor in bench.model.state_dict().values())


def fit(
    sites: Mapping[str, Site],
    options: Mapping[str, Sequence[Option]],
    edges: Sequence[Edge],
    chosen: Sequence[Mapping[str, Option]],
    profiles: Sequence[SiteTimes],
    wholes: Sequence[float],
) -> Costs:
    """The table from the options chosen in each probe and their whole times (ms); the float plan comes first.

    ``sites``: all sites of the record. ``profiles``: of the first probes, at least of the float plan.
    """
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
    times = np.asarray(wholes, dtype=np.float64)
    scaled = [_scaled(p, whole, sites) for p, whole in zip(profiles, wholes, strict=False)]
    kinds = [_kind(key, sites) for key in columns]
    prior = _prior(columns, kinds, edges, chosen, scaled)
    spread = 0.5 * np.abs(prior) + 0.5 * float(times.mean()) / max(len(options), 1)
    table, fixed, errors = _ridge(present, times, prior, _directions(prior, spread, kinds))
    return Costs(
        {key: float(table[i]) for key, i in columns.items() if len(key) == 2},
        {key: float(table[i]) for key, i in columns.items() if len(key) == 3},
        fixed,
        float(np.median(np.abs(errors))),
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


def _scaled(profile: SiteTimes, whole: float, sites: Mapping[str, Site]) -> SiteTimes:
    """The profile stretched to the whole time without a profiler; what is fused behind a site counts as its own."""
    factor = whole / profile.total if profile.total > 0 else 1.0
    heads = {member: site.name for site in sites.values() for member in site.epilogue}
    owned: dict[str, float] = defaultdict(float)
    for site, ms in profile.sites.items():
        owned[heads.get(site, site)] += factor * ms
    changed = {tensor: factor * ms for tensor, ms in profile.conversions.items()}
    return SiteTimes(owned, changed, factor * profile.other, whole, profile.source)


def _kind(key: Any, sites: Mapping[str, Site]) -> tuple[Hashable, Hashable]:
    """(the same operation or change of format, the same of the same shape) of an entry of the table."""
    if len(key) == 2:
        site, technique = key
        alike = (sites[site].kind, technique)
        return alike, (*alike, sites[site].macs, tuple(operand.shape for operand in sites[site].operands))
    edge, produced, consumed = key
    producer, consumer = sites.get(edge.producer), sites[edge.consumer]
    change = (producer.kind if producer is not None else "", consumer.kind, edge.operand, produced, consumed)
    return change, (*change, consumer.operands[edge.operand].shape)


def _prior(
    columns: Mapping[Any, int],
    kinds: Sequence[tuple[Hashable, Hashable]],
    edges: Sequence[Edge],
    chosen: Sequence[Mapping[str, Option]],
    profiles: Sequence[SiteTimes],
) -> Vector:
    """The profiled time of every entry: medians over the probes that contain it; of those alike, where none does."""
    seen: dict[Any, list[float]] = defaultdict(list)
    for choice, profile in zip(chosen, profiles, strict=False):
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
    found = {key: statistics.median(values) for key, values in seen.items()}
    alike: dict[Hashable, list[float]] = defaultdict(list)
    for key, kind in zip(columns, kinds, strict=True):
        if key in found:
            alike[kind[0]].append(found[key])
    return np.array(
        [
            found[key] if key in found else statistics.median(alike.get(kind[0], [0.0]))
            for key, kind in zip(columns, kinds, strict=True)
        ]
    )


def _directions(prior: Vector, spread: Vector, kinds: Sequence[tuple[Hashable, Hashable]]) -> Vector:
    """Moves of the table that the regression may combine, [entries, moves], each as long as it is likely.

    Each entry alone; twice as far, all of one shape and all of one operation together; and the profile's level, for
    one operation and for all.
    """
    moves = [*np.diag(spread)]

    def shared(groups: Iterable[Hashable], length: Vector) -> None:
        labels = list(groups)
        for group in dict.fromkeys(labels):
            member = np.array([label == group for label in labels])
            if member.sum() > 1:
                moves.append(2.0 * length * member)

    shared((shape for _, shape in kinds), spread)
    shared((operation for operation, _ in kinds), spread)
    shared((operation for operation, _ in kinds), 0.5 * prior)
    moves.append(2.0 * prior)
    return np.stack(moves, axis=1)


def _ridge(present: Vector, wholes: Vector, prior: Vector, moves: Vector) -> tuple[Vector, float, Vector]:
    """``(table, fixed, errors)``: ridge regression of the relative residuals on ``moves``, with a free ``fixed``.

    The penalty is the one of least squared error when each probe is predicted from the others (leave-one-out in
    closed form, Allen 1974, Technometrics 16:1, doi:10.1080/00401706.1974.10489157); ``errors`` are those, relative.
    """
    weight = 1.0 / wholes
    design = (present @ moves) * weight[:, None]
    target = (wholes - present @ prior) * weight
    constant = weight / float(np.linalg.norm(weight))
    inner = design - np.outer(constant, constant @ design)
    values, vectors = np.linalg.eigh(inner @ inner.T)
    values = np.maximum(values, 0.0)
    best: tuple[float, float, Vector] | None = None
    for penalty in 10.0 ** np.arange(-7.0, 2.1, 0.5):
        hat = (vectors * (values / (values + penalty))) @ vectors.T + np.outer(constant, constant)
        errors = (target - hat @ target) / np.maximum(1.0 - np.diag(hat), 1e-6)
        score = float(np.mean(errors**2))
        if best is None or score < best[0]:
            best = score, float(penalty), errors
    assert best is not None
    _, penalty, errors = best
    centred = target - constant * float(constant @ target)
    combined = inner.T @ (vectors @ ((vectors.T @ centred) / (values + penalty)))
    fixed = float(constant @ (target - design @ combined)) / float(np.linalg.norm(weight))
    return prior + moves @ combined, fixed, errors
