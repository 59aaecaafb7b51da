"""The result of a search that measured nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan import Budget
from .base import BudgetError, Point, Result, excess


def predicted(points: Sequence[Point], budget: Budget, minimize: str) -> Result:
    """The best of the points as predicted; raises :class:`BudgetError` if none meets the budget."""
    best = min(points, key=lambda p: (excess(p, budget), p.predicted(minimize)))
    frontier = tuple(sorted(points, key=lambda p: (p.predicted(minimize), p.loss)))
    result = Result(best, frontier, minimize, budget, 0, best.missed(budget))
    if result.missed:
        raise BudgetError(result)
    return result
