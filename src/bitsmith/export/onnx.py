"""The exported program as an ONNX file: readable names, no duplicates, small integers; and which site became what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from .._memory import uncollected
from .names import Origin, parse_scopes
from .program import ExportError, quiet
from .rewrite import (
    DEQUANTIZE,
    QUANTIZE,
    drop_identity_gathers,
    drop_implied_clips,
    fold_casts,
    fold_weight_transposes,
    fold_zero_padding,
    look_up_integers,
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
_OWNER = "bitsmith.site"
GIVES = "bitsmith.tensor"
"""Note of a node that gives the integers of a tensor, which no other node may dequantize."""


def to_onnx(program: ExportedProgram, opset: int | None = None) -> onnx.ModelProto:
    """The program in ONNX, every rewriting value-preserving.

    Nodes are named ``<site>/<operation>`` (conversions ``<tensor>/<operation>``), so a profile can be read. ``opset``:
    20, or 21 if the program holds 4-bit or group-wise weights or 16-bit activations. Raises :class:`ExportError`.
    """
    return clean(raw_onnx(program, opset))


def raw_onnx(program: ExportedProgram, opset: int | None = None) -> onnx.ModelProto:
    """The program as the exporter writes it, every quantizer where its cell has it: what ``derive`` takes apart."""
    opset = opset or default_opset(program)
    with quiet(), uncollected(), torch.no_grad():
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
    _mark_absorbed(model, program)
    # torch's exporter does so itself where no quantizer stands in between: float and quantized graphs stay alike
    return rewritten(model, fold_zero_padding)


def clean(raw: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a raw model without duplicates and implied clips, its nodes named after their sites."""
    return rewritten(raw, *cleaning(opset_of(raw)))


def cleaning(opset: int) -> tuple[Callable[[ir.Graph], None], ...]:
    """The passes of :func:`clean`."""
    return (
        drop_identity_gathers,
        fold_casts,
        merge_requantization,
        merge_duplicates,
        fold_weight_transposes,
        look_up_integers,
        drop_implied_clips,
        *((pack_int4,) if opset >= 21 else ()),
        merge_duplicates,
        name_nodes,
    )


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that the model is written in."""
    version: int = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return version


def origin_of(metadata: Mapping[str, str]) -> Origin:
    """Where a node came from, from its metadata."""
    return parse_scopes(metadata.get(SCOPES, ""))


def owner_of(metadata: Mapping[str, str]) -> str:
    """The site that a node belongs to, the layer where a normalisation was folded into it; "" if there is none."""
    return metadata.get(_OWNER) or origin_of(metadata).site


def site_map(model: onnx.ModelProto, sites: Iterable[str] = ()) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """``nodes``: site -> its nodes' names. ``values``: tensor -> name of its float value in the file.

    Every one of ``sites`` is in ``nodes``, with none if it left none. A tensor that is quantized is the value behind
    its DequantizeLinear, or the integers of a native kernel that no node dequantizes; ``@x`` is the graph input ``x``.
    """
    graph = model.graph
    nodes: dict[str, list[str]] = {site: [] for site in sites}
    values = {f"@{value.name}": value.name for value in graph.input}
    written: dict[str, str] = {}
    converted: dict[str, str] = {}
    stored: dict[str, str] = {}
    metadata = [{entry.key: entry.value for entry in node.metadata_props} for node in graph.node]
    origins = [origin_of(notes) for notes in metadata]
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    outputs = {value.name for value in graph.output}
    for node, origin, notes in zip(graph.node, origins, metadata, strict=True):
        if origin.tensor and node.op_type == DEQUANTIZE:
            converted.setdefault(origin.tensor, node.output[0])
        if origin.tensor and node.op_type == "Transpose":  # behind a kernel in NHWC, as the dequantizer before it
            converted[origin.tensor] = node.output[0]
        if not origin.site:
            continue
        nodes.setdefault(notes.get(_OWNER, origin.site), []).append(node.name)
        if GIVES in notes:
            stored[notes[GIVES]] = node.output[0]
            continue
        leaves = [
            name
            for name in node.output
            if name in outputs or any(origins[reader].site != origin.site for reader in readers.get(name, ()))
        ]
        for k, name in enumerate(leaves):
            written[f"{origin.site}#{k}" if k else origin.site] = name
    return {site: tuple(names) for site, names in nodes.items()}, {**values, **written, **stored, **converted}


def conversions(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> the tensor it converts, for every node that quantizes or dequantizes an activation."""
    found = {}
    for node in model.graph.node:
        origin = origin_of({entry.key: entry.value for entry in node.metadata_props})
        if origin.tensor:
            found[node.name] = origin.tensor
    return found


def default_opset(program: ExportedProgram) -> int:
    """The oldest version of the standard operators that has what the program computes with: 20 or 21."""
    small = any(name.endswith("weight_q4") for name in program.state_dict)
    wide = any(argument in (torch.int16, torch.uint16) for node in program.graph.nodes for argument in node.args)
    group = any("dequantize_per_channel_group" in str(node.target) for node in program.graph.nodes)
    return 21 if small or wide or group else 20


def _mark_absorbed(model: onnx.ModelProto, program: ExportedProgram) -> None:
    """torch folds a normalisation into the layer before it and calls the result the normalisation's: note the layer.

    The value stays the normalisation's, for that is what it is.
    """
    layers: dict[str, str] = {}
    for node in program.graph.nodes:
        source = node.args[0] if node.args else None
        if "batch_norm" in str(node.target) and isinstance(source, torch.fx.Node) and source.op == "call_function":
            norm, layer = (
                parse_scopes([*(path for path, _ in (n.meta.get("nn_module_stack") or {}).values()), n.name]).site
                for n in (node, source)
            )
            if norm and layer:
                layers[norm] = layer
    for made in model.graph.node:
        site = origin_of({entry.key: entry.value for entry in made.metadata_props}).site
        if site in layers and made.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            entry = made.metadata_props.add()
            entry.key, entry.value = _OWNER, layers[site]


def name_nodes(graph: ir.Graph) -> None:
    """Name every node after its site or tensor, uniquely."""
    counts: dict[str, int] = {}
    for node in graph:
        origin = origin_of(node.metadata_props)
        owner = node.metadata_props.get(_OWNER) or origin.site or origin.tensor or origin.path
        kind = {QUANTIZE: f"Quantize.{origin.format}", DEQUANTIZE: f"Dequantize.{origin.format}"}.get(node.op_type)
        name = f"{owner}/{kind if kind and origin.tensor else node.op_type}".lstrip("/")
        counts[name] = counts.get(name, 0) + 1
        node.name = f"{name}.{counts[name] - 1}" if counts[name] > 1 else name
        # the other notes of the exporter hold source paths of this machine and triple the size of a small file
        kept = {key: node.metadata_props[key] for key in (SCOPES, _OWNER, GIVES) if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
