"""DegreeQuant: quantization-aware training of graph networks, with nodes of many edges protected at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..numerics import dialect
from ..numerics.degrees import Messages, degree_quantiles, in_degrees, messages_of, with_loops
from ..numerics.derived import Derived
from ..numerics.ranges import MIN_SCALE
from ..numerics.running import RunningQuantizer
from ..numerics.weights import fake_quantize_weight, integers_of
from ..plan import Plan
from ..site import Format, Operand, Record, Site
from ..technique import Cell, No, Technique

AGGREGATIONS = ("scatter_add", "index_add", "scatter_reduce", "spmm")
"""Operations that add up what nodes receive; what they write is quantized there."""


@dataclass(frozen=True)
class DegreeQuant(Technique):
    """Degree-Quant: training for integer graph networks (Tailor et al. 2021, arXiv:2008.05000).

    ``w``, ``a``: bits of weights (symmetric, one scale) and of activations (affine, one range each), 2 to 8. Every
    operand is quantized where it is read, and a sum over neighbours where it is written. Ranges follow the training:
    ``percentile`` (in percent, on each side; the paper has 0.1 for 8 bits and 1 for 4) of each batch, or None for its
    extremes; as a running mean with ``momentum``, or None for ranges that only widen. ``gradient``: ``clipped`` is 0
    outside the range, ``ste`` is 1 everywhere. ``sample``: elements that a percentile is taken of, 0 for all.

    In training a node stays in full precision with probability ``low + (high - low) F(d)``: ``F`` is the part of the
    nodes of its graph whose in-degree is no greater than its own, ``d``. A new draw in every forward pass, the same at
    all sites; messages share the draw of the node that sends them; a row that is drawn does not move a range. Nothing
    is protected in evaluation. ``edges`` names the model's input that holds the edges, (2, E) or a sparse matrix of
    what each node receives; ``batch`` the one that tells the graph of each node, None for a single graph.

    ``low = high = 0``, ``percentile=None`` and ``gradient="ste"`` are plain quantization-aware training, for any model.

    >>> DegreeQuant(4, 4, percentile=1.0)
    DegreeQuant(w=4, a=4, percentile=1.0)
    """

    needs_training = True

    w: int = 8
    a: int = 8
    low: float = 0.0
    high: float = 0.1
    percentile: float | None = 0.1
    momentum: float | None = 0.01
    gradient: Literal["clipped", "ste"] = "clipped"
    sample: int = 0
    edges: str = "edge_index"
    batch: str | None = None

    def __post_init__(self) -> None:
        for name in ("w", "a"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ValueError(f"DegreeQuant({name}={bits!r}): bits must be 2 to 8")
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(f"DegreeQuant(low={self.low!r}, high={self.high!r}): must be 0 <= low <= high <= 1")
        if self.percentile is not None and not 0.0 <= self.percentile < 50.0:
            raise ValueError(f"DegreeQuant(percentile={self.percentile!r}): must be 0 to below 50, in percent, or None")
        if self.momentum is not None and not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"DegreeQuant(momentum={self.momentum!r}): must be above 0 and at most 1, or None")
        if self.gradient not in ("clipped", "ste"):
            raise ValueError(f"DegreeQuant(gradient={self.gradient!r}): must be 'clipped' or 'ste'")
        if not isinstance(self.sample, int) or self.sample < 0:
            raise ValueError(f"DegreeQuant(sample={self.sample!r}): must be 0 for all elements, or how many")

    def __repr__(self) -> str:
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, field in type(self).__dataclass_fields__.items()
            if name in ("w", "a") or getattr(self, name) != field.default
        ]
        return f"DegreeQuant({', '.join(changed)})"

    def plan(self, sites: Mapping[str, Site], *, softmax: bool = False) -> Plan:
        """This technique at every site that it fits. ``softmax=False`` leaves the softmax over neighbours of attention
        layers in float, as the paper does: what is subtracted and added up beside a leaky ReLU in one module."""
        paths = [{site.path for site in sites.values() if site.kind == kind} for kind in ("leaky_relu", "sub")]
        attention = paths[0] & paths[1]
        return Plan(
            {
                name: self
                for name, site in sites.items()
                if self.fits(site) and (softmax or not (site.path in attention and site.kind in ("sub", *AGGREGATIONS)))
            }
        )

    def fits(self, site: Site) -> bool | No:
        if site.role != "integer" and site.kind != "spmm":
            inside = "; its inside can be planned" if site.role == "composite" else ""
            return No(f"{site.kind} is computed in float{inside}")
        if all(len(o.shape) < 2 for o in site.operands if o.floating):
            return No(
                "its operands have one axis, as degrees have: coefficients are quantized where they meet features"
            )
        return True

    def form(self, site: Site) -> str:
        """``float``: what a target promises. The exported file has quantize and dequantize nodes nevertheless."""
        return "float"

    def bits(self, site: Site) -> float:
        """Integers and one scale of float32."""
        return 0.0 if site.weight is None else site.weight.numel * self.w + 32.0

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _DegreeCell(site, self, record, rng.initial_seed())


@dataclass(frozen=True)
class _Graph:
    """``quantiles``: F of each node (N,). ``messages``: without and with a loop at each node."""

    quantiles: Tensor
    messages: tuple[Messages, Messages]


class _DegreeCell(Cell):
    """``ranges`` holds a quantizer by operand, and ``out`` behind an aggregation."""

    fresh = True

    def __init__(self, site: Site, technique: DegreeQuant, record: Record, seed: int) -> None:
        super().__init__(site)
        self.technique, self.seed = technique, seed
        self.slot = site.operands.index(site.weight) if site.weight is not None else -1
        self.format = Format(technique.w, signed=True, symmetric=True)
        self.frozen = False
        self._kept: Derived[tuple[Tensor, Tensor]] = Derived()
        self.ranges = nn.ModuleDict()
        for index, operand in enumerate(site.operands):
            if operand.floating and not operand.constant and not _summed(operand, record):
                self.ranges[str(index)] = _quantizer(technique)
        if site.kind in AGGREGATIONS:
            self.ranges["out"] = _quantizer(technique)
        self.forwards: Tensor
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self._graph: _Graph | None = None
        self._mask: Tensor | None = None  # of the nodes, in this forward

    def observe(self, inputs: Mapping[str, Any]) -> None:
        self._graph = self._mask = None
        technique = self.technique
        if technique.high == 0.0:
            return
        for role in ("edges", "batch"):
            name = getattr(technique, role)
            if name is not None and not isinstance(inputs.get(name), Tensor):
                tensors = ", ".join(key for key, value in inputs.items() if isinstance(value, Tensor))
                raise ValueError(
                    f"DegreeQuant({role}={name!r}) at {self.site!r}: the model has no input tensor of that name; its "
                    f"inputs are {tensors or 'not tensors'}. Name the one that holds the {_HOLDS[role]}, or give "
                    "low=high=0 to protect no node"
                )
        if not self.training:
            return
        self._graph = _graph_of(inputs, technique)
        quantiles = self._graph.quantiles
        self.forwards += 1
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.forwards)) % 2**63)
        chance = technique.low + (technique.high - technique.low) * quantiles
        self._mask = torch.rand(len(quantiles), generator=draw).to(chance.device) < chance

    def forward(self, *operands: Any, **rest: Any) -> Any:
        given = list(operands)
        for index, x in enumerate(operands):
            if index == self.slot:
                given[index] = self._weight(x)
            elif str(index) in self.ranges:
                given[index] = self._quantized(str(index), x, rest)
        output = self.op(*given, **rest)
        return self._quantized("out", output, rest) if "out" in self.ranges else output

    def _quantized(self, which: str, x: Tensor, rest: Mapping[str, Any]) -> Tensor:
        quantizer = self.ranges[which]
        try:
            if x.layout != torch.strided:
                return self._sparse(quantizer, x)
            found: Tensor = quantizer(x, self._protected(which, x, rest))
        except ValueError as error:
            where = "what it writes" if which == "out" else f"operand {which}"
            raise ValueError(f"DegreeQuant at {self.site!r}, {where}: {error}") from None
        return found

    def _sparse(self, quantizer: nn.Module, x: Tensor) -> Tensor:
        """The same matrix with its values on the grid; row i, column j is a message from j."""
        if x.layout not in (torch.sparse_coo, torch.sparse_csr):
            x = x.to_sparse_csr()
        x = x.coalesce() if x.layout == torch.sparse_coo else x
        coo = x.layout == torch.sparse_coo
        source = x.indices()[1] if coo else x.col_indices()
        protected = None if self._mask is None or x.shape[1] != len(self._mask) else self._mask[source]
        values = quantizer(x.values(), protected)
        if coo:
            return torch.sparse_coo_tensor(x.indices(), values, x.shape, check_invariants=False, is_coalesced=True)
        return torch.sparse_csr_tensor(x.crow_indices(), source, values, x.shape, check_invariants=False)

    # -- which rows stay in full precision ---------------------------------------------------------------------------

    def _protected(self, which: str, x: Tensor, rest: Mapping[str, Any]) -> Tensor | None:
        graph, mask = self._graph, self._mask
        if graph is None or mask is None or not x.dim():
            return None
        if self.kind in AGGREGATIONS and which == "1" and "index" in rest:
            if rest["dim"] % x.dim():
                return None
            received = rest["index"].reshape(len(x), -1)[:, 0] if len(x) else rest["index"].reshape(-1)
            for source, target in graph.messages:
                if len(source) != len(x):
                    continue
                if torch.equal(received, target):
                    return mask[source]
                if torch.equal(received.sort().values, target.sort().values):
                    raise ValueError(_REORDERED)
            return mask if len(x) == len(mask) else None
        if len(x) == len(mask):
            return mask
        found = [source for source, _ in graph.messages if len(source) == len(x)]
        if len(found) == 2 and not torch.equal(found[0], found[1]):
            raise ValueError(_REORDERED)
        return mask[found[0]] if found else None

    # -- weights -----------------------------------------------------------------------------------------------------

    def _weight(self, weight: Tensor) -> Tensor:
        if self.frozen:
            q, scale, zero = (self.get_buffer(name) for name in (self.weight_name, "weight_scale", "weight_zero_point"))
            return dialect.dequantize_weight(q, scale, zero, None, self.format.bits)
        return self._kept.of([weight], lambda: self._on_grid(weight))[0]

    def _on_grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        reach = weight.detach().float().abs().max()
        scale = (torch.where(reach > 0, reach, 1.0) / self.format.levels[1]).clamp(min=MIN_SCALE)
        zero = torch.zeros((), dtype=torch.int64, device=weight.device)
        return fake_quantize_weight(weight, scale, zero, None, self.format), scale

    def train(self, mode: bool = True) -> _DegreeCell:
        self._kept.clear()
        super().train(mode)
        return self

    def materialise(self) -> None:
        if self._kept.value is None:  # no weight, or the example does not come here
            return
        weight, scale = self._kept.value
        zero = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.weight_name = "weight_q4" if self.format.bits <= 4 else "weight_q"
        self.register_buffer(self.weight_name, integers_of(weight, scale, zero, None, self.format))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero)
        self._kept.clear()
        self.frozen = True


_REORDERED = (
    "the messages are not in the order of the edges, so it is not known which node sends which. Layers that add "
    "self-loops move those that are there: give edges without loops, or as torch_geometric.utils."
    "add_remaining_self_loops leaves them"
)

_HOLDS = {"edges": "edges", "batch": "graph of each node"}

_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The graph of an edge tensor, as long as that lives: all cells of a network ask for it, in every forward."""


