"""Bits by what each costs the loss, measured while the network trains: an exact allocation under limits.

A uniform quantizer of step d adds noise of variance d^2 / 12, and the loss grows in proportion to it; one bit more
halves d. So at b bits a tensor costs the loss ``k 4^-b``, and ``k = 4^b (dL/dlog2 d) / (2 ln 2)`` with the gradient of
the rounding alone, which training has anyway. That gradient is what :meth:`~bitsmith.numerics.grid.Grid.tie_gradients`
gives; its mean over steps sees curvature, as what rounding moved the weight or the activation to changes its gradient.
The least sum under limits on bytes is the classic allocation of bits (Shoham and Gersho 1988, doi:10.1109/29.90373),
here as an integer program. With learned precision only the quantity that is limited is shared (Uhlich et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .guide import Guide
from .limits import Limits, PrecisionStep, SizeError, grids
from .size import learned_sizes

WIDTHS = range(2, 9)
"""The bits that are chosen among: integers that runtimes and files have."""

CAUTION = 1.0
"""Standard errors that come to a cost. At 8 bits rounding shows next to nothing above the noise of the gradient, and a
cost that is extrapolated to 2 bits would be that noise times 4096: what is not known is taken to be dear."""


def allocate(
    costs: Sequence[float], rows: Mapping[str, Sequence[float]], room: Mapping[str, float]
) -> list[int] | None:
    """Bits of each tensor, 2 to 8, of least ``sum_i costs[i] 4^-bits[i]`` such that for each limit r
    ``sum_i rows[r][i] bits[i] <= room[r]``; None where no bits keep the limits.

    ``rows``: bytes of one bit. Solved to a relative gap of 1e-6, or for a minute at most (HiGHS,
    ``scipy.optimize.milp``); among equals the fewest bytes.

    >>> allocate([64.0, 1.0], {"total": [1.0, 1.0]}, {"total": 9.0})
    [6, 3]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    count, widths = len(costs), np.array(WIDTHS, dtype=float)
    # what is measured with noise may fall below 0: then more bits bring nothing
    scale = max([*costs, 0.0]) or 1.0
    loss = np.array([max(cost, 0.0) / scale for cost in costs])[:, None] * 4.0 ** (2 - widths)
    weights = np.array([rows[name] for name in rows], dtype=float).reshape(len(rows), count)
    bounds = np.array([room[name] for name in rows], dtype=float)
    unit = np.maximum(np.abs(weights).max(axis=1, initial=0.0), 1e-9)
    taken = (weights / unit[:, None])[:, :, None] * widths
    tie = 1e-9 * taken.sum(axis=0) / max(float(taken.sum()), 1e-9)
    one = csr_array(kron(np.eye(count), np.ones((1, len(widths)))))
    found = milp(
        (loss + tie).ravel() * 1e4,  # HiGHS compares to 1e-6 absolutely
        integrality=np.ones(loss.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(taken.reshape(len(rows), -1), -np.inf, bounds / unit),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if found.x is None:
        return None
    return [int(WIDTHS[k]) for k in found.x.reshape(count, -1).argmax(axis=1)]


@dataclass
class Cost:
    """What was measured of one tensor's k, step by step: how often, the sum, the sum of squares."""

    count: float = 0.0
    sum: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count, self.sum, self.squares = self.count + 1, self.sum + value, self.squares + value * value

    def fade(self) -> None:
        """Let what was seen so far count half."""
        self.count, self.sum, self.squares = self.count / 2, self.sum / 2, self.squares / 2

    @property
    def upper(self) -> float:
        """The mean, at least 0, and :data:`CAUTION` standard errors of it."""
        if not self.count:
            return 0.0
        mean = self.sum / self.count
        variance = max(self.squares / self.count - mean * mean, 0.0)
        return max(mean, 0.0) + CAUTION * math.sqrt(variance / self.count)


class Allocation(Guide):
    """Allocates bits after the first phase of training, and ``moves`` - 1 times more in the second, evenly.

    ``phases``: the steps of the three. What the gradients said before an allocation counts half at the next.
    """

    def __init__(self, limits: Limits, phases: tuple[int, int, int], moves: int) -> None:
        self.limits = limits
        first, second = phases[0], phases[0] + phases[1]
        self.at = sorted({first + round(phases[1] * k / moves) for k in range(moves)})
        self.first, self.last = first, second
        self.sizes: list[PrecisionStep] = []
        self.costs = dict[str, Cost]()

    def __str__(self) -> str:
        return f"allocation after the steps {self.at} within {self.limits}"

    def begin(self, net: nn.Module) -> None:
        self.net = net
        self.grids = {name: grid for name, grid in grids(net).items() if grid.infers_bits}
        self.costs = {name: Cost() for name in self.grids}
        for grid in self.grids.values():
            grid.observe_bits()

    def adjust(self, done: int) -> None:
        for name, grid in self.grids.items():
            slope = grid.tie_gradients()
            if done < self.at[-1]:  # nothing is allocated later
                self.costs[name].add(4.0 ** float(grid.bits().detach().mean()) * slope)

    def after(self, done: int, loss: float) -> None:
        if done in self.at:
            self._allocate()
        if self.first < done <= self.last:
            self.sizes.append(PrecisionStep.of(loss, learned_sizes(self.net, self.limits.count)))

    @torch.no_grad()
    def _allocate(self) -> None:
        """New bits for every grid."""
        sizes = learned_sizes(self.net, "sum")
        before = {name: float(grid.bits().mean()) for name, grid in self.grids.items()}
        of_weights, of_activations = [], []
        for name, grid in self.grids.items():
            # what one bit more takes, by asking: a grid is of weights or of an activation, and may serve several sites
            kept = {key: tensor.clone() for key, tensor in grid.state_dict().items()}
            bits = 7 if float(grid.bits().max()) > 7 else 8
            grid.set_bits(bits)
            other, mean = learned_sizes(self.net, "sum"), bits - before[name]
            of_weights.append(float(other.weights - sizes.weights) / mean)
            of_activations.append(float(other.activations - sizes.activations) / mean)
            grid.load_state_dict(kept)
        names = [*self.grids]
        rows, room = self.limits.rows(of_weights, of_activations, [before[name] for name in names], sizes)
        found = allocate([self.costs[name].upper for name in names], rows, room)
        if found is None:
            raise SizeError(
                f"learn_precision: {WIDTHS[0]} bits everywhere are over the limits ({self.limits}), scales and what is "
                "not learned included; raise them, learn more sites, or take fewer slices (granularity='tensor')"
            )
        for name, bits in zip(names, found, strict=True):
            self.grids[name].set_bits(bits)
            self.costs[name].fade()

    def end(self) -> None:
        for grid in self.grids.values():
            grid.hold_bits(False)

    def state(self) -> dict[str, Any]:
        costs = {name: [cost.count, cost.sum, cost.squares] for name, cost in self.costs.items()}
        return {"costs": costs, "sizes": [step.numbers for step in self.sizes]}

    def resume(self, state: Mapping[str, Any], done: int) -> None:
        self.costs = {name: Cost(*numbers) for name, numbers in state["costs"].items()}
        self.sizes = [PrecisionStep(*numbers) for numbers in state["sizes"]]
