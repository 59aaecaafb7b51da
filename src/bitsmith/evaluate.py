"""Measuring a whole plan: its accuracy on validation data, its time and size as the exported file."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .bench import Bench, without_values
from .compare import Score, drop
from .data import batch_size
from .gradual import CERTAINTY, Certainty, Gradual
from .model.formats import place
from .plan import Plan
from .progress import Progress
from .search.base import Evaluation
from .store import Store
from .targets.base import Target
from .task import Split, Task
from .technique import Step
from .techniques.float_ import Float
from .training import Training
from .workers import Crew, Lost, Recipe, decide_remotely, keep_scores, recipe_of

_ROUNDS, _MOST_ROUNDS = 20, 60
_TIMED_MACS = 6e9
"""A plan is timed in as many rounds as compute so much together, within these bounds; in most of them on a machine that
has other work."""


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
    certainty: Certainty = CERTAINTY,
    progress: Progress | None = None,
) -> Evaluator:
    """What ``search(evaluate=...)`` calls with a plan: adapt, simulate on validation data, export, time against float.

    ``certainty``: how certain a decision about the drop has to be before the whole set was seen. The plan in the result
    is the adapted one. Reads calibration and validation data only; ``test`` is never touched.
    """
    bench = Bench.open(model, task, target, store=store, folder=folder, batch=batch, seed=seed, progress=progress)
    return Evaluator(bench, prepare, certainty)


class Evaluator:
    """:func:`evaluator` on a bench that is already open. ``prepare``: steps for every plan that changes something;
    ``training``: what comes behind them where a plan needs it."""

    def __init__(
        self,
        bench: Bench,
        prepare: Sequence[Step] = (),
        certainty: Certainty = CERTAINTY,
        training: Training | None = None,
    ) -> None:
        self.bench, self.prepare, self.training = bench, tuple(prepare), training or Training()
        self.gradual = Gradual(bench, certainty)
        self._decisions: DecisionsAhead | None = None

    def adapted(self, plan: Plan) -> Plan:
        """The plan as it is measured: in the target's form, without the sites that are computed as they were, with the
        steps unless it brings its own."""
        changed = Plan({name: t for name, t in plan.sites.items() if t != Float()}, plan.prepare, plan.groups)
        found = self.bench.adapted(changed)
        return self.training.of(found.replace(prepare=self.prepare)) if found.sites and not found.prepare else found

    def __call__(self, plan: Plan) -> Evaluation:
        adapted = self.adapted(plan)
        self._collect(adapted)
        costs = self.costs(plan)
        judged = self._judged(adapted)
        taken = {name: getattr(costs, name) for name in ("ms", "ms_spread", "bytes", "mj", "mm2", "float_ms", "source")}
        return dataclasses.replace(judged, **taken)

    def _judged(self, adapted: Plan) -> Evaluation:
        """The metric and the drop on the whole set."""
        reference = self.gradual.reference
        got = reference if adapted.empty else self.gradual.whole(adapted)
        lost = drop(reference, got)
        return Evaluation(
            plan=adapted,
            metric=got.mean,
            drop=lost.mean,
            drop_interval=None if lost.low is None or lost.high is None else (lost.low, lost.high),
            samples=got.n,
            population=self.gradual.certainty.population,
        )

    def costs(self, plan: Plan) -> Evaluation:
        """Time, size and energy, of the exported file unless the target computes them; the drop is not measured.

        Steps that change values only are left out of that file, which then comes without an export of its own.
        """
        bench, adapted = self.bench, self.adapted(plan)
        timed = without_values(adapted)
        if self._decisions is not None:
            self._decisions.quiet()
        plain, timing = bench.steady_times([Plan(), timed], self._rounds, _MOST_ROUNDS)
        figures = bench.figures(timed)
        return Evaluation(
            plan=adapted,
            ms=timing.ms,
            ms_spread=timing.spread,
            bytes=bench.size(timed),
            mj=figures["mj"],
            mm2=figures["mm2"],
            float_ms=plain.ms,
            source=bench.target.source,
        )

    @property
    def _rounds(self) -> int:
        bench = self.bench
        factor = bench.batch / batch_size(bench.net.example)
        macs = factor * sum(site.macs for site in bench.net.record.sites.values())
        return min(max(int(_TIMED_MACS / max(macs, 1.0)), _ROUNDS), _MOST_ROUNDS)

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        """Whether the drop is within ``limit``, on as many samples as that takes (see :class:`Staged`)."""
        adapted = self.adapted(plan)
        if adapted.empty:
            return self(plan)
        self._collect(adapted)
        found = self.gradual.decide(adapted, limit, chance)
        if found.complete:
            return dataclasses.replace(self._judged(adapted), within=found.within)
        return Evaluation(
            plan=adapted,
            drop=found.mean,
            drop_interval=found.interval,
            samples=len(found.scores),
            within=found.within,
            certain=found.certain,
            complete=False,
            population=self.gradual.certainty.population,
        )

    def check(self, limit: float, candidates: int | None) -> str:
        """What the validation set cannot tell of such a limit (see :class:`Staged`)."""
        return self.gradual.check(limit, candidates)

    def score(self, plan: Plan, split: Split) -> Score:
        """The metric of an adapted plan, as evaluations measure it: on the runtime where they run there."""
        if plan.empty:
            return self.gradual.plain(split)
        return self.gradual.whole(plan) if split == "validation" else self.gradual.on(plan, split)

    def bound(self, plan: Plan, candidates: int) -> float | None:
        """What the population's drop stays below at the level of the certainty, the plan being one of so many."""
        adapted = self.adapted(plan)
        return 0.0 if adapted.empty else self.gradual.bound(adapted, candidates)

    @contextlib.contextmanager
    def helped(self, executor: Executor) -> Iterator[Evaluator]:
        """One like this, on the same bench, whose :meth:`ahead` works on that executor while the context is open.

        Only decisions about the drop go there; times are taken here, while no worker has work of ours. Plans that are
        evaluated on the runtime (``gradual.runner``) stay here: simulated scores would be others.
        """
        found = copy.copy(self)
        found._decisions = ahead = DecisionsAhead(self.gradual, executor)
        try:
            yield found
        except KeyboardInterrupt:
            ahead.withdraw()
            raise
        except BaseException:
            ahead.quiet()
            raise
        ahead.quiet()

    def ahead(self, plans: Sequence[Plan], limit: float, chance: float = 0.0) -> None:
        """Begin to decide about these on workers (see :class:`Ahead`); nothing without :meth:`helped`.

        Raises :class:`~bitsmith.workers.WorkerError` for a model or task that cannot be sent.
        """
        if self._decisions is not None:
            adapted = [self.adapted(plan) for plan in plans]
            simulated = [plan for plan in adapted if not plan.empty and self.gradual.runs(plan) is None]
            self._decisions.begin(simulated, limit, chance)

    def _collect(self, adapted: Plan) -> None:
        if self._decisions is not None:
            self._decisions.collect(adapted)


