"""Bits that follow step and range, with a penalty on what is over the limits: the published way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data import items
from ..task import evaluating
from .guide import Guide
from .limits import Limits, PrecisionStep, SizeError, grids
from .size import learned_sizes
from .state import State, copied, put

AIM = 0.98
"""The part of a limit that training aims at."""


class Penalty(Guide):
    """Step and range of every grid follow the loss in the second of three ``phases``, every ``rhythm``-th step; a
    square penalty of ``strength`` rises from 0.01 to 1 in its first half. ``judged`` times, evenly, a state that keeps
    the limits is judged by ``judge`` (a loss of the network on a validation item), or by its training loss; the best
    goes on."""

    def __init__(
        self,
        limits: Limits,
        phases: tuple[int, int, int],
        strength: float,
        rhythm: int,
        judged: int,
        judge: Callable[[nn.Module, Any], Tensor],
        validation: Iterable[Any] | None,
    ) -> None:
        self.limits, self.strength, self.rhythm = limits, strength, rhythm
        self.first, self.last = phases[0], phases[0] + phases[1]
        self.at = {self.first + round(phases[1] * (k + 1) / judged) for k in range(judged)}
        self.judge, self.validation = judge, validation
        self.sizes: list[PrecisionStep] = []
        self.kept, self.best = float("inf"), State()

    def __str__(self) -> str:
        return (
            f"penalty of {self.strength:g} from step {self.first} to {self.last} within {self.limits}, grids every "
            f"{self.rhythm}, judged {sorted(self.at)} {'on validation' if self.validation is not None else ''}"
        )

    def begin(self, net: nn.Module) -> None:
        self.net = net
        self.grids = [grid for grid in grids(net).values() if grid.infers_bits]
        self._hold(self.first > 0)

    def end(self) -> None:
        self._hold(False)

    def penalty(self, done: int) -> Tensor | None:
        if not self.first <= done < self.last:
            return None
        ramp = min(1.0, 0.01 + 0.99 * 2 * (done - self.first) / (self.last - self.first))
        # a square has no slope where it begins: it aims a little below the limits
        over = self.limits.excess(learned_sizes(self.net, self.limits.count), AIM)
        return self.strength * ramp * over.square().sum()

    def adjust(self, done: int) -> None:
        if not self.first <= done < self.last:
            return
        self._now = learned_sizes(self.net, self.limits.count)
        for grid in self.grids:
            grid.clip_gradient()
            if (done - self.first + 1) % self.rhythm:
                for parameter in grid.parameters():
                    parameter.grad = None

    def after(self, done: int, loss: float) -> None:
        if self.first < done <= self.last:
            self.sizes.append(PrecisionStep.of(loss, self._now))
        if done in self.at:
            self._keep(loss)
        if done == self.first:
            self._hold(False)
        if done == self.last:
            self._choose()

    def _hold(self, hold: bool, fill: bool = False) -> None:
        for grid in self.grids:
            grid.hold_bits(hold, fill)

    @torch.no_grad()
    def _keep(self, seen: float) -> None:
        if self.limits.over(self.net):
            return
        if self.validation is not None:
            with torch.random.fork_rng(), evaluating(self.net):
                torch.manual_seed(0)  # so that training is the same with and without it
                losses = [float(self.judge(self.net, item)) for item in items(self.validation, "validation")]
            seen = sum(losses) / max(len(losses), 1)
        if seen <= self.kept or not self.best:
            self.kept, self.best = seen, copied(self.net, self.best)

    def _choose(self) -> None:
        if not self.best:
            sizes = learned_sizes(self.net, self.limits.count)
            raise SizeError(
                f"learn_precision: no judged state kept the limits ({self.limits}); the last takes "
                f"{float(sizes.weights.detach()):.0f} for weights and {float(sizes.activations.detach()):.0f} for "
                "activations. More steps, a greater grid_lr or a greater strength may help, or method='allocation'"
            )
        put(self.net, self.best)
        self._hold(True, fill=True)

    def state(self) -> dict[str, Any]:
        return {"sizes": [step.numbers for step in self.sizes], "kept": self.kept, "best": self.best}

    def resume(self, state: Mapping[str, Any], done: int) -> None:
        self.sizes = [PrecisionStep(*numbers) for numbers in state["sizes"]]
        self.kept, self.best = state["kept"], dict(state["best"])
        for grid in self.grids:
            grid.mode = "free" if self.first <= done < self.last else "held"