def _graph_of(inputs: Mapping[str, Any], technique: DegreeQuant) -> _Graph:
    edges: Tensor = inputs[technique.edges]
    batch: Tensor | None = None if technique.batch is None else inputs[technique.batch]
    nodes = _nodes(inputs, technique)
    key = nodes, edges._version, batch if batch is None else (id(batch), batch._version)
    known = _KNOWN.get(edges)  # type: ignore[no-untyped-call]
    if known is not None and known[0] == key:
        graph: _Graph = known[1]
        return graph
    messages, nodes = messages_of(edges, nodes)
    if batch is not None and batch.shape != (nodes,):
        raise ValueError(
            f"DegreeQuant(batch={technique.batch!r}): the input has shape {tuple(batch.shape)}, and there are {nodes} "
            "nodes; it must name the graph of each node"
        )
    quantiles = degree_quantiles(in_degrees(messages, nodes), batch)
    graph = _Graph(quantiles, (messages, with_loops(messages, nodes, edges.layout != torch.strided)))
    _KNOWN[edges] = key, graph, batch  # the batch is held so that no other takes its id
    return graph


def _nodes(inputs: Mapping[str, Any], technique: DegreeQuant) -> int | None:
    """How many nodes there are: rows of the batch, else of the first floating input; None: the edges tell."""
    edges = inputs[technique.edges]
    if edges.layout != torch.strided:
        return None
    if technique.batch is not None:
        return len(inputs[technique.batch])
    for name, value in inputs.items():
        if name != technique.edges and isinstance(value, Tensor) and value.dim() and value.is_floating_point():
            return len(value)
    raise ValueError(
        f"DegreeQuant(edges={technique.edges!r}): no other input tells how many nodes there are (the rows of the first "
        "floating one); give batch="
    )


def _summed(operand: Operand, record: Record) -> bool:
    """Whether an aggregation wrote what is read: it is on its grid already."""
    info = record.tensors.get(operand.tensor)
    producer = record.sites.get(info.producer) if info is not None else None
    return producer is not None and producer.kind in AGGREGATIONS


def _quantizer(technique: DegreeQuant) -> RunningQuantizer:
    clips = technique.gradient == "clipped"
    return RunningQuantizer(Format(technique.a), technique.percentile, technique.momentum, clips, technique.sample)
