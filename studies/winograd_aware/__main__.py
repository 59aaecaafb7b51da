"""F2, F4 and F6 after training, trained, and with trained transforms: ``python -m studies.winograd_aware``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from benchmarks.harness import table

import bitsmith as bs
from bitsmith.cli.progress import TerminalProgress
from bitsmith.progress import Progress
from bitsmith.zoo.data import data_root

from .._command import Study, spread
from .._guided import Size, Subject
from .._resnet20 import TRAINING, VALIDATION, network, task_of
from . import tables, winas
from .grid import (
    AFTER,
    CORRECTED,
    DIRECT,
    FIXED,
    FLEX,
    FLOAT,
    FORMS,
    ROUNDED,
    SHIPPED,
    TILES,
    TRAINED,
    Bed,
    Cell,
    Form,
    Settings,
)
from .grid import array as right_of

SHARES = {"tune": 0.5, "grid": 0.65, "floats": 0.4, "images": 0.5, "winas": 0.35, "modelled": 0.35}
"""Of the time, by part."""
DEFAULT = ("grid", "winas")

SIZE = Size(256, 64)
"""Calibration samples that a seed draws."""

STEPS, FULL_STEPS, TUNING_STEPS = 60, 1000, 60
SEARCH_STEPS = 60
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Adam's, tried from the least on, until one is worse than the one before."""
TUNING_SEED = 100
"""Of the cells that settings are chosen with; no result has it."""

TUNED = ((DIRECT.name, TRAINED), *((f"F{tile} int8", route) for tile in (4, 6) for route in (TRAINED, FIXED, FLEX)))
"""Forms and routes that a rate is chosen for."""

RATE: Mapping[tuple[str, str], float] = dict(zip(TUNED, (1e-5, 1e-4, 1e-5, 1e-5, 1e-5, 1e-3, 3e-4), strict=True))
"""What was chosen."""


def settings_of(form: Form, route: str, steps: int, images: str = "lossless") -> Settings:
    """Float forms train as those in 8 bits do, F2 and 16-bit taps as direct int8. What has several tiles trains as its
    greatest."""
    winograd = [t for t in (form.technique, *dict(form.own).values()) if isinstance(t, bs.Winograd)]
    tiles = [t.tile for t in winograd if t.tap_bits != 16]
    tile = max(tiles, default=2)
    like = (DIRECT.name, TRAINED) if tile == 2 else (f"F{tile} int8", route)
    return Settings(steps, RATE[like], images=images)


def untrained(bed: Bed, seeds: int) -> Iterator[Cell]:
    """What no step of training is needed for. Float forms depend on no seed; shipped are those with kernels."""
    routes = {form.name: [AFTER, CORRECTED] for form in FORMS.values()}
    for form in FORMS.values():
        routes[form.name] += [] if bed.refused(form) else [SHIPPED]
        routes[form.name] += [ROUNDED] if form.winograd is not None and form.winograd.tap_bits == 8 else []
    for form in FORMS.values():
        if form.rest is None:
            yield Cell(form, AFTER, 0)
    for seed in range(seeds):
        for form in FORMS.values():
            if form.rest is not None:
                yield from (Cell(form, route, seed) for route in routes[form.name])


QUANTIZED = (
    (DIRECT.name, TRAINED),
    *((f"F{tile} int8", route) for tile in TILES for route in (TRAINED, FIXED, FLEX)),
)
FLOATING = ((FLOAT.name, TRAINED), *((f"F{tile} fp32", route) for tile in TILES for route in (TRAINED, FLEX)))
"""Forms and routes that are trained; the float ones have nothing to recover."""


def trained(seeds: int, steps: int, routes: Sequence[tuple[str, str]]) -> Iterator[Cell]:
    """Seed by seed, so that time that runs out leaves whole seeds."""
    for seed in range(seeds):
        for form, route in routes:
            yield Cell(FORMS[form], route, seed, settings_of(FORMS[form], route, steps))


def on_jpeg(seeds: int, steps: int) -> Iterator[Cell]:
    for seed in range(seeds):
        for form, route in ((DIRECT.name, TRAINED), ("F4 int8", TRAINED), ("F4 int8", FLEX)):
            yield Cell(FORMS[form], route, seed, settings_of(FORMS[form], route, steps, "jpeg"))


