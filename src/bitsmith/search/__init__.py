"""Which plan: the verb ``search`` and what searches owe."""

from __future__ import annotations

from ..plan import Budget
from ..profile import Profile
from .base import QUANTITIES, BudgetError, Evaluate, Evaluation, Point, Progress, Result, Search
from .exact import Exact

__all__ = ["BudgetError", "Evaluate", "Evaluation", "Point", "Progress", "Result", "Search", "search"]


def search(
    profile: Profile,
    budget: Budget,
    minimize: str | None = None,
    method: Search = Exact(),  # noqa: B008 (a frozen value)
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Result:
    """The plan of least ``minimize`` (``ms``, ``mib``, ``mj`` or ``drop``) within the budget, and the frontier.

    ``minimize`` may be left out when ``drop`` is the only limit: ``ms`` then. ``evaluate`` measures whole plans;
    without it the result is labelled ``predicted`` and cannot keep a ``drop``, which is measured, never predicted.
    Raises ``ValueError`` for a question that the profile cannot answer, :class:`BudgetError` if no plan meets the
    budget.
    """
    minimize = objective(budget, minimize)
    _check_changeable(profile)
    wants_mj = minimize == "mj" or budget.mj is not None
    without = next((row for row in profile.rows if not row.refused and row.mj is None), None)
    if wants_mj and without is not None:
        raise ValueError(
            f"the profile has no energy (its row for {without.site!r} under {without.technique} has no mj): "
            "profile on a target with energy, or leave mj out"
        )
    if budget.drop is not None and evaluate is None:
        raise ValueError(
            f"Budget(drop={budget.drop}) needs evaluate=: losses of sites do not add up to a drop of the metric. "
            "Pass evaluate=bitsmith.evaluator(model, task, target), or limit ms, mib or mj only"
        )
    return method.search(profile, budget, minimize, evaluate, progress)


def objective(budget: Budget, minimize: str | None) -> str:
    """What is minimized: ``minimize``, or ``ms`` if it is left out and ``drop`` is the only limit; else an error."""
    if minimize is None:
        if set(budget.limits) != {"drop"}:
            raise ValueError(
                "say what to minimize: minimize='ms', 'mib', 'mj' or 'drop' (the limits are "
                f"{', '.join(budget.limits)}; only with drop as the single limit it is 'ms' by itself)"
            )
        return "ms"
    if minimize not in QUANTITIES:
        raise ValueError(f"minimize={minimize!r}: must be one of {', '.join(QUANTITIES)}")
    return minimize


def _check_changeable(profile: Profile) -> None:
    if not profile.rows:
        raise ValueError("the profile is empty: it has no rows; profile at least one site under one technique")
    if any(len({row.technique for row in rows}) > 1 for rows in profile.options().values()):
        return
    reasons: dict[str, list[str]] = {}
    for row in profile.rows:
        if row.refused:
            reasons.setdefault(row.refused, []).append(f"{row.technique} at {row.site}")
    lines = [
        f"\n  {reason}: {', '.join(where[:3])}{f' and {len(where) - 3} more' if len(where) > 3 else ''}"
        for reason, where in reasons.items()
    ]
    why = "".join(lines) or " no site has more than one technique; profile more techniques"
    raise ValueError(f"zero sites can change:{why}")
