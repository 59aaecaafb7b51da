"""The constant weights of a program's sites: named after them, with the integers that they were dequantized from."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from ..model.keys import encode_key
from ..site import Site
from .names import CELLS, parse_scopes

Array = NDArray[Any]

_CONSTANT = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Weight:
    """A weight as it ships. ``values``: float32. Where they are ``(integers - offset) * scale`` bit for bit: all three,
    ``scale`` and ``offset`` of the weight's rank, each of their sizes dividing the weight's; ``offset`` None: 0."""

    site: str
    values: Array
    integers: Array | None = None
    scale: Array | None = None
    offset: Array | None = None


def scopes_of(node: Node) -> list[str]:
    """Paths of the modules that a node of an exported program was computed in, outermost first, and its own name."""
    return [*(str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()), node.name]


def site_of(node: Node) -> str:
    """The site whose cell a node of an exported program was computed in; "" for none."""
    return parse_scopes(scopes_of(node)).site


def name_weights(program: ExportedProgram, sites: Mapping[str, Site]) -> dict[str, Weight]:
    """Make the weight of each of those sites one constant of the program, ``weight_<site>``; by that name, what it is.

    What cells compute from constants alone, dequantized weights above all, is computed here, once. A weight is what
    an operation of the site reads and has as many values as the site's. The program is changed in place.
    """
    graph, found = program.graph_module.graph, dict[str, Weight]()
    known, origins = _computed(program, sites)
    first = next(iter(graph.nodes))
    for node, value in known.items():
        readers = [user for user in node.users if user not in known and site_of(user) in sites]
        if not readers or value.dtype != torch.float32:
            continue
        site = site_of(readers[0])
        given = sites[site].weight
        whole = given is not None and given.numel == value.numel()
        if not whole and node.op == "placeholder":
            continue
        kind = "weight" if whole else "constant"
        name = _unique(re.sub(r"\W", "_", f"{kind}_{site}"), {other.name for other in graph.nodes})
        with graph.inserting_before(first):
            made = graph.placeholder(name)
        made.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(made)
        argument = TensorArgument(name=made.name)
        spec = InputSpec(kind=InputKind.BUFFER, arg=argument, target=f"bitsmith.{made.name}", persistent=True)
        program.graph_signature.input_specs.insert(0, spec)
        program.state_dict[f"bitsmith.{made.name}"] = value.contiguous()
        first = made
        if whole:
            found[made.name] = _described(site, value, program.state_dict, origins[node])
    _drop_unread(program)
    return found


def _computed(
    program: ExportedProgram, sites: Collection[str]
) -> tuple[dict[Node, Tensor], dict[Node, frozenset[str]]]:
    """The nodes that depend on constants alone: their values, and the keys of the constants."""
    held = {**program.constants, **program.state_dict}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if spec.kind in _CONSTANT}
    known: dict[Node, Tensor] = {}
    origins: dict[Node, frozenset[str]] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in specs and isinstance(held.get(specs[node.name].target), Tensor):
            known[node] = held[specs[node.name].target]
            origins[node] = frozenset({specs[node.name].target})
        elif node.op == "call_function" and node.all_input_nodes and site_of(node) in sites:
            if not all(read in known for read in node.all_input_nodes):
                continue
            with torch.no_grad():
                value = node.target(
                    *torch.fx.node.map_arg(node.args, known.__getitem__),
                    **torch.fx.node.map_arg(node.kwargs, known.__getitem__),
                )
            if isinstance(value, Tensor):
                known[node] = value
                origins[node] = frozenset().union(*(origins[read] for read in node.all_input_nodes))
    return known, origins


def _unique(name: str, taken: Collection[str]) -> str:
    return next(n for n in (name, *(f"{name}_{k}" for k in range(1, len(taken) + 2))) if n not in taken)


def _described(site: str, value: Tensor, state: Mapping[str, Tensor], keys: Collection[str]) -> Weight:
    values, prefix = value.numpy(force=True), f"{CELLS}{encode_key(site)}."
    stored = next((state[prefix + key] for key in ("weight_q4", "weight_q") if prefix + key in keys), None)
    if stored is None or f"{prefix}weight_scale" not in state or tuple(stored.shape) != values.shape:
        return Weight(site, values)
    integers = stored.numpy(force=True)
    zero = state[f"{prefix}weight_zero_point"].numpy(force=True).astype(integers.dtype)
    for scale in _aligned(state[f"{prefix}weight_scale"].numpy(force=True), values.shape):
        offset = zero.reshape(scale.shape)
        steps = integers.astype(np.float32) - spread(offset, values.shape)
        if np.array_equal(steps * spread(scale, values.shape), values):
            return Weight(site, values, integers, scale, offset if offset.any() else None)
    return Weight(site, values)


def _aligned(scale: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """A scale of one number, by channel or by group of axis 1, shaped to the weight's rank in each way that it fits."""
    if scale.size == 1:
        yield scale.reshape([1] * len(shape))
    elif scale.ndim == 2:
        yield scale.reshape(*scale.shape, *[1] * (len(shape) - 2))
    else:
        for axis, size in enumerate(shape):
            if size == scale.size:
                yield scale.reshape([-1 if k == axis else 1 for k in range(len(shape))])


def spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """One number for each weight from one for each block; along each axis blocks are equally long.

    >>> spread(np.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks


def _drop_unread(program: ExportedProgram) -> None:
    """Take out what nothing reads any more: computations, parameters, buffers."""
    graph, signature = program.graph_module.graph, program.graph_signature
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    unread = {node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users}
    for spec in list(signature.input_specs):
        if spec.kind in _CONSTANT and spec.arg.name in unread:
            graph.erase_node(unread[spec.arg.name])
            signature.input_specs.remove(spec)
            program.state_dict.pop(str(spec.target), None)
    program.graph_module.recompile()