def run(
    study: Study, bed: Bed, cells: Sequence[Cell], split: str, progress: Progress, what: str
) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells' records, from the store or made; a row of the results for each."""
    missing = [cell for cell in cells if study.store.get("winograd aware", bed.key(cell, split)) is None]
    minutes = sum(cell.seconds for cell in missing) / 60.0
    if len(cells) > 1:
        print(f"{what}: {len(cells)} networks, {len(missing)} to be made, about {minutes:.0f} minutes on a quiet core")
        progress.start(f"{what}, networks", len(missing))
    found = []
    for cell in cells:
        known = cell not in missing
        label = f"{what}, {cell.name}"
        record = study.row("winograd aware", bed.key(cell, split), label, partial(bed.record, cell, split))
        if not known and len(cells) > 1:
            progress.advance()
        if record is None:
            continue
        found.append((cell, record))
        settings = cell.settings
        row = {"part": what, "form": cell.form.name, "route": cell.route, "seed": cell.seed, "split": split}
        row |= {} if settings is None else {"steps": settings.steps, "rate": settings.rate, "images": settings.images}
        top1, kl = float(right_of(record["right"]).mean()), float(np.mean(record["kl"]))
        study.rows.append({**row, "samples": len(record["kl"]), "top1": top1, "kl": kl, "gap": record["largest gap"]})
    return found


def tune(study: Study, bed: Bed, progress: Progress) -> None:
    """Adam's rate for each form and route, by the divergence on held-out training images."""
    steps, lines = min(study.options.steps, TUNING_STEPS), []
    most = len(TUNED) * len(RATES)
    minutes = most * steps * 0.35 / 60
    print(f"tune: at most {most} networks, {minutes / 2:.0f} to {minutes:.0f} minutes on a quiet core")
    for form, route in TUNED:
        untouched = AFTER if route == TRAINED else ROUNDED
        said = run(study, bed, [Cell(FORMS[form], untouched, TUNING_SEED)], "validation", progress, "tune")
        for rate in RATES:
            got = run(
                study,
                bed,
                [Cell(FORMS[form], route, TUNING_SEED, Settings(steps, rate))],
                "validation",
                progress,
                "tune",
            )
            said += got
            if not got or (len(said) > 2 and divergence_of(said[-1]) > divergence_of(said[-2])):
                break
        shown = [f"{1e3 * divergence_of(one):.2f} ({right_of(one[1]['right']).mean():.1%})" for one in said]
        lines.append([form, route, *shown, *["-"] * (1 + len(RATES) - len(shown))])
    heads = ["3x3 convolutions", "route", "not trained", *(f"{rate:g}" for rate in RATES)]
    title = f"KL to float in 1e-3 nats (top-1), {steps} steps at these rates, {VALIDATION} held-out training images"
    table(title, heads, lines)


def divergence_of(one: tuple[Cell, Mapping[str, Any]]) -> float:
    return float(np.mean(one[1]["kl"]))


def grid(study: Study, bed: Bed, progress: Progress) -> None:
    options = study.options
    for form in FORMS.values():
        if form.rest is not None and bed.refused(form):
            print(f"{form.name} is not shipped: {bed.refused(form)}")
    cells = [*untrained(bed, options.seeds), *trained(options.seeds, options.steps, QUANTIZED)]
    found = run(study, bed, cells, "test", progress, "grid")
    results = tables.gathered(found)
    if (FLOAT.name, AFTER) not in results:
        return
    count = results[FLOAT.name, AFTER].samples
    where = f"ResNet-20 (reduced), {options.steps} steps, {count} test images"
    tables.accuracies(results, f"{where}: mean ± standard deviation over seeds, differences with 95 % intervals")
    tables.after_training(results, f"{where}: without training, against direct int8 on the same images")
    tables.training(results, f"{where}: what training gains, points of top-1 and ratio of KL, 95 % intervals")
    for cell, record in found:
        if cell.form.rest is None and cell.form != FLOAT and cell.settings is None:
            print(f"{cell.form.name}, not trained: logits within {record['largest gap']:.2g} of direct fp32's")


