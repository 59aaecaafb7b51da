"""The graph between the file and the network: nodes in order, constants by name. Data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .errors import UnsupportedOperatorError

Compute = Callable[..., Any]


@dataclass(frozen=True)
class Literal:
    """An argument that is always the same Python value."""

    value: Any


@dataclass(frozen=True)
class Given:
    """An argument that another node computes: the ``index``-th input of the node.

    ``tensor``: Python numbers there are made a tensor (``number``: but a single one stays); ``host``: a tensor there
    is made Python numbers.
    """

    index: int
    tensor: bool = False
    host: bool = False
    number: bool = False


@dataclass(frozen=True)
class Weight:
    """A constant tensor that the network holds: ``learned`` ones as parameters, others as buffers.

    ``key``: where it came from and what was done to it; the same key is the same tensor (tied).
    """

    value: Tensor
    key: tuple[str, ...]
    learned: bool = True


@dataclass(frozen=True)
class Own:
    """An argument that is a tensor of the node's own, by attribute name."""

    name: str


@dataclass(frozen=True)
class Group:
    """An argument that is a list of arguments."""

    items: tuple[Argument, ...]


Argument = Given | Own | Literal | Group


@dataclass(frozen=True)
class Built:
    """How a node computes: ``compute(*arguments)``, and the tensors that it holds, by attribute name.

    Without ``arguments`` they are the node's inputs in order. ``settings``: plain attributes of the child, which others
    read there (``eps`` of a batch normalisation).
    """

    compute: Compute
    arguments: tuple[Argument, ...] | None = None
    weights: Mapping[str, Weight] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ValueType:
    """What shape inference says of a value: its sizes (a name or None where unknown) and its ONNX element type."""

    shape: tuple[int | str | None, ...] | None
    dtype: int | None


@dataclass
class Node:
    """One node of the graph. An input or output that is left out is "".

    ``name``: the node's own name in the file, perhaps empty or repeated. ``place``: the value that its path is made
    from, where it stands for several nodes; else its first output.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    name: str = ""
    place: str = ""

    @property
    def label(self) -> str:
        return self.name or next((name for name in self.outputs if name), self.op)


@dataclass
class Graph:
    """``constants``: every value known before the network runs. ``origins``: constants that are another, transposed."""

    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Tensor]
    types: dict[str, ValueType]
    opset: int
    source: str
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def readers(self) -> dict[str, list[Node]]:
        """The nodes that read each value; the graph's own outputs are read by a node without outputs."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    found.setdefault(name, []).append(node)
        leave = Node("", list(self.outputs), [], {})
        for name in dict.fromkeys(self.outputs):
            found.setdefault(name, []).append(leave)
        return found

    def key(self, name: str) -> tuple[str, ...]:
        """Where a constant came from."""
        return self.origins.get(name, (name,))

    def rank(self, name: str) -> int | None:
        found = self.types.get(name)
        return len(found.shape) if found is not None and found.shape is not None else None


@dataclass(frozen=True)
class Call:
    """What an operator's builder sees: one node, its attributes and those of its inputs that are constant."""

    node: Node
    graph: Graph

    @property
    def opset(self) -> int:
        return self.graph.opset

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def given(self, index: int) -> bool:
        """Whether the input is there at all."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index])

    def constant(self, index: int) -> Tensor | None:
        """The input, if it is known before the network runs."""
        return self.graph.constants.get(self.node.inputs[index]) if self.given(index) else None

    def weight(self, index: int, learned: bool = True) -> Weight:
        """A constant input as it is."""
        name = self.node.inputs[index]
        return Weight(self.graph.constants[name], self.graph.key(name), learned)

    def rank(self, index: int) -> int | None:
        return self.graph.rank(self.node.inputs[index]) if self.given(index) else None

    def wants(self, output: int) -> bool:
        """Whether anybody may read that output."""
        return output < len(self.node.outputs) and bool(self.node.outputs[output])

    def refuse(self, reason: str) -> UnsupportedOperatorError:
        """The error for a form of the operator that is not supported."""
        return UnsupportedOperatorError({f"{self.node.op} {reason}": [self.node.label]}, self.graph.source)


@dataclass(frozen=True)
class Operator:
    """One row of the table of operators.

    ``build``: from a call to the function that computes it, or to a :class:`Built` where constants take another form.
    ``names``: of the constant inputs, as attributes of the node; ``learned``: those that are parameters.
    ``host``: inputs that are sizes, axes or scales: Python numbers. ``scalars``: numbers may stand beside tensors.
    ``on_numbers``: the same function on Python numbers and lists of them, for the arithmetic of shapes.
    ``note``: what of the operator is not supported.
    """

    build: Callable[[Call], Compute | Built]
    names: Sequence[str] = ()
    learned: Sequence[str] = ()
    host: Sequence[int] = ()
    scalars: bool = False
    on_numbers: Callable[[Call], Compute] | None = None
    note: str = ""