@dataclass
class _Job:
    plan: Plan
    known: int
    future: Future[Any]


class DecisionsAhead:
    """Decisions about adapted plans, begun on workers before they are asked for. Their scores go to the bench's store,
    where :meth:`Gradual.decide` finds them: whoever computed them, the decision is the serial one."""

    def __init__(self, gradual: Gradual, executor: Executor) -> None:
        self.gradual, self.crew = gradual, Crew(executor, gradual.bench.progress.note)
        self.lost = 0
        self._jobs: dict[str, _Job] = {}
        self._recipe: Recipe | None = None

    def begin(self, plans: Sequence[Plan], limit: float, chance: float) -> None:
        """Have these decided, the first one first; what was begun before and is not among them may be withdrawn."""
        wanted = {plan.digest(): plan for plan in plans}
        self.withdraw(wanted)
        for key, plan in wanted.items():
            known = None if key in self._jobs or self.crew.broken else self._undecided(plan, limit, chance)
            future = None if known is None else self._send(plan, limit, chance, known)
            if known is not None and future is not None:
                self._jobs[key] = _Job(plan, len(known), future)

    def collect(self, plan: Plan) -> None:
        """Wait for the job of this plan, if there is one, and keep its scores; an error of the model is raised."""
        job = self._jobs.pop(plan.digest(), None)
        if job is not None:
            self._keep(job)

    def quiet(self) -> None:
        """Wait until workers have none of our work, so that what is timed next is alone on this machine."""
        self.withdraw()
        jobs, self._jobs = self._jobs, {}
        wait([job.future for job in jobs.values()])
        for job in jobs.values():
            # an error is for the one who asks about that plan
            with contextlib.suppress(Exception):
                self._keep(job)

    def withdraw(self, but: Collection[str] = ()) -> None:
        """Take back what has not begun, and wait for nothing. ``but``: digests of plans that stay."""
        self._jobs = {k: job for k, job in self._jobs.items() if k in but or not self.crew.withdraws(job.future)}

    def _undecided(self, plan: Plan, limit: float, chance: float) -> list[float] | None:
        """The scores that the store has; None if they decide."""
        gradual, bench = self.gradual, self.gradual.bench
        if gradual.why_whole:
            found = bench.store.get("accuracy", bench.score_key(plan, "validation"))
            return [] if found is None else None
        known = gradual._known(plan)
        return known.tolist() if gradual.answer(known, limit, chance) is None else None

    def _send(self, plan: Plan, limit: float, chance: float, known: list[float]) -> Future[Any] | None:
        gradual, bench = self.gradual, self.gradual.bench
        statistics: dict[Any, Any] = {}
        if not plan.prepare:  # a prepared network has ranges of its own
            placement = place(plan, bench.net.record)
            have = bench.observed(plan).record.statistics
            keys = (*(tensor for tensor, _ in placement.tensors), *placement.observers.items())
            statistics = {key: have[key] for key in keys if key in have}
        if self._recipe is None:
            self._recipe = recipe_of(bench)
        given = plan, limit, chance, known, gradual.reference.to_json(), bench.data_key("validation")
        return self.crew.send(self._recipe, decide_remotely, statistics, gradual.certainty, *given)

    def _keep(self, job: _Job) -> None:
        got = self.crew.result(job.future)
        gradual, bench = self.gradual, self.gradual.bench
        if isinstance(got, Lost):
            self.lost += 1
            bench.progress.note(
                f"lost with its worker ({got.why}): the evaluation of a plan of {len(job.plan)} sites "
                f"({job.plan.digest()[:12]}); where it is needed it is done again in this process ({self.lost} so far)"
            )
        elif gradual.why_whole:
            bench.store.get_or("accuracy", bench.score_key(job.plan, "validation"), lambda: got)
        else:
            keep_scores(gradual, job.plan, got, job.known)
