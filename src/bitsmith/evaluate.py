"""Measuring a whole plan: its accuracy on validation data, its time and size as the exported file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .bench import Bench
from .compare import drop
from .gradual import Certainty, Gradual
from .plan import Plan
from .progress import Progress
from .search.base import Evaluation
from .store import Store
from .targets.base import Target
from .task import Task
from .technique import Step
from .techniques.float_ import Float

_CERTAINTY = Certainty()


def evaluator(
    model: nn.Module,
    task: Task,
    target: Target,
    *,
    store: Store | str | Path | None = None,
    batch: int = 1,
    seed: int = 0,
    folder: str | Path | None = None,
    prepare: Sequence[Step] = (),
    certainty: Certainty = _CERTAINTY,
    progress: Progress | None = None,
) -> Evaluator:
    """What ``search(evaluate=...)`` calls with a plan: adapt, simulate on validation data, export, time against float.

    ``certainty``: how certain a decision about the drop has to be before the whole set was seen. The plan in the result
    is the adapted one. Reads calibration and validation data only; ``test`` is never touched.
    """
    bench = Bench.open(model, task, target, store=store, folder=folder, batch=batch, seed=seed, progress=progress)
    return Evaluator(bench, prepare, certainty)


class Evaluator:
    """:func:`evaluator` on a bench that is already open. ``prepare``: steps for every plan that changes something."""

    def __init__(self, bench: Bench, prepare: Sequence[Step] = (), certainty: Certainty = _CERTAINTY) -> None:
        self.bench, self.prepare = bench, tuple(prepare)
        self.gradual = Gradual(bench, certainty)

    def adapted(self, plan: Plan) -> Plan:
        """The plan as it is measured: in the target's form, without the sites that are computed as they were, with the
        steps unless it brings its own."""
        changed = Plan({name: t for name, t in plan.sites.items() if t != Float()}, plan.prepare, plan.groups)
        found = self.bench.target.adapt(changed, self.bench.net.record)
        return found.replace(prepare=self.prepare) if found.sites and not found.prepare else found

    def __call__(self, plan: Plan) -> Evaluation:
        adapted, reference = self.adapted(plan), self.gradual.reference
        got = self.gradual.whole(adapted) if adapted.sites else reference
        lost = drop(reference, got)
        return dataclasses.replace(
            self.costs(plan),
            metric=got.mean,
            drop=lost.mean,
            drop_interval=None if lost.low is None or lost.high is None else (lost.low, lost.high),
            samples=got.n,
        )

    def costs(self, plan: Plan) -> Evaluation:
        """Time, size and energy of the exported file; the drop is not measured."""
        bench, adapted = self.bench, self.adapted(plan)
        plain, timing = bench.times([Plan(), adapted])
        artifact = bench.artifact(adapted)
        return Evaluation(
            plan=adapted,
            ms=timing.ms,
            ms_spread=timing.spread,
            bytes=artifact.bytes,
            mj=bench.target.energy(artifact),
            float_ms=plain.ms,
            source=bench.target.source,
        )

    def decide(self, plan: Plan, limit: float, patience: float = 1.0) -> Evaluation:
        """Whether the drop is within ``limit``, on as many samples as that takes (see :class:`Staged`)."""
        adapted = self.adapted(plan)
        if not adapted.sites:
            return self(plan)
        found = self.gradual.decide(adapted, limit, patience)
        return Evaluation(
            plan=adapted,
            drop=found.mean,
            drop_interval=found.interval,
            samples=len(found.scores),
            within=found.within,
            certain=found.certain,
            complete=found.complete,
        )

    def bound(self, plan: Plan, candidates: int) -> float | None:
        """What the population's drop stays below at the level of the certainty, the plan being one of so many."""
        adapted = self.adapted(plan)
        return self.gradual.bound(adapted, candidates) if adapted.sites else 0.0
