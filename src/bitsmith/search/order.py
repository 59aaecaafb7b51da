"""In which order decisions are changed: the one that loses least first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from ..technique import Technique
from .program import Choice, Program

Order = Literal["loss", "marginal", "ratio", "random"]
"""``loss``: what each loses alone. ``marginal``: what each adds to those before it, cross terms included (greedy).
``ratio``: that divided by what it saves. ``random``: the control."""

ORDERS: tuple[Order, ...] = ("loss", "marginal", "ratio", "random")


def levels(program: Program, minimize: str) -> list[Technique]:
    """The techniques of a profile but float, dearest first: the descending precision of the papers."""
    offered = {t for unit in program.units for t in unit.techniques}
    base = {unit.techniques[k] for unit, k in zip(program.units, program.control, strict=True)}
    costs = {}
    quantity = "mib" if minimize == "drop" else minimize  # what more bits cost in any case
    for technique in offered - base:
        choice = [
            unit.techniques.index(technique) if technique in unit.techniques else k
            for unit, k in zip(program.units, program.control, strict=True)
        ]
        costs[technique] = program.point(tuple(choice)).predicted(quantity)
    return sorted(costs, key=lambda t: (-costs[t], str(t)))


def prefixes(
    program: Program,
    technique: Technique,
    base: Choice,
    among: Sequence[int],
    by: Order,
    minimize: str,
    mu: float = 1.0,
    seed: int = 0,
) -> list[Choice]:
    """``base``, then one decision of ``among`` more at a time under the technique, in order; ties by name.

    ``mu`` weights what two decisions lose together.
    """
    open_ = [u for u in among if technique in program.units[u].techniques]
    open_ = [u for u in open_ if program.units[u].techniques[base[u]] != technique]
    names = {u: program.units[u].sites[0] for u in open_}
    if by == "random":
        queue = sorted(open_, key=lambda u: names[u])
        random.Random(seed).shuffle(queue)
        return _walk(program, technique, base, queue)
    if by == "loss" or (mu == 0.0 and by == "marginal"):
        alone = {u: _added(program, technique, base, u, 0.0) for u in open_}
        return _walk(program, technique, base, sorted(open_, key=lambda u: (alone[u], names[u])))
    found = [base]
    while open_:
        added = {u: _added(program, technique, found[-1], u, mu) for u in open_}
        if by == "ratio":
            now = program.point(found[-1]).predicted(minimize)
            after = {u: program.point(_with(program, found[-1], u, technique)).predicted(minimize) for u in open_}
            rank = {u: _ratio(added[u], now - after[u]) for u in open_}
        else:
            rank = {u: (0.0, added[u]) for u in open_}
        following = min(open_, key=lambda u: (rank[u], names[u]))
        found.append(_with(program, found[-1], following, technique))
        open_.remove(following)
    return found


def _ratio(loss: float, saved: float) -> tuple[float, float]:
    """What saves nothing comes last."""
    return (0.0, loss / saved) if saved > 0 else (1.0, loss)


def _with(program: Program, choice: Choice, unit: int, technique: Technique) -> Choice:
    changed = list(choice)
    changed[unit] = program.units[unit].techniques.index(technique)
    return tuple(changed)


def _walk(program: Program, technique: Technique, base: Choice, queue: Sequence[int]) -> list[Choice]:
    found = [base]
    for unit in queue:
        found.append(_with(program, found[-1], unit, technique))
    return found


def _added(program: Program, technique: Technique, choice: Choice, unit: int, mu: float) -> float:
    """What a plan loses more when that decision is changed as well."""
    before = program.units[unit].techniques[choice[unit]]
    alone = sum(program.rows[s][technique].loss - program.rows[s][before].loss for s in program.units[unit].sites)
    return alone + mu * (program.together(unit, technique, choice) - program.together(unit, before, choice))


def check(order: str, mu: float, max_evaluations: int, search: str) -> None:
    """Raise ``ValueError`` for settings that a search along an order cannot have."""
    if order not in ORDERS:
        raise ValueError(f"{search}(order={order!r}): must be one of {', '.join(ORDERS)}")
    if not mu >= 0:
        raise ValueError(f"{search}(mu={mu}): must be a number of 0 or more")
    if max_evaluations < 2:
        raise ValueError(f"{search}(max_evaluations={max_evaluations}): must be at least 2, the float plan and another")


def unmeasured(program: Program, by: Order, minimize: str, mu: float, seed: int) -> list[Choice]:
    """The prefixes of every technique in turn, each behind all of the one before: what can be had without measuring."""
    found, base, among = [], program.control, range(len(program.units))
    for technique in levels(program, minimize):
        found += prefixes(program, technique, base, among, by, minimize, mu, seed)
        base = found[-1]
    return found or [base]
