"""Several nodes that are one operation of the network that wrote them: linear with bias, SiLU, GELU, layer norm.

What a network computes does not change; how many sites it has does: the inside of a layer normalisation is nothing
that anybody wants in int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .graph import Graph, Node

LINEAR, SILU, GELU = "bitsmith.Linear", "bitsmith.Silu", "Gelu"


class _Matcher:
    """The graph with who computes and who reads each value."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.readers = graph.readers()

    def producer(self, name: str, *ops: str) -> Node | None:
        node = self.producers.get(name)
        return node if node is not None and node.op in ops else None

    def only_reader(self, name: str, *ops: str) -> Node | None:
        """The node that alone reads a value, once."""
        found = self.readers.get(name, [])
        if len(found) != 1 or found[0].op not in ops or found[0].inputs.count(name) != 1:
            return None
        return found[0]

    def number(self, name: str) -> float | None:
        value = self.graph.constants.get(name)
        return float(value) if value is not None and value.numel() == 1 else None

    def is_number(self, name: str, wanted: float) -> bool:
        found = self.number(name)
        return found is not None and math.isclose(found, wanted, rel_tol=1e-5)

    def other(self, node: Node, name: str) -> str:
        """The second operand of a node of two."""
        return node.inputs[1] if node.inputs[0] == name else node.inputs[0]

    def beside_number(self, node: Node | None, wanted: float) -> str | None:
        """The operand of a node that stands beside that number."""
        if node is None:
            return None
        return next((self.other(node, name) for name in node.inputs if self.is_number(name, wanted)), None)


def fuse(graph: Graph) -> None:
    """Replace what matches, in place. A value that somebody else reads keeps its node."""
    for rule in (_linear, _conv_bias, _layer_norm, _gelu, _silu, _hard_swish):
        matcher = _Matcher(graph)
        alive = set(map(id, graph.nodes))
        for node in list(graph.nodes):
            if id(node) in alive and rule(matcher, node):
                drop_unread(graph)
                alive = set(map(id, graph.nodes))
                matcher = _Matcher(graph)


def drop_unread(graph: Graph) -> None:
    """Remove the nodes that no output depends on."""
    wanted = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    graph.nodes[:] = kept[::-1]


def _replace(
    graph: Graph, last: Node, op: str, inputs: list[str], head: Node | None = None, **attributes: object
) -> bool:
    """``last`` becomes ``op``; it is named after ``head``, the node where it began."""
    at = next(index for index, node in enumerate(graph.nodes) if node is last)
    first = head or last
    graph.nodes[at] = Node(op, inputs, [last.outputs[0]], dict(attributes), first.label, first.outputs[0])
    return True


def _linear(m: _Matcher, node: Node) -> bool:
    """MatMul by a constant matrix, Add of a constant row."""
    if node.op != "MatMul" or node.inputs[0] in m.graph.constants:
        return False
    matrix = m.graph.constants.get(node.inputs[1])
    add = m.only_reader(node.outputs[0], "Add")
    if matrix is None or matrix.dim() != 2 or add is None:
        return False
    bias = m.other(add, node.outputs[0])
    row = m.graph.constants.get(bias)
    rank = m.graph.rank(node.inputs[0])
    if row is None or not _is_row(row, matrix.shape[1], rank):
        return False
    return _replace(m.graph, add, LINEAR, [*node.inputs, bias], node)


def _is_row(value: Tensor, width: int, rank: int | None) -> bool:
    fits = value.dim() == 1 or (value.dim() > 1 and rank is not None and value.dim() <= rank)
    return fits and value.numel() == width and value.shape[-1] == width


def _conv_bias(m: _Matcher, node: Node) -> bool:
    """Conv, Add of one constant for each channel."""
    if node.op not in ("Conv", "ConvTranspose"):
        return False
    weight, add = m.graph.constants.get(node.inputs[1]), m.only_reader(node.outputs[0], "Add")
    if weight is None or add is None or (len(node.inputs) > 2 and node.inputs[2]):
        return False
    name = m.other(add, node.outputs[0])
    value = m.graph.constants.get(name)
    channels = weight.shape[0] if node.op == "Conv" else weight.shape[1] * node.attributes.get("group", 1)
    space = weight.dim() - 2
    if value is None or tuple(value.shape) not in ((channels, *[1] * space), (1, channels, *[1] * space)):
        return False
    bias = f"{name}.row"
    m.graph.constants[bias] = value.reshape(-1)
    m.graph.origins[bias] = (*m.graph.key(name), "row")
    return _replace(m.graph, add, node.op, [*node.inputs[:2], bias], node, **node.attributes)


