"""Greedy search over an order of sites: each is tried, and kept if the drop allows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..plan import Budget
from ..profile import Profile
from .base import Evaluate, Progress, Result, Search
from .order import Order, check, levels, prefixes, unmeasured
from .predicted import predicted
from .program import Program
from .trials import Trials, key_of


@dataclass(frozen=True)
class Greedy(Search):
    """Walk an order of sites, change each, keep it if the drop allows, else put it back; dearest technique first.

    Schaefer et al. 2023 (arXiv:2302.01382): an evaluation for every site and technique, and a bad order does less harm
    than to :class:`~bitsmith.searches.Bisection`, whose fields these are.
    """

    order: Order = "marginal"
    mu: float = 1.0
    seed: int = 0
    max_evaluations: int = 1024
    chance: float = 0.1
    passes: float = float("inf")
    seconds: float | None = None

    def __post_init__(self) -> None:
        check(self.order, self.mu, self.max_evaluations, "Greedy")

    def search(
        self,
        profile: Profile,
        budget: Budget,
        minimize: str,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
    ) -> Result:
        program = Program(profile)
        base, among = program.control, list(range(len(program.units)))
        if evaluate is None:
            choices = unmeasured(program, self.order, minimize, self.mu, self.seed)
            return predicted([program.point(choice) for choice in choices], budget, minimize)
        control = program.point(base)
        trials = Trials(evaluate, self.max_evaluations, budget, minimize, control, progress, self.chance, self.seconds)
        points = []
        with trials.interruptible():
            trials.promise(None)
            trials.whole(control)
            last = control
            for technique in levels(program, minimize):
                ladder = prefixes(program, technique, base, among, self.order, minimize, self.mu, self.seed)
                accepted = []
                for before, after in itertools.pairwise(ladder):
                    if trials.spent:
                        break
                    unit = next(u for u, (one, other) in enumerate(zip(before, after, strict=True)) if one != other)
                    changed = tuple(after[u] if u == unit else k for u, k in enumerate(base))
                    point = program.point(changed)
                    if trials.keeps(point):
                        base, last = changed, point
                        points.append(point)
                        accepted.append(unit)
                trials.costs(last)
                among = accepted
            # where the last one does not hold on the whole set, those before it are there
            for point in reversed(points):
                trials.costs(point)
                trials.settle(self.passes)
                if key_of(trials.best().plan) != key_of(control.plan) and not trials.best().missed(budget):
                    break
            trials.settle(self.passes)
        return trials.result(points)
