"""Which site every node of OpenVINO's compiled CPU graph computes, and in which precision.

The plugin notes with every node the layers that it was made of (``originalLayersNames``), the precision its kernel
computes in (``runtimePrecision``) and the kernel's name (``primitiveType``, ``..._I8`` for the integer ones).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..export.forms import FUSING
from .base import Realised, TargetError

if TYPE_CHECKING:
    import openvino as ov

_IDLE = frozenset({"Input", "Output", "Const", "Reshape", "Reorder", "ShapeOf", "Transpose", "MemoryInput"})
"""Nodes that compute nothing: a site that only they carry moves values."""

_CONVERTING = frozenset({"Subgraph", "Eltwise", "FakeQuantize", "Convert"})
_REPLACED = re.compile(r"(_original|_\d+)$")
_DEQUANTIZED = "/Dequantization"
_STEPS = 5
"""From stored weights to the operation that dequantizes them: conversion, zero point, scale, groups to rows."""
XOR_POPCOUNT = "xor-popcount, native kernel"
_SMALL = frozenset({"i8", "u8", "i4", "u4"})
_FLOAT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Node:
    """One node of the compiled graph. ``layers``: the layers of the exported file it computes, in order."""

    name: str
    kind: str
    layers: tuple[str, ...]
    precision: str
    kernel: str
    outputs: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def integer(self) -> bool:
        own = self.kind == "Reference" and set(self.outputs) <= _SMALL  # an operation of ours: integers in and out
        return own or self.kernel.endswith(("_I8", "_u8", "_i8"))


def executed(compiled: ov.CompiledModel) -> list[Node]:
    """The nodes that the compiled model runs, in order."""
    nodes = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        notes = op.get_rt_info()

        def note(key: str, notes: Any = notes) -> str:
            return str(notes[key].astype(str)) if key in notes else ""

        nodes.append(
            Node(
                op.get_friendly_name(),
                note("layerType"),
                tuple(filter(None, note("originalLayersNames").split(","))),
                note("runtimePrecision"),
                note("primitiveType"),
                tuple(note("outputPrecisions").split(",")),
                tuple(value.get_source_output().get_node().get_friendly_name() for value in op.inputs()),
            )
        )
    return nodes


def unfuse(model: ov.Model) -> None:
    """Take out the quantizers that were put in for fusing only: beside a result they round, which fused they do not."""
    for node in model.get_ordered_ops():
        if node.get_friendly_name().endswith(FUSING):
            first = node
            while first.get_type_name() != "FakeQuantize":
                first = first.input_value(0).get_node()
            for reader in list(node.output(0).get_target_inputs()):
                reader.replace_source_output(first.input_value(0))


def check_precision(nodes: Iterable[Node], bfloat16: bool) -> None:
    """Raise if the runtime computes in half precision behind the plan's back, as it does by default where it can."""
    found = [node for node in nodes if node.precision in ("bf16", "f16")]
    if found and not bfloat16:
        raise TargetError(
            f"OpenVINO computes {len(found)} nodes in {found[0].precision} ({found[0].name}, ...) though float32 was "
            "asked for: a time or a result would not be what the plan says; ask for it with OpenVino(bfloat16=True)"
        )


@dataclass(frozen=True)
class Owners:
    """``by_layer``: layer of the exported file -> site. ``tensors``: names of the tensors that can be converted."""

    by_layer: Mapping[str, str]
    tensors: frozenset[str]

    @classmethod
    def of(cls, nodes: Mapping[str, Iterable[str]], tensors: Iterable[str]) -> Owners:
        return cls({layer: site for site, layers in nodes.items() for layer in layers}, frozenset(tensors))

    def site(self, layer: str) -> str:
        """The site that a layer computes; "" for none. The plugin's passes put a suffix behind what they replace."""
        return self.by_layer.get(layer) or self.by_layer.get(_REPLACED.sub("", layer), "")

    def sites(self, node: Node, products: Collection[str] = ()) -> list[str]:
        """The sites that a node computes, the one it is the kernel of first. ``products``: see :func:`products`."""
        if node.kind in _IDLE:
            return []
        earlier: set[str] = set()
        if node.kind in _CONVERTING:  # it bears the name of an earlier node's operation, whose result it dequantizes
            earlier = {layer.partition(_DEQUANTIZED)[0] for layer in node.layers if _DEQUANTIZED in layer}
            earlier -= set(products)
        found = [self.site(layer) for layer in node.layers if layer not in earlier]
        return list(dict.fromkeys(filter(None, found)))

    def converted(self, layer: str) -> str:
        """The tensor that a layer quantizes or dequantizes; "" if it does neither."""
        if _DEQUANTIZED in layer:
            return self.site(layer.partition(_DEQUANTIZED)[0])
        tensor, _, operation = layer.rpartition("/")
        return tensor if operation.startswith(("Quantize.", "Dequantize.")) and tensor in self.tensors else ""

    def tensor(self, node: Node, graph: Mapping[str, Node]) -> str:
        """The tensor whose format a node that belongs to no site changes; "" for none (a change of layout)."""
        if node.kind in _CONVERTING:
            return next(filter(None, map(self.converted, node.layers)), "")
        if node.kind != "Reorder" or node.precision == node.outputs[0]:
            return ""
        source = graph.get(node.sources[0]) if node.sources else None
        for layer in reversed(source.layers if source is not None else ()):
            tensor = self.converted(layer) or self.site(layer) or f"@{layer}"
            if tensor in self.tensors:
                return tensor
        return ""


