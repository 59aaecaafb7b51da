"""The evaluator of known samples that simulated searches use, and the rules of ``Exact`` on it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bitsmith.search.base import Staged
from bitsmith.sequential import chance, decide
from repository import load

known_ladder = load("benchmarks.known_ladder")
search_rule = load("benchmarks.search_rule")
N = 400


def ladder(counts, share=None, seed=0):
    """Float, and a rung for each count of worse samples; every next one is faster."""
    rows = [np.repeat([1.0, 0.0], [count, N - count]) for count in (0, *counts)]
    worse = np.random.default_rng(seed).permutation(np.array(rows), axis=1)
    times = [2.0 - 0.1 * k for k in range(len(rows))]
    return known_ladder.KnownLadder(worse, times, chunk=20, share=share)


def plan(number):
    from bitsmith.plan import Plan

    return Plan({"s": known_ladder.Rung(number)})


def test_it_is_a_staged_evaluator_that_tells_the_truth():
    made = ladder([3, 60])
    assert isinstance(made, Staged)
    assert made(plan(2)).drop == pytest.approx(60 / N)
    assert made.costs(plan(2)).ms == pytest.approx(1.8)
    assert made.costs(plan(2)).drop is None
    sure = made.decide(plan(1), 4 / N)
    assert sure.within
    assert sure.certain
    assert made.decisions == {1: (sure.samples, True, True)}


@pytest.mark.parametrize("share", [None, 0.5])
def test_guesses_come_at_the_first_batch_that_allows_them(share):
    made = ladder([30], share)
    got = made.decide(plan(1), 20 / N, chance=0.2)
    row = made.worse[1]
    ends = range(20, N + 1, 20)

    def ready(t):
        if decide(row[:t], N, 20 / N, -1.0, 1.0, 0.05) is not None:
            return True
        return t >= 200 if share else not 0.2 <= chance(row[:t], N, 20 / N, -1.0, 1.0) <= 0.8

    assert got.samples == next(t for t in ends if ready(t))
    assert not got.certain
    assert made.decisions == {1: (got.samples, None, False)}
    assert made.decide(plan(1), 20 / N).certain  # without


def test_exact_ends_at_a_rung_that_keeps_the_drop():
    for seed in range(5):
        made = ladder([0, 2, 4, 6, 8, 10, 14, 40, 90], seed=seed)
        losses = [0.01 * k**2 for k in range(10)]
        rung, used = known_ladder.searched(made, losses, 8 / N)
        assert made.worse[rung].mean() <= 8 / N
        assert rung >= 3
        assert 1.0 <= used <= 3.0
        certain, more = known_ladder.searched(
            made, losses, 8 / N, rule=dataclasses.replace(known_ladder.RULE, chance=0.0, passes=9.0)
        )
        assert certain == 5
        assert more > used


def test_the_rule_as_it_is_is_the_default():
    from bitsmith.searches import Exact

    assert search_rule.RULES["as it is"] == (Exact(), None)
    assert set(search_rule.PARTS) == {cell.network for cell in search_rule.CELLS}
