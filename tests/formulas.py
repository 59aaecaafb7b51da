"""Profiles and evaluations by formula, for tests of searches: the truth is known, and nothing is run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bitsmith.plan import Plan
from bitsmith.profile import Profile, Row
from bitsmith.search import Evaluation
from bitsmith.site import Record, Site
from bitsmith.technique import Cell, Technique

MIB = 2**20


@dataclass(frozen=True)
class Bits(Technique):
    """A technique that only has a name; 32 is float."""

    bits_: int

    def fits(self, site: Site) -> bool:
        return True

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        raise NotImplementedError


FLOAT, EIGHT, FOUR = Bits(32), Bits(8), Bits(4)
Lost = Callable[[Plan], float]


def layers(count: int, techniques: tuple[Technique, ...] = (EIGHT, FOUR), seed: int = 0) -> Profile:
    """Fewer bits are faster, smaller and are said to lose more, at every site by another amount."""
    rng = random.Random(seed)
    rows = []
    for k in range(count):
        ms, size, loss = rng.uniform(0.5, 1.5), rng.uniform(0.5, 2) * MIB, rng.uniform(0.5, 2)
        rows.append(Row(f"s{k:02}", FLOAT, 0.0, ms, size))
        for technique in techniques:
            bits = technique.bits_  # type: ignore[attr-defined]
            rows.append(Row(f"s{k:02}", technique, loss * 2.0**-bits, ms * (bits / 32) ** 0.5, size * bits / 32))
    return Profile(tuple(rows))


def losing(profile: Profile, factor: float = 1.0) -> Lost:
    """A drop that goes with the losses, so that it grows along every order."""
    return lambda plan: factor * sum(row.loss for row in profile.chosen(plan))


class Called:
    """A plain function of a plan, by formula; remembers what it was asked. ``stop``: calls until an interrupt."""

    def __init__(self, profile: Profile, lost: Lost, stop: int | None = None) -> None:
        self.profile, self.lost, self.stop = profile, lost, stop
        self.asked: list[Plan] = []

    def _measured(self, plan: Plan, **drop: Any) -> Evaluation:
        got = self.profile.predict(plan)
        return Evaluation(plan, ms=got["ms"], bytes=int(got["bytes"]), **drop)

    def __call__(self, plan: Plan) -> Evaluation:
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        assert plan not in self.asked, "measured twice"
        self.asked.append(plan)
        return self._measured(plan, drop=self.lost(plan), samples=1000)


class InStages(Called):
    """Decides on a tenth of the set. ``wrong``: plans of which it only looks as if they kept the drop."""

    def __init__(self, profile: Profile, lost: Lost, wrong: Callable[[Plan], bool] = lambda plan: False) -> None:
        super().__init__(profile, lost)
        self.wrong = wrong
        self._asked: list[tuple[Plan, float]] = []
        self.timed: list[Plan] = []
        self.decided: list[Plan] = []
        self.promised: list[int | None] = []

    def costs(self, plan: Plan) -> Evaluation:
        self.timed.append(plan)
        return self._measured(plan)

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        assert (plan, chance) not in self._asked, "decided twice"
        self._asked.append((plan, chance))
        self.decided.append(plan)
        if chance and self.wrong(plan):
            return Evaluation(plan, drop=0.0, samples=100, within=True, certain=False, complete=False)
        lost = self.lost(plan)
        return Evaluation(plan, drop=lost, samples=100, within=lost <= limit, complete=False)

    def bound(self, plan: Plan, candidates: int) -> float | None:
        return None

    def check(self, limit: float, candidates: int | None) -> str:
        self.promised.append(candidates)
        return ""
