"""Which operations of a network that NNCF quantized really are: read from NNCF's own graphs, OpenVINO or ONNX."""

from __future__ import annotations

import math
from typing import Any

QUANTIZERS = {"FakeQuantize", "DequantizeLinear"}
RESCALES = {"Convert", "Subtract", "Multiply"}
MOVES = {
    "Reshape",
    "Transpose",
    "MaxPool",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Gather",
    "StridedSlice",
    "Slice",
    "Split",
}


def plan_of(tuned: Any, model: Any) -> tuple[dict[str, int | str], dict[str, int]]:
    """8 for an operation whose two operands are both quantized, as NNCF's own graph shows them."""
    import openvino
    from nncf.common.factory import build_graph

    if isinstance(tuned, openvino.Model):
        # weights that it put back can have the name of a node that is there: its graph builder refuses that
        seen: set[str] = set()
        for index, node in enumerate(tuned.get_ordered_ops()):
            if node.get_friendly_name() in seen:
                node.set_friendly_name(f"{node.get_friendly_name()}#{index}")
            seen.add(node.get_friendly_name())
    before, graph = build_graph(model), build_graph(tuned)
    plan: dict[str, int | str] = {}
    sizes: dict[str, int] = {}
    for node in before.get_all_nodes():
        if node.node_type not in ("Convolution", "GroupConvolution", "MatMul", "Conv", "Gemm"):
            continue
        edges = graph.get_input_edges(graph.get_node_by_name(node.node_name))
        edges = sorted(edges, key=lambda edge: edge.input_port_id)[:2]  # a bias is the third
        plan[node.node_name] = 8 if all(_quantized(graph, edge) for edge in edges) else "float"
        sizes[node.node_name] = _weights(before, node)
    return plan, sizes


def _quantized(graph: Any, edge: Any) -> bool:
    """Whether a tensor is a quantizer's, at most moved since, or weights that are stored as integers."""
    passed: set[str] = set()
    while True:
        node = edge.from_node
        if node.node_type in QUANTIZERS:
            return not passed & RESCALES  # which compute in float, unless they belong to stored weights
        inputs = graph.get_input_edges(node)
        if not inputs:
            return bool(edge.dtype.name == "INTEGER")
        if node.node_type not in MOVES | RESCALES:
            return False
        passed.add(node.node_type)
        edge = inputs[0]


def _weights(graph: Any, node: Any) -> int:
    """Weights of an operation: the elements of its largest constant; 0 where both operands are activations."""
    attributes = node.layer_attributes
    found = getattr(attributes, "constant_attributes", None) or getattr(attributes, "weight_attrs", None) or {}
    return max((math.prod(value["shape"]) for value in found.values() if "shape" in value), default=0)