def products(nodes: Iterable[Node]) -> dict[str, frozenset[str]]:
    """By node that is no kernel of one layer: the layers whose integers it multiplies itself, all others left out.

    The plugin compiles a chain of linear layers into one subgraph. Such a node reads the stored integers, and holds the
    product together with what dequantizes it; one that only dequantizes reads no small constant.
    """
    graph = {node.name: node for node in nodes}
    found = {}
    done: set[str] = set()
    for node in graph.values():
        if node.kind in _IDLE:
            continue
        if node.kind in _CONVERTING and any(_stored(name, graph) for name in node.sources):
            before = {layer.partition(_DEQUANTIZED)[0] for layer in node.layers if _DEQUANTIZED in layer}
            found[node.name] = frozenset(before & set(node.layers)) - done
        done |= {*node.layers, *(_REPLACED.sub("", layer) for layer in node.layers)}
    return {name: layers for name, layers in found.items() if layers}


def _stored(name: str, graph: Mapping[str, Node]) -> bool:
    """Whether it is a constant of small integers, in whatever layout."""
    node = graph.get(name)
    while node is not None and node.kind in ("Reorder", "Transpose", "Reshape") and node.sources:
        node = graph.get(node.sources[0])
    return node is not None and node.kind in ("Const", "Input") and set(node.outputs) <= _SMALL and not node.sources


def realised(
    owners: Owners,
    sites: Iterable[str],
    nodes: Iterable[Node],
    compressed: Iterable[str],
    one_bit: Collection[str] = (),
) -> dict[str, Realised]:
    """The precision of every site. ``compressed``: sites whose weights are stored as small integers. ``one_bit``:
    layers of the exported file that are our operations on signs."""
    computes: dict[str, list[Node]] = {}
    absorbed: dict[str, Node] = {}
    chained: dict[str, str] = {}
    nodes, small = list(nodes), frozenset(compressed)
    multiplied = products(nodes)
    for node in nodes:
        own = multiplied.get(node.name, frozenset())
        # some sums of a chain are rounded again at once and dequantized nowhere: all its stored integers are multiplied
        together = [site for site in owners.sites(node, own) if site in small] if own else []
        for site in together:
            others = " and ".join(other for other in together if other != site)
            rest = f", one kernel with {others}" if others else ""
            chained[site] = (
                f"in {node.kind} {node.name} ({node.kernel}){rest}: multiplies stored integers and dequantizes sums"
            )
        for k, site in enumerate(owners.sites(node, own)):
            if k:
                absorbed.setdefault(site, node)
            else:
                computes.setdefault(site, []).append(node)
    found = {}
    for site in sites:
        if site not in owners.by_layer.values():
            found[site] = Realised("folded", "no operation of its own in the file: folded into a neighbour")
        elif site in chained:
            found[site] = Realised("int8", chained[site])
        elif site in computes:
            signs = [node for node in computes[site] if set(node.layers) & set(one_bit)]
            found[site] = _signed(computes[site], signs) if signs else _precision(computes[site], site in small)
        elif site in absorbed:
            found[site] = Realised(
                "folded", f"into {absorbed[site].kind} {absorbed[site].name} ({absorbed[site].kernel})"
            )
        else:
            found[site] = Realised(
                "removed", "the runtime computes nothing for it: folded into constants or conversions"
            )
    return found


def _signed(nodes: list[Node], signs: list[Node]) -> Realised:
    rest = ", ".join(dict.fromkeys(node.kind for node in nodes if node not in signs and node.kind not in _CONVERTING))
    return Realised("binary", f"{XOR_POPCOUNT}; {rest} in float" if rest else XOR_POPCOUNT)


def _precision(nodes: list[Node], compressed: bool) -> Realised:
    names = ", ".join(dict.fromkeys(f"{node.kind} {node.kernel}" for node in nodes))
    kernels = [node for node in nodes if node.kind not in _CONVERTING] or nodes
    if any(node.integer for node in kernels):
        rest = ", ".join(dict.fromkeys(node.kind for node in nodes if not node.integer))
        return Realised("int8", f"{names}; {rest} in float" if rest else names)
    if compressed:
        return Realised("size only", f"its weights are stored as integers and computed in float: {names}")
    precision = next((_FLOAT[p] for n in kernels if (p := n.kernel.rpartition("_")[2]) in _FLOAT), kernels[0].precision)
    return Realised(precision, names)


def compressed_sites(model: ov.Model, by_layer: Mapping[str, str]) -> set[str]:
    """Sites of the exported file that read a constant of 8 or fewer bits."""
    found = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_output_element_type(0).get_type_name() not in _SMALL:
            continue
        reader = op
        for _ in range(_STEPS):
            readers = list(reader.output(0).get_target_inputs())
            if not readers or readers[0].get_node().get_type_name() == "Result":
                break
            reader = readers[0].get_node()
            site = by_layer.get(reader.get_friendly_name(), "")
            if site and len(op.get_output_shape(0)) > 1:
                found.add(site)
            if site:
                break
    return found
