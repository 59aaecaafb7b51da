"""Scoring a network while it trains, keeping its best weights, and stopping where it no longer improves."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..task import Task, score
from .state import State, copied


class Validation:
    """The best score so far of a task's validation data, and the weights that had it.

    ``every``: steps between two scores. ``patience``: so many scores in a row without a better one end the training;
    None: never.
    """

    def __init__(self, task: Task, every: int, patience: int | None, seed: int) -> None:
        self.task, self.every, self.patience, self.seed = task, every, patience, seed
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0
        self.state: State = {}

    def __str__(self) -> str:
        return f"{self.task.name} every {self.every}, patience {self.patience}"

    def due(self, done: int, steps: int) -> bool:
        """Whether to score after ``done`` of ``steps`` steps; always after the last."""
        return done % self.every == 0 or done == steps

    def measure(self, net: nn.Module) -> float:
        """The mean score; draws random numbers of its own, so that training is the same with and without it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return score(net, self.task).mean

    def take(self, value: float, done: int, net: nn.Module) -> bool:
        """Whether this is the best score so far; the weights are kept then. NaN is never better."""
        better = self.best is None or (value < self.best if self.task.lower else value > self.best)
        if better and not math.isnan(value):
            self.best, self.best_step, self.waited = value, done, 0
            self.state = copied(net, self.state)
            return True
        self.waited += 1
        return False

    @property
    def stops(self) -> bool:
        return self.patience is not None and self.waited >= self.patience
