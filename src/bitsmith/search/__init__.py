"""Which plan: the verb ``search`` and what searches owe."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..plan import Budget, Plan
from ..profile import Profile
from ..workers import Crew, Lost, WorkerError, call_remotely, packed
from .base import (
    NAMED,
    QUANTITIES,
    BudgetError,
    Evaluate,
    Evaluation,
    Point,
    Progress,
    Result,
    Search,
    SearchInterrupted,
    Shared,
    Staged,
)
from .exact import Exact

__all__ = [
    "BudgetError",
    "Evaluate",
    "Evaluation",
    "Point",
    "Progress",
    "Result",
    "Search",
    "SearchInterrupted",
    "search",
]


def search(
    profile: Profile,
    budget: Budget,
    minimize: str | None = None,
    method: Search = Exact(),  # noqa: B008 (a frozen value)
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    *,
    executor: Executor | None = None,
) -> Result:
    """The plan of least ``minimize`` (``ms``, ``mib``, ``mj``, ``mm2``, ``drop``) within the budget, and the frontier.

    ``minimize`` may be left out when ``drop`` is the only limit: ``ms`` then. ``evaluate`` measures whole plans;
    without it the result is labelled ``predicted`` and cannot keep a ``drop``, which is measured, never predicted.
    Raises ``ValueError`` for a question that the profile cannot answer, :class:`BudgetError` if no plan meets the
    budget, :class:`SearchInterrupted` (a ``KeyboardInterrupt``) with the best so far.

    ``executor``: such as a process pool (with the ``spawn`` context), Dask's ``client.get_executor()`` or
    ``mpi4py.futures``. The search decides as without it and gives the same result; workers score, ahead, plans that it
    may ask about next (:class:`~bitsmith.searches.Exact` and :class:`~bitsmith.searches.Bisection` say which), and the
    scores are kept in the evaluator's store. Times are taken in this process, while no worker has work of ours. What is
    lost with a worker is done here, with a note. A plain function as ``evaluate`` is called whole on workers, several
    at a time: leave the executor out if it takes times. Raises :class:`~bitsmith.workers.WorkerError` for a model or
    task that cannot be sent.
    """
    minimize = objective(budget, minimize)
    _check_changeable(profile)
    for quantity, named in NAMED.items():
        without = next((row for row in profile.rows if not row.refused and getattr(row, quantity) is None), None)
        if without is not None and quantity in (minimize, *budget.limits):
            raise ValueError(
                f"the profile has no {named} (its row for {without.site!r} under {without.technique} has no "
                f"{quantity}): profile on a target with {named}, or leave {quantity} out"
            )
    if budget.drop is not None and evaluate is None:
        raise ValueError(
            f"Budget(drop={budget.drop}) needs evaluate=: losses of sites do not add up to a drop of the metric. "
            "Pass evaluate=bitsmith.evaluator(model, task, target), or limit ms, mib, mj or mm2 only"
        )
    with _helped(evaluate, executor, progress) as measured:
        return method.search(profile, budget, minimize, measured, progress)


@contextmanager
def _helped(
    evaluate: Evaluate | None, executor: Executor | None, progress: Progress | None
) -> Iterator[Evaluate | None]:
    """What measures plans, with the executor's help if it can have any."""

    def note(text: str) -> None:
        if progress is not None:
            progress(text, 1, 1)

    if executor is None or evaluate is None:
        yield evaluate
    elif isinstance(evaluate, Shared):
        with evaluate.helped(executor) as found:
            yield found
    elif isinstance(evaluate, Staged):
        note("workers are not used: this evaluate= has no helped()")
        yield evaluate
    else:
        work = None
        if not isinstance(executor, ThreadPoolExecutor):
            try:
                work = packed(evaluate, {"evaluate": evaluate})
            except WorkerError as error:
                note(f"one plan at a time: {error}")
                yield evaluate
                return
        calls = _CallsAhead(evaluate, work, Crew(executor, note))
        try:
            yield calls
        finally:
            calls.withdraw()


class _CallsAhead:
    """A plain function of a plan, called on workers before its result is asked for."""

    def __init__(self, function: Evaluate, work: bytes | None, crew: Crew) -> None:
        self.function, self.work, self.crew = function, work, crew
        self.lost = 0
        self._jobs: dict[str, Future[Any]] = {}

    def __call__(self, plan: Plan) -> Evaluation:
        future = self._jobs.pop(plan.digest(), None)
        got = Lost("") if future is None else self.crew.result(future)
        if not isinstance(got, Lost):
            found: Evaluation = got
            return found
        if got.why:
            self.lost += 1
            self.crew.note(
                f"lost with its worker ({got.why}): a plan of {len(plan)} sites, measured here ({self.lost} so far)"
            )
        return self.function(plan)

    def ahead(self, plans: Sequence[Plan], limit: float, chance: float = 0.0) -> None:
        wanted = {plan.digest(): plan for plan in plans}
        self.withdraw(wanted)
        for key, plan in wanted.items():
            future = None if key in self._jobs or self.crew.broken else self._send(plan)
            if future is not None:
                self._jobs[key] = future

    def withdraw(self, but: Collection[str] = ()) -> None:
        """Take back what has not begun, and wait for nothing. ``but``: plans that stay, by digest."""
        self._jobs = {k: f for k, f in self._jobs.items() if k in but or not self.crew.withdraws(f)}

    def _send(self, plan: Plan) -> Future[Any] | None:
        if self.work is None:
            return self.crew.submit(self.function, plan)
        return self.crew.submit(call_remotely, self.work, packed(plan, {"the plan": plan}))


def objective(budget: Budget, minimize: str | None) -> str:
    """What is minimized: ``minimize``, or ``ms`` if it is left out and ``drop`` is the only limit; else an error."""
    if minimize is None:
        if set(budget.limits) != {"drop"}:
            raise ValueError(
                "say what to minimize: minimize='ms', 'mib', 'mj', 'mm2' or 'drop' (the limits are "
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
