"""The table of losses and costs that a search decides on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .plan import Plan
from .site import Edge
from .technique import Technique


@dataclass(frozen=True)
class Row:
    """One site under one technique. ``loss``: what it loses alone (relative squared output error or task loss rise).

    ``ms`` per batch, ``bytes`` of its weights in the file, ``mj`` per batch. ``refused``: why the target does not
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


@dataclass(frozen=True)
class EdgeRow:
    """The cost of handing one tensor from ``producer`` to ``consumer`` when their formats are these, ms per batch."""

    producer: str
    consumer: str
    operand: int
    produced: str
    consumed: str
    ms: float


@dataclass(frozen=True)
class Profile:
    """Site rows, edge rows, and what is common to all plans.

    ``fixed_ms``: time that no decision changes. ``fixed_bytes``: the file without the decided weights.
    ``source``: of the times. ``groups``: sites that share one decision.
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
                row = next((r for r in rows if r.writes == "float" and not any(x != "float" for x in r.reads)), rows[0])
            picked.append(row)
        return picked

    def predict(self, plan: Plan) -> dict[str, float]:
        """Predicted ``ms``, ``bytes``, ``loss`` of a plan: site rows plus edge rows plus what is fixed."""
        rows = self.chosen(plan)
        by_site = {row.site: row for row in rows}
        ms = self.fixed_ms + sum(row.ms for row in rows) + sum(edge.ms for edge in self.paid(by_site))
        return {
            "ms": ms,
            "bytes": self.fixed_bytes + sum(row.bytes for row in rows),
            "loss": sum(row.loss for row in rows),
        }

    def paid(self, by_site: Mapping[str, Row]) -> Iterable[EdgeRow]:
        """The edge rows whose formats are those of the chosen rows."""
        for edge in self.edges:
            producer, consumer = by_site.get(edge.producer), by_site.get(edge.consumer)
            produced = producer.writes if producer is not None else "float"
            consumed = consumer.reads[edge.operand] if consumer is not None and edge.operand < len(consumer.reads) else "float"
            if (produced, consumed) == (edge.produced, edge.consumed):
                yield edge
