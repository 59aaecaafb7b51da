"""From a graph to the network: constants folded, sizes on Python numbers, one child module for each node."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidGraphError, OnnxError
from .fuse import drop_unread, fuse
from .graph import Argument, Built, Call, Compute, Given, Graph, Literal, Node, Operator, Own, Weight
from .host import as_numbers, as_tensor, hostable
from .module import GraphNetwork, Input, Operation, Program, Step
from .table import OPERATORS
from .types import DTYPES

_ALIASES = frozenset({"Identity", "Dropout"})
_RESHAPING = frozenset({"Reshape", "Unsqueeze", "Expand", "Squeeze"})


def build(graph: Graph) -> GraphNetwork:
    """The network of a graph, in evaluation mode."""
    names = list(graph.outputs)
    _fold(graph)
    drop_unread(graph)
    fuse(graph)
    network: GraphNetwork = _Assembly(graph).network(names).eval()
    return network


# -- constants -------------------------------------------------------------------------------------------------------


def _fold(graph: Graph) -> None:
    """Compute what depends on constants only, and leave out what does nothing."""
    aliases: dict[str, str] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        node.inputs = [aliases.get(name, name) for name in node.inputs]
        call = Call(node, graph)
        if node.op in _ALIASES and _does_nothing(call):
            aliases[node.outputs[0]] = node.inputs[0]
        elif node.op == "Shape" and (known := _known_shape(call)) is not None:
            graph.constants[node.outputs[0]] = torch.tensor(known, dtype=torch.int64)
        elif all(not name or name in graph.constants for name in node.inputs):
            _evaluate(call)
        else:
            kept.append(node)
    graph.nodes[:] = kept
    graph.outputs[:] = [aliases.get(name, name) for name in graph.outputs]


def _does_nothing(call: Call) -> bool:
    if call.node.op == "Identity":
        return True
    if call.graph.readers().get(call.node.outputs[1] if call.wants(1) else ""):
        raise call.refuse("with the mask as a second output")
    training = call.constant(2)
    if call.given(2) and (training is None or bool(training)):
        raise call.refuse("in training mode (export the network after .eval())")
    return True


def _known_shape(call: Call) -> list[int] | None:
    kind = call.graph.types.get(call.node.inputs[0])
    if kind is None or kind.shape is None or not all(isinstance(size, int) for size in kind.shape):
        return None
    shape: Any = list(kind.shape)
    return shape[call.attribute("start", 0) : call.attribute("end")]  # type: ignore[no-any-return]


@torch.no_grad()
def _evaluate(call: Call) -> None:
    graph, node = call.graph, call.node
    built, _ = _arguments(call, OPERATORS[node.op], frozenset())
    operation = _operation(node.label, built)
    made = run(call, lambda: operation(*[graph.constants.get(name) for name in node.inputs]))
    results = made if len(node.outputs) > 1 else (made,)
    for name, value in zip(node.outputs, results, strict=False):
        graph.constants[name] = value if isinstance(value, Tensor) else as_tensor(value)
    source = graph.key(node.inputs[0]) if node.inputs and node.inputs[0] else ()
    if (
        node.op == "Transpose"
        and graph.constants[node.inputs[0]].dim() == 2
        and call.attribute("perm") in (None, [1, 0])
    ):
        # a weight that is stored transposed stays tied to the weight
        graph.origins[node.outputs[0]] = source[:-1] if source[-1] == "t" else (*source, "t")
    elif node.op == "Transpose" and call.attribute("perm") == [0, 1]:
        graph.origins[node.outputs[0]] = source


def run(call: Call, compute: Callable[[], Any]) -> Any:
    """``compute()``; what fails on constants is told with its node."""
    try:
        return compute()
    except OnnxError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InvalidGraphError(
            f"{call.graph.source}: node {call.node.label!r} ({call.node.op}) cannot be computed from its constants: "
            f"{str(error).splitlines()[0]}"
        ) from error


# -- nodes -----------------------------------------------------------------------------------------------------------


def _arguments(call: Call, operator: Operator, hosts: frozenset[str]) -> tuple[Built, bool]:
    """How the node computes, and whether that is on Python numbers (then it holds no tensors)."""
    names, constants = call.node.inputs, call.graph.constants
    on_numbers = operator.on_numbers is not None and _on_numbers(call, hosts)
    made: Compute | Built
    if on_numbers:
        assert operator.on_numbers is not None
        made = operator.on_numbers(call)
    else:
        made = operator.build(call)
    if not isinstance(made, Built):
        made = Built(made)
    if made.arguments is not None:
        return made, False
    arguments: list[Argument] = []
    weights: dict[str, Weight] = {}
    for index, name in enumerate(names):
        constant = constants.get(name)
        if not name:
            arguments.append(Literal(None))
        elif constant is None:
            at_host = name in hosts
            as_host = index in operator.host and not at_host
            tensor = at_host and not on_numbers and index not in operator.host and call.node.op not in ("Shape", "Size")
            arguments.append(Given(index, tensor=tensor, host=as_host, number=operator.scalars))
        elif on_numbers or index in operator.host:
            arguments.append(Literal(as_numbers(constant)))
        elif operator.scalars and constant.dim() == 0 and not all(n in constants for n in names if n):
            arguments.append(Literal(constant.item()))
        else:
            own = operator.names[index] if index < len(operator.names) else f"constant{index}"
            weights[own] = call.weight(index, own in operator.learned and constant.is_floating_point())
            arguments.append(Own(own))
    while arguments and arguments[-1] == Literal(None):
        arguments.pop()
    return replace(made, arguments=tuple(arguments), weights=weights), on_numbers


def _on_numbers(call: Call, hosts: frozenset[str]) -> bool:
    names = [name for name in call.node.inputs if name]
    if call.node.op in ("Shape", "Size"):
        return True
    if not any(name in hosts for name in names) or not _small(call):
        return False
    return all(
        name in hosts or (name in call.graph.constants and hostable(call.graph.constants[name])) for name in names
    )


def _small(call: Call) -> bool:
    """Whether the result is a number or a vector of known length, as far as shape inference says."""
    kind = call.graph.types.get(next(iter(call.node.outputs)))
    shape = kind.shape if kind is not None else None
    if shape is None:
        return call.node.op not in _RESHAPING
    return len(shape) <= 1 and (call.node.op not in _RESHAPING or all(isinstance(size, int) for size in shape))


def _operation(label: str, built: Built) -> Operation:
    operation = Operation(label, built.compute, built.arguments or ())
    for name, weight in built.weights.items():
        operation.register_buffer(name, weight.value)
    return operation


class _Assembly:
    """Makes the children and the program."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.hosts: frozenset[str] = frozenset()
        self.slots: dict[str, int] = {name: index for index, name in enumerate(graph.inputs)}
        self.children: dict[str, Operation] = {}
        self.names: dict[str, str] = {}
        self.tied: dict[tuple[str, ...], Tensor] = {}
        self.steps: list[tuple[str, Compute | None, list[str], list[str]]] = []

    def network(self, output_names: Sequence[str]) -> GraphNetwork:
        for node in self.graph.nodes:
            self._add(node)
        graph = self.graph
        inputs = [
            self._input(name, taken) for name, taken in zip(graph.inputs, argument_names(graph.inputs), strict=True)
        ]
        held = [name for name in dict.fromkeys(graph.outputs) if name in graph.constants]
        made = {name: f"output_{index}" for index, name in enumerate(held)}
        for name in (*made, *(n for step in self.steps for n in step[3]), *graph.outputs):
            self.slots.setdefault(name, len(self.slots))
        network = GraphNetwork(
            inputs,
            argument_names(output_names),
            Program(
                self._steps(),
                tuple(self.slots[name] for name in graph.outputs),
                len(self.slots),
                tuple((self.slots[name], (), attribute) for name, attribute in made.items()),
                assemble=_assemble,
            ),
            self.names,
            graph.source,
        )
        for name, attribute in made.items():
            network.register_buffer(attribute, graph.constants[name])
        for path, child in self.children.items():
            network.add_module(path, child)
        return network

    def _add(self, node: Node) -> None:
        call = Call(node, self.graph)
        built, on_numbers = _arguments(call, OPERATORS[node.op], self.hosts)
        wanted = built.arguments or ()
        given = [argument for argument in wanted if isinstance(argument, Given)]
        order = {index: at for at, index in enumerate(dict.fromkeys(argument.index for argument in given))}
        reads = [node.inputs[index] for index in order]
        outputs = list(node.outputs)
        arguments = tuple(self._moved(call, a, order, on_numbers) if isinstance(a, Given) else a for a in wanted)
        if on_numbers:
            self.hosts |= {name for name in outputs if name}
            self.steps.append(("", _bound(built.compute, arguments), reads, outputs))
            return
        path = self._path(node)
        child = Operation(node.label, built.compute, arguments, built.settings)
        for name, weight in built.weights.items():
            self._hold(child, name, weight)
        self.children[path] = child
        self.names[path] = node.label
        self.steps.append((path, None, reads, outputs))

    def _moved(self, call: Call, argument: Given, order: dict[int, int], on_numbers: bool) -> Given:
        """The argument among what the module is given; only what is a Python number has to become a tensor."""
        host = call.node.inputs[argument.index] in self.hosts
        return Given(order[argument.index], argument.tensor and host, argument.host, argument.number)

    def _hold(self, child: nn.Module, name: str, weight: Weight) -> None:
        tensor = self.tied.get(weight.key)
        if tensor is None:
            value = weight.value.detach().contiguous()
            tensor = nn.Parameter(value) if weight.learned else value
            self.tied[weight.key] = tensor
        if isinstance(tensor, nn.Parameter):
            child.register_parameter(name, tensor)
        else:
            child.register_buffer(name, tensor)

    def _path(self, node: Node) -> str:
        name = _legal(re.sub(r"_output_\d+$", "", node.place or next((n for n in node.outputs if n), node.op)))
        return unique(name, {*self.children, *RESERVED})

    def _input(self, original: str, name: str) -> Input:
        kind = self.graph.types.get(original)
        shape = kind.shape if kind is not None else None
        return Input(original, name, shape, DTYPES.get(kind.dtype) if kind is not None and kind.dtype else None)

    def _steps(self) -> tuple[Step, ...]:
        """The program, with what each step is the last to read."""
        kept = set(self.graph.outputs)
        found: list[Step] = []
        for path, compute, reads, writes in reversed(self.steps):
            done = [name for name in dict.fromkeys((*reads, *writes)) if name and name not in kept]
            kept.update(done)
            found.append(
                Step(
                    (path,) if path else (),
                    compute,
                    tuple(self.slots[name] for name in reads),
                    tuple(self.slots[name] for name in writes),
                    tuple(self.slots[name] for name in done),
                )
            )
        return tuple(found[::-1])


