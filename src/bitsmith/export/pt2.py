"""The applied network as a ``.pt2`` file: the exported program itself, in the quantized reference dialect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from .._files import atomic_write
from .names import parse_scopes
from .program import applied_program, quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def write_program(
    net: nn.Module, path: str | Path, example: Any, batch: int | None = None
) -> tuple[ExportedProgram, dict[str, tuple[str, ...]]]:
    """Save the program of an applied network; the program, and site -> names of its graph nodes.

    Parameters that nothing reads any more (float weights whose integers ship) are left out. ``torch.export.load``
    reads the file; it unpickles, so load only files that you trust.
    """
    program, _ = applied_program(net, example, batch)
    _drop_unread(program)
    with quiet():
        saved = atomic_write(path, lambda temporary: torch.export.save(program, str(temporary)))
    assert saved == Path(path)
    nodes: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        scopes = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        origin = parse_scopes([*scopes, node.name])
        if origin.site:
            nodes.setdefault(origin.site, []).append(node.name)
    return program, {site: tuple(names) for site, names in nodes.items()}


def _drop_unread(program: ExportedProgram) -> None:
    """Take parameters and buffers without a reader out of graph, signature and state."""
    graph = program.graph_module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    specs = program.graph_signature.input_specs
    for spec in list(specs):
        node = placeholders.get(getattr(spec.arg, "name", ""))
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or node is None or node.users:
            continue
        graph.erase_node(node)
        specs.remove(spec)
        program.state_dict.pop(str(spec.target), None)
    program.graph_module.recompile()
