"""The report as plain values: what was asked, what was got, and why they differ."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .._files import atomic_write

SCHEMA = 1
KIND = "bitsmith.report"

T = TypeVar("T")


class ReportError(ValueError):
    """A report file that cannot be read, or a report that cannot be written, and what to do about it."""


@dataclass(frozen=True)
class SiteRow:
    """One site: what was asked for it, what ran, and what that cost. None is "not measured".

    ``asked``: the technique as short text. ``realised``: the precision read back from the runtime. ``why``: the reason
    where the two differ or the target refused; empty where all went as asked. ``sqnr_db``: simulated against float at
    the site's output, dB. ``gap_db``: run against simulated, dB. ``agree``: fraction of integers within one step.
    ``ms``, ``float_ms``: per batch, under the plan and in float; ``mj``, ``float_mj`` likewise, on a target that models
    energy by site. ``bytes``: of its weights in the file.
    ``macs``: multiply-accumulates per batch. ``rejected``: what an exploration came next to choosing here, and what
    that lost by.
    """

    site: str
    kind: str
    asked: str
    realised: str
    why: str = ""
    sqnr_db: float | None = None
    gap_db: float | None = None
    agree: float | None = None
    loss: float | None = None
    ms: float | None = None
    float_ms: float | None = None
    bytes: float | None = None
    macs: int = 0
    mj: float | None = None
    float_mj: float | None = None
    rejected: str = ""


@dataclass(frozen=True)
class TechniqueRow:
    """One technique of an exploration: where it was chosen, and why not elsewhere.

    ``chosen``, ``offered``, ``refused``: numbers of sites; ``sites``: names of those where it was chosen. ``lost_by``:
    ``accuracy``, ``cost``, ``accuracy and cost``, ``nothing predicted`` (no worse as predicted, where no measured plan
    bore it out), ``not supported`` (refused everywhere); empty where it was chosen. ``candidate``: the site where
    it came nearest to being chosen. ``why``: the numbers and reasons, in words.
    """

    technique: str
    chosen: int
    offered: int
    refused: int
    sites: str = ""
    lost_by: str = ""
    candidate: str = ""
    why: str = ""


@dataclass(frozen=True)
class Measure:
    """A number that does not stand alone.

    ``spread``: half the interquartile range for times, standard deviation over draws for scores. ``low``, ``high``: the
    95 % interval. ``n``: samples. ``unit``: "fraction" is printed in per cent. ``source``: measured, simulated or
    modelled.
    """

    value: float
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""
    source: str = "measured"


@dataclass(frozen=True)
class FrontierPoint:
    """One plan of the search: ``ms`` per batch, ``drop`` in the metric (None: only its loss was predicted), ``mib``,
    ``mj`` per batch and ``mm2`` where the target has them. ``source``: of time, energy and area.

    ``evaluated``: measured on the validation samples, not only predicted. ``chosen``: the plan that was handed back.
    """

    label: str
    ms: float
    drop: float | None
    mib: float
    loss: float
    evaluated: bool = False
    chosen: bool = False
    mj: float | None = None
    mm2: float | None = None
    source: str = "measured"


@dataclass(frozen=True)
class TrainingPoint:
    """One step of a training, from 1: ``loss`` before its update, ``lr``, the ``validation`` score after it where there
    was one. ``kept``: these weights came back.
    """

    step: int
    loss: float
    lr: float
    validation: float | None = None
    kept: bool = False


MEASURES: tuple[str, ...] = (
    *("float_metric", "plan_metric", "drop"),
    *("float_ms", "plan_ms", "float_mj", "plan_mj", "float_mm2", "plan_mm2"),
)
"""The fields of :class:`Report` that are measures; in the JSON each is a plain number with details beside it."""

_DETAILS = ("spread", "n", "unit", "source")


@dataclass(frozen=True)
class Report:
    """What was asked, what was got, and why they differ.

    ``budget``: the limits by name (``ms``, ``mib``, ``mj``, ``mm2``, ``drop``); ``missed``: by how much, in the limit's
    unit. ``drop``: how much worse the plan is than float, paired by sample; positive is worse whichever way it goes.
    ``split``: which samples the accuracies come from. ``time_parts``: ms of the plan's sites, conversions and
    other nodes under the profiler; ``time_whole``: median ms of the whole run without it. ``predicted``: what the
    search expected (``ms``, ``bytes``, ``loss``, ``drop``). ``store``: ``hits`` and ``misses`` of stored measurements.
    ``training``: the steps of a training under the plan; ``training_metric``: what was validated in it.
    ``techniques``: of an exploration, what became of each.
    """

    title: str
    target: str
    metric: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    missed: Mapping[str, float] = field(default_factory=dict)
    minimize: str = "ms"
    split: str = "selected on these samples"
    float_metric: Measure | None = None
    plan_metric: Measure | None = None
    drop: Measure | None = None
    float_ms: Measure | None = None
    plan_ms: Measure | None = None
    float_mj: Measure | None = None
    plan_mj: Measure | None = None
    float_mm2: Measure | None = None
    plan_mm2: Measure | None = None
    float_bytes: int | None = None
    plan_bytes: int | None = None
    loss_name: str = "relative squared output error"
    frontier: tuple[FrontierPoint, ...] = ()
    sites: tuple[SiteRow, ...] = ()
    verify: Mapping[str, Any] = field(default_factory=dict)
    time_parts: Mapping[str, float] = field(default_factory=dict)
    time_whole: float | None = None
    notes: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    citations: tuple[str, ...] = ()
    seed: int | None = None
    store: Mapping[str, int] = field(default_factory=dict)
    training: tuple[TrainingPoint, ...] = ()
    training_metric: str = ""
    techniques: tuple[TechniqueRow, ...] = ()

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, _plain(getattr(self, name), name))
        for name in ("frontier", "sites", "notes", "citations", "training", "techniques"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in self.budget:
            self.got(name)  # an unknown limit is an error here, not when the page is written
        stray = sorted(set(self.missed) - set(self.budget))
        if stray:
            raise ReportError(f"missed names {', '.join(stray)}, which the budget does not limit")

    @property
    def samples(self) -> int:
        """How many samples the plan's accuracy comes from."""
        measure = self.plan_metric or self.float_metric
        return measure.n if measure is not None else 0

    @property
    def time_source(self) -> str:
        """Where the times come from: measured, simulated or modelled; empty if there are none."""
        measure = self.plan_ms or self.float_ms
        return measure.source if measure is not None else ""

    @property
    def speedup(self) -> float | None:
        """Float time over plan time; below 1 the plan is slower."""
        if self.float_ms is None or self.plan_ms is None or self.plan_ms.value <= 0:
            return None
        return self.float_ms.value / self.plan_ms.value

    @property
    def over(self) -> dict[str, float]:
        """By how much each limit does not hold: what the search missed, and what the report's own numbers exceed.

        The two can differ: a limit that held on the validation samples may not hold on the test samples.
        """
        over = dict(self.missed)
        for name, limit in self.budget.items():
            got = self.got(name)
            if got is not None and got - limit > 1e-12:
                over[name] = got - limit
        return over

    @property
    def met(self) -> bool:
        """Whether every limit was checked and holds."""
        return not self.over and all(self.got(name) is not None for name in self.budget)

    def got(self, limit: str) -> float | None:
        """What was reached where the budget has ``limit``, in the limit's own unit; None: not measured."""
        if limit == "mib":
            return None if self.plan_bytes is None else self.plan_bytes / 2**20
        if limit not in ("ms", "mj", "mm2", "drop"):
            raise ReportError(f"{limit!r} is not a limit: ms, mib, mj, mm2 or drop")
        measure: Measure | None = self.drop if limit == "drop" else getattr(self, f"plan_{limit}")
        return None if measure is None else measure.value

    def to_json(self) -> dict[str, Any]:
        """Flat, for people and scripts: plain numbers first, each measure's details under ``<name>_<detail>``.

        Numbers that JSON cannot hold are written as "inf", "-inf" and "nan".
        """
        data: dict[str, Any] = {"schema": SCHEMA, "kind": KIND, "title": self.title, "target": self.target}
        data["metric"] = self.metric
        absent = {name for name in _LATER if not getattr(self, name)}
        absent |= set() if self.training else set(_OF_TRAINING)
        for name in MEASURES:
            measure = getattr(self, name)
            if name not in absent:
                data[name] = None if measure is None else measure.value
        data |= {"float_bytes": self.float_bytes, "plan_bytes": self.plan_bytes}
        data |= {name: getattr(self, name) for name in _DERIVED}
        for name in MEASURES:
            measure = getattr(self, name)
            if measure is not None:
                data[f"{name}_interval"] = [measure.low, measure.high]
                data |= {f"{name}_{detail}": getattr(measure, detail) for detail in _DETAILS}
        for f in fields(self):
            if f.name not in data and f.name not in absent:
                value = getattr(self, f.name)
                data[f.name] = [_flat(item) for item in value] if f.name in _ROWS else value
        written = _encode(data)
        assert isinstance(written, dict)
        return written

    def dumps(self) -> str:
        """The JSON text that ``save`` writes."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """Read what :meth:`to_json` wrote; anything else is a :class:`ReportError` that names the key."""
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise ReportError(f'this is not a Bitsmith report: a JSON object with "kind": "{KIND}" was expected')
        version = data.get("schema")
        reader = _READERS.get(version) if type(version) is int else None
        if reader is None:
            raise ReportError(
                f"report schema {version!r} is unknown to this version, which reads {sorted(_READERS)}; "
                "a newer Bitsmith wrote it: pip install -U bitsmith"
            )
        return reader(data)

    def save(self, path: str | Path) -> Path:
        """Write ``report.html`` (one page that opens offline) or ``report.json``, whole or not at all."""
        path = Path(path)
        if path.suffix == ".html":
            from .html import page

            text = page(self)
        elif path.suffix == ".json":
            text = self.dumps()
        else:
            raise ReportError(f"{path}: a report is saved as .html or .json, not {path.suffix or 'without a suffix'}")
        return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a ``.json`` that :meth:`save` wrote."""
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ReportError(f"{path} is not a report: the JSON is broken or cut off ({error})") from None
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from None


