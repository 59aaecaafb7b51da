"""What the studies of guided searches share: networks with drawn calibration data, tables of costs, searches.

A plan's time is the profile's: a sum over sites, as in the papers, so that no file is exported for a plan on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from benchmarks.mixed_cells import halves
from torch import nn

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.bench import Bench, code_key
from bitsmith.compare import drop
from bitsmith.costs import Option
from bitsmith.data import call
from bitsmith.evaluate import Evaluator
from bitsmith.plan import Plan
from bitsmith.profile import Profile, measure
from bitsmith.sampling import shuffled
from bitsmith.scoring import scored
from bitsmith.search import BudgetError, Search, search
from bitsmith.search.base import Evaluation
from bitsmith.sensitivity.base import Pair, Scores, Sensitivity
from bitsmith.store import Store
from bitsmith.targets.base import Target
from bitsmith.task import Task, evaluating
from bitsmith.technique import Technique
from bitsmith.zoo.tasks import Batches

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """``calibration``: samples that a seed draws from the pool. ``held``: of each half, at most; None: all of it."""

    calibration: int
    batch: int
    held: int | None = None


SIZES: Mapping[str, Size] = {
    "resnet20": Size(128, 32),
    "minilm": Size(64, 32, 200),
    "mobilenet_v1": Size(32, 16, 200),
}
"""By default. With ``--full`` a seed draws :data:`FULL` and both halves are whole."""

FULL = 128

KEEP = (0.99, 0.999)
"""Parts of the float accuracy that are kept. Of 200 samples 99.9 % allow that no more be lost than won."""


@functools.cache
def library(*folders: str) -> str:
    """A hash of these folders of the library ("" its own modules): what was found is stale once they change."""
    root = Path(bs.__file__).parent
    return hash_files([path for folder in folders for path in sorted((root / folder).glob("*.py"))])


class Subject:
    """A trained network whose calibration data a seed draws; one bench for each target and seed is kept open."""

    def __init__(self, name: str, model: nn.Module, task: Task, size: Size, store: Store) -> None:
        self.name, self.model, self.size, self.store = name, model, size, store
        self.task = dataclasses.replace(
            task, validation=_first(task.validation, size.held), test=_first(task.test, size.held)
        )
        self._benches: dict[tuple[str, int], Bench] = {}

    def key(self, **more: Any) -> dict[str, Any]:
        """What a figure of this network depends on, apart from ``more``."""
        return {"network": self.name, "size": dataclasses.asdict(self.size), "code": code_key(), **more}

    def drawn(self, seed: int) -> Task:
        """The task with calibration samples drawn from the pool, each at most once.

        A sample without a class gets the float network's own probabilities: the loss is then, but for a constant, the
        divergence from the float network, and no held-out class is read.
        """
        source = shuffled(self.task.calibration, seed)
        assert source is not None
        count = min(self.size.calibration, source.total)
        parts = [source.batch(k, min(self.size.batch, count - k)) for k in range(0, count, self.size.batch)]
        if parts[0][1] is None:
            with evaluating(self.model):
                parts = [(x, F.softmax(call(self.model, x, self.task.forward), -1)) for x, _ in parts]
        return dataclasses.replace(self.task, calibration=parts, loss=F.cross_entropy)

    def bench(self, target: Target, seed: int = 0) -> Bench:
        key = (repr(target), seed)
        if key not in self._benches:
            found = Bench.open(self.model, self.drawn(seed), target, store=self.store)
            found.choose = False  # ranges from the extremes, as in the papers
            self._benches[key] = found
        return self._benches[key]

    def forget(self) -> None:
        """Let go of the benches: a new seed needs new ones."""
        self._benches.clear()


def _first(loader: Any, count: int | None) -> Any:
    """The first samples of a loader; both halves are in random order already."""
    if count is None or not isinstance(loader, Batches) or count >= loader.samples:
        return loader
    return Batches(count, loader.batch, loader.read)


def opened(name: str, root: Path, full: bool, store: Store) -> Subject:
    """One of :data:`SIZES` from the data folder."""
    size = SIZES[name]
    if full:
        size = Size(FULL, size.batch)
    found = halves(name, root, RESULTS / "models")
    return Subject(name, found.model, found.task, size, store)


# -- profiles ----------------------------------------------------------------------------------------------------------


def unscored(
    model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]
) -> Iterator[float]:
    """Costs are measured once, losses for each seed and metric: no losses, which is also what a random order needs."""
    return (0.0 for _ in pairs)


def costs(subject: Subject, target: Target, techniques: Sequence[Technique]) -> Profile:
    """What sites cost on the target, without losses: measured once for a network."""
    key = subject.key(profile=repr(target), techniques=[repr(technique) for technique in techniques])
    bench = subject.bench
    return Profile.from_json(
        subject.store.get_or("costs", key, lambda: measure(bench(target), techniques, unscored).to_json())
    )


def choices(tables: Iterable[Profile]) -> dict[str, list[Option]]:
    """All that any of the tables offers, by site: a metric scores it once for all targets."""
    found: dict[str, list[Option]] = {}
    for table in tables:
        for site, rows in table.options().items():
            known = {option.technique for option in found.setdefault(site, [])}
            found[site] += [
                Option(site, row.technique, row.reads, row.writes) for row in rows if row.technique not in known
            ]
    return found


def with_losses(table: Profile, scores: Scores) -> Profile:
    """The table with these losses and cross terms."""
    rows = tuple(
        row if row.refused else dataclasses.replace(row, loss=scores.losses[row.site, row.technique])
        for row in table.rows
    )
    index = {(row.site, row.technique): k for k, row in enumerate(rows) if not row.refused}
    cross = tuple(
        (index[one], index[other], loss) for (one, other), loss in scores.cross.items() if {one, other} <= index.keys()
    )
    return dataclasses.replace(table, rows=rows, cross=cross, spent=scores.spent)


def everywhere(table: Profile, technique: Technique) -> Plan:
    """The technique at every site that may have it."""
    return Plan({row.site: technique for row in table.rows if not row.refused and row.technique == technique})


# -- searches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tabled:
    """Measures drops as :class:`Evaluator` does and looks times up in the profile."""

    inner: Evaluator
    table: Profile

    def __call__(self, plan: Plan) -> Evaluation:
        adapted, reference = self.inner.adapted(plan), self.inner.gradual.reference
        got = self.inner.gradual.whole(adapted) if adapted.sites else reference
        return dataclasses.replace(self.costs(plan), metric=got.mean, drop=drop(reference, got).mean, samples=got.n)

    def costs(self, plan: Plan) -> Evaluation:
        found = self.table.predict(plan)
        return Evaluation(
            plan=self.inner.adapted(plan),
            ms=found["ms"],
            bytes=round(found["bytes"]),
            float_ms=self.table.predict(Plan())["ms"],
            source=self.table.source,
        )

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        return self.inner.decide(plan, limit, chance) if self.inner.adapted(plan).sites else self(plan)

    def check(self, limit: float, candidates: int | None) -> str:
        return self.inner.check(limit, candidates)

    def bound(self, plan: Plan, candidates: int) -> float | None:
        return self.inner.bound(plan, candidates)


@dataclass(frozen=True)
class Place:
    """Where plans run. ``base``: what latency is saved against, a technique everywhere; None: the float network."""

    name: str
    target: Target
    techniques: tuple[Technique, ...]
    base: Technique | None = None

    def base_ms(self, table: Profile) -> float:
        return table.predict(Plan() if self.base is None else everywhere(table, self.base))["ms"]


@dataclass(frozen=True)
class Cell:
    """One search. ``keep``: the part of the float network's accuracy that is kept. ``sensitivity``: None, no order."""

    place: Place
    metric: str
    sensitivity: Sensitivity | None
    method: Search
    keep: float
    seed: int

    @property
    def name(self) -> str:
        kind = type(self.method).__name__.lower()
        return f"{self.place.name}, {self.metric}, {kind}, {self.keep:.1%}, seed {self.seed}"


