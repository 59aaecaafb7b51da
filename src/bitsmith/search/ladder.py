"""Climbing a ladder of plans, from the one of least loss to the one of least cost, as far as the budget goes."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Point
from .trials import Trials


def climb(
    trials: Trials, points: Sequence[Point], margin: float, passes: float, everywhere: Point | None = None
) -> None:
    """Find where the limits begin to hold, compare the costs of what lies around it, evaluate the best whole.

    ``points``: least loss first. ``margin``: what is predicted worse than the best measured by more than this fraction
    is not measured. ``passes``: full evaluation sets that may be forwarded, as far as that can be helped.
    ``everywhere``: a plan to beat that is asked first, as it need not lie on the ladder: the cheapest technique at
    every site.
    """
    budget, minimize, last = trials.budget, trials.minimize, len(points) - 1
    if minimize == "drop":
        pivot = bisect(trials, points, fails_first=True) if set(budget.limits) != {"drop"} else 0
        pivot = min(pivot, last)
    else:
        held = None
        if everywhere is not None and budget.drop is not None and not trials.spent:
            trials.ahead([everywhere, *points[-1:]])
            held = everywhere if trials.keeps(everywhere) and trials.holds(everywhere) else None
        if everywhere is not None and (held is not None or budget.drop is None) and not trials.spent:
            trials.costs(everywhere)
        pivot = descend(trials, points, passes, held) if budget.drop is not None else last
    around(trials, points, pivot, margin)
    trials.settle(passes)


def around(trials: Trials, points: Sequence[Point], pivot: int, margin: float) -> None:
    """Measure the costs of a point (all of it where the drop is minimized) and of its neighbours, nearest first, while
    they are not predicted worse than the best so far by more than ``margin``."""
    budget, minimize, last = trials.budget, trials.minimize, len(points) - 1
    measure = trials.whole if minimize == "drop" else trials.costs
    if 0 <= pivot <= last and not trials.spent:
        measure(points[pivot])
    for distance in range(1, len(points) + 1):
        for index in (pivot + distance, pivot - distance):
            if not 0 <= index <= last or trials.spent:
                continue
            best = trials.promising()
            ceiling = best.predicted(minimize) + margin * abs(best.predicted(minimize))
            if best.missed(budget) or points[index].predicted(minimize) <= ceiling:
                measure(points[index])


def bisect(trials: Trials, points: Sequence[Point], fails_first: bool) -> int:
    """The last point whose drop holds; if points of little loss fail a cost limit, the first that holds it.

    The far end comes first: often nothing has to be searched. -1 (or the number of points): none.
    """

    def holds(point: Point) -> bool:
        if fails_first:
            return not set(trials.costs(point).missed(trials.budget)) - {"drop"}
        return trials.keeps(point)

    low, high = -1, len(points)
    middle = 0 if fails_first else high - 1
    while high - low > 1 and not trials.spent:
        if not fails_first:
            following = [(a + b) // 2 for a, b in ((low, middle), (middle, high)) if b - a > 1]
            trials.ahead([points[k] for k in (middle, *following)])
        if holds(points[middle]) is fails_first:
            high = middle
        else:
            low = middle
        middle = (low + high) // 2
    return high if fails_first else low


def descend(trials: Trials, points: Sequence[Point], passes: float, held: Point | None = None) -> int:
    """The last point found to keep the drop, from the far end down: after each that does not, one that is expected
    to lose what can still be hoped to fit (:meth:`Trials.tolerable`). -1: none.

    What is likely to keep the drop is decided with certainty: it is evaluated whole anyway. Once
    a point is found that keeps it (or another is ``held`` that does), others are tried while ``passes`` leave room for
    its whole evaluation and theirs.
    """
    low, high, index = -1, len(points), len(points) - 1
    while high - low > 1 and not trials.spent:
        kept = points[low] if low >= 0 else held
        if kept is not None and trials.used + 1.0 + trials.left(kept) > passes:
            break
        trials.ahead([points[k] for k in (index, *_following(trials, points, low, index, high))])
        if trials.keeps(points[index]) and trials.holds(points[index]):
            low = index
            index = (low + high) // 2
        else:
            high = index
            index = _tolerable(trials, points, low, high)
    return low


def _tolerable(trials: Trials, points: Sequence[Point], low: int, high: int) -> int:
    """Where between these to go on after ``high`` did not keep the drop."""
    target = trials.tolerable(points[high])
    below = [k for k in range(low + 1, high) if points[k].loss <= target]
    return max(below, default=low + 1)


def _following(trials: Trials, points: Sequence[Point], low: int, index: int, high: int) -> list[int]:
    """What may come after ``index`` while its drop is not known: after one that fails a guess, nearby once a drop has
    been seen, as that put ``index`` close to the limit."""
    found = []
    if index - low > 1:
        found.append(index - 1 if high < len(points) else _tolerable(trials, points, low, index))
    if high - index > 1:
        found.append((index + high) // 2)
    return found
