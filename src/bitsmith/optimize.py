"""The main job: a trained network in, a faster one that really runs out, with the proof."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ._files import check_writable
from .bench import Bench, suffix
from .compare import drop
from .data import batch_size
from .evaluate import Evaluator
from .gradual import CERTAINTY, Certainty
from .plan import Budget, Plan
from .prepare.correct_bias import CorrectBias
from .profile import Profile, measure
from .progress import Progress, Silent, counted
from .report.compose import report
from .report.data import Report
from .search import BudgetError, Result, Search, objective, search
from .search.exact import Exact
from .sensitivity.base import Sensitivity
from .sensitivity.inter_layer import DIAGONAL
from .store import Store, machine_key
from .targets.base import Artifact, Target
from .task import Split, Task
from .technique import Step, Technique
from .techniques.int_ import Int
from .training import Training
from .verify import Check, verify


def steps_for(bench: Bench) -> tuple[Step, ...]:
    """What ``optimize`` prepares plans with where it is not told: biases corrected on four calibration batches, 64
    to 256 samples. Small batches say that samples are dear.
    """
    return (CorrectBias(samples=min(max(4 * batch_size(bench.net.example), 64), 256)),)


@dataclass(frozen=True)
class Optimized:
    """What :func:`optimize` hands back. ``plan`` is the adapted one; ``net`` its simulation; ``artifact`` what runs."""

    plan: Plan
    artifact: Artifact
    report: Report
    net: nn.Module
    result: Result
    check: Check
    profile: Profile


def optimize(
    model: nn.Module,
    task: Task,
    target: Target,
    budget: Budget,
    *,
    minimize: str | None = None,
    techniques: Sequence[Technique] | None = None,
    prepare: Sequence[Step] | None = None,
    method: Search | None = None,
    sensitivity: Sensitivity = DIAGONAL,
    certainty: Certainty = CERTAINTY,
    store: Store | str | Path | None = None,
    batch: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    title: str = "",
    executor: Executor | None = None,
    trained: Sequence[Technique] = (),
    train: Step | None = None,
) -> Optimized:
    """Profile, search, apply, export, verify, report: the verbs composed.

    ``budget``: limits; if ``drop`` is the only one, ``ms`` is minimized, otherwise say what with ``minimize``.
    ``techniques``: what may stand at a site, ``[Int(8, 8)]`` by default. ``prepare``: steps that every whole plan is
    measured and returned with; None: ``CorrectBias``, as :func:`steps_for` says; ``()``: none. Those that ``quantize``
    takes (``default_steps(Int(8, 8))``) take longer. Sites alone are measured without. ``folder``: gets ``plan.json``,
    the model file, ``report.html``, ``report.json`` and, if no ``store`` is given, the store ``runs.db`` from which a
    killed run resumes; without a folder the model file lives as long as the returned artifact. ``batch``: of the times
    and of the file. ``certainty``: of decisions before the whole validation set was seen. ``executor``: workers for the
    accuracy part of ``profile`` and ``search``; the plan is the same without. ``trained``, ``train``: as of
    ``profile``; with ``trained`` ``prepare`` is ``()`` by default, as there may be no float network worth coming close
    to. With ``train`` every whole plan that needs training is trained by it, too.

    Calibration and validation data are read to choose; ``task.test`` is forwarded once, for the report. Raises
    ``BudgetError`` if no plan meets the budget, after the best one was saved; it carries that one as ``.best``.
    """
    minimize = objective(budget, minimize)
    progress = progress or Silent()
    place = check_writable(folder) if folder is not None else None
    if store is None and place is not None:
        store = place / "runs.db"
    # the artifacts of probes go to a temporary folder; only the chosen one goes to the user's
    bench = Bench.open(model, task, target, store=store, batch=batch, seed=seed, progress=progress)
    offered = [*([Int(8, 8)] if techniques is None else techniques), *trained]
    steps = (() if trained else steps_for(bench)) if prepare is None else prepare
    training = Training(train, tuple(trained))
    evaluate = Evaluator(bench, steps, certainty, training)
    _dry_run(evaluate, offered)
    bench.check({minimize, *budget.limits})
    profiled = measure(bench, offered, sensitivity, executor=executor, training=training)
    failure: BudgetError | None = None
    try:
        result = search(profiled, budget, minimize, method or Exact(), evaluate, counted(progress), executor=executor)
    except BudgetError as error:
        failure, result = error, error.best
    finished = _finish(evaluate, profiled, result, budget, place, title)
    if failure is not None:
        raise failure
    return finished


def _dry_run(evaluate: Evaluator, offered: Sequence[Technique]) -> None:
    """Export and run the float network first, and say how long the rest will take: nothing fails at the end."""
    bench = evaluate.bench
    bench.everywhere([])  # the float graph is needed for all others
    progress = bench.progress
    progress.start("trying the float network on the target", 2)
    start = time.perf_counter()
    reference = evaluate.gradual.reference
    seconds = time.perf_counter() - start
    progress.advance()
    start = time.perf_counter()
    bench.artifact(Plan())
    bench.times([Plan()], rounds=5)
    exporting = time.perf_counter() - start
    progress.advance()
    sites = sum(site.role == "integer" for site in bench.net.record.sites.values())
    share = sum(1 for _ in bench.task.calibration) / max(sum(1 for _ in bench.task.validation), 1)
    minutes = (sites * len(offered) * share * 1.5 * seconds + 12 * (exporting + 1.5 * seconds)) / 60
    progress.note(
        f"{len(bench.net.record.sites)} sites, {sites} of them can change; float: {reference}; "
        f"about {max(minutes, 0.1):.1f} minutes if nothing is in the store yet"
    )


def _notes(evaluate: Evaluator, profiled: Profile, result: Result) -> tuple[str, ...]:
    """What the drop was on the samples that chose the plan, what that says of others, and what finding it took."""
    got, level, total = result.best.evaluation, evaluate.gradual.certainty.level, evaluate.gradual.reference.n
    found = []
    if got is not None and got.drop is not None and got.drop_interval is not None:
        low, high = got.drop_interval
        chose = f"on the {got.samples} samples that chose the plan the drop is"
        line = f"{chose} {got.drop:.4f} (95 % {low:.4f} to {high:.4f})"
        if got.drop_bound is not None:
            line += f"; in their population it is below {got.drop_bound:.4f} with {level:.0%} confidence"
            line += f", chosen among {result.candidates} plans"
        found.append(line)
    if total:
        forwarded = (
            f"the search measured {result.evaluations} plans and forwarded {result.samples / total:.2f} full sets"
        )
        found.append(f"{forwarded}; the sensitivity {profiled.spent.passes / total:.2f} (a backward counts two)")
    if evaluate.gradual.why_whole:
        found.append(f"every evaluation saw the whole set: {evaluate.gradual.why_whole}")
    for name in ("not scored", "below 0"):
        if name in profiled.notes:
            found.append(f"{name}: {profiled.notes[name]}")
    return tuple(found)


def _finish(
    evaluate: Evaluator, profiled: Profile, result: Result, budget: Budget, folder: Path | None, title: str
) -> Optimized:
    """Export the chosen plan, verify it, measure it against float once more, and report."""
    bench = evaluate.bench
    task, target, progress = bench.task, bench.target, bench.progress
    progress.start("exporting, verifying and measuring the chosen plan", 4)
    plan = evaluate.adapted(result.plan)
    net = bench.simulate(plan)
    place = folder or Path(tempfile.mkdtemp(prefix="bitsmith-"))
    artifact = target.export(net, place / f"model{suffix(target)}", bench.example, bench.batch)
    if folder is None:
        weakref.finalize(artifact, shutil.rmtree, place, ignore_errors=True)
    progress.advance()
    check = verify(net, artifact, task.calibration, target=target, forward=task.forward)
    progress.advance()
    split: Split = "test" if task.test is not None else "validation"
    float_score, plan_score = evaluate.score(Plan(), split), evaluate.score(plan, split)
    progress.advance()
    float_time, plan_time = bench.times([Plan(), plan], rounds=200)
    written = report(
        profiled,
        plan,
        check,
        result=result,
        budget=budget,
        title=title or f"{type(bench.model).__name__} on {target.name}",
        metric=task.name,
        float_score=float_score,
        plan_score=plan_score,
        drop=drop(float_score, plan_score),
        split="test (never used for selection)" if task.test is not None else "selected on these samples",
        float_time=float_time,
        plan_time=plan_time,
        float_bytes=bench.artifact(Plan()).bytes,
        plan_bytes=artifact.bytes,
        float_mj=target.energy(bench.artifact(Plan())),
        plan_mj=target.energy(artifact),
        float_mm2=target.area(bench.artifact(Plan())),
        plan_mm2=target.area(artifact),
        float_sites=bench.site_times(Plan()),
        plan_sites=bench.site_times(plan),
        float_energies=bench.artifact(Plan()).energies,
        plan_energies=artifact.energies,
        sites=bench.net.record.sites,
        settings=target.settings(),
        versions={**artifact.versions, "torch": torch.__version__, "python": platform.python_version()},
        machine=machine_key(),
        notes=_notes(evaluate, profiled, result),
        seed=bench.seed,
        store={"hits": bench.store.hits, "misses": bench.store.misses},
    )
    if folder is not None:
        plan.save(folder / "plan.json")
        written.save(folder / "report.json")
        written.save(folder / "report.html")
    progress.advance()
    return Optimized(plan, artifact, written, net, result, check, profiled)
