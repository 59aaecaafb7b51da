"""Exported programs (``.pt2``) as ordinary modules whose operations Bitsmith sees.

The graph of a ``torch.export`` program calls ATen overloads, which interception does not know. Each call becomes a
child that calls the torch function of the same name, at the path of the module that it came from: the convolution of
``layer1.0.conv1`` is ``layer1.0.conv1`` again, and its weight has its old name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..operations import BY_FUNCTION, PADDING, VALUE_PRESERVING
from .onnx_graph.build import RESERVED, argument_names, unique
from .onnx_graph.errors import named
from .onnx_graph.graph import Argument, Compute, Given, Group, Literal, Own
from .onnx_graph.module import GraphNetwork, Input, Operation, Program, Step

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class ExportedError(ValueError):
    """A ``.pt2`` file or an exported program that cannot be used: what, where, what to do."""


def load_exported(path: Path, *, trusted: bool = False) -> GraphNetwork:
    """The program in a file that ``torch.export.save`` wrote, as a module. See :func:`bitsmith.load`."""
    if not trusted:
        raise ExportedError(
            f"{path}: torch unpickles a .pt2 file, which can run any code in it. If you trust whoever wrote it, say "
            "bitsmith.load(path, trusted=True); an .onnx file holds no code"
        )
    if not path.is_file():
        raise ExportedError(f"{path} is not a file; give the path of a .pt2 file that torch.export.save wrote")
    try:
        program = torch.export.load(path)
    except Exception as error:  # zip, pickle and JSON errors of many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportedError(
            f"{path} cannot be read as an exported program ({first}): it is cut short, of another torch version "
            f"(this is {torch.__version__}) or another kind of file; write it again with torch.export.save"
        ) from error
    return from_program(program, path.name)


def from_program(program: ExportedProgram, source: str = "the program") -> GraphNetwork:
    """An exported program as a module: the same parameters under the same names, every operation a child."""
    network: GraphNetwork = _Reader(program, source).network().eval()
    return network


# -- functions -------------------------------------------------------------------------------------------------------


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, *rest[:3])


def _decomposed_batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> tuple[Tensor]:
    return (F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps),)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _decomposed_layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor]:
    return (F.layer_norm(x, shape, weight, bias, eps),)


def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _embedding(weight: Tensor, index: Tensor, *rest: Any) -> Tensor:
    return F.embedding(index, weight)


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    index = [slice(None)] * x.dim()
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def _index(x: Tensor, indices: Iterable[Any]) -> Tensor:
    return x[tuple(slice(None) if index is None else index for index in indices)]


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    return torch.dropout(x, p, True) if train else x


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    name = f"conv{'_transpose' if transposed else ''}{weight.dim() - 2}d"
    if transposed:
        return getattr(F, name)(x, weight, bias, stride, padding, output_padding, groups, dilation)  # type: ignore[no-any-return]
    return getattr(F, name)(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return torch.softmax(x, dim)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return torch.log_softmax(x, dim)


def _to(x: Tensor, *target: Any, layout: Any = None, pin_memory: Any = None, **rest: Any) -> Tensor:
    if layout not in (None, x.layout):
        raise ExportedError(f"a tensor is brought into the layout {layout}: only {x.layout} is read")
    return x.to(*target, **{key: value for key, value in rest.items() if value is not None})


def _size(x: Tensor, dim: int) -> Any:
    return x.shape[dim]


_WITH_OTHER_ARGUMENTS: Mapping[str, Compute] = {
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _decomposed_batch_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": _decomposed_layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "slice": _slice,
    "index": _index,
    "dropout": _dropout,
    "convolution": _convolution,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "to": _to,
    "sym_size": _size,
    "t": torch.Tensor.t,
}
"""ATen operators whose arguments stand in another order, or of which torch has no function of that name."""

_KINDS = {
    **{"batch_norm": "batch_norm", "_native_batch_norm_legit_no_training": "batch_norm"},
    **{"layer_norm": "layer_norm", "native_layer_norm": "layer_norm", "group_norm": "group_norm"},
    **{"embedding": "embedding", "convolution": "conv", "_softmax": "softmax", "_log_softmax": "log_softmax"},
}
_KNOWN = frozenset((*BY_FUNCTION, *VALUE_PRESERVING, *PADDING))


def _name(target: Any) -> str:
    """The ATen operator's name, without its overload; "" for anything else."""
    schema = getattr(target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else ""


def _function(target: Any) -> tuple[Compute, str, bool]:
    """What computes a call, what it is called, and whether it is an operation that can be a site."""
    if not isinstance(target, torch._ops.OpOverload):
        return target, str(getattr(target, "__name__", target)), False
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten":
        return target, name, False
    if name in _WITH_OTHER_ARGUMENTS:
        return _WITH_OTHER_ARGUMENTS[name], _KINDS.get(name, name), name in _KINDS
    owners = (torch.Tensor,) if name.endswith("_") else (torch, F, torch.Tensor)
    for owner in owners:
        function = getattr(owner, name, None)
        if function is not None and function in _KNOWN:
            return function, name.rstrip("_"), function in BY_FUNCTION
    return target, name.strip("_"), False


# -- the graph -------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, program: ExportedProgram, source: str) -> None:
        self.program = program
        self.source = source
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.slots: dict[fx.Node, int] = {}
        self.owners: dict[fx.Node, tuple[str, str]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.literals: list[tuple[int, Any]] = []
        self.count = 0

    def network(self) -> GraphNetwork:
        self._check()
        inputs = self._inputs()
        self._constants()
        paths = self._paths()
        children: dict[str, Operation] = {}
        steps: list[Step] = []
        held: dict[fx.Node, None] = {}
        for node in self.nodes:
            self._slot(node)
            path = paths.get(node)
            built, reads = self._call(node, path)
            for read in reads:
                if read in self.owners:
                    held[read] = None
            if path is None:
                steps.append(Step((), _on_numbers(*built), tuple(map(self._slot, reads)), (self._slot(node),)))
                continue
            children[path] = Operation(node.name, *built, _settings(node))
            steps.append(Step(tuple(path.split(".")), None, tuple(map(self._slot, reads)), (self._slot(node),)))
        outputs = self._outputs(held)
        spec = self.program.call_spec.out_spec
        network = GraphNetwork(
            inputs,
            [f"output_{index}" for index in range(len(outputs))],
            Program(
                _with_releases(steps, outputs),
                outputs,
                self.count,
                tuple((self.slots[node], *self._place(node)) for node in held),
                tuple(self.literals),
                functools.partial(_unflatten, spec),
            ),
            {path: child.label for path, child in children.items()},
            self.source,
        )
        for path in sorted(
            {*children, *(name.rpartition(".")[0] for name in self.tensors)}, key=lambda p: p.count(".")
        ):
            if path:
                _add(network, path, children.get(path))
        for name, tensor in self.tensors.items():
            _hold(network, name, tensor)
        return network

    def _check(self) -> None:
        signature = self.program.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        written = [node.args[0] for node in self.nodes if _name(node.target).endswith("_") and node.args]
        mutated = [
            *signature.buffers_to_mutate.values(),
            *signature.user_inputs_to_mutate.values(),
            *(sources.get(n.name, n.name) for n in written if isinstance(n, fx.Node) and n.op == "placeholder"),
        ]
        if mutated:
            raise ExportedError(
                f"{self.source} changes {named(mutated)} when it runs (it was exported in training mode, or the model "
                "keeps state); export model.eval()"
            )
        closed = [node.name for node in self.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
        if closed:
            raise ExportedError(
                f"{self.source} has control flow or regions that nothing can be seen in: {named(closed)}; export a "
                "model without torch.cond, loops over tensors and torch.no_grad inside its forward"
            )

    def _slot(self, node: fx.Node) -> int:
        if node not in self.slots:
            self.slots[node] = self.count
            self.count += 1
        return self.slots[node]

    def _inputs(self) -> list[Input]:
        signature = self.program.graph_signature
        wanted = [
            node for node in self.program.graph.nodes if node.op == "placeholder" and node.name in signature.user_inputs
        ]
        if len(wanted) != len(signature.user_inputs) or any(not isinstance(n.meta.get("val"), Tensor) for n in wanted):
            raise ExportedError(
                f"{self.source} takes inputs that are not tensors ({signature.user_inputs}); export it with tensors"
            )
        names = self._argument_names(len(wanted)) or [node.name for node in wanted]
        found = []
        for node, name in zip(wanted, argument_names(names), strict=True):
            self._slot(node)
            value = node.meta["val"]
            shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
            found.append(Input(node.name, name, shape, value.dtype))
        return found

    def _argument_names(self, count: int) -> list[str] | None:
        """The names of the forward's own parameters; None if an argument held several tensors."""
        entry = self.program.module_call_graph[0].signature
        names = list(entry.forward_arg_names or ()) if entry is not None else []
        return names if len(names) == count else None

    def _constants(self) -> None:
        """Parameters, buffers and lifted tensors: placeholders that the program fills itself."""
        signature, program = self.program.graph_signature, self.program
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        for node in program.graph.nodes:
            if node.op != "placeholder" or node in self.slots:
                continue
            name = sources.get(node.name) or lifted.get(node.name)
            if name is None:
                raise ExportedError(f"{self.source} holds {node.name!r}, which is not a tensor; export it without")
            value = program.state_dict.get(name, program.constants.get(name))
            if not isinstance(value, Tensor):
                raise ExportedError(
                    f"{self.source} holds no tensor for {name!r}; write it again with torch.export.save"
                )
            path, _, attribute = name.rpartition(".")
            self.owners[node] = (path, attribute)
            self.tensors[name] = value

    def _place(self, node: fx.Node) -> tuple[tuple[str, ...], str]:
        path, attribute = self.owners[node]
        return (tuple(path.split(".")) if path else ()), attribute

    def _paths(self) -> dict[fx.Node, str]:
        """Where each call goes: a layer's only operation to the layer's own path, others below their module's."""
        inside: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if isinstance(node.meta.get("val"), (Tensor, tuple, list)):
                inside.setdefault(_module_path(node), []).append(node)
        parents = {path[:at] for path in inside for at in range(len(path)) if path[at] == "."}
        taken = {*inside, *self.tensors, *parents}
        found: dict[fx.Node, str] = {}
        for path, nodes in inside.items():
            operations = [node for node in nodes if _function(node.target)[2]]
            alone = operations[0] if len(operations) == 1 and path and path not in parents else None
            for node in nodes:
                if node is alone:
                    found[node] = path
                    continue
                prefix = f"{path}." if path else ""
                name = _function(node.target)[1]
                used = {full[len(prefix) :] for full in taken if full.startswith(prefix)}
                found[node] = prefix + unique(name, {*RESERVED, *used})
                taken.add(found[node])
        return found

    def _call(self, node: fx.Node, path: str | None) -> tuple[tuple[Compute, tuple[Argument, ...]], list[fx.Node]]:
        function, _, _ = _function(node.target)
        reads: dict[fx.Node, int] = {}

        def argument(value: Any) -> Argument:
            if isinstance(value, fx.Node):
                owner = self.owners.get(value)
                if owner is not None and path is not None and owner[0] == path:
                    return Own(owner[1])
                return Given(reads.setdefault(value, len(reads)))
            if isinstance(value, (list, tuple)):
                if any(isinstance(item, (fx.Node, list, tuple)) for item in value):
                    return Group(tuple(argument(item) for item in value))
                return Literal(list(value))
            return Literal(value)

        kwargs = dict(node.kwargs)
        if not any(isinstance(value, fx.Node) for value in node.all_input_nodes):
            kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "layout", "pin_memory")}
        arguments = [argument(value) for value in node.args]
        if kwargs:
            function = _with_names(function, len(arguments), tuple(kwargs))
            arguments += [argument(value) for value in kwargs.values()]
        return (function, tuple(arguments)), list(reads)

    def _outputs(self, held: dict[fx.Node, None]) -> tuple[int, ...]:
        (values,) = next(node for node in self.program.graph.nodes if node.op == "output").args
        found = []
        for value in values:
            if isinstance(value, fx.Node):
                if value in self.owners:
                    held[value] = None
                found.append(self._slot(value))
                continue
            self.literals.append((self.count, value))
            found.append(self.count)
            self.count += 1
        return tuple(found)


def _settings(node: fx.Node) -> dict[str, Any]:
    """What is read of the child of a batch normalisation besides its tensors."""
    at = {"batch_norm": 7, "_native_batch_norm_legit_no_training": 6}.get(_name(node.target))
    return {} if at is None else {"eps": node.args[at]}


def _module_path(node: fx.Node) -> str:
    """The path of the module that the call was made in; ``@1`` marks a second call of the same module."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def _with_names(function: Compute, positional: int, names: tuple[str, ...]) -> Compute:
    def call(*arguments: Any) -> Any:
        return function(*arguments[:positional], **dict(zip(names, arguments[positional:], strict=True)))

    return call


def _on_numbers(compute: Compute, arguments: tuple[Argument, ...]) -> Compute:
    """A call that gives a size, not a tensor."""
    return Operation("size", compute, arguments).forward


def _with_releases(steps: list[Step], outputs: tuple[int, ...]) -> tuple[Step, ...]:
    kept = set(outputs)
    found: list[Step] = []
    for step in reversed(steps):
        done = tuple(slot for slot in dict.fromkeys((*step.reads, *step.writes)) if slot not in kept)
        kept.update(done)
        found.append(Step(step.path, step.compute, step.reads, step.writes, done))
    return tuple(found[::-1])


def _unflatten(spec: Any, outputs: tuple[Any, ...]) -> Any:
    return torch.utils._pytree.tree_unflatten(list(outputs), spec)


def _add(root: nn.Module, path: str, child: nn.Module | None) -> None:
    """``child`` (or a module that only holds others) at a dotted path."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if last not in root._modules:
        root.add_module(last, child or nn.Module())


def _hold(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = root.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
    else:
        module.register_buffer(attribute, tensor)
