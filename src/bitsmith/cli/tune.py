"""``bitsmith quantize``, ``profile``, ``search`` and ``optimize``: from a model to a plan that runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, show

if TYPE_CHECKING:
    from torch import nn

    from ..profile import Profile
    from ..search.base import Point, Result
    from ..task import Task
    from ..technique import Step, Technique


def add(commands: Any) -> None:
    """Add the commands of this file."""
    quantize = commands.add_parser("quantize", help="put one technique everywhere, export, no search")
    arguments.add_model(quantize)
    arguments.add_data(quantize)
    arguments.add_target(quantize)
    quantize.add_argument("--technique", default="Int(8, 8)", metavar="T", help="such as 'Int(8, 8)' (the default)")
    quantize.add_argument("--exclude", nargs="+", default=[], metavar="SITE", help="sites that stay float; * matches")
    arguments.add_batch(quantize)
    arguments.add_seed(quantize)
    arguments.add_out(quantize, "folder for the plan and the exported file")
    quantize.set_defaults(run=run_quantize)

    profile = commands.add_parser("profile", help="measure what every site loses and costs under each technique")
    arguments.add_model(profile)
    arguments.add_data(profile, task=True)
    arguments.add_target(profile)
    arguments.add_techniques(profile)
    profile.add_argument("--sites", nargs="+", default=["*"], metavar="SITE", help="which sites may change; * matches")
    arguments.add_batch(profile)
    arguments.add_seed(profile)
    _add_store(profile)
    arguments.add_out(profile, "the profile, a .json file", "FILE")
    profile.set_defaults(run=run_profile)

    search = commands.add_parser("search", help="choose a plan from a profile")
    search.add_argument("profile", type=Path, metavar="PROFILE", help="what 'bitsmith profile' wrote")
    arguments.add_budget(search)
    measured = search.add_argument_group("measure whole plans (needed for --drop); all three or none")
    measured.add_argument("--model", metavar="MODEL", help="file.py:function, build() -> nn.Module")
    measured.add_argument("--data", metavar="DATA", help="file.py:function, task() -> bitsmith.Task")
    arguments.add_target(search, required=False)
    arguments.add_batch(search)
    arguments.add_seed(search)
    _add_store(search)
    arguments.add_out(search, "the plan, a .json file", "FILE")
    search.set_defaults(run=run_search)

    optimize = commands.add_parser("optimize", help="the main job: profile, search, export, verify, report")
    arguments.add_model(optimize)
    arguments.add_data(optimize, task=True)
    arguments.add_target(optimize)
    arguments.add_budget(optimize)
    arguments.add_techniques(optimize)
    arguments.add_batch(optimize)
    arguments.add_seed(optimize)
    _add_store(optimize)
    optimize.add_argument(
        "--prepare",
        action="store_true",
        help="prepare whole plans with all that quantize takes, not with bias correction alone: slower",
    )
    optimize.add_argument("--title", default="", help="of the report")
    arguments.add_out(optimize, "folder for plan.json, the exported file, report.html and report.json")
    optimize.set_defaults(run=run_optimize)


def _add_store(parser: Any) -> None:
    parser.add_argument(
        "--store", type=Path, metavar="FILE", help="keeps every measurement once (default: runs.db beside the output)"
    )


def run_quantize(options: Namespace) -> int:
    import bitsmith as bs

    from .._files import check_writable
    from ..bench import suffix
    from ..data import first_inputs
    from ..model.load import load_calibration, load_model

    folder = check_writable(options.out)
    target = arguments.target(options.target, options.threads)
    (technique,) = arguments.techniques([options.technique]) or []
    model = load_model(options.model)
    loader, forward = load_calibration(options.data)
    net = bs.quantize(
        model, loader, target, technique, exclude=tuple(options.exclude), forward=forward, seed=options.seed
    )
    plan = bs.plan_of(net)
    artifact = bs.export(net, target, folder / f"model{suffix(target)}", first_inputs(loader), batch=options.batch)
    show.plain(f"{len(plan)} sites under {technique}; the exported file has {artifact.mib:.3f} MiB")
    show.written(plan.save(folder / "plan.json"), artifact.path)
    show.plain(f"compare it with the simulation: bitsmith verify {options.model} {artifact.path} --data {options.data}")
    return 0


def run_profile(options: Namespace) -> int:
    import bitsmith as bs

    from ..model.load import load_model, load_task
    from .progress import TerminalProgress

    prepare_store(options, options.out.parent)
    target = arguments.target(options.target, options.threads)
    techniques = arguments.techniques(options.techniques or ["Int(8, 8)"]) or []
    model, task = load_model(options.model), load_task(options.data)
    with TerminalProgress() as progress:
        found = bs.profile(
            model,
            task,
            techniques,
            target,
            store=options.store,
            batch=options.batch,
            patterns=tuple(options.sites),
            seed=options.seed,
            progress=progress,
        )
    print_profile(found)
    show.written(found.save(options.out))
    return 0


def print_profile(profile: Profile) -> None:
    """Every row, the refused ones last with their reasons."""
    headings = ("site", "technique", "loss", "ms", "weights KiB", "mJ")
    mj = any(row.mj is not None for row in profile.rows)
    rows = [
        (
            row.site,
            str(row.technique),
            f"{row.loss:.3g}",
            f"{row.ms:.4f}",
            f"{row.bytes / 1024:.1f}",
            *(("" if row.mj is None else f"{row.mj:.4g}",) if mj else ()),
        )
        for row in profile.rows
        if not row.refused
    ]
    caption = (
        f"loss: {profile.loss_name}; ms per batch, {profile.source} on {profile.target}; beside the sites "
        f"{profile.fixed_ms:.4f} ms and {profile.fixed_bytes / 1024:.1f} KiB that no decision changes"
    )
    show.table(headings if mj else headings[:-1], rows, headings[2:], caption)
    refused = [(row.site, str(row.technique), row.refused) for row in profile.rows if row.refused]
    if refused:
        show.table(("not offered at", "technique", "because"), refused)
    for name, note in profile.notes.items():
        show.plain(f"{name}: {note}")
    for line in (*profile.assumptions, *profile.references):
        show.plain(f"{profile.target}: {line}")


def run_search(options: Namespace) -> int:
    import bitsmith as bs

    from .._files import check_writable
    from ..model.load import load_model, load_task
    from ..profile import Profile
    from ..search.base import BudgetError, SearchInterrupted
    from .progress import TerminalProgress

    check_writable(options.out.parent)
    budget = arguments.budget(options)
    given = [name for name in ("model", "data", "target") if getattr(options, name) is not None]
    if given and len(given) < 3:
        lacking = ", ".join(f"--{name}" for name in ("model", "data", "target") if name not in given)
        raise arguments.ArgumentError(
            f"whole plans are measured with --model, --data and --target: {lacking} is missing"
        )
    profile = Profile.load(options.profile)
    evaluate = None
    if given:
        prepare_store(options, options.out.parent)
        evaluate = bs.evaluator(
            load_model(options.model),
            load_task(options.data),
            arguments.target(options.target, options.threads),
            store=options.store,
            batch=options.batch,
            seed=options.seed,
        )
    with TerminalProgress() as progress:
        try:
            result = bs.search(profile, budget, options.minimize, evaluate=evaluate, progress=progress.told)
        except BudgetError as error:
            save_best(error, options.out)
            raise
        except SearchInterrupted as error:
            _save_so_far(error, options.out)
            raise
    print_frontier(result)
    show.written(result.plan.save(options.out))
    return 0


def print_frontier(result: Result) -> None:
    """The plans that no other plan beats, and which one was chosen."""
    more = [(name, label) for name, label in (("mj", "mJ"), ("mm2", "mm2")) if _has(result, name)]
    costs = ("ms", "MiB", *(label for _, label in more))
    headings = ("", *costs, "loss", "drop", "sites changed", "numbers")

    def drop(point: Point) -> str:
        got = point.evaluation
        if got is None or got.drop is None:
            return ""
        low, high = got.drop_interval or (got.drop, got.drop)
        return f"{got.drop:.4f} [{low:.4f}, {high:.4f}] n={got.samples}"

    rows = [
        (
            "->" if point is result.best else "",
            f"{point.value('ms'):.4f}",
            f"{point.value('mib'):.3f}",
            *(f"{point.value(name):.4g}" for name, _ in more),
            f"{point.loss:.3g}",
            drop(point),
            _changed(point),
            _numbers(point),
        )
        for point in result.frontier
    ]
    caption = f"{result.label}: least {result.minimize} within the limits; plans measured whole: {result.evaluations}"
    show.table(headings, rows, (*costs, "loss"), caption)


def _has(result: Result, quantity: str) -> bool:
    """Whether every plan has an energy, or an area."""
    return all(
        getattr(point, quantity) is not None or getattr(point.evaluation, quantity, None) is not None
        for point in result.frontier
    )


def _numbers(point: Point) -> str:
    """``predicted`` or ``evaluated``, and where costs come from if they were not measured."""
    source = "measured" if point.evaluation is None else point.evaluation.source
    return point.label if source == "measured" else f"{point.label}, {source}"


def _changed(point: Point) -> int:
    from ..techniques.float_ import Float

    return sum(technique != Float() for technique in point.plan.sites.values())


def _steps(model: nn.Module, task: Task, techniques: Sequence[Technique] | None) -> tuple[Step, ...]:
    """What ``quantize`` would prepare the first integer technique with."""
    import bitsmith as bs

    from ..data import first_inputs

    given = (technique for technique in techniques or () if isinstance(technique, bs.Int))
    found = bs.sites(model, first_inputs(task.calibration), forward=task.forward).values()
    return bs.default_steps(next(given, bs.Int(8, 8)), {site.kind for site in found if site.weight is not None})


def run_optimize(options: Namespace) -> int:
    import bitsmith as bs

    from ..model.load import load_model, load_task
    from ..report.terminal import summary
    from ..search.base import BudgetError, SearchInterrupted
    from .progress import TerminalProgress

    prepare_store(options, options.out)
    budget = arguments.budget(options)
    target = arguments.target(options.target, options.threads)
    techniques = arguments.techniques(options.techniques)
    model, task = load_model(options.model), load_task(options.data)
    with TerminalProgress() as progress:
        try:
            found = bs.optimize(
                model,
                task,
                target,
                budget,
                minimize=options.minimize,
                techniques=techniques,
                prepare=_steps(model, task, techniques) if options.prepare else None,
                store=options.store,
                batch=options.batch,
                seed=options.seed,
                folder=options.out,
                progress=progress,
                title=options.title or options.model,
            )
        except BudgetError as error:
            save_best(error, options.out / "plan.json")
            raise
        except SearchInterrupted as error:
            _save_so_far(error, options.out / "plan.json")
            raise
    summary(found.report, show.console())
    show.written(*written_by_optimize(options.out, found.artifact.path))
    return 0


def written_by_optimize(folder: Path, artifact: Path) -> list[Path]:
    """What lies in the folder afterwards."""
    return [
        path
        for path in (folder / "plan.json", artifact, folder / "report.html", folder / "report.json")
        if path.exists()
    ]


def prepare_store(options: Namespace, folder: Path) -> None:
    """Check that output and store can be written, before anything long begins, and settle where the store is."""
    from .._files import check_writable

    check_writable(folder)
    options.store = options.store or folder / "runs.db"
    check_writable(options.store.parent)


def save_best(error: Any, path: Path) -> None:
    """Save the plan that misses the budget by least, and say so on the error itself."""
    error.best.plan.save(path)
    error.add_note(f"the closest plan is saved: {path}")


def _save_so_far(interrupt: Any, path: Path) -> None:
    """Save the best plan that an interrupted search knows, and say so."""
    show.plain("interrupted: this is the best plan so far")
    show.written(interrupt.best.plan.save(path))