_MAPPINGS = ("settings", "versions", "machine", "budget", "missed", "verify", "time_parts", "predicted", "store")
_NUMBERS: Mapping[str, type] = {"budget": float, "missed": float, "time_parts": float, "predicted": float, "store": int}
_ROWS: Mapping[str, type] = {
    **{"sites": SiteRow, "frontier": FrontierPoint},
    **{"training": TrainingPoint, "techniques": TechniqueRow},
}
_OF_TRAINING = ("training", "training_metric")
_LATER = ("float_mm2", "plan_mm2", "techniques")
"""Written where there is one only: files without them are as old as the schema."""
_DERIVED = ("samples", "speedup", "time_source")
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _plain(value: Any, where: str) -> Any:
    """Only what JSON can hold, so that a report that was read back equals the one that was written."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, where) for item in value)
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a NumPy or torch scalar
        return _plain(value.item(), where)
    raise ReportError(
        f"{where}: {type(value).__name__} cannot be written to a report: use numbers, strings and mappings"
    )


def _flat(row: Any) -> dict[str, Any]:
    """A row of scalars; what came later to the schema is written where there is one only."""
    return {key: value for key, value in asdict(row).items() if key != "rejected" or value}


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    value = _plain(value, "report")
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, Mapping):
        return {key: _decode(item) for key, item in value.items()}
    return tuple(_decode(item) for item in value) if isinstance(value, (list, tuple)) else value


def _check(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the scalar type ``hint`` (or one of a union), or an error that names the place."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, str):
        value = _NON_FINITE.get(value, value)
    if isinstance(value, bool):
        fine = bool in allowed
    elif isinstance(value, int):
        fine = int in allowed or float in allowed
    else:
        fine = isinstance(value, allowed)
    if not fine:
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise ReportError(f"{where}: {value!r} is not {names}")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and int not in allowed else value


def _read_flat(cls: type[T], data: Any, where: str) -> T:
    """A dataclass of scalars from its JSON object."""
    if not isinstance(data, Mapping):
        raise ReportError(f"{where}: an object was expected, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    required = {f.name for f in fields(cls) if f.default is MISSING}  # type: ignore[arg-type]
    _check_keys(data, set(hints), required, where)
    return cls(**{key: _check(value, hints[key], f"{where}.{key}") for key, value in data.items()})


def _check_keys(data: Mapping[str, Any], known: set[str], required: set[str], where: str) -> None:
    unknown, missing = sorted(set(data) - known), sorted(required - set(data))
    if unknown:
        raise ReportError(f"{where}: unknown keys {', '.join(unknown)}")
    if missing:
        raise ReportError(f"{where}: lacks {', '.join(missing)}; the file is incomplete")


def _read_1(data: Mapping[str, Any]) -> Report:
    names = {f.name for f in fields(Report)}
    details = {f"{name}_{detail}" for name in MEASURES for detail in (*_DETAILS, "interval")}
    optional = {*_OF_TRAINING, *_LATER}
    required = (names | set(_DERIVED)) - optional
    names &= required | data.keys()
    _check_keys(data, required | details | optional | {"schema", "kind"}, required, "report")
    values: dict[str, Any] = {}
    for name in names - set(MEASURES):
        value = data[name]
        if name in _MAPPINGS:
            if not isinstance(value, Mapping):
                raise ReportError(f"report.{name}: an object was expected, not {type(value).__name__}")
            values[name] = _decode(value)
            if name in _NUMBERS:
                for key, item in value.items():
                    _check(item, _NUMBERS[name], f"report.{name}.{key}")
        elif name in (*_ROWS, "notes", "citations"):
            if not isinstance(value, list):
                raise ReportError(f"report.{name}: a list was expected, not {type(value).__name__}")
            values[name] = tuple(_item(name, item, f"report.{name}[{i}]") for i, item in enumerate(value))
        else:
            values[name] = _check(value, typing.get_type_hints(Report)[name], f"report.{name}")
    for name in MEASURES:
        values[name] = _read_measure(data, name)
    return Report(**values)


def _item(name: str, item: Any, where: str) -> Any:
    return _read_flat(_ROWS[name], item, where) if name in _ROWS else _check(item, str, where)


def _read_measure(data: Mapping[str, Any], name: str) -> Measure | None:
    if data.get(name) is None:
        return None
    where = f"report.{name}"
    interval = data.get(f"{name}_interval")
    if not isinstance(interval, list) or len(interval) != 2:
        raise ReportError(f"{where}_interval: [low, high] was expected, not {interval!r}")
    flat = {"value": data[name], "low": interval[0], "high": interval[1]}
    flat |= {detail: data[f"{name}_{detail}"] for detail in _DETAILS if f"{name}_{detail}" in data}
    return _read_flat(Measure, flat, where)


_READERS: Mapping[int, Callable[[Mapping[str, Any]], Report]] = {1: _read_1}
