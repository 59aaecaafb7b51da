"""``bitsmith explore``: the whole frontier of drop, time, size and energy, and the plan on it that keeps the limits."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments, show
from .tune import prepare_store, print_frontier

if TYPE_CHECKING:
    from ..bench import Bench
    from ..plan import Budget, Plan
    from ..profile import Profile
    from ..report.data import Report
    from ..search.base import Point, Result
    from ..search.pareto import Pareto
    from ..technique import Technique

SCHEMA = 1
KIND = "bitsmith.frontier"

_PROBES = 33
"""Plans that the profile times on a target without formulas, at most, beside one for each technique."""


def add(commands: Any) -> None:
    """Add the command of this file."""
    explore = commands.add_parser("explore", help="measure the whole frontier of drop, time and size")
    arguments.add_model(explore)
    arguments.add_data(explore, task=True)
    arguments.add_target(explore)
    explore.add_argument(
        "--objective",
        nargs="+",
        choices=arguments.QUANTITIES,
        default=["drop", "ms"],
        metavar="Q",
        help="two or more of drop, ms, mib, mj (drop ms)",
    )
    arguments.add_budget(explore)
    arguments.add_techniques(explore)
    explore.add_argument(
        "--sampler", choices=("nsga2", "tpe"), default="nsga2", help="what proposes plans: nsga2 (the default) or tpe"
    )
    explore.add_argument("--trials", type=arguments.positive, default=60, metavar="N", help="plans to measure (60)")
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
    import bitsmith as bs

    from ..bench import Bench
    from ..evaluate import Evaluator
    from ..model.load import load_model, load_task
    from ..profile import measure
    from ..search.base import BudgetError, SearchInterrupted
    from ..search.pareto import Pareto
    from ..search.proposals import require
    from ..sensitivity.inter_layer import InterLayer
    from .progress import TerminalProgress

    require()
    prepare_store(options, options.out)
    budget, objectives = arguments.budget(options), tuple(dict.fromkeys(options.objective))
    minimize = options.minimize or next((name for name in objectives if name != "drop"), "drop")
    storage = options.storage or options.out / "study.db"
    Pareto(objectives, options.sampler, storage=storage, study="").left()  # what cannot be used is told first
    target = arguments.target(options.target, options.threads)
    offered = arguments.techniques(options.techniques) or [bs.Int(8, 8)]
    model, task = load_model(options.model), load_task(options.data)
    with TerminalProgress() as progress:
        bench = Bench.open(
            model, task, target, store=options.store, batch=options.batch, seed=options.seed, progress=progress
        )
        if "mj" in (*objectives, *budget.limits, minimize) and target.energy(bench.artifact(bs.Plan())) is None:
            raise arguments.ArgumentError(f"{target.name} gives no energy: leave mj out, or take a target that has it")
        asked = {"study": _name(bench, options, budget, objectives, minimize, offered)}
        study = options.study or asked["study"]
        method = Pareto(objectives, options.sampler, options.trials, seed=options.seed, storage=storage, study=study)
        _estimate(bench, method.left(), options.trials, len(offered), bench.store.get("profiled", asked) is not None)
        profile = measure(bench, offered, InterLayer())
        bench.store.put("profiled", asked, len(profile.rows))
        output = _Output(options.out, bench, profile, method, budget, options.model)
        try:
            result = bs.search(profile, budget, minimize, method, Evaluator(bench), progress.told)
        except BudgetError as error:
            output.write(error.best)
            error.add_note(f"the closest plan is saved: {options.out / 'plan.json'}; what was found lies beside it")
            raise
        except SearchInterrupted as stop:
            output.write(stop.best, complete=False)
            progress.note(
                f"the best plan and the frontier so far are saved in {options.out}; {method.left()} plans are left"
            )
            raise
    found = output.write(result)
    print_frontier(dataclasses.replace(result, frontier=tuple(output.front(result))))
    show.written(*found)
    return 0


def _name(
    bench: Bench,
    options: Namespace,
    budget: Budget,
    objectives: Sequence[str],
    minimize: str,
    offered: Sequence[Technique],
) -> str:
    """The same question about the same network goes on with the same study, whichever machine asks."""
    from .._hash import hash_json, technique_key

    asked = {
        "score": bench.score_key(None, "validation"),
        "target": repr(bench.target),
        "batch": bench.batch,
        "objectives": [*objectives, minimize],
        "limits": budget.limits,
        "sampler": options.sampler,
        "techniques": [technique_key(technique) for technique in offered],
    }
    return f"bitsmith-{hash_json(asked)[:16]}"


def _estimate(bench: Bench, left: int, trials: int, techniques: int, profiled: bool) -> None:
    """Say how long it will take, from one whole evaluation of the float network with nothing known beforehand."""
    from ..bench import Bench
    from ..evaluate import Evaluator
    from ..plan import Plan

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


@dataclasses.dataclass(frozen=True)
class _Output:
    """What the command leaves in its folder, whole after every call."""

    folder: Path
    bench: Bench
    profile: Profile
    method: Pareto
    budget: Budget
    title: str

    def front(self, result: Result) -> list[Point]:
        """The plans that no other betters; while none was measured in all objectives, the best one alone."""
        from ..search.pareto import front

        return front(result.frontier, self.method.objectives) or [result.best]

    def write(self, result: Result, complete: bool = True) -> list[Path]:
        """plan.json, frontier.json, plans/NN.json and frontier.html; the paths in that order, without the plans."""
        from .._files import atomic_write

        points, plans = self.front(result), self.folder / "plans"
        names = [f"{k:02}.json" for k in range(1, len(points) + 1)]
        chosen = measured_plan(result.best).save(self.folder / "plan.json")
        for name, point in zip(names, points, strict=True):
            measured_plan(point).save(plans / name)
        for old in plans.glob("[0-9][0-9]*.json"):
            if old.name not in names:
                old.unlink()  # of a frontier that was longer
        text = json.dumps(_finite(self._json(result, points, names, complete)), indent=1, allow_nan=False) + "\n"
        path = self.folder / "frontier.json"
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return [chosen, path, self._report(result, points, complete).save(self.folder / "frontier.html")]

    def _json(self, result: Result, points: Sequence[Point], names: Sequence[str], complete: bool) -> dict[str, Any]:
        from ..report.explored import volume

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
            "points": [
                {"plan": f"plans/{name}", "chosen": point is result.best, **_numbers(point, self.budget)}
                for name, point in zip(names, points, strict=True)
            ],
        }

    def _report(self, result: Result, points: Sequence[Point], complete: bool) -> Report:
        from ..report.explored import explored
        from ..store import machine_key

        bench = self.bench
        notes = ["frontier.json has the numbers of these plans, plans/ the plans themselves"]
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
    costs, accuracy = ("ms", "ms_spread", "float_ms", "mj", "source"), ("drop", "drop_interval", "metric", "samples")
    return {
        **{name: getattr(got, name, None) for name in costs},
        "mib": None if got is None or got.bytes is None else got.bytes / 2**20,
        **{name: getattr(got, name, None) for name in accuracy},
        "missed": point.missed(budget),
        "predicted": {"ms": point.ms, "mib": point.predicted("mib"), "mj": point.mj, "loss": point.loss},
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
