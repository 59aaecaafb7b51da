"""Limits in bytes on what a network whose bits are learned takes to store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.network import duplicate
from ..numerics.grid import Grid
from .size import Count, Sizes, learned_sizes

Rows = dict[str, list[float]]


class SizeError(ValueError):
    """A limit on size that cannot be kept, or was not."""


@dataclass(frozen=True)
class PrecisionStep:
    """One step of the mixed phase: the loss with penalties, and the bytes of weights and of activations then."""

    loss: float
    weights: float
    activations: float

    @classmethod
    def of(cls, loss: float, sizes: Sizes) -> PrecisionStep:
        return cls(loss, float(sizes.weights.detach()), float(sizes.activations.detach()))

    @property
    def numbers(self) -> list[float]:
        return [self.loss, self.weights, self.activations]


def grids(net: nn.Module) -> dict[str, Grid]:
    """The grids of a network by name, those that are trained and others."""
    return {name: module for name, module in net.named_modules() if isinstance(module, Grid)}


@dataclass(frozen=True)
class Limits:
    """Bytes of ``weights``, ``activations`` and both, None where there is no limit; activations by ``count``."""

    weights: float | None
    activations: float | None
    total: float | None
    count: Count

    def __str__(self) -> str:
        return ", ".join(f"{what} {limit:g} bytes" for what, limit in self.given.items())

    @property
    def given(self) -> dict[str, float]:
        every = {"weights": self.weights, "activations": self.activations, "total": self.total}
        return {what: limit for what, limit in every.items() if limit is not None}

    def over(self, net: nn.Module) -> bool:
        """Whether a limit is passed now."""
        sizes = learned_sizes(net, self.count)
        return any(float(getattr(sizes, what).detach()) > limit for what, limit in self.given.items())

    def excess(self, sizes: Sizes, aim: float) -> Tensor:
        """By how much so much of each limit is passed, relative to it: shape (limits,), 0 where it is kept."""
        return torch.stack([torch.relu(getattr(sizes, what) / (aim * limit) - 1) for what, limit in self.given.items()])

    def check(self, net: nn.Module, bits: int | None = None) -> None:
        """Raise :class:`SizeError` where the fewest bits are too many: so many, or one level on each side of 0."""
        least = duplicate(net)
        with torch.no_grad():
            for grid in grids(least).values():
                if grid.infers_bits and bits is not None:
                    grid.set_bits(bits)
                elif grid.infers_bits:
                    grid.log_step.fill_(40.0)
            sizes = learned_sizes(least, self.count)
        for what, limit in self.given.items():
            size = float(getattr(sizes, what))
            if size > limit:
                raise SizeError(
                    f"learn_precision({what}={limit:g}): with the fewest bits everywhere it is {size:.0f} bytes, "
                    "scales and what is not learned included; raise the limit, learn more sites, or take fewer slices "
                    "(granularity='tensor')"
                )

    def rows(
        self, of_weights: Sequence[float], of_activations: Sequence[float], bits: Sequence[float], now: Sizes
    ) -> tuple[Rows, dict[str, float]]:
        """The limits as linear ones on bits: what a bit of each grid takes in bytes, and what all may take.

        ``of_weights``, ``of_activations``: bytes that one more bit of each grid adds; ``bits``: as they are ``now``,
        with activations counted as a sum.
        """

        def taken(rates: Sequence[float]) -> float:
            return sum(rate * width for rate, width in zip(rates, bits, strict=True))

        fixed = {
            "weights": float(now.weights.detach()) - taken(of_weights),
            "activations": float(now.activations.detach()) - taken(of_activations),
        }
        parts = {"sum": [*of_activations]}
        if self.count == "max":  # each alone must keep the limit
            parts = {
                f"of {i}": [rate if i == j else 0.0 for j in range(len(bits))]
                for i, rate in enumerate(of_activations)
                if rate
            }
            fixed["activations"] = 0.0
        rows, room = Rows(), dict[str, float]()
        for what, limit in self.given.items():
            if what == "weights":
                rows[what], room[what] = [*of_weights], limit - fixed["weights"]
                continue
            for name, part in parts.items():
                both = part if what == "activations" else [a + b for a, b in zip(of_weights, part, strict=True)]
                left = fixed["activations"] + (fixed["weights"] if what == "total" else 0.0)
                rows[f"{what} {name}"], room[f"{what} {name}"] = both, limit - left
        return rows, room
