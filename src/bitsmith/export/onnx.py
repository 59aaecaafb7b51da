"""The exported program as an ONNX file: readable names, no duplicates, small integers; and which site became what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from .names import Origin, parse_scopes
from .program import ExportError, quiet
from .rewrite import (
    DEQUANTIZE,
    QUANTIZE,
    drop_implied_clips,
    fold_weight_transposes,
    merge_duplicates,
    merge_requantization,
    pack_int4,
    rewritten,
)
from .translations import translations

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
_SITES = "bitsmith.sites"


def to_onnx(program: ExportedProgram, opset: int | None = None) -> onnx.ModelProto:
    """The program in ONNX, every rewriting value-preserving.

    Nodes are named ``<site>/<operation>`` (conversions ``<tensor>/<operation>``), so a profile can be read. ``opset``:
    20, or 21 if the program holds 4-bit or group-wise weights or 16-bit activations. Raises :class:`ExportError`.
    """
    opset = opset or _opset(program)
    with quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=dict(translations(opset)),
            )
        except Exception as error:
            cause = error.__cause__ or error
            text = str(cause).strip() or type(cause).__name__
            raise ExportError(f"the network cannot be written as ONNX: {text.splitlines()[0]}") from error
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    _remember_sites(model)
    model = rewritten(
        model,
        merge_requantization,
        merge_duplicates,
        fold_weight_transposes,
        drop_implied_clips,
        *((pack_int4,) if opset >= 21 else ()),
        merge_duplicates,
    )
    return named(model)


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every node named after its site or tensor, uniquely."""
    return rewritten(model, _name_nodes)


def origin_of(metadata: Mapping[str, str]) -> Origin:
    """Where a node came from, from its metadata."""
    return parse_scopes(metadata.get(SCOPES, ""))


def site_map(model: onnx.ModelProto) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """``nodes``: site -> its nodes' names, empty if it left none. ``values``: tensor -> name of its float value.

    A tensor that is quantized is the value behind its DequantizeLinear; ``@x`` is the graph input ``x``.
    """
    graph = model.graph
    nodes: dict[str, list[str]] = {site: [] for site in _remembered(model)}
    values = {f"@{value.name}": value.name for value in graph.input}
    written: dict[str, str] = {}
    converted: dict[str, str] = {}
    origins = [origin_of({entry.key: entry.value for entry in node.metadata_props}) for node in graph.node]
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    outputs = {value.name for value in graph.output}
    for node, origin in zip(graph.node, origins, strict=True):
        if origin.tensor and node.op_type == DEQUANTIZE:
            converted.setdefault(origin.tensor, node.output[0])
        if not origin.site:
            continue
        nodes.setdefault(origin.site, []).append(node.name)
        leaves = [
            name
            for name in node.output
            if name in outputs or any(origins[reader].site != origin.site for reader in readers.get(name, ()))
        ]
        for k, name in enumerate(leaves):
            written[f"{origin.site}#{k}" if k else origin.site] = name
    return {site: tuple(names) for site, names in nodes.items()}, {**values, **written, **converted}


def conversions(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> the tensor it converts, for every node that quantizes or dequantizes an activation."""
    found = {}
    for node in model.graph.node:
        origin = origin_of({entry.key: entry.value for entry in node.metadata_props})
        if origin.tensor:
            found[node.name] = origin.tensor
    return found


def _opset(program: ExportedProgram) -> int:
    small = any(name.endswith("weight_q4") for name in program.state_dict)
    wide = any(argument in (torch.int16, torch.uint16) for node in program.graph.nodes for argument in node.args)
    group = any("dequantize_per_channel_group" in str(node.target) for node in program.graph.nodes)
    return 21 if small or wide or group else 20


def _remember_sites(model: onnx.ModelProto) -> None:
    """Note all sites in the file, in order: a rewriting may leave one without nodes."""
    sites: dict[str, None] = {}
    for node in model.graph.node:
        site = origin_of({entry.key: entry.value for entry in node.metadata_props}).site
        if site:
            sites[site] = None
    entry = model.metadata_props.add()
    entry.key, entry.value = _SITES, json.dumps(list(sites))


def _remembered(model: onnx.ModelProto) -> list[str]:
    return next((json.loads(entry.value) for entry in model.metadata_props if entry.key == _SITES), [])


def _name_nodes(graph: ir.Graph) -> None:
    counts: dict[str, int] = {}
    for node in graph:
        origin = origin_of(node.metadata_props)
        owner = origin.site or origin.tensor or origin.path
        kind = {QUANTIZE: f"Quantize.{origin.format}", DEQUANTIZE: f"Dequantize.{origin.format}"}.get(node.op_type)
        name = f"{owner}/{kind if kind and origin.tensor else node.op_type}".lstrip("/")
        counts[name] = counts.get(name, 0) + 1
        node.name = f"{name}.{counts[name] - 1}" if counts[name] > 1 else name
        # the other notes of the exporter hold source paths of this machine and triple the size of a small file
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
