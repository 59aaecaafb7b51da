"""Random plans: the control that every search must beat."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..plan import Budget
from ..profile import Profile
from .base import Evaluate, Progress, Result, Search
from .predicted import predicted
from .program import Choice, Program
from .trials import Trials


@dataclass(frozen=True)
class RandomPlans(Search):
    """``plans`` drawn at random, the share of changed sites uniform (Bergstra and Bengio 2012, JMLR 13:281).

    Every plan's costs are measured; then the drop, cheapest first, until one keeps it. ``seed``: of the draw.
    ``passes``, ``seconds``: as in :class:`~bitsmith.searches.Exact`.
    """

    plans: int = 24
    seed: int = 0
    passes: float = float("inf")
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.plans < 1:
            raise ValueError(f"RandomPlans(plans={self.plans}): must be at least 1")

    def search(
        self,
        profile: Profile,
        budget: Budget,
        minimize: str,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
    ) -> Result:
        program = Program(profile)
        generator = random.Random(self.seed)
        control = program.point(program.control)
        points = [program.point(drawn(program, generator)) for _ in range(self.plans)]
        if evaluate is None:
            return predicted([control, *points], budget, minimize)
        trials = Trials(evaluate, self.plans + 1, budget, minimize, control, progress, seconds=self.seconds)
        with trials.interruptible():
            trials.promise(len(points) + 1)
            trials.whole(control)
            for point in points:
                if not trials.late:
                    (trials.whole if minimize == "drop" else trials.costs)(point)
            trials.settle(self.passes)
        return trials.result(points)


def drawn(program: Program, generator: random.Random) -> Choice:
    """A plan that changes each decision with one probability, itself uniform."""
    share = generator.random()
    return tuple(
        generator.choice([other for other in range(len(unit.techniques)) if other != k] or [k])
        if generator.random() < share
        else k
        for unit, k in zip(program.units, program.control, strict=True)
    )
