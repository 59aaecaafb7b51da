"""Whether what a search says about a plan's drop is true, the selection included: simulated searches, known truth.

    python -m benchmarks.certification [--full] [--only rising|budget|scan|exact]

Each search has a population, in which every plan of a ladder of K has a known drop, and an evaluation set of n samples
drawn from it. It bisects the ladder for the most aggressive plan within the budget, each decision stopped as early as
``bitsmith.sequential.decide`` allows (after every 32 samples, in one random order for all plans); what it found is
evaluated on the whole set, and where it fails there, the next plan less aggressive. Then the drop in the population is
bounded at ``alpha`` / K, since any of the K plans could have been chosen. The part "scan" does not bisect but takes the
first plan that holds, from the most aggressive on: a harder selection, among up to K plans instead of about log2 K.
The part "exact" goes down the ladder as ``searches.Exact`` does; a plan that it leaves with a guess counts among its
decisions, as the level is that of each plan that is asked about, whenever one stops.

Plans differ from float in nested samples, and besides, for a share of them, in samples of their own. "rising": the drop
grows from 0 to far over the budget. "at budget": the drop of half of the plans or of all is exactly the budget.
"over budget", "far over budget": every plan's drop is over it, so what is declared owes it to luck.

Bars, at alpha = 0.05: >= 95 % of the declared plans are within the budget on the set; <= 5 % of the early decisions are
wrong; >= 95 % of the bounds hold in the population, in every setting. Controls, without a bar: the same search without
early stopping (samples used, and whether it ends at the same plan), and the bound at ``alpha`` that ignores selection.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.sequential import decide, upper_bound

from . import known_ladder
from .harness import Benchmark, Record, table
from .known_ladder import RULE, KnownLadder

Vector = NDArray[np.float64]

ALPHA = 0.05
CHUNK = 32
SEARCHES, SEARCHES_FULL = 300, 2000


@dataclass(frozen=True)
class Setting:
    """``drops``: which drops the plans have. ``changed``: share of samples that become right, beside those that become
    wrong. ``nested``: share of the changed samples that more aggressive plans share. ``scan``: no bisection.
    ``exact``: nor that, but the rules of ``searches.Exact``.
    """

    name: str
    n: int
    plans: int
    budget: float
    drops: str
    changed: float
    nested: float = 0.8
    scan: bool = False
    exact: bool = False

    def ladder(self) -> tuple[Vector, Vector]:
        """(P(becomes wrong), P(becomes right)) of the plans in the population, each [plans], least aggressive first."""
        steps = np.linspace(0, 1, self.plans)
        drops = {
            "rising": 4 * self.budget * steps**2,
            "half at budget": np.minimum(2 * self.budget * steps, self.budget),
            "at budget": np.full(self.plans, self.budget),
            "over budget": self.budget * (1.2 + 0.3 * steps),
            "far over budget": np.full(self.plans, 1.9 * self.budget),
        }[self.drops]
        better = self.changed * (0.5 + 0.5 * steps)
        return drops + better, better


SETTINGS = {
    "rising": (
        Setting("rising, n 436", 436, 24, 0.02, "rising", 0.01),
        Setting("rising, n 500", 500, 32, 0.02, "rising", 0.01),
        Setting("rising, n 1000", 1000, 48, 0.01, "rising", 0.01),
        Setting("rising, n 1222", 1222, 64, 0.01, "rising", 0.02),
    ),
    "budget": (
        Setting("half at budget, n 436", 436, 48, 0.02, "half at budget", 0.02),
        Setting("half at budget, n 1222", 1222, 64, 0.01, "half at budget", 0.005, 0.5),
        Setting("at budget, n 500", 500, 64, 0.02, "at budget", 0.01, 0.5),
        Setting("at budget, n 1000", 1000, 64, 0.01, "at budget", 0.01, 0.0),
        Setting("over budget, n 500", 500, 48, 0.01, "over budget", 0.005, 0.3),
    ),
    "scan": (
        Setting("at budget, n 436, scan", 436, 64, 0.02, "at budget", 0.0, 0.0, scan=True),
        Setting("at budget, n 1000, scan", 1000, 64, 0.01, "at budget", 0.002, 0.0, scan=True),
        Setting("over budget, n 1222, scan", 1222, 64, 0.01, "over budget", 0.0, 0.0, scan=True),
        Setting("far over budget, n 1222, scan", 1222, 64, 0.01, "far over budget", 0.0, 0.0, scan=True),
    ),
    "exact": (
        Setting("rising, n 436, exact", 436, 24, 0.02, "rising", 0.01, exact=True),
        Setting("rising, n 1222, exact", 1222, 24, 0.01, "rising", 0.02, exact=True),
        Setting("half at budget, n 1222, exact", 1222, 24, 0.01, "half at budget", 0.005, 0.5, exact=True),
        Setting("at budget, n 500, exact", 500, 24, 0.02, "at budget", 0.01, 0.5, exact=True),
        Setting("over budget, n 500, exact", 500, 24, 0.01, "over budget", 0.005, 0.3, exact=True),
    ),
}
PARTS = {"rising": (0.5, 3.5), "budget": (0.7, 4.5), "scan": (0.5, 3.5), "exact": (0.7, 4.5)}


def drawn(setting: Setting, rng: np.random.Generator) -> Vector:
    """An evaluation set in random order: differences [plans, n] of samples drawn independently from the population.

    A sample whose one number says so changes under this plan and all that are more aggressive; else one of its own for
    each plan decides, so that the probabilities are exactly the ladder's.
    """
    worse, better = (p[:, None] for p in setting.ladder())
    common, own = rng.random(setting.n)[None], rng.random((setting.plans, setting.n))
    shared_worse, shared_better = setting.nested * worse, setting.nested * better
    rest = 1 - shared_worse - shared_better
    wrong = own < (worse - shared_worse) / rest
    right = own > 1 - (better - shared_better) / rest
    found = np.where(wrong, 1.0, np.where(right, -1.0, 0.0))
    return np.where(common < shared_worse, 1.0, np.where(common > 1 - shared_better, -1.0, found))


@dataclass
class Search:
    """One search. ``chosen``: the declared plan; None: float. ``used``: samples run, each plan's counted once.

    ``decisions``: (samples seen, the answer, the truth on the set) of each decision, but not of the last evaluation;
    None: the plan was left with a guess, which claims nothing.
    """

    chosen: int | None
    used: int
    decisions: list[tuple[int, bool | None, bool]]


def stopped(differences: Vector, budget: float) -> tuple[int, bool]:
    """(samples, answer) of one who looks after every chunk and stops at the first answer.

    What is decided once stays decided, so the first chunk that does is bisected for, with the same outcome.
    """
    n = len(differences)
    ends = [*range(CHUNK, n, CHUNK), n]

    def answer(index: int) -> bool | None:
        return decide(differences[: ends[index]], n, budget, -1.0, 1.0, ALPHA)

    least, most = -1, len(ends) - 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if answer(middle) is None else (least, middle)
    said = answer(most)
    assert said is not None, "with all samples seen every question is decided"
    return ends[most], said


def searched(setting: Setting, samples: Vector, early: bool) -> Search:
    """The search on an evaluation set [plans, n], most aggressive plan last; ``early``: decisions stop early."""
    if setting.exact:
        return _descended(setting, samples, early)
    n, within = setting.n, samples.mean(axis=1) <= setting.budget + 1e-12
    seen: dict[int, int] = {}
    decisions: list[tuple[int, bool | None, bool]] = []

    def holds(plan: int) -> bool:
        seen[plan], said = stopped(samples[plan], setting.budget) if early else (n, bool(within[plan]))
        decisions.append((seen[plan], said, bool(within[plan])))
        return said

    if setting.scan:
        candidates: Iterable[int] = (plan for plan in reversed(range(setting.plans)) if holds(plan))
    else:
        least, most = -1, setting.plans  # float is before the first plan, and nothing is known beyond the last
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if holds(middle) else (least, middle)
        candidates = range(least, -1, -1)
    chosen = None
    for plan in candidates:
        seen[plan] = n
        if within[plan]:
            chosen = plan
            break
    return Search(chosen, sum(seen.values()), decisions)


def _descended(setting: Setting, samples: Vector, early: bool) -> Search:
    """With the rules of ``Exact``. Losses are predicted as the square of the place, times as falling with it."""
    steps = np.linspace(0, 1, setting.plans + 1)
    chunk, rule = (CHUNK, RULE) if early else (setting.n, dataclasses.replace(RULE, chance=0.0))
    ladder = KnownLadder(np.vstack([np.zeros(setting.n), samples]), (2.0 - steps).tolist(), chunk, ALPHA)
    rung, used = known_ladder.searched(ladder, (steps**2).tolist(), setting.budget, rule=rule)
    return Search(rung - 1 if rung else None, round(used * setting.n), list(ladder.decisions.values()))


@dataclass
class Tally:
    """What happened in the searches of a setting, in order; the names are those of ``SHARES``.

    ``slack``: the bound less the true drop. ``used``, ``control``: full sets run with and without early stopping.
    """

    within: list[bool]
    errors: list[bool]
    early_errors: list[bool]
    certain: list[bool]
    covered: list[bool]
    naive: list[bool]
    slack: list[float]
    same: list[bool]
    used: list[float]
    control: list[float]


def simulated(setting: Setting, searches: int, seed: Sequence[int]) -> Tally:
    """So many searches of a setting, each with an evaluation set of its own."""
    tally = Tally(*([] for _ in dataclasses.fields(Tally)))
    worse, better = setting.ladder()
    for number in range(searches):
        samples = drawn(setting, np.random.default_rng([*seed, number]))
        search, control = (searched(setting, samples, early) for early in (True, False))
        tally.errors += [said is (not truth) for _, said, truth in search.decisions]
        tally.early_errors += [said is (not truth) for t, said, truth in search.decisions if t < setting.n]
        tally.certain += [
            said is not truth for t, said, truth in search.decisions if t < setting.n and said is not None
        ]
        tally.same.append(search.chosen == control.chosen)
        tally.used.append(search.used / setting.n)
        tally.control.append(control.used / setting.n)
        if search.chosen is None:
            continue  # float: nothing is claimed
        differences, drop = samples[search.chosen], float(worse[search.chosen] - better[search.chosen])
        bound = upper_bound(differences, -1.0, 1.0, ALPHA / setting.plans)
        tally.within.append(float(differences.mean()) <= setting.budget + 1e-12)
        tally.covered.append(bound >= drop)
        tally.naive.append(upper_bound(differences, -1.0, 1.0, ALPHA) >= drop)
        tally.slack.append(bound - drop)
    return tally


SHARES = {
    "within": "declared plan within the budget on the set",
    "early_errors": "early decisions that are wrong",
    "certain": "the same of those that were certain, guesses left out",
    "errors": "all decisions that are wrong",
    "covered": "bound at alpha / K holds in the population",
    "naive": "control: bound at alpha, selection ignored",
    "same": "ends at the same plan as without early stopping",
}


def measure(part: str, bench: Benchmark) -> None:
    """All settings of a part, each with its table; then the bars, for the worst of them."""
    searches = SEARCHES_FULL if bench.options.full else SEARCHES
    for number, setting in enumerate(SETTINGS[part]):
        seed = [list(SETTINGS).index(part), number]
        tally = simulated(setting, searches, seed)
        record(part, setting, seed, tally, bench)
        if not tally.covered:
            bench.miss(f"{setting.name}: no search declared a plan, so nothing was tested")
    done = [row for row in bench.rows if row["part"] == part]
    for what, name, at_least in (
        (f"{part}: worst share within budget", "within", True),
        (f"{part}: worst rate of wrong early decisions", "early_errors", False),
        (f"{part}: worst coverage after selection", "covered", True),
    ):
        worst = (min if at_least else max)(100 * share(row, name) for row in done)
        bench.judge(what, worst, 95.0 if at_least else 5.0, " %", at_least)
    together(bench.rows)


def record(part: str, setting: Setting, seed: list[int], tally: Tally, bench: Benchmark) -> None:
    """The row and the table of one setting."""
    counts = {name: getattr(tally, name) for name in SHARES}
    slack = float(np.median(tally.slack)) if tally.slack else float("nan")
    bench.row(
        part,
        **vars(setting),
        searches=len(tally.same),
        seed=seed,
        alpha=ALPHA,
        chunk=CHUNK,
        **{name: [sum(flags), len(flags)] for name, flags in counts.items()},
        intervals={name: exact(sum(flags), len(flags)) for name, flags in counts.items()},
        bound_less_drop=slack,
        used=float(np.sum(tally.used)),
        control=float(np.sum(tally.control)),
    )
    rows: list[tuple[str, str, int]] = [
        (SHARES[name], _text(sum(flags), len(flags)), len(flags)) for name, flags in counts.items()
    ]
    rows += [
        ("median of the bound less the true drop", f"{slack:.4f}", len(tally.slack)),
        ("full sets used", f"{np.mean(tally.used):.2f}", len(tally.used)),
        ("control: full sets used without early stopping", f"{np.mean(tally.control):.2f}", len(tally.control)),
    ]
    title = (
        f"{setting.name}: n {setting.n}, K {setting.plans}, budget {setting.budget}, drops {setting.drops}, nested "
        f"{setting.nested:.0%}, {len(tally.same)} searches, seed {seed}, alpha {ALPHA}"
    )
    table(title, ("", "share (95 %) or mean", "of"), rows)


def together(rows: Sequence[Record]) -> None:
    """A table of all settings so far, pooled."""
    cells: list[tuple[str, str, int]] = []
    for name, what in SHARES.items():
        hits, of = (sum(row[name][i] for row in rows) for i in (0, 1))
        cells.append((what, _text(hits, of), of))
    searches = sum(row["searches"] for row in rows)
    used, control = (sum(row[name] for row in rows) for name in ("used", "control"))
    cells.append(("full sets used, of those without early stopping", f"{used / control:.1%}", searches))
    table(f"All {len(rows)} settings so far: {searches} searches", ("", "share (95 %)", "of"), cells)


def share(row: Record, name: str) -> float:
    """The share of a row that ``name`` counts; NaN, which meets no bar, of none."""
    hits, of = row[name]
    return hits / of if of else float("nan")


def exact(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Clopper and Pearson 1934); (0, 1) of none.

    >>> [round(x, 4) for x in exact(30, 30)]
    [0.8843, 1.0]
    """
    from scipy.stats import binomtest

    if not of:
        return 0.0, 1.0
    limits = binomtest(hits, of).proportion_ci(0.95, method="exact")
    return float(limits.low), float(limits.high)


def _text(hits: int, of: int) -> str:
    low, high = exact(hits, of)
    return f"{hits / of:.1%} ({low:.1%} to {high:.1%})" if of else "none"


def main() -> int:
    bench = Benchmark("certification", PARTS, "Simulated searches with known truth: errors, coverage, samples.")
    bench.start()
    return bench.run({part: functools.partial(measure, part) for part in PARTS})


if __name__ == "__main__":
    sys.exit(main())
