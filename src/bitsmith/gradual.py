"""Scoring a plan sample by sample, in random order, until it is certain whether its drop is within a limit.

What was scored is kept in the store: a later question about the same plan goes on where the last one ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import sequential
from .bench import Bench
from .compare import Score, drop
from .data import call, device_of
from .plan import Plan
from .runner import Runner, pays, runner
from .sampling import Shuffled, shuffled
from .task import Split, batch_scores, evaluating, score, score_of
from .technique import Step

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Certainty:
    """How certain an evaluation has to be. ``level``: of every decision that is made before the whole set was seen, and
    of the bound on the population's drop. ``population=True``: this bound, not the drop on the set, has to be within
    the budget. ``early=False``: every evaluation sees the whole set.
    """

    level: float = 0.95
    population: bool = False
    early: bool = True

    def __post_init__(self) -> None:
        if not 0.5 <= self.level < 1.0:
            raise ValueError(f"Certainty(level={self.level}): must be a probability of at least 0.5, below 1")


CERTAINTY = Certainty()


@dataclass(frozen=True, eq=False)
class Partial:
    """What is known of a plan. ``scores``: [n], in random order (the loader's, where every evaluation sees the whole
    set); ``total``: of the set. ``within``: None, not decided; ``certain``: by the statistics and not only by the look
    of it."""

    scores: Scores
    total: int
    within: bool | None
    certain: bool
    mean: float
    interval: tuple[float, float]

    @property
    def complete(self) -> bool:
        return len(self.scores) == self.total


@dataclass
class Gradual:
    """Scores adapted plans of one bench on its validation data. ``run``: on the runtime where that is faster."""

    bench: Bench
    certainty: Certainty = field(default_factory=Certainty)
    run: bool = True
    _source: Shuffled | None = None
    _bounds: tuple[float, float] | None = None
    _reference: Score | None = None
    _exporting: dict[tuple[Step, ...], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task = self.bench.task
        if task.evaluate is not None or task.draws > 1:
            return
        self._source = shuffled(task.validation, self.bench.seed)

    @functools.cached_property
    def runner(self) -> Runner | None:
        """What evaluates on the runtime; None: plans are simulated."""
        if not self.run or self._source is None:
            return None
        return runner(self.bench, self._source.batch(0, self._source.chunk)[0])

    def runs(self, plan: Plan) -> Runner | None:
        """What evaluates an adapted plan on the runtime (a prepared one may take an export); None: it is simulated."""
        if self.runner is None or self._source is None or not plan.prepare:
            return self.runner
        if plan.prepare not in self._exporting:
            inputs = self._source.batch(0, self._source.chunk)[0]
            self._exporting[plan.prepare] = pays(self.runner, plan, inputs, self._source.total)
        return self.runner if self._exporting[plan.prepare] else None

    @property
    def reference(self) -> Score:
        """The float network's score of the whole set."""
        if self._reference is None:
            self._reference = self.plain("validation")
            bounds = self.bench.task.scored_by.bounds if self.bench.task.metric is not None else None
            scores = self._reference.scores
            if bounds is None and len(scores) and bool(((scores == 0) | (scores == 1)).all()):
                bounds = (0.0, 1.0)
            self._bounds = bounds
        return self._reference

    @property
    def why_whole(self) -> str:
        """Why every evaluation sees the whole set; "" if it can stop early."""
        task = self.bench.task
        if not self.certainty.early:
            return "that was asked for"
        if task.evaluate is not None:
            return "a metric of the whole corpus has no score per sample"
        if task.draws > 1:
            return f"every sample is scored {task.draws} times"
        if self._source is None:
            return "the validation loader cannot be read in random order: give a list of equal batches or a DataLoader"
        if self.reference is not None and self._bounds is None:
            return f"the metric {task.name!r} has no bounds: give Metric(..., bounds=(least, greatest))"
        return ""

    def check(self, limit: float, candidates: int | None) -> str:
        """What the set can tell of such a limit, "" if enough. Raises ``ValueError`` if the bound that was asked for
        can never be within it, saying how many samples it would take; ``candidates``: None if they are not fixed."""
        total, bounds = self.reference.n, self._bounds
        if self.certainty.population and (bounds is None or candidates is None or limit <= 0):
            raise ValueError(
                "Certainty(population=True) needs a drop above 0, a metric with bounds and one score per sample, and a "
                "search whose candidates are fixed before validation data are read, such as searches.Exact()"
            )
        if bounds is None or limit <= 0:
            return ""
        width = bounds[1] - bounds[0]
        if self.certainty.population and candidates is not None:
            needed = sequential.needed(limit, (1 - self.certainty.level) / candidates, -width, width)
            if needed > total:
                raise ValueError(
                    f"{total} samples can never show at {self.certainty.level:.0%} that the population's drop is "
                    f"within {limit:.4g}, whichever of {candidates} plans is chosen: it takes {needed} of which none "
                    "gets worse. Give more validation data, a wider budget, or Certainty(population=False)"
                )
        if limit * total < width:
            return (
                f"one of {total} samples is {width / total:.4f}: a drop within {limit:.4g} means that none gets worse"
            )
        return ""

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Partial:
        """Score as many samples as it takes to be certain, or until the chance that the whole set's drop is within the
        limit, or that it is not, is below ``chance``.

        What is known beyond that is not looked at: the answer does not depend on what was asked before.
        """
        if self.why_whole:
            got = self.whole(plan)
            lost = drop(self.reference, got)
            ends = (lost.mean, lost.mean) if lost.low is None or lost.high is None else (lost.low, lost.high)
            return Partial(got.scores, len(got.scores), lost.mean <= limit + 1e-12, True, lost.mean, ends)
        scores, seen = self._known(plan), 0
        with ExitStack() as stack:
            scorer: Callable[[Any], Any] | None = None
            while self._bounded(scores):
                found = self.answer(scores, limit, chance, seen)
                if found is not None:
                    return found
                seen = len(scores)
                scorer = scorer or stack.enter_context(self._scorer(plan))
                scores = self._more(plan, scores, scorer)
        return self.decide(plan, limit)

    def answer(self, scores: Scores, limit: float, chance: float, after: int = 0) -> Partial | None:
        """What the first batches of these scores (in random order) say that decide, for certain or as likely as
        ``chance`` asks; None: more are needed. ``after``: so many samples do not."""
        assert self._source is not None
        chunk = self._source.chunk
        for seen in (*range(chunk, self._total, chunk), self._total):
            if after < seen <= len(scores):
                found = self._partial(scores[:seen], limit, chance)
                if found.within is not None:
                    return found
        return None

    def whole(self, plan: Plan) -> Score:
        """The score of the whole set."""
        if self._source is None or not self.certainty.early:
            return self.bench.score(plan)
        scores = self._known(plan)
        if len(scores) < self._total:
            with self._scorer(plan) as scorer:
                while len(scores) < self._total:
                    scores = self._more(plan, scores, scorer)
        ordered = np.empty_like(scores)
        ordered[self._source.order] = scores
        return score_of(ordered, self.bench.task, self.reference.samples)

    def on(self, plan: Plan, split: Split) -> Score:
        """The score of a whole split, where the validation data are scored: on the runtime or by simulation."""
        runner = self.runs(plan) if self.certainty.early else None
        if runner is None:
            return self.bench.score(plan, split)
        key = {**self.bench.score_key(plan, split), "on": runner.key()}
        model = _Called(runner.scorer(plan))
        return Score.from_json(
            self.bench.store.get_or("accuracy", key, lambda: score(model, self.bench.task, split).to_json())
        )

    def plain(self, split: Split) -> Score:
        """The float network's score of a whole split, on the runtime if its file computes what the model does."""
        runs = self.certainty.early and self.runner is not None and self.runner.exact
        return self.on(Plan(), split) if runs else self.bench.score(None, split)

    def bound(self, plan: Plan, candidates: int) -> float | None:
        """What the population's drop stays below, at the level that was asked, the plan being one of so many."""
        found = self.whole(plan)
        if not len(found.scores) or not self._bounded(found.scores) or self._bounds is None:
            return None
        width = self._bounds[1] - self._bounds[0]
        worse = self._worse(found.scores, self.reference.scores)
        return sequential.upper_bound(worse, -width, width, (1 - self.certainty.level) / candidates)

    def _bounded(self, scores: Scores) -> bool:
        """Whether the scores are within the bounds; where these were taken from the float network's scores and a plan
        has others, the metric counts as one without."""
        if self._bounds is not None and len(scores):
            low, high = self._bounds
            if float(scores.min()) < low or float(scores.max()) > high:
                self._bounds = None
        return self._bounds is not None

    @property
    def _total(self) -> int:
        assert self._source is not None
        return self._source.total

    def _worse(self, scores: Scores, reference: Scores) -> NDArray[np.float64]:
        """By how much each sample is worse than in float."""
        sign = -1.0 if self.bench.task.lower else 1.0
        found: NDArray[np.float64] = sign * (reference.astype(np.float64) - scores)
        return found

    def _partial(self, scores: Scores, limit: float, chance: float) -> Partial:
        assert self._source is not None
        assert self._bounds is not None  # else the whole set is seen
        reference = self.reference.scores[self._source.order[: len(scores)]]
        worse, width = self._worse(scores, reference), self._bounds[1] - self._bounds[0]
        within = sequential.decide(worse, self._total, limit, -width, width, 1 - self.certainty.level)
        certain, ends = within is not None, (-width, width)
        if within is None and chance:
            likely = sequential.chance(worse, self._total, limit, -width, width)
            within = None if chance <= likely <= 1 - chance else likely >= 0.5
        if within is not None:
            ends = sequential.interval(worse, self._total, -width, width, 1 - self.certainty.level)
        return Partial(scores, self._total, within, certain, float(worse.mean()), ends)

    @contextmanager
    def _scorer(self, plan: Plan) -> Iterator[Callable[[Any], Any]]:
        """What computes the plan's output for a batch of inputs."""
        runner = self.runs(plan)
        if runner is not None:
            yield runner.scorer(plan)
            return
        net = self.bench.model if plan.empty else self.bench.simulate(plan)
        with evaluating(net):
            yield lambda inputs: call(net, inputs, self.bench.task.forward)

    def _key(self, plan: Plan, first: int) -> dict[str, Any]:
        """Of a batch of scores, by the position of its first sample in the random order."""
        runner = self.runs(plan)
        on = "simulation" if runner is None else runner.key()
        return {**self.bench.score_key(plan, "validation"), "order": self.bench.seed, "on": on, "first": first}

    def _known(self, plan: Plan) -> Scores:
        known: list[float] = []
        while len(known) < self._total:
            more = self.bench.store.look("scores of samples", self._key(plan, len(known)))
            if more is None:
                break
            known += more
        return np.asarray(known, np.float32)

    def _more(self, plan: Plan, known: Scores, scorer: Callable[[Any], Any]) -> Scores:
        """The scores with one batch more, kept in the store."""
        assert self._source is not None
        inputs, target = self._source.batch(len(known), self._source.chunk)
        where = f"validation sample {len(known)} in random order"
        got = batch_scores(scorer, self.bench.task, inputs, target, where, device_of(self.bench.model))
        self.bench.store.put("scores of samples", self._key(plan, len(known)), got.tolist())
        return np.concatenate([known, got])


class _Called:
    """A function of a batch of inputs, called as a model is: with the tensor, the tensors, or by their names."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(kwargs or (args[0] if len(args) == 1 else args))
