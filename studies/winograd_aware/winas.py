"""wiNAS against one choice everywhere: accuracy, trained alike and simulated, and the measured time of the files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import table
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.plan import Plan
from bitsmith.progress import Progress
from bitsmith.sampling import RandomAccess
from bitsmith.targets.base import Timing
from bitsmith.task import evaluating
from bitsmith.technique import Technique

from .. import _guided
from .._command import Study, spread
from .._images import Augmented
from . import tables
from .grid import BATCH, FORMS, INT8, TARGET, TRAINED, Bed, Cell, Form, Settings, softened

UNIFORM = ("direct int8", "F2 int8", "F4 int8", "F4 16-bit taps")
"""What has native kernels, so a time that can be measured: F6 and flex have none and are left out."""

MODELLED = (*UNIFORM, "F6 int8")
"""What multiplications can be counted for."""

WEIGHT, FULL_WEIGHTS = 0.3, (0.1, 0.3, 1.0)
"""Of latency in the search's loss, in nats for the time of direct int8 everywhere."""
LOGIT_RATE = 0.05
ROUNDS = 200
"""In which files are timed, interleaved."""


class Taught:
    """A loader whose targets are what the teacher says of its inputs."""

    def __init__(self, loader: Iterable[tuple[Tensor, Any]], teacher: nn.Module) -> None:
        self.loader, self.teacher = loader, teacher

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, _ in self.loader:
            with evaluating(self.teacher):
                wanted = self.teacher(inputs)
            yield inputs, wanted


def techniques(names: Sequence[str] | None = None) -> dict[str, Technique]:
    """Of forms, by default those of :data:`UNIFORM`."""
    return {name: technique for name in names or UNIFORM if (technique := FORMS[name].technique) is not None}


def times_of_sites(bed: Bed) -> dict[tuple[str, Technique], float]:
    """Measured ms by site and technique, of the sites that are decided."""
    table_of = _guided.costs(bed.subject, TARGET, tuple(techniques().values()))
    wanted = set(techniques().values())
    return {
        (row.site, row.technique): row.ms
        for row in table_of.rows
        if not row.refused and row.site in bed.fitting and row.technique in wanted
    }


Times = Mapping[tuple[str, Technique], float]


def multiplications(bed: Bed) -> dict[tuple[str, Technique], float]:
    """A model, nowhere measured: millions of 8-bit multiplications at batch 1, as if transforms were free. By output
    and pair of channels 9, 4, 2.25 and 1.78 for direct, F2, F4, F6 (Lavin and Gray 2016); 16-bit taps count twice."""
    found: dict[tuple[str, Technique], float] = {}
    for name in bed.fitting:
        macs = bed.sites[name].macs / bed.sites[name].operands[0].shape[0]
        for technique in techniques(MODELLED).values():
            saved = 1.0
            if isinstance(technique, bs.Winograd):
                saved = ((technique.tile + 2) / technique.tile) ** 2 / 9 * technique.tap_bits / 8
            found[name, technique] = macs * saved / 1e6
    return found


