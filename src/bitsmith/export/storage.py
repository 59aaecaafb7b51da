"""Weights of few values or many zeros in a smaller form, looked up when the file is loaded.

A form is chosen by its bytes: dense; indices into a palette, packed to whole bits; a bit for each place that may be
zero, and what is left, dense or as indices. All give the same numbers bit for bit. Runtimes compute what depends on
constants alone once, when they load the file, so a run costs what it did.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plan import Plan
from ..technique import Technique
from .onnx import owner_of
from .rewrite import Array, constant, initializer, rewritten

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

ONNX_NODE, OPENVINO_NODE = 75, 700
"""Bytes that a node takes in a file, about."""


def packed(model: onnx.ModelProto, plan: Plan, node: int = ONNX_NODE, integers: bool = True) -> onnx.ModelProto:
    """The model with the weights of sites whose technique is ``compact`` in their smallest form.

    ``node``: bytes that each further node will take. ``integers``: whether 8-bit weights are packed, too. ONNX Runtime
    looks them up before it chooses integer kernels; OpenVINO after, and would compute in float.
    """
    compact = {name: technique for name, technique in plan.sites.items() if technique.compact()}
    kinds = (np.float32, np.int8) if integers else (np.float32,)
    return rewritten(model, lambda graph: _pack(graph, compact, node, kinds)) if compact else model


@dataclass(frozen=True)
class Form:
    """A weight to be stored. ``shape``; ``part``: how many weights in a row stay or go together, 0 if none may go;
    ``kept``: by part, whether it stays; ``palettes`` (rows, k), or None: values themselves; ``index`` or ``values`` of
    what stays; ``bytes``: of all, nodes included."""

    shape: tuple[int, ...]
    part: int
    kept: Array | None
    palettes: Array | None
    bits: int
    index: Array | None
    values: Array | None
    bytes: int


def smallest(weight: Array, rows: int = 1, node: int = ONNX_NODE) -> Form | None:
    """The smallest form of a weight, or None where that is the weight itself. ``rows``: palettes it may have, each of
    an equal number of output channels. ``node`` as in :func:`packed`."""
    forms = [form for count in dict.fromkeys((1, rows)) for form in _forms(weight, count, node)]
    best = min(forms, key=lambda form: form.bytes, default=None)
    return best if best is not None and best.bytes < weight.nbytes else None


def _forms(weight: Array, rows: int, node: int) -> list[Form]:
    found = []
    dense = indexed(weight.reshape(rows, -1))
    if dense is not None:
        palettes, bits, index = dense
        nodes = 2 + 4 * len(planes(bits)) + 2 * (rows > 1)
        size = _index_bytes(index.size, bits) + palettes.nbytes + nodes * node
        found.append(Form(weight.shape, 0, None, palettes, bits, index, None, size))
    if rows > 1 or weight.ndim < 2:
        return found
    for part in dict.fromkeys((1, math.prod(weight.shape[2:]), math.prod(weight.shape[1:]))):
        parts = weight.reshape(-1, part)
        kept: Array = (parts != 0).any(axis=1)
        if kept.all() or not kept.any():
            continue
        values = parts[kept]
        mask = math.ceil(kept.size / 8)
        found.append(Form(weight.shape, part, kept, None, 0, None, values, mask + values.nbytes + 9 * node))
        few = indexed(values.reshape(1, -1))
        if few is not None:
            palettes, bits, index = few
            nodes = 11 + 4 * len(planes(bits))
            size = mask + _index_bytes(index.size, bits) + palettes.nbytes + nodes * node
            found.append(Form(weight.shape, part, kept, palettes, bits, index, None, size))
    return found


def indexed(rows: Array) -> tuple[Array, int, Array] | None:
    """``(palettes, bits, index)`` of rows of few different values; None if some row has more than 256."""
    found = []
    for row in rows:
        if row.size > 4096 and len(np.unique(row[:4096])) > 256:
            return None
        found.append(np.unique(row, return_inverse=True))
    most = max(len(values) for values, _ in found)
    if most > 256:
        return None
    palettes = np.stack([np.pad(values, (0, most - len(values)), mode="edge") for values, _ in found])
    index = np.stack([inverse.reshape(-1) for _, inverse in found]).astype(np.uint8)
    return palettes, max(1, math.ceil(math.log2(most))), index


def planes(bits: int) -> tuple[int, ...]:
    """Widths that divide a byte and sum to ``bits``, the high bits first.

    >>> planes(3), planes(4), planes(7), planes(8)
    ((2, 1), (4,), (4, 2, 1), (8,))
    """
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack(index: Array, width: int) -> Array:
    """Numbers below ``2^width``, packed into bytes, the first in the low bits: width 1, 2, 4 or 8.

    >>> pack(np.array([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    each = 8 // width
    padded = np.pad(index.ravel(), (0, -index.size % each)).reshape(-1, each).astype(np.uint8)
    shifts = np.arange(each, dtype=np.uint8) * width
    found: Array = np.bitwise_or.reduce(padded << shifts, axis=1).astype(np.uint8)
    return found


def _index_bytes(count: int, bits: int) -> int:
    return sum(math.ceil(count * width / 8) for width in planes(bits))


# -- in a graph ----------------------------------------------------------------------------------------------------


def _pack(graph: ir.Graph, compact: Mapping[str, Technique], node: int, kinds: Collection[Any]) -> None:
    writer = _Writer(graph)
    for value in list(graph.initializers.values()):
        weight = constant(value)
        if weight is None or weight.dtype not in kinds or weight.ndim < 2 or not value.uses():
            continue
        owners = {owner_of(use.node.metadata_props) for use in value.uses()}
        if value.is_graph_output() or not owners <= set(compact) or _is_narrow(value):
            continue
        technique = compact[next(iter(owners))]
        group = int(getattr(technique, "group", 0))
        form = smallest(weight, weight.shape[0] // group if group and weight.shape[0] % group == 0 else 1, node)
        if form is not None:
            writer.put(value, form)


def _is_narrow(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.bitwidth < 8


class _Writer:
    """Writes what gives a weight back; names are short, for every file has many of them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.shared: dict[str, ir.Value] = {}
        self.count = itertools.count()
        self.nodes: list[ir.Node] = []

    def put(self, value: ir.Value, form: Form) -> None:
        self.nodes = []
        if form.index is not None:
            found = self._looked_up(form)
        else:
            assert form.values is not None
            found = self._new(np.concatenate((np.zeros_like(form.values[:1]), form.values)))
        if form.kept is not None:
            found = self._spread(form, found)
        found = self._node("Reshape", found, self._numbers(form.shape))
        for made in self.nodes:
            made.outputs[0].shape = None
        found.type, found.shape = value.type, value.shape
        self.graph.insert_before(self.graph[0], self.nodes)
        value.replace_all_uses_with(found)

    def _looked_up(self, form: Form) -> ir.Value:
        """The values that the indices stand for: with what stays and goes, (1 + kept, part), zeros first."""
        assert form.index is not None
        assert form.palettes is not None
        index = self._whole(form.index, form.bits)
        if len(form.palettes) > 1:
            rows, width = form.palettes.shape
            starts = np.arange(rows, dtype=np.int32)[:, None] * width
            index = self._node("Reshape", index, self._numbers((rows, -1)))
            index = self._node("Add", index, self._new(starts))
        found = self._node("Gather", self._new(form.palettes.ravel()), index)
        if form.kept is None:
            return found
        found = self._node("Reshape", found, self._numbers((-1, form.part)))
        zeros = self._new(np.zeros((1, form.part), dtype=form.palettes.dtype))
        return self._node("Concat", zeros, found, axis=0)

    def _spread(self, form: Form, found: ir.Value) -> ir.Value:
        """Rows at the places that are kept, row 0 elsewhere."""
        assert form.kept is not None
        mask = self._whole(form.kept.astype(np.uint8), 1)
        place = self._node("Mul", self._node("CumSum", mask, self._numbers(0)), mask)
        return self._node("Gather", found, place, axis=0)

    def _whole(self, index: Array, bits: int) -> ir.Value:
        """Packed numbers as int32, (n,)."""
        found: ir.Value | None = None
        rest = bits
        for width in planes(bits):
            rest -= width
            part = self._unpacked((index.ravel() >> rest) & (2**width - 1), width)
            if rest:
                part = self._node("Mul", part, self._scalar(2**rest))
            found = part if found is None else self._node("Add", found, part)
        assert found is not None
        return found

    def _unpacked(self, part: Array, width: int) -> ir.Value:
        import onnx_ir as ir

        if width == 8:
            return self._node("Cast", self._new(part.astype(np.uint8)), to=int(ir.DataType.INT32))
        each = 8 // width
        shifts = np.arange(each, dtype=np.uint8)[None] * np.uint8(width)
        masks = np.uint8(2**width - 1) << shifts
        # masked first, so that nothing is shifted out: OpenVINO divides, and rounds
        found = self._node("BitwiseAnd", self._new(pack(part, width)[:, None]), self._same(masks))
        found = self._node("BitShift", found, self._same(shifts), direction="RIGHT")
        found = self._node("Cast", found, to=int(ir.DataType.INT32))
        found = self._node("Reshape", found, self._numbers((-1,)))
        if part.size % each:
            found = self._node("Slice", found, self._numbers((0,)), self._numbers((part.size,)))
        return found

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _node(self, kind: str, *inputs: ir.Value, **settings: Any) -> ir.Value:
        import onnx_ir as ir

        made = ir.node(kind, list(inputs), settings or None)
        made.name = made.outputs[0].name = f"~{next(self.count)}"
        self.nodes.append(made)
        return made.outputs[0]

    def _new(self, array: Array) -> ir.Value:
        return initializer(self.graph, f"~{next(self.count)}", np.ascontiguousarray(array))

    def _same(self, array: Array) -> ir.Value:
        """A constant that others share."""
        key = f"{array.dtype} {array.shape} {array.tobytes().hex()}"
        if key not in self.shared:
            self.shared[key] = self._new(array)
        return self.shared[key]

    def _numbers(self, numbers: int | Collection[int]) -> ir.Value:
        return self._same(np.array(numbers, dtype=np.int64))

    def _scalar(self, number: int) -> ir.Value:
        return self._same(np.array(number, dtype=np.int32))
