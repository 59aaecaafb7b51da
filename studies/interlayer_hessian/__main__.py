"""Losses that layers share: do they predict, do they order? ``python -m studies.interlayer_hessian``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness import table
from benchmarks.mixed_cells import MODEL, SPACES

import bitsmith as bs
from bitsmith.bench import Bench
from bitsmith.search.bisection import Bisection
from bitsmith.sensitivity.base import Pair
from bitsmith.sensitivity.inter_layer import InterLayer

from .._command import SEARCH_COLUMNS, Study, by, search_columns, spread
from .._guided import KEEP, Cell, Place, Subject, library
from .correlation import Held, Predictor, correlations, predictors, scores_of, sites_for, subsets

FORMATS = (
    bs.Int(4, 4, granularity="tensor"),
    bs.Int(4, 8, granularity="tensor"),
    bs.Int(8, 8, granularity="tensor"),
)
SETS = 40
FEW_SITES = 12
ALL = "all sites"
DEAR = ("resnet20",)
"""Networks whose Hessians and pairs of sites are affordable by default."""

HELD = {"resnet20": 150, "minilm": 64, "mobilenet_v1": 16}
"""Samples that the true loss of a set is taken over, by default."""

SHARES = {"resnet20": 0.5, "minilm": 0.25, "mobilenet_v1": 0.25}
SEARCHING = 0.4
"""The part of a network's time that searches may take; the correlations come first."""


def short(technique: bs.Int) -> str:
    """As in tables."""
    return f"W{technique.w}A{technique.a}"


Truths = dict[tuple[str, ...], dict[str, float]]


def truths(study: Study, subject: Subject, held: Held, technique: bs.Int, sites: list[str]) -> Truths:
    """The true losses of random sets of these sites; empty where the time was over before all were known."""
    found: Truths = {}
    for chosen in subsets(sites, SETS):
        key = subject.key(technique=repr(technique), sites=sorted(chosen), held=len(held.target))
        label = f"{subject.name}, {short(technique)}, true loss of {len(chosen)} sites"
        got = study.row("true losses", key, label, partial(held.truth, bs.Plan(dict.fromkeys(chosen, technique))))
        if got is None:
            return {}
        found[chosen] = got
    return found


@dataclass(frozen=True)
class Question:
    """One format at all ``sites`` of a network, or at a part of them. ``known``: where -> the true losses of sets."""

    technique: bs.Int
    sites: list[str]
    few: list[str]
    known: dict[str, Truths]

    def of(self, predictor: Predictor) -> tuple[list[Pair], dict[str, Truths]]:
        """What it has to score, and the sets that it can be asked about."""
        sites = self.few if predictor.few_sites else self.sites
        known = {where: t for where, t in self.known.items() if t and not (predictor.few_sites and where == ALL)}
        return [(site, self.technique) for site in sites], known


def questions(study: Study, subject: Subject, held: Held, dear: bool) -> Iterator[Question]:
    """One for each format."""
    for technique in FORMATS:
        sites = sites_for(held.bench, technique)
        few = sorted(random.Random(0).sample(sites, min(FEW_SITES, len(sites))))
        known = {ALL: truths(study, subject, held, technique, sites)}
        if dear:
            known[f"{len(few)} sites"] = truths(study, subject, held, technique, few)
        yield Question(technique, sites, few, known)


def correlate(study: Study, subject: Subject) -> None:
    """Rows of kind ``correlation``: one for each seed, format, label and choice of sites; seed by seed, so that time
    that runs out leaves whole seeds."""
    held = Held(subject, subject.bench(MODEL), None if study.options.full else HELD[subject.name])
    dear = study.options.full or subject.name in DEAR
    asked = list(questions(study, subject, held, dear))
    for seed in range(study.options.seeds):
        for question in asked:
            for name, predictor in predictors(subject.size.calibration, seed, dear, dear).items():
                pairs, known = question.of(predictor)
                if not known:
                    continue
                settings = {"technique": repr(question.technique), "predictor": repr(predictor), "seed": seed}
                settings |= {"library": library("sensitivity", "techniques")}
                sets = [sorted(map(sorted, found)) for found in known.values()]
                key = subject.key(**settings, sites=sets, held=len(held.target))
                label = f"{subject.name}, {short(question.technique)}, {name}, seed {seed}"
                compute = partial(asked_of, predictor, held.bench, subject, seed, pairs, known)
                got = study.row("correlations", key, label, compute)
                if got is None:
                    continue
                cost = {"passes": got["passes"], "seconds": got["seconds"]}
                for where, labels in got["ranks"].items():
                    row = {"kind": "correlation", "network": subject.name, "format": short(question.technique), **cost}
                    row |= {"sites": where, "n": len(pairs), "held": len(held.target), "seed": seed}
                    study.rows += [{**row, "predictor": said, **ranks} for said, ranks in labels.items()]


