"""``bitsmith explore``: the whole frontier of drop, time, size and energy, and the plan on it that keeps the limits."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, show
from .tune import prepare_store, print_frontier

if TYPE_CHECKING:
    from ..report.data import Report


def add(commands: Any) -> None:
    """Add the command of this file."""
    explore = commands.add_parser("explore", help="measure the whole frontier of drop, time, size and energy")
    arguments.add_model(explore)
    arguments.add_data(explore, task=True)
    arguments.add_target(explore)
    explore.add_argument(
        "--objective",
        nargs="+",
        choices=(*arguments.QUANTITIES, "accuracy", "latency", "size", "energy", "area"),
        default=["drop", "ms"],
        metavar="Q",
        help="size, latency, energy or area (mib, ms, mj, mm2), against the accuracy; or two or more, drop among them "
        "or not (drop ms)",
    )
    arguments.add_budget(explore)
    explore.add_argument(
        "--accuracy-drop", type=float, metavar="P", help="the same as --drop, in points: 1 stands for --drop 0.01"
    )
    arguments.add_techniques(explore)
    explore.add_argument(
        "--sampler", choices=("nsga2", "tpe"), default="nsga2", help="what proposes plans: nsga2 (the default) or tpe"
    )
    explore.add_argument("--trials", type=arguments.positive, default=60, metavar="N", help="plans to measure (60)")
    explore.add_argument(
        "--train",
        type=arguments.positive,
        metavar="STEPS",
        help="train what needs it for so many batches before it is scored, at a site alone and in whole plans, towards "
        "the float network; without it such techniques are left out",
    )
    arguments.add_batch(explore)
    arguments.add_seed(explore)
    explore.add_argument("--store", type=Path, metavar="FILE", help="keeps every measurement once (OUT/runs.db)")
    explore.add_argument(
        "--storage",
        metavar="URL",
        help="keeps the trials: a file (OUT/study.db), or a database that several machines share, such as "
        "postgresql://user:password@host/database",
    )
    explore.add_argument("--study", metavar="NAME", help="of the trials in the storage (default: from what is asked)")
    arguments.add_out(explore, "folder for the frontier, its plans and its page")
    explore.set_defaults(run=run_explore)


def run_explore(options: Namespace) -> int:
    from ..bench import Bench
    from ..explore import every_technique, explore_bench, objectives_of
    from ..learn.distil import Distil
    from ..model.load import load_model, load_task
    from ..search.pareto import Pareto
    from ..search.proposals import require
    from ..techniques.int_ import Int
    from .progress import TerminalProgress

    require()
    prepare_store(options, options.out)
    if options.accuracy_drop is not None:
        if options.drop is not None:
            raise arguments.ArgumentError("--accuracy-drop and --drop are the same limit: give one of them")
        options.drop = options.accuracy_drop / 100.0
    budget, objectives = arguments.budget(options), objectives_of(options.objective)
    storage = options.storage or options.out / "study.db"
    Pareto(objectives, options.sampler, storage=storage, study="").left()  # what cannot be used is told first
    target = arguments.target(options.target, options.threads)
    everything = options.techniques == ["all"]
    offered = every_technique() if everything else arguments.techniques(options.techniques) or [Int(8, 8)]
    model, task = load_model(options.model), load_task(options.data)
    with TerminalProgress() as progress:
        bench = Bench.open(
            model, task, target, store=options.store, batch=options.batch, seed=options.seed, progress=progress
        )
        found = explore_bench(
            bench,
            offered,
            objectives,
            budget,
            options.minimize,
            options.sampler,
            options.trials,
            storage,
            options.study,
            options.out,
            options.model,
            progress.told,
            None if options.train is None else Distil(options.train),
        )
    print_frontier(dataclasses.replace(found.result, frontier=found.front))
    print_techniques(found.report)
    for line in found.profile.assumptions:
        show.plain(f"{found.profile.target}: {line}")
    show.written(*found.files)
    return 0


def print_techniques(report: Report) -> None:
    """What became of each technique: first those that were chosen, then what came nearest, last what is refused."""
    order = ("", "nothing predicted", "accuracy", "cost", "accuracy and cost", "not supported")
    rows = sorted(report.techniques, key=lambda row: (-row.chosen, order.index(row.lost_by)))
    show.table(
        ("technique", "sites", "lost by", "why"),
        [(row.technique, str(row.chosen), row.lost_by, row.why) for row in rows],
        ("sites",),
        f"sites: where it was chosen, by name in the report; why: one change of the chosen plan as predicted, loss in "
        f"{report.loss_name}, and the measured plans that have it",
    )
