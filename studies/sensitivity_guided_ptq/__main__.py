"""Three sensitivities and ours, two searches, a random control: ``python -m studies.sensitivity_guided_ptq``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.harness import table
from benchmarks.mixed_cells import MODEL, SPACES

import bitsmith as bs
from bitsmith.search.bisection import Bisection
from bitsmith.search.greedy import Greedy
from bitsmith.sensitivity.base import Sensitivity
from bitsmith.sensitivity.hessian_trace import HessianTrace
from bitsmith.sensitivity.inter_layer import InterLayer
from bitsmith.sensitivity.noise import NoiseInjection
from bitsmith.sensitivity.quantization_error import QuantizationError

from .._command import SEARCH_COLUMNS, Study, by, search_columns, spread
from .._guided import KEEP, Cell, Place

SHARES = {"resnet20": 0.5, "minilm": 0.27, "mobilenet_v1": 0.23}
"""Of the time, by network."""


def metrics(samples: int, seed: int) -> Mapping[str, Sensitivity]:
    """On so many samples: as many as a seed draws, fewer where every site costs a pass of them."""
    few = max(samples // 4, 8)
    return {
        "quantization error": QuantizationError(),
        "noise": NoiseInjection(samples=few, seed=seed),
        "Hessian trace": HessianTrace(samples=few, most=8, seed=seed),
        "ours (diagonal)": InterLayer(mu=0.0, samples=samples, seed=seed),
    }


def places(threads: int) -> tuple[Place, Place]:
    modelled = tuple(SPACES["modelled"])
    return (
        Place("modelled 4/8/16", MODEL, modelled, modelled[0]),
        Place("measured int8", bs.targets.OnnxRuntime(threads=threads), tuple(SPACES["int8"])),
    )


def cells(
    where: Sequence[Place], samples: int, seeds: int, keeps: Sequence[float], greedy: Sequence[Place]
) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds. ``greedy``: where that search is run as well, at the
    first of the parts that are kept: it evaluates a plan for every site and technique."""
    for seed in range(seeds):
        for place in where:
            for keep in keeps:
                for name, metric in metrics(samples, seed).items():
                    yield Cell(place, name, metric, Bisection(order="loss"), keep, seed)
                yield Cell(place, "random order", None, Bisection(order="random", seed=seed), keep, seed)
        for place in greedy:
            for name, metric in metrics(samples, seed).items():
                yield Cell(place, name, metric, Greedy(order="loss"), keeps[0], seed)


def main() -> None:
    study = Study.start("sensitivity_guided_ptq", __doc__ or "", 25.0)
    full, seeds = bool(study.options.full), study.options.seeds
    total = sum(SHARES[name] for name in study.chosen)
    where = places(study.options.threads)
    for name in study.chosen:
        study.part(SHARES[name] / total)
        subject = study.subject(name)
        samples = subject.size.calibration
        greedy = where if full else where[:1]
        seed = 0
        for cell in cells(where, samples, seeds, KEEP, greedy):
            if cell.seed != seed:
                subject.forget()
                seed = cell.seed
            study.search(subject, cell, where)
    for (network, target), rows in by(study.rows, "network", "target").items():
        measured = any(row["measured_saved"] is not None for row in rows)
        columns = ["metric", "search", "kept", *SEARCH_COLUMNS, *(["saved %, timed"] if measured else [])]
        lines = []
        for (keep, search, metric), mine in by(rows, "keep", "search", "metric").items():
            line = [metric, search.lower(), f"{keep:.1%}", *search_columns(mine)]
            lines.append([*line, *([spread((r["measured_saved"] for r in mine), True, 1)] if measured else [])])
        reduced = "" if full else " (reduced)"
        table(f"{network}, {target}{reduced}: {rows[0]['samples']} samples decide", columns, lines)
    study.finish()


if __name__ == "__main__":
    main()
