"""Which site every node of ONNX Runtime's optimized graph computes.

The optimizer keeps the names of most nodes (with ``_token_N``, ``_nchwc`` or ``/MatMulAddFusion`` behind them) and the
names of most values; a fused node bears one or the other. What neither names belongs to no site.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..export.onnx import conversions
from .base import Realised

if TYPE_CHECKING:
    import onnx

_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_bn_\w+)$")
_LOOKUP = "Gather of int8"
_INTEGER = re.compile(rf"^(QLinear\w+|QGemm|QAttention|MatMulIntegerToFloat|MatMulInteger|ConvInteger|{_LOOKUP})$")
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Shape", "Slice"})
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput"})
_BASE = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}


@dataclass(frozen=True)
class Owners:
    """The exported graph, as far as it is needed to recognise what became of it."""

    by_node: Mapping[str, str]
    by_value: Mapping[str, str]
    operations: Mapping[str, str]
    makers: Mapping[str, str]
    inputs: Mapping[str, tuple[str, ...]]
    converted: Mapping[str, str]

    @classmethod
    def of(cls, model: onnx.ModelProto, nodes: Mapping[str, Iterable[str]]) -> Owners:
        """``nodes``: site -> names of its nodes, as the artifact has them."""
        by_node = {name: site for site, names in nodes.items() for name in names}
        return cls(
            by_node,
            {value: by_node[node.name] for node in model.graph.node for value in node.output if node.name in by_node},
            {node.name: node.op_type for node in model.graph.node},
            {value: node.name for node in model.graph.node for value in node.output},
            {node.name: tuple(node.input) for node in model.graph.node},
            conversions(model),
        )

    def original(self, name: str, operation: str, outputs: Iterable[str] = ()) -> str:
        """The node of the exported graph that a node of the optimized one computes; "" if none can be told."""
        plain = _plain(name)
        if plain in self.operations:
            return plain
        behind = [known for known in self.operations if plain.startswith((known + "/", known + "_"))]
        if behind:
            return max(behind, key=len)
        for value in (plain, *map(_plain, outputs)):
            if value in self.makers:
                return self._computed_behind(self.makers[value], _BASE.get(operation, operation))
        return ""

    def _computed_behind(self, node: str, operation: str) -> str:
        """The nearest node at or before ``node`` of that operation, at most four steps back, else ``node``."""
        front = [node]
        for _ in range(5):
            found = next((name for name in front if self.operations[name] == operation), None)
            if found is not None:
                return found
            front = [self.makers[v] for name in front for v in self.inputs[name] if v in self.makers]
        return node

    def site(self, name: str, operation: str, outputs: Iterable[str] = ()) -> str:
        """The site that a node of the optimized graph computes, "" for none (a change of layout)."""
        if operation in _LAYOUT:
            return ""
        return self.by_node.get(self.original(name, operation, outputs), "")

    def tensor(self, name: str, operation: str, outputs: Iterable[str] = ()) -> str:
        """The tensor whose format a node of the optimized graph changes, "" for none."""
        if operation not in ("QuantizeLinear", "DequantizeLinear", "Clip"):
            return ""
        return self.converted.get(self.original(name, operation, outputs), "")


def realised(owners: Owners, sites: Iterable[str], optimized: onnx.ModelProto) -> dict[str, Realised]:
    """The precision of every site, from the operations that compute it in the optimized graph."""
    computes: dict[str, list[str]] = {}
    stored: dict[str, bool] = {}
    tables = {tensor.name for tensor in optimized.graph.initializer if tensor.data_type == tensor.INT8}
    for node in optimized.graph.node:
        site = owners.site(node.name, node.op_type, node.output)
        if node.op_type == "DequantizeLinear":
            stored[site] = True
        elif node.op_type not in _MOVES and node.op_type != "QuantizeLinear":
            lookup = node.op_type == "Gather" and node.input[0] in tables
            computes.setdefault(site, []).append(_LOOKUP if lookup else node.op_type)
    return {site: _precision(computes.get(site, []), stored.get(site, False)) for site in sites}


def _precision(operations: list[str], dequantized: bool) -> Realised:
    names = ", ".join(dict.fromkeys(operations))
    if not operations:
        return Realised("folded", "no node of its own: fused into a neighbour")
    if any(_INTEGER.match(operation) for operation in operations):
        rest = ", ".join(dict.fromkeys(o for o in operations if not _INTEGER.match(o)))
        return Realised("int8", f"{names}; {rest} in float" if rest else names)
    if "MatMulNBits" in operations:
        return Realised("size only", "MatMulNBits: 4-bit weights, float products")
    if dequantized:
        return Realised("size only", f"its weights are dequantized at every run, then {names} in float")
    return Realised("float32", names)


def _plain(name: str) -> str:
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    return name
