"""Design space exploration: every technique at every site, and the front of accuracy against what it costs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ._files import atomic_write, check_writable
from ._hash import hash_json, technique_key
from .bench import Bench
from .evaluate import Evaluator
from .plan import Budget, Plan, known_classes
from .profile import Profile, measure
from .progress import Progress, counted
from .report.data import Report
from .report.explored import control_of, explored, volume
from .search import BudgetError, Result, SearchInterrupted, search
from .search.base import QUANTITIES, Point
from .sensitivity.base import Sensitivity, name_of
from .sensitivity.inter_layer import DIAGONAL, InterLayer
from .store import Store, machine_key
from .targets.base import Target
from .task import Task
from .technique import Step, Technique
from .techniques.degree_quant import DegreeQuant
from .techniques.float_ import Float
from .techniques.int_ import Int
from .techniques.sparse import Sparse
from .techniques.winograd import Winograd
from .training import Training

if TYPE_CHECKING:
    from .search.pareto import Pareto

SCHEMA = 1
KIND = "bitsmith.frontier"

WORDS: Mapping[str, str] = {"accuracy": "drop", "latency": "ms", "size": "mib", "energy": "mj", "area": "mm2"}
"""What people call the quantities."""

STRENGTHS: Mapping[type[Technique], tuple[Technique, ...]] = {
    DegreeQuant: (),  # is for graphs, and has to be told which input holds the edges
    Float: (Float("bfloat16"),),
    Int: (Int(8, 8), Int(8, None), Int(4, 8), Int(4, None)),
    Sparse: (Sparse(0.5), Sparse(0.25)),
    Winograd: (Winograd(2), Winograd(4, 16)),
}
"""In how many strengths :func:`every_technique` has a technique; one that is not named comes as it is by default."""

_PROBES = 33
"""Plans that the profile times on a target without formulas, at most, beside one for each technique."""


@dataclass(frozen=True)
class Explored:
    """What :func:`explore` found. ``front``: the measured plans that no other betters, least of the objective first;
    ``plan``: the one of least objective within the limits, as measured; ``files``: what was written."""

    plan: Plan
    front: tuple[Point, ...]
    result: Result
    profile: Profile
    report: Report
    files: tuple[Path, ...] = ()


def every_technique() -> list[Technique]:
    """The built-in techniques, each in the strengths that an exploration tries.

    What needs training, or has no kernel on the target, is left out by the profile, which says why.

    >>> Int(8, 8) in every_technique(), Float() in every_technique()
    (True, False)
    """
    found: list[Technique] = []
    for kind in known_classes(()).values():
        if not issubclass(kind, Technique) or inspect.isabstract(kind):
            continue
        strengths = STRENGTHS.get(kind)
        try:
            found += [kind()] if strengths is None else strengths
        except (TypeError, ValueError):
            continue  # one that has no default stands for nothing in particular
    return found


def objectives_of(words: str | Sequence[str]) -> tuple[str, ...]:
    """Quantities from words; one cost alone is explored against the drop.

    >>> objectives_of("latency"), objectives_of(["size", "energy", "drop"])
    (('drop', 'ms'), ('mib', 'mj', 'drop'))
    """
    given = [words] if isinstance(words, str) else list(words)
    known = (*WORDS, *QUANTITIES)
    unknown = [word for word in given if word not in known]
    if unknown or not given:
        raise ValueError(f"objective {', '.join(map(repr, unknown)) or 'is missing'}: must be of {', '.join(known)}")
    found = tuple(dict.fromkeys(WORDS.get(word, word) for word in given))
    return ("drop", *found) if len(found) == 1 and found != ("drop",) else found


def explore(
    model: nn.Module,
    task: Task,
    target: Target,
    *,
    accuracy_drop: float | None = 1.0,
    objective: str | Sequence[str] = "latency",
    techniques: Sequence[Technique] | None = None,
    budget: Budget | None = None,
    minimize: str | None = None,
    sampler: Literal["nsga2", "tpe"] = "nsga2",
    trials: int = 60,
    storage: str | Path | None = None,
    study: str | None = None,
    store: Store | str | Path | None = None,
    batch: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    title: str = "",
    train: Step | None = None,
    sensitivity: Sensitivity | None = None,
) -> Explored:
    """Explore which technique at which site, as Deeplite's Neutrino poses it (Sankaran et al. 2021, arXiv:2101.04073):
    least size, latency or energy at a tolerance of accuracy.

    A sensitivity scan, the predicted fronts, then measured plans (:class:`~bitsmith.searches.Pareto`); the published
    engine is closed, and this is not it. ``accuracy_drop``: points of the metric's mean, 1 is 0.01; None: no limit, or
    that of ``budget``. ``objective``: ``size``, ``latency``, ``energy``, ``area`` (or ``mib``, ``ms``, ``mj``,
    ``mm2``), against the accuracy; or several of them. ``techniques``: None, :func:`every_technique`. ``budget``: more
    limits. ``minimize``: what the plan that is handed back has least of; the first objective that is a cost.
    ``trials``: plans measured in all. ``folder``: gets ``plan.json``, ``frontier.json``, ``frontier.html``, ``plans/``,
    and the store and the trials from which a stopped run goes on. ``storage``, ``study``: as in ``Pareto``.
    ``train``: a step such as :class:`~bitsmith.Distil` for what needs training, at a site alone and in whole plans;
    without, such techniques are left out. ``sensitivity``: what scores every choice, as in ``profile``; None:
    :class:`~bitsmith.InterLayer`, or with ``train``, where each choice has weights of its own, ``output_error``.

    Reads calibration and validation data only. Raises ``BudgetError`` if no plan keeps the limits, after the closest
    one was saved, and ``ModuleNotFoundError`` without Optuna.
    """
    from .search.pareto import Pareto
    from .search.proposals import require

    require()
    objectives = objectives_of(objective)
    limits = limited(budget, accuracy_drop)
    place = check_writable(folder) if folder is not None else None
    if place is not None:
        store = place / "runs.db" if store is None else store
        storage = place / "study.db" if storage is None else storage
    Pareto(objectives, sampler, trials, storage=storage, study=study or "").left()  # what cannot be is told first
    bench = Bench.open(model, task, target, store=store, batch=batch, seed=seed, progress=progress)
    offered = every_technique() if techniques is None else list(techniques)
    return explore_bench(
        bench,
        offered,
        objectives,
        limits,
        minimize,
        sampler,
        trials,
        storage,
        study,
        place,
        title or type(model).__name__,
        train=train,
        sensitivity=sensitivity,
    )


def limited(budget: Budget | None, accuracy_drop: float | None) -> Budget:
    """The limits with a drop in points."""
    if accuracy_drop is None:
        if budget is None:
            raise ValueError("explore(): give accuracy_drop, in points, or a budget")
        return budget
    if budget is not None and budget.drop is not None:
        raise ValueError(
            f"accuracy_drop={accuracy_drop} and Budget(drop={budget.drop}): say the drop in one place only"
        )
    drop = Budget(drop=accuracy_drop / 100.0)
    return drop if budget is None else dataclasses.replace(budget, drop=drop.drop)


def explore_bench(
    bench: Bench,
    offered: Sequence[Technique],
    objectives: tuple[str, ...],
    budget: Budget,
    minimize: str | None,
    sampler: Literal["nsga2", "tpe"],
    trials: int,
    storage: str | Path | None,
    study: str | None,
    folder: Path | None,
    title: str,
    told: Callable[[str, int, int], None] | None = None,
    train: Step | None = None,
    sensitivity: Sensitivity | None = None,
) -> Explored:
    """:func:`explore` with a bench that is already open."""
    from .search.pareto import Pareto

    least = minimize or next((name for name in objectives if name != "drop"), "drop")
    bench.check({*objectives, *budget.limits, least})
    asked = {"study": _name(bench, offered, objectives, budget, least, sampler, train, sensitivity)}
    method = Pareto(objectives, sampler, trials, seed=bench.seed, storage=storage, study=study or asked["study"])
    _estimate(bench, method.left(), trials, len(offered), bench.store.get("profiled", asked) is not None)
    training = Training(train)
    scores = sensitivity or (DIAGONAL if train else InterLayer())
    profile = measure(bench, offered, scores, training=training)
    bench.store.put("profiled", asked, len(profile.rows))
    output = _Output(folder, bench, profile, method, budget, title)
    try:
        result = search(
            profile, budget, least, method, Evaluator(bench, training=training), told or counted(bench.progress)
        )
    except BudgetError as error:
        output.write(error.best)
        if folder is not None:
            error.add_note(f"the closest plan is saved: {folder / 'plan.json'}; what was found lies beside it")
        raise
    except SearchInterrupted as stop:
        output.write(stop.best, complete=False)
        kept = f"the best plan and the frontier so far are saved in {folder}; " if folder is not None else ""
        bench.progress.note(f"{kept}{method.left()} plans are left")
        raise
    return output.write(result)


def _name(
    bench: Bench,
    offered: Sequence[Technique],
    objectives: Sequence[str],
    budget: Budget,
    minimize: str,
    sampler: str,
    train: Step | None,
    sensitivity: Sensitivity | None,
) -> str:
    """The same question about the same network goes on with the same study, whichever machine asks."""
    asked = {
        "score": bench.score_key(None, "validation"),
        "target": repr(bench.target),
        "batch": bench.batch,
        "objectives": [*objectives, minimize],
        "limits": budget.limits,
        "sampler": sampler,
        "techniques": [technique_key(technique) for technique in offered],
        **({} if train is None else {"train": repr(train)}),
        **({} if sensitivity is None else {"sensitivity": name_of(sensitivity)}),
    }
    return f"bitsmith-{hash_json(asked)[:16]}"


def _estimate(bench: Bench, left: int, trials: int, techniques: int, profiled: bool) -> None:
    """Say how long it will take, from one whole evaluation of the float network with nothing known beforehand."""
    key = {"score": bench.score_key(None, "validation"), "time": bench.time_key([Plan()], 0)}

    def measured() -> list[float]:
        bench.progress.start("timing one evaluation, of the float network", 1)
        bench.artifact(Plan())  # the profile needs it; what the first export loads is not timed
        alone = Evaluator(Bench.open(bench.model, bench.task, bench.target, batch=bench.batch, seed=bench.seed))
        start = time.perf_counter()
        alone.costs(Plan())
        costs = time.perf_counter() - start
        alone(Plan())
        bench.progress.advance()
        return [costs, time.perf_counter() - start]

    costs, whole = bench.store.get_or("seconds of an evaluation", key, measured)
    probes = 0 if profiled or bench.target.source == "modelled" else _PROBES + techniques
    # a simulated network takes about half as long again as the float one
    minutes = (1.5 * whole * left + costs * probes) / 60
    bench.progress.note(
        f"{left} of {trials} plans are left to measure: at most about {max(minutes, 0.1):.1f} minutes, "
        f"{'' if profiled else 'the profile included, '}if nothing of them is in the store yet; one evaluation of the "
        f"float network takes {whole:.2f} s"
    )


@dataclass(frozen=True)
class _Output:
    """What an exploration leaves, in its folder whole after every call."""

    folder: Path | None
    bench: Bench
    profile: Profile
    method: Pareto
    budget: Budget
    title: str

    def write(self, result: Result, complete: bool = True) -> Explored:
        """plan.json, frontier.json, plans/NN.json and frontier.html; ``files`` in that order, without the plans."""
        from .search.pareto import front

        # while none was measured in all objectives, the best one alone
        points = front(result.frontier, self.method.objectives) or [result.best]
        report = self._report(result, points, complete)
        found = Explored(measured_plan(result.best), tuple(points), result, self.profile, report)
        return found if self.folder is None else dataclasses.replace(found, files=self._files(found, complete))

    def _files(self, found: Explored, complete: bool) -> tuple[Path, ...]:
        assert self.folder is not None
        plans = self.folder / "plans"
        names = [f"{k:02}.json" for k in range(1, len(found.front) + 1)]
        chosen = found.plan.save(self.folder / "plan.json")
        for name, point in zip(names, found.front, strict=True):
            measured_plan(point).save(plans / name)
        for old in plans.glob("[0-9][0-9]*.json"):
            if old.name not in names:
                old.unlink()  # of a frontier that was longer
        data = self._json(found, names, complete)
        text = json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"
        path = self.folder / "frontier.json"
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return chosen, path, found.report.save(self.folder / "frontier.html")

    def _json(self, found: Explored, names: Sequence[str], complete: bool) -> dict[str, Any]:
        result, points = found.result, found.front
        control = control_of(result)
        box = volume(result, points, self.method.objectives, self.budget)
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "target": self.bench.target.name,
            "metric": self.bench.task.name,
            "objectives": list(self.method.objectives),
            "minimize": result.minimize,
            "budget": self.budget.limits,
            "missed": result.missed,
            "sampler": self.method.sampler,
            "seed": self.method.seed,
            "trials": self.method.trials,
            "complete": complete,
            "evaluations": result.evaluations,
            "samples": result.samples,
            "hypervolume": None if box is None else {"reference": box[0], "value": box[1]},
            "assumptions": list(self.profile.assumptions),
            "references": list(self.profile.references),
            "float": None if control is None else _numbers(control, self.budget),
            "techniques": [dataclasses.asdict(row) for row in found.report.techniques],
            "points": [
                {"plan": f"plans/{name}", "chosen": point is result.best, **_numbers(point, self.budget)}
                for name, point in zip(names, points, strict=True)
            ],
        }

    def _report(self, result: Result, points: Sequence[Point], complete: bool) -> Report:
        bench = self.bench
        notes = []
        if self.folder is not None:
            notes.append("frontier.json has the numbers of these plans, plans/ the plans themselves")
        if not complete:
            notes.append(f"interrupted before {self.method.trials} plans were measured: the same command goes on")
        return explored(
            self.profile,
            result,
            points,
            self.method.objectives,
            self.budget,
            notes=notes,
            title=f"{self.title} on {bench.target.name}: {' and '.join(self.method.objectives)}",
            metric=bench.task.name,
            sites=bench.net.record.sites,
            settings=bench.target.settings(),
            machine=machine_key(),
            seed=bench.seed,
            store={"hits": bench.store.hits, "misses": bench.store.misses},
        )


def measured_plan(point: Point) -> Plan:
    """The plan as it was measured: in the target's form, if it was measured."""
    return point.plan if point.evaluation is None else point.evaluation.plan


def _numbers(point: Point, budget: Budget) -> dict[str, Any]:
    """What is known of a plan, flat: each number with where it comes from."""
    got = point.evaluation
    costs = ("ms", "ms_spread", "float_ms", "mj", "mm2", "source")
    accuracy = ("drop", "drop_interval", "metric", "samples")
    predicted = {"ms": point.ms, "mib": point.predicted("mib"), "mj": point.mj, "mm2": point.mm2, "loss": point.loss}
    return {
        **{name: getattr(got, name, None) for name in costs},
        "mib": None if got is None or got.bytes is None else got.bytes / 2**20,
        **{name: getattr(got, name, None) for name in accuracy},
        "missed": point.missed(budget),
        "predicted": predicted,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
