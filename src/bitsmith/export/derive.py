"""The ONNX file of a plan that leaves some sites of another plan in float, without exporting the network again.

Two exported models hold all that is needed: the fuller plan's has every quantizer and every integer weight, the float
model's has the float weights (normalisations folded as the exporter folds them).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..model.formats import place
from ..model.keys import tensor_key
from ..plan import Plan
from ..site import Format, Record
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from .onnx import cleaning, opset_of, origin_of
from .rewrite import DEQUANTIZE, QUANTIZE, attributes, constant, initializer, replace, rewritten

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def derive(
    full: onnx.ModelProto, base: onnx.ModelProto, plan: Plan, full_plan: Plan, record: Record
) -> onnx.ModelProto | None:
    """What ``to_onnx`` gives for ``plan``, made in milliseconds from the ``raw_onnx`` of two other plans.

    ``full``: of ``full_plan``; ``base``: of the float plan with the same ``prepare`` steps. Both of one network and
    example, materialised, in the same opset (which the result keeps). ``plan`` and ``full_plan`` are adapted plans.
    Every site of ``plan`` is float or computed as in ``full_plan``; output formats (``out``) may differ.

    None if the file cannot be derived, and must be exported: other techniques than ``Int`` and ``Float``, a
    quantizer that ``full`` does not hold, float and quantized graphs that the exporter gave different structures.
    """
    if not _is_part(plan, full_plan, record) or opset_of(full) != opset_of(base):
        return None
    import onnx_ir as ir

    try:
        return rewritten(
            full,
            lambda graph: _Derivation(graph, ir.from_proto(base).graph, plan, full_plan, record).run(),
            *cleaning(opset_of(full)),
        )
    except _UnderivableError:
        return None


class _UnderivableError(Exception):
    """The two exported graphs do not determine the third."""


def _is_part(plan: Plan, full_plan: Plan, record: Record) -> bool:
    if plan.prepare != full_plan.prepare:
        return False
    for name in (*plan.sites, *full_plan.sites):
        mine, theirs = plan.get(name), full_plan.get(name)
        site = record.site(name)
        for technique in (mine, theirs):
            # a composite computed whole has another graph than its inside
            floating = technique is None or (isinstance(technique, Float) and technique.dtype == "float32")
            if not floating and not isinstance(technique, Int):
                return False
            if technique is not None and (site.role == "composite" or site.kind == "module"):
                return False
        if isinstance(mine, Int) and (not isinstance(theirs, Int) or _inner(mine) != _inner(theirs)):
            return False
    return True


def _inner(technique: Int) -> Int:
    return dataclasses.replace(technique, out=None)


class _Derivation:
    """One rewriting of the full graph: all activation quantizers out, float weights in, this plan's quantizers in."""

    def __init__(self, graph: ir.Graph, base: ir.Graph, plan: Plan, full_plan: Plan, record: Record) -> None:
        self.graph, self.base, self.record = graph, base, record
        self.plan, self.full_plan = plan, full_plan
        # a folded normalisation belongs to its layer, whichever of the two the exporter named the node after
        self.heads = {site.fold.site: site.name for site in record.sites.values() if site.fold is not None}
        self.weighted = {
            name
            for name, technique in full_plan.sites.items()
            if isinstance(technique, Int) and record.sites[name].weight is not None
        }
        self.quantizers: dict[tuple[str, str], list[ir.Node]] = {}
        self.edges: dict[tuple[str, str], list[tuple[ir.Node, int]]] = {}
        self.constants: dict[int, ir.Value] = {}
        self.signatures: dict[int, Any] = {}
        names = (value.name for value in (*graph.inputs, *graph.initializers.values()))
        self.taken = {*names, *(value.name for node in graph for value in node.outputs)}

    def run(self) -> None:
        self._find_edges()
        self._remove_quantizers()
        if self._structure(self.graph) != self._structure(self.base):
            raise _UnderivableError
        mine, theirs = self._groups(self.graph), self._groups(self.base)
        for name in self.weighted:
            if not isinstance(self.plan.get(name), Int):
                self._put_float(mine.get(name, []), theirs.get(name, []))
        self._quantize()

    def _owner(self, node: ir.Node) -> str:
        site = origin_of(node.metadata_props).site
        return self.heads.get(site, site)

    def _groups(self, graph: ir.Graph) -> dict[str, list[ir.Node]]:
        groups: dict[str, list[ir.Node]] = {}
        for node in graph:
            groups.setdefault(self._owner(node), []).append(node)
        return groups

    # -- what the full graph holds ---------------------------------------------------------------------------------

    def _find_edges(self) -> None:
        """Which node inputs are a site's reads of which tensor."""
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
        """Let everything read floating values; the quantizers' own nodes stay, unread, to be copied."""
        written = {(t, _kind(t, fmt)) for t, fmt in place(self.full_plan, self.record).writes.values()}
        self.points: dict[str, list[ir.Node]] = {}
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

    def _structure(self, graph: ir.Graph) -> Counter[Any]:
        """All nodes but those of weighted sites, which may be folded in one graph and not in the other."""
        found: Counter[Any] = Counter()
        for node in graph:
            origin, owner = origin_of(node.metadata_props), self._owner(node)
            if not origin.tensor and owner not in self.weighted:
                found[node.op_type, owner, origin.path, _settings(node)] += 1
        return found

    # -- float weights -----------------------------------------------------------------------------------------------

    def _put_float(self, old: list[ir.Node], new: list[ir.Node]) -> None:
        """Compute a weighted site as the float graph does: its nodes take the place of the integer ones."""
        mine, theirs = _outside(old), _outside(new)
        same = [self._signature(value) for value in mine] == [self._signature(value) for value in theirs]
        left, right = _leaves(old), _leaves(new)
        if not same or len(left) != 1 or len(right) != 1:
            raise _UnderivableError
        last = left[0].producer()
        assert last is not None
        values: dict[int, ir.Value] = {id(a): b for a, b in zip(theirs, mine, strict=True)}
        for node in new:
            self.graph.insert_before(last, self._copy(node, values))
        made = values[id(right[0])]
        if not replace(left[0], made):
            raise _UnderivableError
        for quantizers in self.points.values():
            for quantizer in quantizers:
                source = quantizer.inputs[0].producer() if quantizer.inputs[0] is not None else None
                if source is not None and any(source is node for node in old):
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
        for mine, theirs in zip(copy.outputs, node.outputs, strict=True):
            mine.name, mine.shape, mine.type = self._unique(theirs.name or "value"), theirs.shape, theirs.type
            values[id(theirs)] = mine
        return copy

    def _constant(self, value: ir.Value) -> ir.Value:
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

    def _signature(self, value: ir.Value | None) -> Any:
        """Where a value comes from, in words that hold in both graphs: a graph input or a site, and the views since."""
        if value is None:
            return None
        if id(value) in self.signatures:
            return self.signatures[id(value)]
        node, array = value.producer(), constant(value)
        found: tuple[Any, ...]
        if array is not None:
            found = ("constant", str(array.dtype), array.shape, array.tobytes())
        elif node is None:
            found = ("input", value.name)
        elif self._owner(node):
            found = ("site", self._owner(node), value.index())
        else:
            found = (node.op_type, _settings(node), value.index(), tuple(self._signature(v) for v in node.inputs))
        self.signatures[id(value)] = found
        return found

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
            edges = self.edges.get((name, tensor), [])
            if at_read and not edges:
                raise _UnderivableError
            for node, index in edges if at_read else ():
                if (id(node), index) not in done:  # a site may read one tensor twice
                    done.add((id(node), index))
                    self._insert_before(node, index, self._chain(tensor, fmt))

    def _written_at(self, name: str, tensor: str) -> list[ir.Value]:
        """The values that are the tensor: where the full plan quantized its write, else what leaves the site."""
        known = [q.inputs[0] for q in self.points.get(tensor, [])]
        if known:
            return [value for value in known if value is not None]
        owner = self.heads.get(name, name)
        leaves = _leaves([node for node in self.graph if self._owner(node) == owner])
        if len(leaves) != 1 or len(self.record.sites[name].writes) != 1:
            raise _UnderivableError
        return leaves

    def _chain(self, tensor: str, fmt: Format) -> list[ir.Node]:
        """New nodes that quantize and dequantize the tensor, each reading the one before; the first reads nothing."""
        import onnx_ir as ir

        copies: list[ir.Node] = []
        for node in self.quantizers.get((tensor, _kind(tensor, fmt)), []):
            source = copies[-1].outputs[0] if copies else None
            copies.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    [source, *node.inputs[1:]],
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
