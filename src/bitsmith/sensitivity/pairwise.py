"""Pairwise sensitivity: every two sites measured together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..plan import Plan
from ..site import contains
from ..task import NonFiniteError, Task, mean_loss
from .base import Meter, Pair, Scores
from .noise import FirstSamples
from .one_at_a_time import output_error

_MOST = 2000
"""Plans that are built at most: hours of work on a small network."""


@dataclass(frozen=True)
class Pairwise:
    """Measured losses of every site and of every two sites together: ``L(l) - L(0)``, and what two lose beyond that,
    ``C_lm = L(l, m) - L(l) - L(m) + L(0)``, after the question of Schaefer et al. 2023 (arXiv:2306.04879); the measured
    form is ours. Losses and their cross terms add up exactly to what one or two changed sites lose.

    ``L``: the task's mean loss in its own unit, or without ``Task(loss=...)`` the relative squared error of the output
    (``L(0)`` is then 0), over the first calibration items that hold at most ``samples`` samples (at least one item). N
    pairs of different sites cost ``1 + N + N (N - 1) / 2`` forwards of them. Nothing is clipped: a loss may be below 0.

    Raises ``ValueError`` if more than 2000 networks would have to be built. Skipped, with the reason: pairs whose loss
    is not finite. A module and a site inside it have no cross term: no plan can name both.
    """

    samples: int = 256

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"Pairwise(samples={self.samples}): must be at least 1")

    def __call__(
        self, model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]
    ) -> Scores:
        meter = Meter()
        both = [(one, other) for one, other in itertools.combinations(pairs, 2) if _apart(one[0], other[0])]
        count = len(pairs) + len(both)
        if count > _MOST:
            raise ValueError(
                f"Pairwise would build {count} networks for {len(pairs)} choices, more than {_MOST}: score fewer sites "
                "or techniques, or take cross terms from derivatives, InterLayer(form='gauss_newton')"
            )
        task = replace(task, calibration=FirstSamples(task.calibration, self.samples, meter))
        plans = [*(Plan(dict([pair])) for pair in pairs), *(Plan(dict(two)) for two in both)]
        rises = list(_rises(model, task, plans, simulate)) if plans else []
        alone = dict(zip(pairs, rises, strict=False))
        losses = {pair: rise for pair, rise in alone.items() if math.isfinite(rise)}
        skipped = {pair: f"its loss is {rise}" for pair, rise in alone.items() if pair not in losses}
        cross: dict[tuple[Pair, Pair], float] = {}
        unknown: list[str] = []
        for (one, other), rise in zip(both, rises[len(pairs) :], strict=True):
            if one not in losses or other not in losses:
                continue
            if math.isfinite(rise):
                cross[one, other] = rise - losses[one] - losses[other]
            else:
                unknown.append(f"{one[0]} {one[1].label()} with {other[0]} {other[1].label()}")
        notes = {"plans": f"{count} measured"}
        if unknown:
            notes["not finite together"] = f"no cross term for {len(unknown)}: {'; '.join(unknown[:5])}"
        return Scores(losses, cross, skipped, meter.spent(), notes)


def _apart(one: str, other: str) -> bool:
    """Whether one plan can name both sites."""
    return one != other and not contains(one, other) and not contains(other, one)


def _rises(
    model: nn.Module, task: Task, plans: Sequence[Plan], simulate: Callable[[Plan], nn.Module]
) -> Iterator[float]:
    """What each plan loses against the float model; NaN where its loss is not finite."""
    if task.loss is None:
        # it asks for one network per pair, and is handed those of the plans
        waiting = iter(plans)
        pairs = [next(iter(plan.sites.items())) for plan in plans]
        yield from output_error(model, task, pairs, lambda _: simulate(next(waiting)))
        return
    base = mean_loss(model, task)
    for plan in plans:
        try:
            yield mean_loss(simulate(plan), task) - base
        except NonFiniteError:
            yield math.nan
