"""A ladder of plans of which every sample's outcome is known, for simulated searches with the rules of ``Exact``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from bitsmith.plan import Budget, Plan
from bitsmith.search import BudgetError, Evaluation, Point
from bitsmith.search.ladder import climb
from bitsmith.search.trials import Trials
from bitsmith.searches import Exact
from bitsmith.sequential import chance as likely
from bitsmith.sequential import decide, upper_bound
from bitsmith.site import Record, Site
from bitsmith.technique import Cell, Technique

Vector = NDArray[np.float64]
RULE = Exact()


@dataclass(frozen=True)
class Rung(Technique):
    """A technique that only has a number; 0 is float."""

    number: int

    def fits(self, site: Site) -> bool:
        return True

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        raise NotImplementedError("a rung stands for a plan and computes nothing")


@dataclass
class KnownLadder:
    """An evaluator of plans of one site, whose ``Rung`` is a row of ``worse``: [plans, n], how much worse than float
    each sample is, in the order in which they are drawn, within [-1, 1]; row 0 is float, all 0. ``ms``: [plans].

    ``chunk``: samples a batch. ``share``: a guess is made after that share of the set, by the mean, as searches did
    before they asked for a chance; None: as they do. ``decisions``: by rung that was asked about, the last (samples,
    the answer that is certain or None, the truth on the set).
    """

    worse: Vector
    ms: Sequence[float]
    chunk: int = 32
    alpha: float = 0.05
    share: float | None = None
    decisions: dict[int, tuple[int, bool | None, bool]] = field(default_factory=dict)

    def rung(self, plan: Plan) -> int:
        found = plan["s"]
        assert isinstance(found, Rung)
        return found.number

    def __call__(self, plan: Plan) -> Evaluation:
        k, (_, n) = self.rung(plan), self.worse.shape
        lost = float(self.worse[k].mean())
        return Evaluation(plan, -lost, lost, (lost, lost), self.ms[k], float_ms=self.ms[0], bytes=1, samples=n)

    def costs(self, plan: Plan) -> Evaluation:
        return Evaluation(plan, ms=self.ms[self.rung(plan)], float_ms=self.ms[0], bytes=1)

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        n, rung, seen = self.worse.shape[1], self.rung(plan), 0
        row = self.worse[rung]
        truth = bool(row.mean() <= limit + 1e-12)
        while True:
            seen = min(seen + self.chunk, n)
            known = row[:seen]
            within = decide(known, n, limit, -1.0, 1.0, self.alpha)
            if within is not None:
                self.decisions[rung] = seen, within, truth
                break
            guess = self._guess(known, limit, chance) if chance else None
            if guess is not None:
                self.decisions[rung] = seen, None, truth
                drop = float(known.mean())
                return Evaluation(plan, drop=drop, samples=seen, within=guess, certain=False, complete=False)
        return Evaluation(plan, drop=float(known.mean()), samples=seen, within=within, certain=True, complete=seen == n)

    def bound(self, plan: Plan, candidates: int) -> float | None:
        return upper_bound(self.worse[self.rung(plan)], -1.0, 1.0, self.alpha / candidates)

    def check(self, limit: float, candidates: int | None) -> str:
        return ""

    def _guess(self, known: Vector, limit: float, chance: float) -> bool | None:
        n = self.worse.shape[1]
        if self.share is not None:
            return bool(known.mean() <= limit) if len(known) >= self.share * n else None
        found = likely(known, n, limit, -1.0, 1.0)
        return None if chance <= found <= 1 - chance else found >= 0.5


def searched(
    ladder: KnownLadder, losses: Sequence[float], limit: float, everywhere: int | None = None, rule: Exact = RULE
) -> tuple[int, float]:
    """The rung that ``Exact`` returns, and the full sets it took. ``losses``: as predicted, [plans], least first.
    ``everywhere``: the rung that is asked first, which is not on the ladder."""
    points = [
        Point(Plan({"s": Rung(k)}), ms, 1.0, loss) for k, (ms, loss) in enumerate(zip(ladder.ms, losses, strict=True))
    ]
    rungs = [point for k, point in enumerate(points) if k != everywhere]
    trials = Trials(ladder, rule.max_evaluations, Budget(drop=limit), "ms", points[0], None, rule.chance)
    trials.promise(len(points))
    trials.whole(points[0])
    climb(trials, rungs, rule.margin, rule.passes, None if everywhere is None else points[everywhere])
    try:
        result = trials.result(rungs)
    except BudgetError as error:
        result = error.best
    return ladder.rung(result.plan), result.samples / ladder.worse.shape[1]