def searched(
    bed: Bed, latency: Times, weight: float, seed: int, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """The plan of one search on training images; its choices are judged on the held-out ones."""
    model, drawn, judging = bed.subject.model, bed.subject.drawn(seed), bed.subject.task.validation
    assert isinstance(judging, RandomAccess)
    found = bs.differentiable_search(
        model,
        list(dict.fromkeys(technique for _, technique in latency)),
        Taught(Augmented(bed.pool(settings.images), BATCH), model),
        Taught(Augmented(judging, BATCH), model),
        latency,
        softened,
        steps=settings.steps,
        latency_weight=weight,
        lr=settings.rate,
        logit_lr=LOGIT_RATE,
        calibration=drawn.calibration,
        seed=seed,
        progress=progress,
    )
    least = min(max(row.values()) for row in found.probabilities.values())
    plan = found.plan.to_json()
    return {"plan": plan, "ms": found.ms, "reference ms": found.reference_ms, "least certain": least}


def learned(
    study: Study, bed: Bed, latency: Times, what: str, weight: float, seed: int, settings: Settings, progress: Progress
) -> Form | None:
    """What one search chose, as a form; None once the time is over. ``what``: the times are."""
    key = {"weight": weight, "seed": seed, "steps": settings.steps, "rate": [settings.rate, LOGIT_RATE], "batch": BATCH}
    key |= {"latency": sorted([site, repr(t), ms] for (site, t), ms in latency.items())}
    key = bed.subject.key(search=key, library=_guided.library("learn", "techniques"))
    label = f"wiNAS, {what}, weight {weight:g}, seed {seed}"
    found = study.row("winas", key, label, lambda: searched(bed, latency, weight, seed, settings, progress))
    if found is None:
        return None
    plan = Plan.from_json(found["plan"])
    chosen = list(plan.sites.values())
    counts = {name: chosen.count(technique) for name, technique in techniques(MODELLED).items()}
    row = {"part": "winas search", "times": what, "weight": weight, "seed": seed, "sites": counts, "table": found["ms"]}
    study.rows.append({**row, "table, direct": found["reference ms"], "least certain": found["least certain"]})
    print(f"{label}: {counts}, least certain site {found['least certain']:.2f}")
    return Form(f"wiNAS, {what}, weight {weight:g}", INT8, INT8, tuple(sorted(plan.sites.items())))


def fastest(bed: Bed, latency: Times) -> Form:
    """The control: the fastest technique of each site by the same table, and nothing learned."""
    own: dict[str, tuple[float, Technique]] = {}
    for (site, technique), ms in latency.items():
        own[site] = min(own.get(site, (ms, technique)), (ms, technique), key=lambda one: one[0])
    return Form("fastest by the table", INT8, INT8, tuple(sorted((site, t) for site, (_, t) in own.items())))


def site_table(bed: Bed, found: Times) -> None:
    lines = []
    for site in bed.fitting:
        shape = bed.sites[site].operands[0].shape
        ms = [found.get((site, technique)) for technique in techniques().values()]
        lines.append([site, f"{shape[1]}@{shape[2]}", *("-" if one is None else f"{1e3 * one:.1f}" for one in ms)])
    table("measured time of each site in OpenVINO, batch 1, 1 thread, us", ["site", "map", *techniques()], lines)


def timed(bed: Bed, forms: Sequence[Form]) -> list[Timing]:
    """Of the files, interleaved in one run; the first is the float network's."""
    bench, plans = bed.subject.bench(TARGET), [Plan(), *map(bed.shipped, forms)]
    known = bed.subject.store.get("time", bench.time_key(plans, ROUNDS)) is not None
    load = "kept from an earlier run" if known else ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"timing {len(plans)} files, load: {load}", flush=True)
    return bench.times(plans, ROUNDS)


def compare(study: Study, bed: Bed, forms: Sequence[Form], cells: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """Accuracy and time of each form; ``forms`` are those whose files are timed."""
    timings = timed(bed, forms)
    results = tables.gathered(cells)
    plain, direct = timings[0], timings[1]
    of = dict(zip(forms, timings[1:], strict=True))
    lines = [["direct fp32", "-", "-", "-", f"{plain.ms:.3f} ± {plain.spread:.3f}", f"{direct.ms / plain.ms:.2f}"]]
    for name in dict.fromkeys(form.name for form in forms):
        mine = [timing for form, timing in of.items() if form.name == name]
        found, rival = results.get((name, TRAINED)), results.get((UNIFORM[0], TRAINED))
        over = "-" if found is None or rival is None or name == UNIFORM[0] else tables.said(tables.gained(found, rival))
        top1 = "-" if found is None else spread(found.right.mean(1), percent=True)
        kl = "-" if found is None else spread(1e3 * found.kl.mean(1))
        ms = ", ".join(f"{one.ms:.3f} ± {one.spread:.3f}" for one in mine)
        faster = ", ".join(f"{direct.ms / one.ms:.2f}" for one in mine)
        lines.append([name, top1, over, kl, ms, faster])
        study.rows += [{"part": "winas times", "form": name, "ms": t.ms, "spread": t.spread} for t in mine]
    heads = ["3x3 convolutions", "top-1 %", "points over direct int8", "KL, 1e-3 nats", "ms, measured"]
    table(f"one choice and wiNAS (reduced), batch 1, 1 thread, {ROUNDS} rounds", [*heads, "x direct int8"], lines)


def compare_models(study: Study, bed: Bed, forms: Sequence[Form], cells: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """Accuracy and modelled multiplications of each form; nothing is timed."""
    model, results, lines = multiplications(bed), tables.gathered(cells), []
    total = {form: sum(model[site, bed.plan(form)[site]] for site in bed.fitting) for form in forms}
    for name in dict.fromkeys(form.name for form in forms):
        found, rival = results.get((name, TRAINED)), results.get((UNIFORM[0], TRAINED))
        if found is None or rival is None:
            continue
        over = "-" if name == UNIFORM[0] else tables.said(tables.gained(found, rival))
        mine = [count for form, count in total.items() if form.name == name]
        cells_ = [spread(found.right.mean(1), percent=True), over, spread(1e3 * found.kl.mean(1))]
        lines.append([name, *cells_, ", ".join(f"{one:.1f}" for one in mine), f"{total[forms[0]] / min(mine):.2f}"])
        study.rows.append({"part": "winas modelled", "form": name, "multiplications": mine})
    heads = ["3x3 convolutions", "top-1 %", "points over direct int8", "KL, 1e-3 nats", "M multiplications, modelled"]
    table("one choice and wiNAS on a model of multiplications (reduced)", [*heads, "fewer, at best"], lines)
