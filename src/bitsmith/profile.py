"""The table of losses and costs that a search decides on, row by row from the store or measured."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from . import costs
from ._files import atomic_write
from .bench import Bench
from .costs import FLOAT, Costs, Option
from .data import batch_size, first_inputs
from .plan import Plan, PlanError, decode, encode, known_classes
from .progress import Progress
from .scoring import scored
from .sensitivity.base import Sensitivity, Spent, name_of
from .sensitivity.inter_layer import DIAGONAL
from .sensitivity.one_at_a_time import output_error
from .site import Edge, Site, UnknownSiteError
from .store import Store
from .targets._formulas import scaled
from .targets.base import Artifact, Target
from .task import Task
from .technique import No, Step, Technique
from .techniques.float_ import Float
from .training import Training

SCHEMA = 2


@dataclass(frozen=True)
class Row:
    """One site under one technique. ``loss``: what it loses alone (relative squared output error or task loss rise).

    ``ms`` per batch, ``bytes`` of its weights in the file, ``mj`` per batch: as the target models it, else its ms at
    the float network's mean power; None on a target without energy. ``mm2``: what it adds to a modelled chip, None on a
    target without area. ``refused``: why the target does not
    offer it; such a row is never chosen. ``reads``, ``writes``: formats at its operands and its output ("float", "u8").
    """

    site: str
    technique: Technique
    loss: float
    ms: float
    bytes: float
    mj: float | None = None
    refused: str = ""
    reads: tuple[str, ...] = ()
    writes: str = "float"
    mm2: float | None = None


@dataclass(frozen=True)
class EdgeRow:
    """The cost of handing one tensor from ``producer`` to ``consumer`` when their formats are these, ms and mJ."""

    producer: str
    consumer: str
    operand: int
    produced: str
    consumed: str
    ms: float
    mj: float | None = None


@dataclass(frozen=True)
class Profile:
    """Site rows, edge rows, and what is common to all plans.

    ``fixed_ms``: time that no decision changes. ``fixed_bytes``: the file without the decided weights.
    ``source``: of the times. ``groups``: sites that share one decision. ``cross``: (i, j, loss), what the rows i and j
    lose together beyond the sum of both. ``spent``: what the sensitivity cost. ``fixed_mj``, ``fixed_mm2``: what no
    decision changes. ``assumptions``, ``references``: what a modelled target's numbers rest on; reports print them.
    """

    rows: tuple[Row, ...]
    edges: tuple[EdgeRow, ...] = ()
    flow: tuple[Edge, ...] = ()
    fixed_ms: float = 0.0
    fixed_bytes: float = 0.0
    source: str = "measured"
    loss_name: str = "relative squared output error"
    target: str = ""
    groups: tuple[tuple[str, ...], ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    cross: tuple[tuple[int, int, float], ...] = ()
    spent: Spent = field(default_factory=Spent)
    fixed_mj: float = 0.0
    fixed_mm2: float = 0.0
    assumptions: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    @functools.cached_property
    def interactions(self) -> dict[tuple[str, Technique], dict[tuple[str, Technique], float]]:
        """``cross`` by (site, technique), both ways."""
        table: dict[tuple[str, Technique], dict[tuple[str, Technique], float]] = {}
        for i, j, loss in self.cross:
            one, other = ((self.rows[k].site, self.rows[k].technique) for k in (i, j))
            table.setdefault(one, {})[other] = loss
            table.setdefault(other, {})[one] = loss
        return table

    def options(self) -> dict[str, list[Row]]:
        """The rows that may be chosen, by site, in order."""
        table: dict[str, list[Row]] = {}
        for row in self.rows:
            if not row.refused:
                table.setdefault(row.site, []).append(row)
        return table

    def chosen(self, plan: Plan) -> list[Row]:
        """The row of each profiled site under the plan (a site the plan does not name takes its float row)."""
        picked = []
        for site, rows in self.options().items():
            technique = plan.get(site)
            row = next((r for r in rows if r.technique == technique), None)
            if row is None:
                row = next((r for r in rows if r.technique == Float()), min(rows, key=lambda r: r.loss))
            picked.append(row)
        return picked

    def predict(self, plan: Plan) -> dict[str, float]:
        """Predicted ``ms``, ``bytes``, ``loss`` of a plan, and ``mj`` and ``mm2`` where its rows have them: site rows
        plus edge rows plus what is fixed."""
        rows = self.chosen(plan)
        paid = list(self.paid({row.site: row for row in rows}))
        found = {
            "ms": self.fixed_ms + sum(row.ms for row in rows) + sum(edge.ms for edge in paid),
            "bytes": self.fixed_bytes + sum(row.bytes for row in rows),
            "loss": sum(row.loss for row in rows) + self._together(rows),
        }
        if all(row.mj is not None for row in rows):
            found["mj"] = self.fixed_mj + sum(row.mj or 0.0 for row in rows) + sum(edge.mj or 0.0 for edge in paid)
        if all(row.mm2 is not None for row in rows):
            found["mm2"] = self.fixed_mm2 + sum(row.mm2 or 0.0 for row in rows)
        return found

    def _together(self, rows: Sequence[Row]) -> float:
        """What the rows lose beyond the sum of their losses."""
        table = self.interactions
        chosen = [(row.site, row.technique) for row in rows if (row.site, row.technique) in table]
        return sum(table[one].get(other, 0.0) for k, one in enumerate(chosen) for other in chosen[:k])

    def paid(self, by_site: Mapping[str, Row]) -> Iterable[EdgeRow]:
        """The edge rows whose formats are those of the chosen rows."""
        for edge in self.edges:
            producer, consumer = by_site.get(edge.producer), by_site.get(edge.consumer)
            produced = producer.writes if producer is not None else FLOAT
            consumed = (
                consumer.reads[edge.operand] if consumer is not None and edge.operand < len(consumer.reads) else FLOAT
            )
            if (produced, consumed) == (edge.produced, edge.consumed):
                yield edge

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "bitsmith.profile",
            **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_json(cls, data: Any, techniques: Sequence[type] = ()) -> Profile:
        """Read what :meth:`to_json` wrote. Raises ``PlanError`` for another, garbled or newer file."""
        if not isinstance(data, dict) or data.get("kind") != "bitsmith.profile":
            raise PlanError(
                'this is not a Bitsmith profile: a JSON object with "kind": "bitsmith.profile" was expected'
            )
        if data.get("schema") not in (1, SCHEMA):
            raise PlanError(
                f"profile schema {data.get('schema')!r} is unknown to this version, which reads 1 and {SCHEMA}; "
                "a newer Bitsmith wrote it: pip install -U bitsmith"
            )
        classes = known_classes(techniques)
        try:
            rows = tuple(
                Row(**{**row, "technique": decode(row["technique"], classes), "reads": tuple(row["reads"])})
                for row in data["rows"]
            )
            scalars = ("fixed_ms", "fixed_bytes", "source", "loss_name", "target", "notes")
            rest = {name: data[name] for name in scalars}
            found = cls(
                rows=rows,
                edges=tuple(EdgeRow(**edge) for edge in data["edges"]),
                flow=tuple(Edge(**edge) for edge in data["flow"]),
                groups=tuple(map(tuple, data["groups"])),
                cross=tuple((int(i), int(j), float(loss)) for i, j, loss in data.get("cross", ())),  # none in schema 1
                spent=Spent(**data.get("spent", {})),
                # files of earlier versions have none of these
                fixed_mj=float(data.get("fixed_mj", 0.0)),
                fixed_mm2=float(data.get("fixed_mm2", 0.0)),
                assumptions=tuple(map(str, data.get("assumptions", ()))),
                references=tuple(map(str, data.get("references", ()))),
                **rest,
            )
            if any(not 0 <= k < len(rows) for i, j, _ in found.cross for k in (i, j)):
                raise ValueError("cross names a row that is not there")
            numbers = [found.fixed_ms, found.fixed_bytes, *(edge.ms for edge in found.edges)]
            numbers += [value for row in found.rows for value in (row.loss, row.ms, row.bytes)]
            known = [value for row in found.rows for value in (row.mj, row.mm2)] + [edge.mj for edge in found.edges]
            numbers += [value for value in known if value is not None]
            strange = next((value for value in numbers if not isinstance(value, (int, float))), None)
            if strange is not None:
                raise TypeError(f"{strange!r} is not a number")
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the profile is garbled: {error}; profile again") from None
        return found

    def save(self, path: str | Path) -> Path:
        """Write readable JSON under a temporary name, then rename."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path, techniques: Sequence[type] = ()) -> Profile:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path} is not a profile: the JSON is broken or cut off ({error})") from None
        return cls.from_json(data, techniques)


