"""Measuring a whole plan: its accuracy on validation data, its time and size as the exported file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .bench import Bench
from .compare import drop
from .plan import Plan
from .progress import Progress
from .search.base import Evaluate, Evaluation
from .store import Store
from .targets.base import Target
from .task import Task
from .technique import Step
from .techniques.float_ import Float


def evaluator(
    model: nn.Module,
    task: Task,
    target: Target,
    *,
    store: Store | str | Path | None = None,
    batch: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluate:
    """What ``search(evaluate=...)`` calls with a plan: adapt, simulate on validation data, export, time against float.

    The plan in the result is the adapted one. Reads calibration and validation data only; ``test`` is never touched.
    """
    return Evaluator(
        Bench.open(model, task, target, store=store, folder=folder, batch=batch, seed=seed, progress=progress)
    )


class Evaluator:
    """:func:`evaluator` on a bench that is already open. ``prepare``: steps for every plan that changes something."""

    def __init__(self, bench: Bench, prepare: Sequence[Step] = ()) -> None:
        self.bench, self.prepare = bench, tuple(prepare)

    def adapted(self, plan: Plan) -> Plan:
        """The plan as it is measured: in the target's form, without the sites that are computed as they were, with the
        steps unless it brings its own."""
        changed = Plan({name: t for name, t in plan.sites.items() if t != Float()}, plan.prepare, plan.groups)
        found = self.bench.target.adapt(changed, self.bench.net.record)
        return found.replace(prepare=self.prepare) if found.sites and not found.prepare else found

    def __call__(self, plan: Plan) -> Evaluation:
        bench = self.bench
        adapted = self.adapted(plan)
        reference = bench.score(None)
        got = bench.score(adapted)
        lost = drop(reference, got)
        plain, timing = bench.times([Plan(), adapted])
        artifact = bench.artifact(adapted)
        return Evaluation(
            plan=adapted,
            metric=got.mean,
            drop=lost.mean,
            drop_interval=None if lost.low is None or lost.high is None else (lost.low, lost.high),
            ms=timing.ms,
            ms_spread=timing.spread,
            bytes=artifact.bytes,
            mj=bench.target.energy(artifact),
            samples=got.n,
            float_ms=plain.ms,
            source=bench.target.source,
        )