def _assemble(outputs: tuple[Any, ...]) -> Any:
    """A tensor, or a tuple of them; sizes among them become tensors."""
    found = tuple(value if isinstance(value, Tensor) else as_tensor(value) for value in outputs)
    return found[0] if len(found) == 1 else found


def _bound(compute: Compute, arguments: tuple[Argument, ...]) -> Compute:
    """A function of Python numbers with its constants put in."""
    if all(isinstance(a, Given) and a.index == i and not a.host for i, a in enumerate(arguments)):
        return compute

    def bound(*given: Any) -> Any:
        return compute(*[_number(a, given) for a in arguments])

    return bound


def _number(argument: Argument, given: tuple[Any, ...]) -> Any:
    if isinstance(argument, Given):
        value = given[argument.index]
        return as_numbers(value) if argument.host else value
    return argument.value if isinstance(argument, Literal) else None


# -- names -----------------------------------------------------------------------------------------------------------

RESERVED = frozenset((*dir(nn.Module()), *dir(GraphNetwork), "inputs", "output_names", "onnx_names", "source"))


def _legal(name: str) -> str:
    """A name of letters, digits and underscores, for a module or an argument.

    >>> _legal("/layer1/conv1/Conv"), _legal("input.1"), _legal("0")
    ('layer1_conv1_Conv', 'input_1', '_0')
    """
    found = re.sub(r"[^0-9A-Za-z_]+", "_", name).strip("_") or "value"
    return f"_{found}" if found[0].isdigit() else found


def unique(name: str, taken: Iterable[str]) -> str:
    used = set(taken)
    found, number = name, 1
    while found in used:
        found, number = f"{name}_{number}", number + 1
    return found


def argument_names(names: Iterable[str]) -> list[str]:
    """Argument names of the inputs: legal, unique, no Python keyword."""
    found: list[str] = []
    for name in names:
        legal = _legal(name)
        legal = f"{legal}_" if keyword.iskeyword(legal) or legal in ("self", "args", "kwargs") else legal
        found.append(unique(legal, found))
    return found
