"""Bisection over an order of sites: the guided search of two papers."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Budget
from ..profile import Profile
from .base import Evaluate, Progress, Result, Search
from .ladder import around, bisect
from .order import Order, check, levels, prefixes, unmeasured
from .predicted import predicted
from .program import Choice, Program
from .trials import Trials, key_of


@dataclass(frozen=True)
class Bisection(Search):
    """The longest beginning of an order of sites that keeps the drop, technique by technique, dearest first.

    Schaefer et al. 2023 (arXiv:2302.01382) with ``order="loss"``, and (arXiv:2306.04879) with ``order="marginal"``:
    sites are ordered by what each adds to those before it, ``mu`` weighting what two lose together. Those that kept one
    technique are candidates for the next. About log2 of their number evaluations for each technique.

    ``order="ratio"``: loss for what is saved. ``order="random"``: the control, drawn with ``seed``. ``margin``:
    neighbours that are predicted worse by no more than this fraction have their costs measured too; 0: none.
    ``max_evaluations``, ``chance``, ``passes``, ``seconds``: as in :class:`~bitsmith.searches.Exact`.
    """

    order: Order = "marginal"
    mu: float = 1.0
    seed: int = 0
    margin: float = 0.0
    max_evaluations: int = 64
    chance: float = 0.1
    passes: float = 3.0
    seconds: float | None = None

    def __post_init__(self) -> None:
        check(self.order, self.mu, self.max_evaluations, "Bisection")
        if not self.margin >= 0:
            raise ValueError(f"Bisection(margin={self.margin}): must be a fraction of 0 or more")

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
            trials.promise((len(program.units) + 1) ** len(levels(program, minimize)))
            trials.whole(control)
            for technique in levels(program, minimize):
                ladder = prefixes(program, technique, base, among, self.order, minimize, self.mu, self.seed)
                found = [program.point(choice) for choice in ladder]
                points += found
                kept = len(found) - 1
                if budget.drop is not None:
                    kept = bisect(trials, found, fails_first=False)
                    # what only looked as if it kept the drop is asked again before more is built on it
                    while kept > 0 and not trials.late and not trials.holds(found[kept]):
                        kept = bisect(trials, found[:kept], fails_first=False)
                kept = max(kept, 0)
                trials.costs(found[kept])
                if self.margin:
                    around(trials, found, kept, self.margin)
                base = ladder[kept]
                among = _changed(base, program.control)
            trials.settle(self.passes)
        unique = list({key_of(point.plan): point for point in points}.values())
        return trials.result(unique)


def _changed(choice: Choice, control: Choice) -> list[int]:
    """The decisions that are not as in the control."""
    return [u for u, (one, other) in enumerate(zip(choice, control, strict=True)) if one != other]
