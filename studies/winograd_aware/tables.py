"""What the cells say together: means over seeds, and differences on the same test images with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.harness import table
from benchmarks.paired import holm, mcnemar, mean_interval, ratio_interval
from numpy.typing import NDArray

from .._command import spread
from .grid import AFTER, CORRECTED, DIRECT, FIXED, FLEX, FLOAT, FORMS, ROUNDED, SHIPPED, TRAINED, Cell, array

Array = NDArray[Any]
ROUTES = (AFTER, CORRECTED, SHIPPED, ROUNDED, TRAINED, FIXED, FLEX)
TWICE = 2.0
"""Of direct int8's divergence from float: the most that F2 may have after training."""


@dataclass(frozen=True)
class Found:
    """One form by one route: ``right`` bool [seeds, n], ``kl`` [seeds, n], on the same samples everywhere."""

    seeds: tuple[int, ...]
    right: Array
    kl: Array

    @classmethod
    def of(cls, records: Mapping[int, Mapping[str, Any]]) -> Found:
        return cls(
            tuple(records),
            np.stack([array(record["right"]) for record in records.values()]),
            np.stack([np.array(record["kl"]) for record in records.values()]),
        )

    @property
    def samples(self) -> int:
        return int(self.right.shape[1])

    def at(self, seeds: Iterable[int]) -> Found:
        """Of these seeds only; one that depends on none stands for each."""
        rows = [0 if len(self.seeds) == 1 else self.seeds.index(seed) for seed in seeds]
        return Found(tuple(seeds), self.right[rows], self.kl[rows])


Results = Mapping[tuple[str, str], Found]
"""By form and route."""


def gathered(cells: Iterable[tuple[Cell, Mapping[str, Any]]]) -> dict[tuple[str, str], Found]:
    by: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for cell, record in cells:
        by.setdefault((cell.form.name, cell.route), {})[cell.seed] = record
    return {key: Found.of(records) for key, records in by.items()}


def common(one: Found, other: Found) -> list[int]:
    """The seeds that both have; one that depends on none has each."""
    if len(one.seeds) == 1 or len(other.seeds) == 1:
        return list(one.seeds if len(one.seeds) > len(other.seeds) else other.seeds)
    return sorted(set(one.seeds) & set(other.seeds))


def gained(better: Found, worse: Found) -> tuple[float, float, float]:
    """By how many points the first is right more often, and a 95 % bootstrap interval over samples of the mean over the
    seeds that both have."""
    shared = common(better, worse)
    first, second = better.at(shared), worse.at(shared)
    lost = 100.0 * (first.right.mean(0) - second.right.mean(0))
    return (float(lost.mean()), *mean_interval(lost))


def said(values: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in values)  # no -0.00
    return f"{mean} ({low} to {high})"


def accuracies(results: Results, title: str) -> None:
    """One line for each form and route."""
    lines = []
    for name in FORMS:
        for route in ROUTES:
            found = results.get((name, route))
            if found is None:
                continue
            rival = results.get((DIRECT.name, route)) if FORMS[name].rest is not None and name != DIRECT.name else None
            lines.append(
                [
                    name,
                    route,
                    str(len(found.seeds)),
                    spread(found.right.mean(1), percent=True),
                    said(gained(found, results[FLOAT.name, AFTER])),
                    "-" if rival is None else said(gained(found, rival)),
                    spread(1000.0 * found.kl.mean(1), digits=3),
                ]
            )
    heads = ["3x3 convolutions", "route", "seeds", "top-1 %", "points over float", "over direct int8, same route"]
    table(title, [*heads, "KL to float, 1e-3 nats"], lines)


@dataclass(frozen=True)
class Question:
    """A form against direct int8, both by one route, never trained. ``p``: McNemar's, by seed, corrected after Holm."""

    form: str
    route: str
    lost: tuple[float, float, float]
    p: tuple[float, ...]
    ratio: tuple[float, float, float]

    @property
    def worse(self) -> bool:
        """Significantly, in any seed."""
        return self.lost[0] > 0 and min(self.p) < 0.05

    @property
    def met(self) -> bool:
        return not self.worse and self.ratio[0] <= TWICE


def questions(results: Results) -> Iterator[Question]:
    """F2 by every route that trains nothing; the forms that should miss the bar, or pass it, as controls."""
    for name in FORMS:
        for route in (AFTER, CORRECTED, SHIPPED):
            mine, direct = results.get((name, route)), results.get((DIRECT.name, route))
            if mine is None or direct is None or name == DIRECT.name or FORMS[name].rest is None:
                continue
            lost = gained(direct, mine)
            shared = common(mine, direct)
            one, other = direct.at(shared), mine.at(shared)
            p = holm({str(seed): mcnemar(a, b) for seed, a, b in zip(shared, one.right, other.right, strict=True)})
            mean, against = other.kl.mean(0), one.kl.mean(0)
            ratio = (float(mean.mean() / against.mean()), *ratio_interval(mean, against))
            yield Question(name, route, lost, tuple(p.values()), ratio)


def after_training(results: Results, title: str) -> None:
    lines = [
        [
            one.form,
            one.route,
            said(one.lost),
            ", ".join(f"{p:.2g}" for p in one.p),
            said(one.ratio),
            "yes" if one.met else "no",
        ]
        for one in questions(results)
    ]
    heads = ["form", "route", "points lost to direct int8", "McNemar's p by seed", "KL over direct int8's"]
    table(title, [*heads, f"not worse, KL at most {TWICE:g} times"], lines)


GAINS = ((TRAINED, AFTER), (FIXED, ROUNDED), (FLEX, ROUNDED), (FLEX, FIXED), (FLEX, TRAINED))
"""What is held against what."""


def training(results: Results, title: str) -> None:
    """What training and trained transforms gain. Beyond direct int8's own gain: the control, its first line."""
    lines = []
    for name in FORMS:
        for route, base in GAINS:
            mine, other = results.get((name, route)), results.get((name, base))
            if mine is None or other is None:
                continue
            shared = common(mine, other)
            apart = [a - b for a, b in zip(mine.at(shared).right.mean(1), other.at(shared).right.mean(1), strict=True)]
            lines.append(
                [
                    name,
                    f"{route} - {base}",
                    spread(apart, percent=True),
                    said(gained(mine, other)),
                    _less(mine.at(shared), other.at(shared)),
                ]
            )
    table(title, ["form", "what against what", "points, over seeds", "points, over samples", "KL, ratio"], lines)


def _less(one: Found, other: Found) -> str:
    first, second = one.kl.mean(0), other.kl.mean(0)
    return said((float(first.mean() / second.mean()), *ratio_interval(first, second)))
