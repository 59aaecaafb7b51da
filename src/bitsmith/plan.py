"""Plan and Budget: the decisions, readable and editable by hand, and the limits they must keep."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._files import atomic_write
from .site import Format, Learn, Range, Record, UnknownSiteError, contains
from .technique import Step, Technique, check_fits

SCHEMA = 1


class PlanError(ValueError):
    """A plan file or a plan that cannot be used, and what to do about it."""


@dataclass(frozen=True)
class Plan:
    """Which technique computes each site; what is done before; which sites decide together.

    ``sites``: site name -> technique; a site that is not named is computed as it was. ``prepare``: steps in order.
    ``groups``: tuples of site names that share one decision. A plan never names both a module and something inside it.
    """

    sites: Mapping[str, Technique] = field(default_factory=dict)
    prepare: tuple[Step, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", dict(self.sites))
        object.__setattr__(self, "prepare", tuple(self.prepare))
        object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))
        for name, technique in self.sites.items():
            if not isinstance(technique, Technique):
                raise PlanError(
                    f"site {name!r}: {technique!r} is not a technique; write a value such as bitsmith.Int(8, 8)"
                )
        names = sorted(self.sites)
        for outer in names:
            inner = next((name for name in names if contains(outer, name)), None)
            if inner is not None:
                raise PlanError(f"the plan names {outer!r} and also {inner!r}, which is inside it; keep one of them")
        seen: set[str] = set()
        for group in self.groups:
            for name in group:
                if name in seen:
                    raise PlanError(f"site {name!r} is in two groups")
                seen.add(name)
            techniques = {self.sites.get(name) for name in group}
            if len(techniques) > 1:
                raise PlanError(
                    f"the sites {', '.join(group)} share one decision, but the plan gives them different techniques"
                )

    def __getitem__(self, name: str) -> Technique:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def empty(self) -> bool:
        """Without sites and steps: the float network."""
        return not self.sites and not self.prepare

    def get(self, name: str) -> Technique | None:
        return self.sites.get(name)

    def replace(self, **changes: Any) -> Plan:
        """A copy with other ``sites``, ``prepare`` or ``groups``."""
        return dataclasses.replace(self, **changes)

    def assign(self, technique: Technique, *patterns: str, among: Iterable[str]) -> Plan:
        """A copy in which every site of ``among`` that matches a shell pattern has that technique.

        A pattern that matches nothing is an error.
        """
        names = list(among)
        sites = dict(self.sites)
        for pattern in patterns:
            hits = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
            if not hits:
                raise UnknownSiteError(pattern, names)
            sites.update(dict.fromkeys(hits, technique))
        return self.replace(sites=sites)

    def check(self, record: Record) -> None:
        """Raise if the plan names an unknown site or a technique that does not fit its site."""
        for name, technique in self.sites.items():
            check_fits(technique, record.site(name))
        for group in self.groups:
            for name in group:
                record.site(name)

    def cite(self) -> tuple[str, ...]:
        """The sources of everything in the plan, each once."""
        parts: tuple[Step | Technique, ...] = (*self.prepare, *self.sites.values())
        return tuple(dict.fromkeys(part.cite() for part in parts))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "bitsmith.plan",
            "prepare": [encode(step) for step in self.prepare],
            "groups": [list(group) for group in self.groups],
            "sites": {name: encode(technique) for name, technique in self.sites.items()},
        }

    @classmethod
    def from_json(cls, data: Any, techniques: Sequence[type] = ()) -> Plan:
        """Read what :meth:`to_json` wrote. Names resolve among the built-ins and ``techniques`` only."""
        if not isinstance(data, dict) or data.get("kind") != "bitsmith.plan":
            raise PlanError('this is not a Bitsmith plan: a JSON object with "kind": "bitsmith.plan" was expected')
        version = data.get("schema")
        reader = _READERS.get(version) if isinstance(version, int) else None
        if reader is None:
            raise PlanError(
                f"plan schema {version!r} is unknown to this version, which reads {sorted(_READERS)}; "
                "a newer Bitsmith wrote it: pip install -U bitsmith"
            )
        return reader(data, techniques)

    def save(self, path: str | Path) -> Path:
        """Write readable JSON under a temporary name, then rename."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path, techniques: Sequence[type] = ()) -> Plan:
        """Read a plan file. Nothing is imported or run because the file says so."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path} is not a plan: the JSON is broken or cut off ({error})") from None
        try:
            return cls.from_json(data, techniques)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def encode(value: Any) -> Any:
    """A frozen dataclass as JSON: ``{"type": class name, field: value, ...}``; defaults are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: encode(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init and (f.default is dataclasses.MISSING or getattr(value, f.name) != f.default)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PlanError(
        f"{value!r} ({type(value).__name__}) cannot be written to a plan: use numbers, strings and frozen dataclasses"
    )


def decode(data: Any, classes: Mapping[str, type]) -> Any:
    """The inverse of :func:`encode`; class names resolve in ``classes`` only."""
    if isinstance(data, list):
        return tuple(decode(item, classes) for item in data)
    if isinstance(data, dict) and "type" in data:
        name = data["type"]
        if not isinstance(name, str) or name not in classes:
            raise PlanError(
                f"unknown type {name!r}; known: {', '.join(sorted(classes))}. "
                "Give your own classes with Plan.load(path, techniques=[...])"
            )
        target = classes[name]
        known = {f.name for f in dataclasses.fields(target) if f.init}
        given = {key: decode(item, classes) for key, item in data.items() if key != "type"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise PlanError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        try:
            return target(**given)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{name}: {error}") from None
    if isinstance(data, dict):
        return {key: decode(item, classes) for key, item in data.items()}
    return data


def known_classes(extra: Sequence[type]) -> dict[str, type]:
    """Built-in techniques and steps (the package's own subclasses), the data types they hold, and the given ones."""

    def descend(base: type) -> Iterator[type]:
        children: list[type] = base.__subclasses__()
        for child in children:
            yield child
            yield from descend(child)

    classes: dict[str, type] = {"Format": Format, "Learn": Learn, "Range": Range}
    bases: tuple[type, ...] = (Technique, Step)
    for base in bases:
        for child in descend(base):
            if child.__module__.partition(".")[0] == __name__.partition(".")[0] and dataclasses.is_dataclass(child):
                classes[child.__name__] = child
    for child in extra:
        if not (isinstance(child, type) and dataclasses.is_dataclass(child)):
            raise PlanError(f"techniques=[{child!r}]: each must be a frozen dataclass")
        classes[child.__name__] = child
    return classes


def _read_1(data: Mapping[str, Any], techniques: Sequence[type]) -> Plan:
    classes = known_classes(techniques)
    unknown = sorted(set(data) - {"schema", "kind", "prepare", "groups", "sites"})
    if unknown:
        raise PlanError(f"unknown keys in the plan: {', '.join(unknown)}")
    sites, prepare, groups = data.get("sites", {}), data.get("prepare", []), data.get("groups", [])
    if not isinstance(sites, dict) or not isinstance(prepare, list) or not isinstance(groups, list):
        raise PlanError("'sites' must be an object, 'prepare' and 'groups' lists")
    steps = []
    for item in prepare:
        step = decode(item, classes)
        if not isinstance(step, Step):
            raise PlanError(f"prepare: {item!r} is not a prepare step")
        steps.append(step)
    return Plan({name: decode(item, classes) for name, item in sites.items()}, tuple(steps), tuple(map(tuple, groups)))


_READERS: Mapping[int, Callable[[Mapping[str, Any], Sequence[type]], Plan]] = {1: _read_1}


@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit. ``ms`` per batch, ``mib`` of the exported file (2^20 bytes), ``mj`` per batch,
    ``mm2`` of the chip on a target that models one, ``drop``: absolute, in the metric's mean (0.01 is one point of a
    fraction).

    >>> Budget(drop=0.01).limits
    {'drop': 0.01}
    """

    ms: float | None = None
    mib: float | None = None
    mj: float | None = None
    drop: float | None = None
    mm2: float | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError("Budget(): name at least one limit: ms, mib, mj, mm2 or drop")
        for name, limit in self.limits.items():
            if not isinstance(limit, (int, float)) or isinstance(limit, bool) or limit != limit:
                raise ValueError(f"Budget({name}={limit!r}): must be a number")
            if name != "drop" and limit <= 0:
                raise ValueError(f"Budget({name}={limit}): must be above 0")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that were set, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}

    def missed(self, **got: float | None) -> dict[str, float]:
        """By how much each limit is missed, in its own unit; empty if all hold.

        >>> Budget(ms=2.0, drop=0.01).missed(ms=2.5, drop=0.0)
        {'ms': 0.5}
        """
        over = {name: got[name] - limit for name, limit in self.limits.items() if got.get(name) is not None}  # type: ignore[operator]
        return {name: excess for name, excess in over.items() if excess > 1e-12}
