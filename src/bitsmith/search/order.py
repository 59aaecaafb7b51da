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
    for technique in offered - base:
        choice = [
            unit.techniques.index(technique) if technique in unit.techniques else k
            for unit, k in zip(program.units, program.control, strict=True)
        ]
        costs[technique] = program.point(tuple(choice)).predicted(minimize)
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
    total = 0.0
    for site in program.units[unit].sites:
        total += program.rows[site][technique].loss - program.rows[site][before].loss
        if mu:
            total += mu * (program.together(site, technique, choice) - program.together(site, before, choice))
    return total