def _plain(value: Any) -> Any:
    if isinstance(value, Technique):
        return encode(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def profile(
    model: nn.Module,
    task: Task,
    techniques: Sequence[Technique],
    target: Target,
    *,
    store: Store | str | Path | None = None,
    batch: int = 1,
    sensitivity: Sensitivity = DIAGONAL,
    patterns: Sequence[str] = ("*",),
    seed: int = 0,
    progress: Progress | None = None,
    executor: Executor | None = None,
    trained: Sequence[Technique] = (),
    train: Step | None = None,
) -> Profile:
    """Measure what every site loses and costs under every technique that fits it and that the target supports.

    ``patterns``: shell patterns of the sites to decide on; one that matches nothing is an error. ``Float()`` is always
    an option. ``store``: path of a measurement store (or an open one); what it holds is not measured again.
    Reads calibration data only. Times are ms per batch of ``batch``.

    ``executor``: such as a process pool (with the ``spawn`` context), Dask's ``client.get_executor()`` or
    ``mpi4py.futures``. Sensitivities that yield their scores are shared out over it, choice by choice, and give the
    same losses; others, and all times, are measured in this process. What is lost with a worker is measured here.
    Raises :class:`~bitsmith.workers.WorkerError` naming what cannot be sent to a worker.

    ``trained``: techniques that need training, offered as well because the weights given were trained under them
    somewhere. They are scored with these weights as they are; ``notes`` says so. Without, they are left out. Losses are
    counted from the float network of these weights, whatever it is worth. ``train``: a step such as
    :class:`~bitsmith.Distil`; each choice that needs training is scored after it, alone, and ``sensitivity`` must score
    choices one by one (``output_error``, which is then the default, or ``loss_rise``).
    """
    bench = Bench.open(model, task, target, store=store, batch=batch, seed=seed, progress=progress)
    return measure(bench, techniques, sensitivity, patterns, executor, Training(train, tuple(trained)))


def measure(
    bench: Bench,
    techniques: Sequence[Technique],
    sensitivity: Sensitivity = DIAGONAL,
    patterns: Sequence[str] = ("*",),
    executor: Executor | None = None,
    training: Training | None = None,
) -> Profile:
    """:func:`profile` with a bench that is already open."""
    record = bench.net.record
    sites = _selected(record.sites, patterns)
    training = training or Training()
    options, refused = _options(sites, techniques, bench.target, training)
    if not any(option.technique != Float() for rows in options.values() for option in rows):
        reasons = "; ".join(dict.fromkeys(f"{row.technique}: {row.refused}" for row in refused))
        reasons = reasons or (
            "no technique was given" if sites else f"no site of {', '.join(patterns)} computes with numbers"
        )
        raise ValueError(f"not one site can change on {bench.target.name}: {reasons}")
    shortly = [t for t in dict.fromkeys(o.technique for rows in options.values() for o in rows) if training.needs(t)]
    if shortly and sensitivity is DIAGONAL:
        sensitivity = output_error
    scores = scored(bench, options, sensitivity, executor, training)
    losses = scores.losses
    flow = tuple(record.edges())
    table = _costs(bench, options, flow)
    base = bench.artifact(Plan())
    energies = _energies(bench, options, table, base)
    areas = _areas(bench, options, base)
    weights = {name: site.parameter_bytes for name, site in record.sites.items()}

    def row(site: str, option: Option) -> Row:
        ms = table.sites[site, option.technique]
        return Row(
            site,
            option.technique,
            losses[site, option.technique],
            ms,
            option.technique.bits(record.sites[site]) / 8,
            None if energies is None else energies.sites[site, option.technique],
            reads=option.reads,
            writes=option.writes,
            mm2=None if areas is None else areas.sites[site, option.technique],
        )

    rows = tuple(row(site, option) for site, choices in options.items() for option in choices)
    edges = tuple(
        EdgeRow(
            *(edge.producer, edge.consumer, edge.operand, produced, consumed, ms),
            None if energies is None else energies.edges[edge, produced, consumed],
        )
        for (edge, produced, consumed), ms in table.edges.items()
    )
    notes = {
        "probes": str(table.probes),
        "fit error": f"{table.fit_error:.3f}",
        "float, sum of sites": f"{table.sum_float_ms:.4f} ms",
        "float, whole": f"{table.whole_float_ms:.4f} ms",
        "sensitivity": str(scores.spent),
        **scores.notes,
    }
    if shortly:
        notes["trained shortly"] = f"{', '.join(map(str, shortly))}: scored after {training.step}, each alone"
    if training.trained:
        named = ", ".join(str(technique) for technique in dict.fromkeys(training.trained))
        notes["trained"] = f"{named}: scored with the weights as they were given, without training"
    if scores.skipped:
        reasons = "; ".join(dict.fromkeys(scores.skipped.values()))
        named = ", ".join(dict.fromkeys(site for site, _ in scores.skipped))
        notes["not scored"] = f"{len(scores.skipped)}, counted as the worst that was: {named} ({reasons})"
    index = {(row.site, row.technique): k for k, row in enumerate(rows)}
    cross = tuple((index[one], index[other], loss) for (one, other), loss in scores.cross.items())
    return Profile(
        (*rows, *refused),
        edges,
        flow,
        table.fixed,
        max(base.bytes - sum(weights[site] for site in options), 0.0),
        bench.target.source,
        name_of(sensitivity),
        bench.target.name,
        notes=notes,
        cross=cross,
        spent=scores.spent,
        fixed_mj=0.0 if energies is None else energies.fixed,
        fixed_mm2=0.0 if areas is None else areas.fixed,
        assumptions=bench.target.assumptions(),
        references=bench.target.references(),
    )


def _selected(sites: Mapping[str, Site], patterns: Sequence[str]) -> dict[str, Site]:
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        hits = {name: site for name, site in sites.items() if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise UnknownSiteError(pattern, sites)
        chosen.update(hits)
    return {name: site for name, site in sites.items() if name in chosen and site.role == "integer"}


def _options(
    sites: Mapping[str, Site], techniques: Sequence[Technique], target: Target, training: Training
) -> tuple[dict[str, list[Option]], list[Row]]:
    """What may be chosen at each site, and a row with its reason for what may not."""
    options: dict[str, list[Option]] = {}
    refused: list[Row] = []
    for name, site in sites.items():
        floating = (FLOAT,) * len(site.operands)
        rows = [Option(name, Float(), floating, FLOAT)]
        for technique in dict.fromkeys((*techniques, *training.trained)):
            if technique == Float():
                continue
            reads = tuple(FLOAT if fmt is None else str(fmt) for fmt in technique.reads(site))
            verdict = technique.fits(site)
            if verdict:
                verdict = target.supports(technique, site)
            if verdict and not training.can(technique):
                verdict = No(
                    "it needs training before it can be scored: profile(train=bitsmith.Distil(steps=50)) does so; "
                    f"where these weights were trained under it, profile(trained=[{technique}]) scores them as they are"
                )
            if verdict:
                writes = next((read for read in reads if read != FLOAT), FLOAT)
                rows.append(Option(name, technique, reads, writes))
            else:
                reason = verdict.reason if isinstance(verdict, No) else "it does not fit"
                refused.append(Row(name, technique, 0.0, 0.0, technique.bits(site) / 8, refused=reason, reads=reads))
        options[name] = rows
    return options, refused


def _costs(bench: Bench, options: Mapping[str, Sequence[Option]], flow: Sequence[Edge]) -> Costs:
    record = bench.net.record
    factor = _factor(bench)
    formulas = {
        (site, option.technique): bench.target.cost(scaled(record.sites[site], factor), option.technique)
        for site, rows in options.items()
        for option in rows
    }
    if any(ms is None for ms in formulas.values()):
        return costs.learn(bench, options, flow)
    seen_inside = {site.parent for site in record.sites.values()}
    fixed = sum(
        bench.target.cost(scaled(site, factor), Float()) or 0.0
        for name, site in record.sites.items()
        if name not in options and name not in seen_inside
    )
    known = {key: float(ms) for key, ms in formulas.items() if ms is not None}
    edges = {}
    for edge in flow:
        shape = record.sites[edge.consumer].operands[edge.operand]
        for produced, consumed in costs.meeting(edge, options):
            edges[edge, produced, consumed] = (
                bench.target.conversion_cost(round(shape.numel * factor), produced, consumed) or 0.0
            )
    whole = fixed + sum(known[site, Float()] for site in options)
    return Costs(known, edges, fixed, 0.0, 0, whole, whole)


@dataclass(frozen=True)
class _Shares:
    """One quantity of every choice, as in :class:`~bitsmith.costs.Costs`."""

    sites: Mapping[tuple[str, Technique], float]
    edges: Mapping[tuple[Edge, str, str], float]
    fixed: float


def _energies(bench: Bench, options: Mapping[str, Sequence[Option]], table: Costs, base: Artifact) -> _Shares | None:
    """mJ of every choice, as the target models it, or its time at the float network's mean power."""
    whole = bench.target.energy(base)
    if whole is None:
        return None
    watts = whole / table.whole_float_ms
    found = _by_formula(bench, options, bench.target.site_energy)
    if found is None:
        sites = {key: watts * ms for key, ms in table.sites.items()}
        edges = {key: watts * ms for key, ms in table.edges.items()}
        return _Shares(sites, edges, watts * table.fixed)
    factor = _factor(bench)
    changes = {}
    for (edge, produced, consumed), ms in table.edges.items():
        numel = round(bench.net.record.sites[edge.consumer].operands[edge.operand].numel * factor)
        mj = bench.target.conversion_energy(numel, produced, consumed)
        changes[edge, produced, consumed] = watts * ms if mj is None else mj
    return _Shares(found, changes, whole - sum(found[site, Float()] for site in options))


def _areas(bench: Bench, options: Mapping[str, Sequence[Option]], base: Artifact) -> _Shares | None:
    """mm2 of every choice, None where the target has no area."""
    whole = bench.target.area(base)
    found = None if whole is None else _by_formula(bench, options, bench.target.site_area)
    if whole is None or found is None:
        return None
    return _Shares(found, {}, whole - sum(found[site, Float()] for site in options))


def _by_formula(
    bench: Bench, options: Mapping[str, Sequence[Option]], formula: Callable[[Site, Technique], float | None]
) -> dict[tuple[str, Technique], float] | None:
    factor, found = _factor(bench), {}
    for site, rows in options.items():
        for option in rows:
            value = formula(scaled(bench.net.record.sites[site], factor), option.technique)
            if value is None:
                return None
            found[site, option.technique] = value
    return found


def _factor(bench: Bench) -> float:
    """The batch that is timed, in batches of what was recorded."""
    return bench.batch / batch_size(first_inputs(bench.task.calibration))
