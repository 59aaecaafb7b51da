"""What a search has measured so far, and the best of it: accuracy is spent last, on plans that are worth it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ..plan import Budget, Plan
from .base import (
    Ahead,
    BudgetError,
    Evaluate,
    Evaluation,
    Point,
    Progress,
    Result,
    SearchInterrupted,
    Staged,
    excess,
)

Key = tuple[object, ...]

_BOLD, _LESS = 3.0, 0.75
"""Plans that lose too much are soon seen to, one that keeps the drop has to be evaluated whole: it pays to aim high."""


class Trials:
    """Plans measured so far. ``seen`` maps a plan's key to its point with what is known of it.

    ``control``: the float plan. ``most``: plans measured at most, it included. ``chance``: where that to keep the drop,
    or that not to, is below it, an undecided plan is judged by what was seen, until it is evaluated whole. ``seconds``:
    after that nothing new is begun; None: no limit. An interrupt raises :class:`SearchInterrupted` with what is known.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        most: int,
        budget: Budget,
        minimize: str,
        control: Point,
        progress: Progress | None = None,
        chance: float = 0.0,
        seconds: float | None = None,
    ) -> None:
        self.evaluate, self.most, self.budget, self.minimize = evaluate, most, budget, minimize
        self.control, self.progress, self.chance = control, progress, chance
        self.seen: dict[Key, Point] = {}
        self._end = None if seconds is None else time.monotonic() + seconds
        self.asks_drop = budget.drop is not None or minimize == "drop"
        self.candidates: int | None = 1  # the float plan, until more are promised

    def promise(self, candidates: int | None) -> None:
        """So many plans can be returned, whatever the validation data say; None: they decide which are looked at.

        Raises ``ValueError`` if the evaluation set can never show what was asked of it.
        """
        self.candidates = candidates
        if isinstance(self.evaluate, Staged) and self.budget.drop is not None:
            said = self.evaluate.check(self.budget.drop, candidates)
            if said and self.progress is not None:
                self.progress(said, 0, 1)

    @property
    def spent(self) -> bool:
        """Whether nothing new may be measured."""
        return len(self.seen) >= self.most or self.late

    @property
    def late(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def costs(self, point: Point) -> Point:
        """The point with its measured time, size and energy (and its drop, if that cannot be had apart)."""
        if not isinstance(self.evaluate, Staged):
            return self.whole(point)
        known = self._of(point)
        if known.evaluation is None or (known.evaluation.ms is None and known.evaluation.bytes is None):
            known = self._learn(point, lambda staged: staged.costs(point.plan))
        return known

    def keeps(self, point: Point) -> bool:
        """Whether the drop is within the budget: as certain as the evaluator was asked to be, or as likely as
        ``chance`` says. True where no drop is limited."""
        limit = self.budget.drop
        if limit is None:
            return True
        if not isinstance(self.evaluate, Staged):
            return "drop" not in self.whole(point).missed(self.budget)
        known = self._of(point).evaluation
        if known is None or (known.within is None and known.drop is None):
            self._learn(point, lambda staged: staged.decide(point.plan, limit, self.chance))
        return "drop" not in self._of(point).missed(self.budget)

    def ahead(self, points: Iterable[Point]) -> None:
        """Tell an evaluator that can work ahead what :meth:`keeps` may be asked about next, the first point at once."""
        limit = self.budget.drop
        if limit is not None and isinstance(self.evaluate, Ahead):
            known = {key for key, point in self.seen.items() if _has_drop(point)}
            waiting = {key_of(point.plan): point.plan for point in points if key_of(point.plan) not in known}
            self.evaluate.ahead(list(waiting.values())[: self.most - len(self.seen)], limit, self.chance)

    def whole(self, point: Point) -> Point:
        """The point measured whole; each plan once."""
        known = self._of(point).evaluation
        if known is None or not known.complete or (known.drop is None and self.asks_drop):
            self._learn(point, lambda evaluate: evaluate(point.plan))
            got = self._of(point).evaluation
            if self.asks_drop and got is not None and got.drop is None:
                raise ValueError(
                    "evaluate() gave no drop, but the search was asked to keep or minimize it: "
                    "give the evaluator a task with a metric and validation data"
                )
        return self._of(point)

    def _of(self, point: Point) -> Point:
        return self.seen.get(key_of(point.plan), point)

    def _learn(self, point: Point, measure: Callable[..., Evaluation]) -> Point:
        key = key_of(point.plan)
        if self.progress is not None:
            self.progress("measuring whole plans", min(len(self.seen), self.most), self.most)
        got = measure(self.evaluate)
        if got.population and got.complete and got.drop is not None and isinstance(self.evaluate, Staged):
            assert self.candidates is not None  # else check() has refused
            got = dataclasses.replace(got, drop_bound=self.evaluate.bound(point.plan, self.candidates))
        known = self._of(point).evaluation
        if known is not None:
            got = _merged(known, got)
        self.seen[key] = dataclasses.replace(point, evaluation=got)
        return self.seen[key]

    def finished(self) -> list[Point]:
        """The points of which everything that was asked for is known."""
        return [
            point
            for point in self.seen.values()
            if point.evaluation is not None
            and (not self.asks_drop or (point.evaluation.complete and point.evaluation.drop is not None))
        ]

    def best(self) -> Point:
        """Of those that meet the budget as measured the best as measured, else the one that misses it by least.

        The float plan is the control: a plan measured slower than it is not a gain in time.
        """
        return self.ranked(self.finished() or list(self.seen.values()))[0]

    def promising(self) -> Point:
        """The best of those whose costs are known and whose drop is not known to be too great."""
        found = [p for p in self.seen.values() if _has_costs(p) and (not self.asks_drop or _has_drop(p))]
        return self.ranked(found or self.seen.values())[0]

    def ranked(self, points: Iterable[Point]) -> list[Point]:
        """Best first by what was measured; the float plan ahead of all that are slower than it."""
        found = sorted(points, key=lambda p: (p.loss, p.predicted(self.minimize), str(key_of(p.plan))))
        control = self.seen.get(key_of(self.control.plan))
        if control is not None and self.minimize == "ms" and not control.missed(self.budget):
            found = [p for p in found if p is control or _speed_ratio(p) <= 1.0]
        # Times of different moments compare through the float plan, timed interleaved with each.
        relative = self.minimize == "ms" and all(p is control or _speed_ratio(p) > 0.0 for p in found)

        def rank(point: Point) -> tuple[float, float]:
            value = point.value(self.minimize)
            if relative:
                value = 1.0 if point is control else _speed_ratio(point)
            return excess(point, self.budget), value

        return sorted(found, key=rank)

    def settle(self, passes: float) -> None:
        """Evaluate whole what is fastest (or least) as measured and may keep the drop, until one does.

        ``passes``: full sets that may be forwarded in all. While one more whole evaluation is left of them, plans that
        only looked as if they did not keep it are tried too; without, those that are known to, or look like it.
        """
        if not self.asks_drop:
            self.whole(self.best())
            return
        tried: set[Key] = set()
        while not self.late:
            waiting = [
                p
                for p in self.ranked(p for p in self.seen.values() if key_of(p.plan) not in tried)
                if _has_costs(p) and not set(p.missed(self.budget)) - {"drop"}
            ]
            spare = self.used + 2.0 <= passes
            point = next((p for p in waiting if self._likely(p) or (spare and not self._refuted(p))), None)
            if point is None:
                break
            tried.add(key_of(point.plan))
            if self.holds(point) and not self.whole(point).missed(self.budget):
                return
        if not self.finished() or self.best().missed(self.budget):
            # nothing meets the budget: the one that is closest is known whole
            self.whole(self.ranked(self.seen.values())[0])

    @property
    def used(self) -> float:
        """Full evaluation sets that were forwarded, the float plan's left out."""
        control = key_of(self.control.plan)
        found = [p.evaluation for key, p in self.seen.items() if p.evaluation is not None and key != control]
        whole = self._set_size()
        return sum(got.samples for got in found) / whole if whole else 0.0

    def left(self, point: Point) -> float:
        """The part of the evaluation set that this point has not seen."""
        got, whole = self._of(point).evaluation, self._set_size()
        return 1.0 - (got.samples / whole if got is not None and whole else 0.0)

    def tolerable(self, point: Point) -> float:
        """The predicted loss to try next after this point did not keep the drop, a quarter less at least: where the
        drop would be ``_BOLD`` times its limit, if it went with the loss."""
        got, limit = self._of(point).evaluation, self.budget.drop
        lost = None if got is None else got.judged
        if lost is None or limit is None or limit <= 0 or not lost > 0:
            return point.loss * _LESS
        return point.loss * min(_BOLD * limit / lost, _LESS)

    def _set_size(self) -> int:
        return max(
            (p.evaluation.samples for p in self.seen.values() if p.evaluation and p.evaluation.complete), default=0
        )

    def _likely(self, point: Point) -> bool:
        """Whether it is known or looks as if it keeps the drop."""
        got = point.evaluation
        return got is not None and got.drop is not None and "drop" not in point.missed(self.budget)

    def _refuted(self, point: Point) -> bool:
        """Whether it is certain that it does not."""
        got = point.evaluation
        return got is not None and got.drop is not None and got.certain and "drop" in point.missed(self.budget)

    def holds(self, point: Point) -> bool:
        """Whether the drop is within the limit, with certainty: no chance is enough."""
        limit = self.budget.drop
        if limit is not None and isinstance(self.evaluate, Staged) and not self._refuted(point):
            got = self._of(point).evaluation
            if got is None or got.drop is None or not (got.certain or got.complete):
                got = self._learn(point, lambda staged: staged.decide(point.plan, limit)).evaluation
            if got is not None and got.population and got.within and not got.complete:
                self.whole(point)  # the bound on the population is known of whole evaluations only
        return "drop" not in self._of(point).missed(self.budget)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """An interrupt inside carries the best plan so far."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if not self.seen or isinstance(interrupt, SearchInterrupted):
                raise
            raise SearchInterrupted(self._result(())) from interrupt

    def result(self, points: Iterable[Point]) -> Result:
        """All that was measured and the predicted ``points``; :class:`BudgetError` if nothing meets the budget."""
        found = self._result(points)
        if found.missed:
            raise BudgetError(found)
        return found

    def _result(self, points: Iterable[Point]) -> Result:
        best, candidates = self.best(), self.candidates
        if candidates is not None and isinstance(self.evaluate, Staged) and best.evaluation is not None:
            bound = self.evaluate.bound(best.plan, candidates) if _has_drop(best) else None
            known = dataclasses.replace(best, evaluation=dataclasses.replace(best.evaluation, drop_bound=bound))
            self.seen[key_of(best.plan)] = best = known
        every = {key_of(point.plan): point for point in (*points, *self.seen.values())}
        frontier = sorted(every.values(), key=lambda p: (p.predicted(self.minimize), p.loss))
        frontier = [self.seen.get(key_of(point.plan), point) for point in frontier]
        samples = sum(
            point.evaluation.samples
            for key, point in self.seen.items()
            if point.evaluation is not None and key != key_of(self.control.plan)
        )
        missed = best.missed(self.budget)
        return Result(best, tuple(frontier), self.minimize, self.budget, len(self.seen), missed, samples, candidates)


def key_of(plan: Plan) -> Key:
    """What tells plans apart, whatever the order of their sites."""
    return tuple(sorted(((site, technique) for site, technique in plan.sites.items()), key=lambda item: item[0]))


def _merged(old: Evaluation, new: Evaluation) -> Evaluation:
    """What both say, the newer one first; the drop and what belongs to it come together."""
    together = (
        "drop",
        "drop_interval",
        "metric",
        "samples",
        "within",
        "certain",
        "complete",
        "drop_bound",
        "population",
    )
    keep = {
        field.name: getattr(old, field.name)
        for field in dataclasses.fields(old)
        if getattr(new, field.name) is None and field.name not in together
    }
    if new.drop is None:
        keep |= {name: getattr(old, name) for name in together}
    return dataclasses.replace(new, **keep)


def _has_costs(point: Point) -> bool:
    got = point.evaluation
    return got is not None and (got.ms is not None or got.bytes is not None or got.complete)


def _has_drop(point: Point) -> bool:
    return point.evaluation is not None and point.evaluation.drop is not None


def _speed_ratio(point: Point) -> float:
    """Measured time over the float plan's in the same run; 0 where that was not timed: nothing held against it."""
    got = point.evaluation
    return got.ms / got.float_ms if got is not None and got.ms is not None and got.float_ms else 0.0