def searched(subject: Subject, cell: Cell, places: Sequence[Place]) -> dict[str, Any]:
    """What a cell's search found: one flat record."""
    place, start = cell.place, time.perf_counter()
    tables = {p.name: costs(subject, p.target, p.techniques) for p in places}
    bench, table, passes = subject.bench(place.target, cell.seed), tables[place.name], 0.0
    evaluate = Evaluator(bench)
    reference = evaluate.gradual.reference
    if cell.sensitivity is not None:
        scores = scored(subject.bench(places[0].target, cell.seed), choices(tables.values()), cell.sensitivity)
        table, passes = with_losses(table, scores), scores.spent.passes / reference.n
    budget = bs.Budget(drop=(1.0 - cell.keep) * reference.mean)
    try:
        result = search(table, budget, method=cell.method, evaluate=Tabled(evaluate, table))
    except BudgetError as error:
        result = error.best
    asked = [p for p in result.frontier if p.evaluation is not None and p.evaluation.drop is not None]
    adapted, base = evaluate.adapted(result.plan), place.base_ms(table)
    shown = drop(bench.score(None, "test"), bench.score(adapted, "test"))
    return {
        "saved": 1.0 - table.predict(result.plan)["ms"] / base,
        "measured_saved": _measured(subject, place, table, adapted),
        "drop": result.best.evaluation.drop if result.best.evaluation is not None else None,
        "test_drop": shown.mean,
        "met": not result.missed,
        "evaluations": len(asked) - 1,  # the float network is not one
        "result_evaluations": result.evaluations,
        "passes": result.samples / reference.n,
        "sensitivity_passes": passes,
        "samples": reference.n,
        "sites": {str(t): sum(s == t for s in adapted.sites.values()) for t in dict.fromkeys(adapted.sites.values())},
        "seconds": time.perf_counter() - start,
    }


def _measured(subject: Subject, place: Place, table: Profile, adapted: Plan) -> float | None:
    """The latency saved by the file, timed interleaved with the float network's; None where nothing runs."""
    if place.target.source == "modelled":
        return None
    bench = subject.bench(place.target)
    if not adapted.sites:
        return 0.0
    if bench._graphs is None:
        bench.everywhere([bench.target.adapt(everywhere(table, place.techniques[-1]), bench.net.record)])
    plain, timing = bench.times([Plan(), adapted])
    return 1.0 - timing.ms / plain.ms
