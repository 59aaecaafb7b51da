"""The ONNX file of a plan whose sites are each computed as in one of a few other plans, without another export.

The exported models of those plans hold all that is needed: a fuller plan's has every quantizer and every integer weight
of its techniques, the float model's has the float weights (normalisations folded as the exporter folds them).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..model.formats import place
from ..model.keys import tensor_key
from ..model.stages import moved
from ..plan import Plan
from ..site import Format, Record
from ..technique import Technique
from ..techniques.binary import Binary
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from ..techniques.winograd import Winograd
from .onnx import cleaning, opset_of, origin_of
from .rewrite import DEQUANTIZE, QUANTIZE, attributes, constant, initializer, replace, rewritten

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

INTEGER = (Int, Winograd, Binary)
"""Techniques that can be taken from one graph into another."""


def derive(
    fulls: Sequence[tuple[onnx.ModelProto, Plan]], base: onnx.ModelProto, plan: Plan, record: Record
) -> onnx.ModelProto | None:
    """What ``to_onnx`` gives for ``plan``, made in milliseconds from the ``raw_onnx`` of other plans.

    ``fulls``: these, each with its plan; ``base``: of the float plan. All of one network and example, materialised, in
    the same opset (which the result keeps). The plans are adapted ones. Every site of ``plan`` is float or computed as
    in one of ``fulls`` (:func:`parts`); output formats (``out``) may differ.

    None if the file cannot be derived, and must be exported: ``prepare`` steps, whose weights may depend on the whole
    plan; other techniques than ``Int``, ``Winograd``, ``Binary`` without errors and ``Float``; a quantizer that no
    graph holds; float and quantized graphs that the exporter gave different structures.
    """
    needed = parts(plan, [full_plan for _, full_plan in fulls], record)
    if needed is None or any(opset_of(fulls[k][0]) != opset_of(base) for k in needed):
        return None
    import onnx_ir as ir

    (full, full_plan), *rest = (fulls[k] for k in needed)
    try:
        return rewritten(
            full,
            lambda graph: _Derivation(
                _Source(graph, full_plan, record),
                [_Source(ir.from_proto(other).graph, its, record) for other, its in rest],
                _Source(ir.from_proto(base).graph, Plan(), record),
                plan,
                record,
            ).run(),
            *cleaning(opset_of(full)),
        )
    except _UnderivableError:
        return None


class _UnderivableError(Exception):
    """The exported graphs do not determine the other."""


def parts(plan: Plan, full_plans: Sequence[Plan], record: Record) -> tuple[int, ...] | None:
    """Which of the fuller plans have the sites of ``plan`` computed as it has them, the one of most first; None: not
    all sites are in one of them, or a plan has techniques that cannot be derived. At least one."""
    ours = {name: technique for name, technique in plan.sites.items() if isinstance(technique, INTEGER)}
    usable = [k for k, full in enumerate(full_plans) if _derivable(full, record)] if _derivable(plan, record) else []
    found: list[int] = []
    while usable:
        has = {
            k: sum(same_technique(technique, full_plans[k].get(name)) for name, technique in ours.items())
            for k in usable
        }
        best = max(usable, key=lambda k: has[k])
        if found and not has[best]:
            break
        usable.remove(best)
        found.append(best)
        ours = {name: t for name, t in ours.items() if not same_technique(t, full_plans[best].get(name))}
        if not ours:
            return tuple(found)
    return None


def _derivable(plan: Plan, record: Record) -> bool:
    if plan.prepare or moved(plan, record):  # or ranges of a site depend on what the plan has at others
        return False
    for name, technique in plan.sites.items():
        site = record.site(name)
        if not _floating(technique) and not isinstance(technique, INTEGER):
            return False
        if isinstance(technique, Binary) and technique.error_rate:
            return False  # which signs are wrong is drawn for each plan anew
        # a composite computed whole has another graph than its inside
        if site.role == "composite" or site.kind == "module":
            return False
    return True


def _floating(technique: Technique | None) -> bool:
    return technique is None or (isinstance(technique, Float) and technique.dtype == "float32")


def same_technique(mine: Technique | None, theirs: Technique | None) -> bool:
    """Whether two techniques compute a site alike, whatever their output format."""
    if isinstance(mine, INTEGER) and isinstance(theirs, INTEGER):
        return _bare(mine) == _bare(theirs)
    return _floating(mine) and _floating(theirs)


def _bare(technique: Technique) -> Technique:
    """Without the format of its output."""
    return dataclasses.replace(technique, out=None) if isinstance(technique, (Int, Winograd)) else technique


class _Source:
    """A graph that sites are taken from, its activation quantizers taken out: everything reads floating values.

    ``quantizers``: by tensor and format, the nodes from Quantize to Dequantize, unread. ``points``: by tensor, the
    first of those that quantized its write. ``edges``: by site and tensor, the inputs of nodes that are its reads.
    """

    def __init__(self, graph: ir.Graph, plan: Plan, record: Record) -> None:
        self.graph, self.plan, self.record = graph, plan, record
        # a folded normalisation belongs to its layer, whichever of the two the exporter named the node after
        self.heads = {site.fold.site: site.name for site in record.sites.values() if site.fold is not None}
        self.quantizers: dict[tuple[str, str], list[ir.Node]] = {}
        self.points: dict[str, list[ir.Node]] = {}
        self.edges: dict[tuple[str, str], list[tuple[ir.Node, int]]] = {}
        self._signatures: dict[int, Any] = {}
        self._find_edges()
        self._remove_quantizers()

    def owner(self, node: ir.Node) -> str:
        site = origin_of(node.metadata_props).site
        return self.heads.get(site, site)

    def groups(self) -> dict[str, list[ir.Node]]:
        """The nodes by site."""
        groups: dict[str, list[ir.Node]] = {}
        for node in self.graph:
            groups.setdefault(self.owner(node), []).append(node)
        return groups

    def structure(self, weighted: Collection[str]) -> Counter[Any]:
        """All nodes but those of weighted sites, which may be folded in one graph and not in the other."""
        found: Counter[Any] = Counter()
        for node in self.graph:
            origin, owner = origin_of(node.metadata_props), self.owner(node)
            if not origin.tensor and owner not in weighted:
                found[node.op_type, owner, origin.path, _settings(node)] += 1
        return found

    def signature(self, value: ir.Value | None) -> Any:
        """Where a value comes from, in words that hold in all graphs: a graph input or a site, and the views since."""
        if value is None:
            return None
        if id(value) in self._signatures:
            return self._signatures[id(value)]
        node, array = value.producer(), constant(value)
        found: tuple[Any, ...]
        if array is not None:
            found = ("constant", str(array.dtype), array.shape, array.tobytes())
        elif node is None:
            found = ("input", value.name)
        elif self.owner(node):
            found = ("site", self.owner(node), value.index())
        else:
            found = (node.op_type, _settings(node), value.index(), tuple(self.signature(v) for v in node.inputs))
        self._signatures[id(value)] = found
        return found

    def _find_edges(self) -> None:
        for node in self.graph:
            site = origin_of(node.metadata_props).site
            for index, value in enumerate(node.inputs) if site else ():
                tensor = self._tensor(value)
                if tensor:
                    self.edges.setdefault((site, tensor), []).append((node, index))

    def _tensor(self, value: ir.Value | None) -> str:
        """The tensor quantized at ``value``, or where the views before it begin; "" if there is none."""
        while value is not None and (node := value.producer()) is not None:
            origin = origin_of(node.metadata_props)
            if origin.tensor:
                return origin.tensor
            if origin.site or not node.inputs:
                return ""
            value = node.inputs[0]
        return ""

    def _remove_quantizers(self) -> None:
        written = {(t, _kind(t, fmt)) for t, fmt in place(self.plan, self.record).writes.values()}
        for node in list(self.graph):
            origin = origin_of(node.metadata_props)
            if node.op_type != DEQUANTIZE or not origin.tensor:
                continue
            chain = [node]
            while chain[0].op_type != QUANTIZE:
                before = chain[0].inputs[0].producer() if chain[0].inputs[0] is not None else None
                if before is None:
                    raise _UnderivableError
                chain.insert(0, before)
            source = chain[0].inputs[0]
            if source is None or not replace(node.outputs[0], source):
                raise _UnderivableError
            key = (origin.tensor, origin.format)
            self.quantizers.setdefault(key, chain)
            if key in written:
                self.points.setdefault(origin.tensor, []).append(chain[0])


class _Derivation:
    """One rewriting of the full graph: sites that the plan computes otherwise come in from the graph that has them so,
    then this plan's quantizers."""

    def __init__(self, full: _Source, others: Sequence[_Source], base: _Source, plan: Plan, record: Record) -> None:
        self.full, self.others, self.base = full, others, base
        self.graph, self.plan, self.record = full.graph, plan, record
        self.weighted = {
            name
            for source in (full, *others)
            for name, technique in source.plan.sites.items()
            if isinstance(technique, INTEGER) and record.sites[name].weight is not None
        }
        self.constants: dict[int, ir.Value] = {}
        names = (value.name for value in (*self.graph.inputs, *self.graph.initializers.values()))
        self.taken = {*names, *(value.name for node in self.graph for value in node.outputs)}

    def run(self) -> None:
        structure = self.full.structure(self.weighted)
        if any(source.structure(self.weighted) != structure for source in (*self.others, self.base)):
            raise _UnderivableError
        mine, theirs = self.full.groups(), {id(source): source.groups() for source in (*self.others, self.base)}
        for name in sorted(self.weighted):
            source = self._source(name)
            if source is not self.full:
                self._put(mine.get(name, []), theirs[id(source)].get(name, []), source)
        self._quantize()

    def _source(self, name: str) -> _Source:
        """The graph that computes a weighted site as the plan does."""
        wanted = self.plan.get(name)
        if isinstance(wanted, INTEGER):
            return next(s for s in (self.full, *self.others) if same_technique(wanted, s.plan.get(name)))
        return self.base if isinstance(self.full.plan.get(name), INTEGER) else self.full

    # -- sites of other graphs ---------------------------------------------------------------------------------------

    def _put(self, old: list[ir.Node], new: list[ir.Node], source: _Source) -> None:
        """Compute a weighted site as another graph does: its nodes take the place of those that are here."""
        mine, theirs = _outside(old), _outside(new)
        same = [self.full.signature(value) for value in mine] == [source.signature(value) for value in theirs]
        left, right = _leaves(old), _leaves(new)
        if not same or len(left) != 1 or len(right) != 1:
            raise _UnderivableError
        last = left[0].producer()
        assert last is not None
        values: dict[int, ir.Value] = {id(a): b for a, b in zip(theirs, mine, strict=True)}
        copies = {}
        for node in new:
            copies[id(node)] = self._copy(node, values)
            self.graph.insert_before(last, copies[id(node)])
        for key, reads in source.edges.items():
            if any(id(node) in copies for node, _ in reads):
                self.full.edges[key] = [(copies[id(node)], index) for node, index in reads]
        made = values[id(right[0])]
        if not replace(left[0], made):
            raise _UnderivableError
        for quantizers in self.full.points.values():
            for quantizer in quantizers:
                before = quantizer.inputs[0].producer() if quantizer.inputs[0] is not None else None
                if before is not None and any(before is node for node in old):
                    raise _UnderivableError

    def _copy(self, node: ir.Node, values: dict[int, ir.Value]) -> ir.Node:
        import onnx_ir as ir

        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise _UnderivableError
        inputs = [
            value if value is None else values[id(value)] if id(value) in values else self._constant(value)
            for value in node.inputs
        ]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            metadata_props=dict(node.metadata_props),
        )
        self.graph.opset_imports.setdefault(node.domain, 1)  # one that no node of this graph may have had
        for mine, theirs in zip(copy.outputs, node.outputs, strict=True):
            mine.name, mine.shape, mine.type = self._unique(theirs.name or "value"), theirs.shape, theirs.type
            values[id(theirs)] = mine
        return copy

    def _constant(self, value: ir.Value) -> ir.Value:
        """The constant of another graph in this one."""
        array = constant(value)
        if array is None:
            raise _UnderivableError
        if id(value) not in self.constants:
            name = self._unique(value.name or "constant")
            self.constants[id(value)] = initializer(self.graph, name, array, value.dtype)
        return self.constants[id(value)]

    def _unique(self, name: str) -> str:
        names = itertools.chain([name], (f"{name}.{k}" for k in itertools.count(1)))
        free = next(candidate for candidate in names if candidate not in self.taken)
        self.taken.add(free)
        return free

    # -- quantizers ---------------------------------------------------------------------------------------------------

    def _quantize(self) -> None:
        placement = place(self.plan, self.record)
        for (name, _), (tensor, fmt) in placement.writes.items():
            for value in self._written_at(name, tensor):
                producer = value.producer()
                if producer is None:
                    raise _UnderivableError
                self._insert_behind(value, producer, self._chain(tensor, fmt))
        done: set[tuple[int, int]] = set()
        for (name, _), (tensor, fmt, at_read) in placement.reads.items():
            edges = self.full.edges.get((name, tensor), [])
            if at_read and not edges:
                raise _UnderivableError
            for node, index in edges if at_read else ():
                if (id(node), index) not in done:  # a site may read one tensor twice
                    done.add((id(node), index))
                    self._insert_before(node, index, self._chain(tensor, fmt))

    def _written_at(self, name: str, tensor: str) -> list[ir.Value]:
        """The values that are the tensor: where the full plan quantized its write, else what leaves the site."""
        known = [q.inputs[0] for q in self.full.points.get(tensor, [])]
        if known:
            return [value for value in known if value is not None]
        owner = self.full.heads.get(name, name)
        leaves = _leaves([node for node in self.graph if self.full.owner(node) == owner])
        if len(leaves) != 1 or len(self.record.sites[name].writes) != 1:
            raise _UnderivableError
        return leaves

    def _chain(self, tensor: str, fmt: Format) -> list[ir.Node]:
        """New nodes that quantize and dequantize the tensor, each reading the one before; the first reads nothing."""
        import onnx_ir as ir

        copies: list[ir.Node] = []
        key = (tensor, _kind(tensor, fmt))
        holder = next((source for source in (self.full, *self.others) if key in source.quantizers), self.full)
        for node in holder.quantizers.get(key, []):
            source = copies[-1].outputs[0] if copies else None
            settings = [v if v is None or holder is self.full else self._constant(v) for v in node.inputs[1:]]
            copies.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    [source, *settings],
                    list(node.attributes.values()),
                    metadata_props=dict(node.metadata_props),
                )
            )
            output = copies[-1].outputs[0]
            output.name = self._unique(f"{tensor}.{node.op_type}")
            output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
        if not copies:
            raise _UnderivableError
        return copies

    def _insert_behind(self, value: ir.Value, producer: ir.Node, chain: list[ir.Node]) -> None:
        readers = [use for use in value.uses() if origin_of(use.node.metadata_props).tensor == ""]
        self.graph.insert_after(producer, chain)
        if value.is_graph_output():
            replace(value, chain[-1].outputs[0])
        for use in readers:
            use.node.replace_input_with(use.idx, chain[-1].outputs[0])
        chain[0].replace_input_with(0, value)

    def _insert_before(self, node: ir.Node, index: int, chain: list[ir.Node]) -> None:
        value = node.inputs[index]
        chain[0].replace_input_with(0, value)
        for made in chain:
            made.outputs[0].shape = value.shape if value is not None else None
        self.graph.insert_before(node, chain)
        node.replace_input_with(index, chain[-1].outputs[0])


def _kind(tensor: str, fmt: Format) -> str:
    """A format as nodes carry it."""
    return tensor_key(tensor, fmt).rpartition("|")[2]


def _settings(node: ir.Node) -> str:
    return repr(sorted(attributes(node).items()))


def _outside(group: list[ir.Node]) -> list[ir.Value]:
    """What a group of nodes reads from others, constants left out, in order, each once."""
    inside = {id(value) for node in group for value in node.outputs}
    found: dict[int, ir.Value] = {}
    for node in group:
        for value in node.inputs:
            if value is not None and id(value) not in inside and constant(value) is None:
                found[id(value)] = value
    return list(found.values())


def _leaves(group: list[ir.Node]) -> list[ir.Value]:
    """What others read of a group of nodes."""
    inside = {id(node) for node in group}
    return [
        value
        for node in group
        for value in node.outputs
        if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses())
    ]