def _layer_norm(m: _Matcher, node: Node) -> bool:
    """(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps), and the scale and bias behind it, over the last axis."""
    if node.op != "Div":
        return False
    centred, root = m.producer(node.inputs[0], "Sub"), m.producer(node.inputs[1], "Sqrt")
    if centred is None or root is None:
        return False
    x = centred.inputs[0]
    eps = m.producer(root.inputs[0], "Add")
    mean = m.producer(centred.inputs[1], "ReduceMean")
    if eps is None or mean is None or mean.inputs[0] != x or not _over_last(m, mean):
        return False
    variance, number = next(
        ((p, m.number(m.other(eps, name))) for name in eps.inputs if (p := m.producer(name, "ReduceMean"))),
        (None, None),
    )
    if variance is None or number is None or not _over_last(m, variance):
        return False
    square = m.producer(variance.inputs[0], "Pow", "Mul")
    if square is None:
        return False
    # some write the difference once, some twice
    base = m.producer(square.inputs[0], "Sub")
    again = square.inputs[1] == square.inputs[0] if square.op == "Mul" else m.is_number(square.inputs[1], 2.0)
    if base is None or not again or (base is not centred and base.inputs != centred.inputs):
        return False
    kind = m.graph.types.get(x)
    width = kind.shape[-1] if kind is not None and kind.shape else None
    scale = m.only_reader(node.outputs[0], "Mul")
    gamma = m.graph.constants.get(m.other(scale, node.outputs[0])) if scale is not None else None
    if (
        scale is None
        or gamma is None
        or gamma.dim() != 1
        or gamma.numel() == 1
        or (width or gamma.numel()) != gamma.numel()
    ):
        if not isinstance(width, int):
            return False
        ones = f"{node.outputs[0]}.ones"
        m.graph.constants[ones] = torch.ones(width)
        return _replace(m.graph, node, "LayerNormalization", [x, ones], node, axis=-1, epsilon=number)
    inputs, last = [x, m.other(scale, node.outputs[0])], scale
    shift = m.only_reader(scale.outputs[0], "Add")
    if shift is not None:
        name = m.other(shift, scale.outputs[0])
        beta = m.graph.constants.get(name)
        if beta is not None and beta.shape == gamma.shape:
            inputs, last = [*inputs, name], shift
    return _replace(m.graph, last, "LayerNormalization", inputs, node, axis=-1, epsilon=number)


def _over_last(m: _Matcher, node: Node) -> bool:
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1:
        constant = m.graph.constants.get(node.inputs[1])
        axes = constant.tolist() if constant is not None else None
    rank = m.graph.rank(node.inputs[0])
    return bool(node.attributes.get("keepdims", 1)) and (axes == [-1] or (rank is not None and axes == [rank - 1]))


def _gelu(m: _Matcher, node: Node) -> bool:
    """x * 0.5 * (1 + erf(x / sqrt(2))), the products in any order; from Erf on."""
    if node.op != "Erf":
        return False
    inner = m.producer(node.inputs[0], "Div", "Mul")
    if inner is None:
        return False
    x = m.beside_number(inner, math.sqrt(2.0) if inner.op == "Div" else math.sqrt(0.5))
    plus = m.only_reader(node.outputs[0], "Add")
    if x is None or plus is None or m.beside_number(plus, 1.0) != node.outputs[0]:
        return False
    if inner.op == "Div" and inner.inputs[0] != x:
        return False
    # what is left is a product of x, 0.5 and this
    halved, whole, value = False, False, plus.outputs[0]
    last: Node = plus
    while not (halved and whole):
        product = m.only_reader(value, "Mul")
        if product is None:
            return False
        factor = m.other(product, value)
        if factor == x and not whole:
            whole = True
        elif m.is_number(factor, 0.5) and not halved:
            halved = True
        elif not halved and not whole and _is_half_of(m, factor, x):
            halved = whole = True
        else:
            return False
        last, value = product, product.outputs[0]
    return _replace(m.graph, last, GELU, [x], last)


def _is_half_of(m: _Matcher, name: str, x: str) -> bool:
    half = m.producer(name, "Mul")
    return half is not None and m.beside_number(half, 0.5) == x


def _gated(gate: str, fits: Callable[[Node], bool], op: str) -> Callable[[_Matcher, Node], bool]:
    """x * gate(x)."""

    def rule(m: _Matcher, node: Node) -> bool:
        if node.op != gate or not fits(node):
            return False
        product = m.only_reader(node.outputs[0], "Mul")
        if product is None or m.other(product, node.outputs[0]) != node.inputs[0]:
            return False
        return _replace(m.graph, product, op, [node.inputs[0]], product)

    return rule


def _hard(node: Node) -> bool:
    return (
        math.isclose(node.attributes.get("alpha", 0.2), 1 / 6, rel_tol=1e-5) and node.attributes.get("beta", 0.5) == 0.5
    )


_silu = _gated("Sigmoid", lambda node: True, SILU)
_gated_hard = _gated("HardSigmoid", _hard, "HardSwish")


def _hard_swish(m: _Matcher, node: Node) -> bool:
    """x * hardsigmoid(x), or x * clip(x + 3, 0, 6) / 6."""
    if node.op == "HardSigmoid":
        return _gated_hard(m, node)
    if node.op != "Clip" or len(node.inputs) < 3 or m.number(node.inputs[1]) != 0.0 or m.number(node.inputs[2]) != 6.0:
        return False
    x = m.beside_number(m.producer(node.inputs[0], "Add"), 3.0)
    product = m.only_reader(node.outputs[0], "Mul", "Div")
    if x is None or product is None:
        return False
    if product.op == "Mul" and m.other(product, node.outputs[0]) == x:
        last = m.only_reader(product.outputs[0], "Div", "Mul")
        if last is not None and m.beside_number(last, 6.0 if last.op == "Div" else 1 / 6) == product.outputs[0]:
            return _replace(m.graph, last, "HardSwish", [x], last)
        return False
    if m.beside_number(product, 6.0 if product.op == "Div" else 1 / 6) != node.outputs[0]:
        return False
    last = m.only_reader(product.outputs[0], "Mul")
    if last is not None and m.other(last, product.outputs[0]) == x:
        return _replace(m.graph, last, "HardSwish", [x], last)
    return _replace(m.graph, product, "HardSigmoid", [x], product, alpha=1 / 6, beta=0.5)