def floats(study: Study, bed: Bed, progress: Progress) -> None:
    """What training does where nothing is quantized."""
    options = study.options
    cells = [*untrained(bed, 0), *trained(options.seeds, options.steps, FLOATING)]
    results = tables.gathered(run(study, bed, cells, "test", progress, "floats"))
    if (FLOAT.name, AFTER) in results:
        count = results[FLOAT.name, AFTER].samples
        tables.accuracies(results, f"float ResNet-20 (reduced), {options.steps} steps, {count} test images")


def images(study: Study, bed: Bed, progress: Progress) -> None:
    """The same trainings on the lossless images and on the JPEG ones."""
    options = study.options
    jpeg = list(on_jpeg(options.seeds, options.steps))
    lossless = [Cell(c.form, c.route, c.seed, settings_of(c.form, c.route, options.steps)) for c in jpeg]
    found = {
        kind: tables.gathered(run(study, bed, cells, "test", progress, f"images, {kind}"))
        for kind, cells in (("lossless", lossless), ("JPEG", jpeg))
    }
    lines = []
    for key, mine in found["JPEG"].items():
        other = found["lossless"].get(key)
        top1 = ["-" if one is None else spread(one.right.mean(1), percent=True) for one in (other, mine)]
        better = "-" if other is None else tables.said(tables.gained(mine, other))
        lines.append([*key, str(len(mine.seeds)), *top1, better])
    heads = ["3x3 convolutions", "route", "seeds", "lossless, top-1 %", "JPEG, top-1 %", "JPEG - lossless"]
    table(f"trained on {TRAINING} lossless or 50000 JPEG images (reduced), {options.steps} steps", heads, lines)


def choices(study: Study, bed: Bed, progress: Progress, modelled: bool = False) -> None:
    """wiNAS against one choice everywhere, trained alike (as in the grid). A plan that two seeds find is timed once."""
    options, what = study.options, "modelled" if modelled else "measured"
    if not modelled:
        lacking = bed.refused(FORMS["F2 int8"])
        if lacking:
            print(f"wiNAS on measured times is left out: {lacking}")
            return
    latency = winas.multiplications(bed) if modelled else winas.times_of_sites(bed)
    if not modelled:
        winas.site_table(bed, latency)
    weights = winas.FULL_WEIGHTS if options.full else (winas.WEIGHT,)
    search = Settings(options.search_steps, RATES[0])
    names = winas.MODELLED if modelled else winas.UNIFORM
    cells, forms = [], [*(FORMS[name] for name in names), winas.fastest(bed, latency)]
    everywhere = tuple(forms)
    for seed in range(options.seeds):
        mine = [winas.learned(study, bed, latency, what, weight, seed, search, progress) for weight in weights]
        forms += [form for form in mine if form is not None and form not in forms]
        for form in (*everywhere, *(form for form in mine if form is not None)):
            cells.append(Cell(form, TRAINED, seed, settings_of(form, TRAINED, options.steps)))
    compare = winas.compare_models if modelled else winas.compare
    compare(study, bed, forms, run(study, bed, cells, "test", progress, f"winas, {what}"))


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "winograd_aware",
        __doc__ or "",
        25.0,
        argv,
        parts=tuple(SHARES),
        seeds=3,
        full=f"every part, {FULL_STEPS} steps, no limit of time: hours",
        store="winograd_aware",
        more={
            "steps": (int, None, f"of each training ({STEPS}; {FULL_STEPS} with --full)"),
            "search_steps": (int, SEARCH_STEPS, f"of each search of wiNAS ({SEARCH_STEPS})"),
        },
    )
    options = study.options
    options.steps = options.steps or (FULL_STEPS if options.full else STEPS)
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    subject = Subject("resnet20", network(root), task_of(root), SIZE, study.store)
    bed = Bed(subject, root)
    chosen = options.only or (tuple(SHARES) if options.full else DEFAULT)
    with TerminalProgress() as progress:
        for name, part in (
            ("tune", tune),
            ("grid", grid),
            ("floats", floats),
            ("images", images),
            ("winas", choices),
            ("modelled", partial(choices, modelled=True)),
        ):
            if name in chosen:
                study.part(SHARES[name] / sum(SHARES[one] for one in chosen))
                part(study, bed, progress)
    study.finish()


if __name__ == "__main__":
    main()