def asked_of(
    predictor: Predictor, bench: Bench, subject: Subject, seed: int, pairs: list[Pair], known: dict[str, Truths]
) -> dict[str, Any]:
    """How its ranks go with the true ones, and what it cost."""
    scores = scores_of(bench, subject.drawn(seed), predictor, pairs)
    technique = pairs[0][1]
    ranks = {where: correlations(scores, technique, predictor.with_cross, found) for where, found in known.items()}
    return {"ranks": ranks, "passes": scores.spent.passes, "seconds": scores.spent.seconds}


def cells(place: Place, samples: int, seeds: int, keeps: Sequence[float]) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds."""
    for seed in range(seeds):
        plain = InterLayer(samples=samples, shrink=False, seed=seed)
        shrunk = InterLayer(samples=samples, seed=seed)
        for keep in keeps:
            yield Cell(place, "mu=0 (diagonal)", plain, Bisection(order="marginal", mu=0.0), keep, seed)
            yield Cell(place, "mu=1", plain, Bisection(order="marginal", mu=1.0), keep, seed)
            yield Cell(place, "mu=1, shrunk", shrunk, Bisection(order="marginal", mu=1.0), keep, seed)
            yield Cell(place, "random order", None, Bisection(order="random", seed=seed), keep, seed)


def show(study: Study) -> None:
    reduced = "" if study.options.full else " (reduced)"
    found = [row for row in study.rows if row.get("kind") == "correlation"]
    for (network, where), rows in by(found, "network", "sites").items():
        formats = list(dict.fromkeys(row["format"] for row in rows))
        columns = ["predictor", "seeds", *(f"{f}: {what}" for f in formats for what in ("KL", "drop")), "samples"]
        lines = []
        for (label,), mine in by(rows, "predictor").items():
            line = [label, str(len({row["seed"] for row in mine}))]
            for f in formats:
                line += [spread((r[what] for r in mine if r["format"] == f), digits=3) for what in ("kl", "drop")]
            lines.append([*line, spread((row["passes"] for row in mine), digits=0)])
        title = f"{network}{reduced}: Spearman's coefficient with the true loss of {SETS} sets, {where}, per tensor"
        table(f"{title}; {rows[0]['held']} held-out samples", columns, lines)
    searches = [row for row in study.rows if "kind" not in row]
    for (network, target), rows in by(searches, "network", "target").items():
        lines = [
            [metric, f"{keep:.1%}", *search_columns(mine)]
            for (keep, metric), mine in by(rows, "keep", "metric").items()
        ]
        title = f"{network}, {target}, bisection{reduced}: {rows[0]['samples']} samples decide"
        table(title, ["order", "kept", *SEARCH_COLUMNS], lines)


def main() -> None:
    study = Study.start("interlayer_hessian", __doc__ or "", 25.0)
    total = sum(SHARES[name] for name in study.chosen)
    techniques = tuple(SPACES["modelled"])
    place = Place("modelled 4/8/16", MODEL, techniques, techniques[0])
    for name in study.chosen:
        share = SHARES[name] / total
        study.part(share * (1.0 - SEARCHING))
        subject = study.subject(name)
        correlate(study, subject)
        study.part(share * SEARCHING)
        seed = 0
        for cell in cells(place, subject.size.calibration, study.options.seeds, KEEP):
            if cell.seed != seed:
                subject.forget()
                seed = cell.seed
            study.search(subject, cell, (place,))
    show(study)
    study.finish()


if __name__ == "__main__":
    main()
