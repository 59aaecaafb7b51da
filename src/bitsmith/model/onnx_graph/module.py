"""The network that a graph becomes: an ordinary module with one child for each node that computes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, named
from .graph import Argument, Compute, Given, Group, Own
from .host import as_numbers, as_tensor


class Operation(nn.Module):
    """One node of the graph. Its forward takes what other nodes computed, in the order of the node's inputs."""

    def __init__(
        self, label: str, compute: Compute, arguments: Sequence[Argument], settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.label = label
        self.compute = compute
        self.arguments = tuple(arguments)
        for name, value in (settings or {}).items():
            setattr(self, name, value)
        self.plain = all(
            isinstance(a, Given) and a.index == i and not (a.tensor or a.host) for i, a in enumerate(arguments)
        )

    def forward(self, *given: Any) -> Any:
        if self.plain:
            return self.compute(*given)
        return self.compute(*[self._argument(argument, given) for argument in self.arguments])

    def _argument(self, argument: Argument, given: tuple[Any, ...]) -> Any:
        if isinstance(argument, Given):
            value = given[argument.index]
            if (
                argument.tensor
                and not isinstance(value, Tensor)
                and not (argument.number and not isinstance(value, tuple))
            ):
                return as_tensor(
                    value, next((g.device for g in given if isinstance(g, Tensor)), None) or self._device()
                )
            return as_numbers(value) if argument.host and isinstance(value, Tensor) else value
        if isinstance(argument, Group):
            return [self._argument(item, given) for item in argument.items]
        return getattr(self, argument.name) if isinstance(argument, Own) else argument.value

    def _device(self) -> torch.device | None:
        return next((t.device for t in (*self._parameters.values(), *self._buffers.values()) if t is not None), None)

    def extra_repr(self) -> str:
        return self.label


@dataclass(frozen=True)
class Step:
    """One call: of the child at ``path``, or of ``compute`` on Python numbers. ``done``: values nobody reads later."""

    path: tuple[str, ...]
    compute: Compute | None
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """Steps over ``count`` values, the first of which are the inputs. ``outputs``: which of them are given back.

    ``held``: values that are tensors of a module: slot, path and attribute. ``literals``: values that are always the
    same. ``assemble``: from the outputs to what the forward returns.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    count: int
    held: tuple[tuple[int, tuple[str, ...], str], ...] = ()
    literals: tuple[tuple[int, Any], ...] = ()
    assemble: Callable[[tuple[Any, ...]], Any] = lambda outputs: outputs[0] if len(outputs) == 1 else outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self


@dataclass(frozen=True)
class Input:
    """A graph input: its name in the file and as an argument, its sizes (a name or None where any) and element type."""

    original: str
    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: torch.dtype | None


class GraphNetwork(nn.Module):
    """A graph read from a file. ``forward`` takes the graph's inputs by position or by name.

    It returns one tensor, or a tuple if the graph has several outputs. ``onnx_names``: path of each child -> the
    node's name in the file (its output's, where the node has none). ``inputs``, ``output_names``: what it takes and
    gives. It computes as in evaluation whatever its mode: normalisations use their statistics, dropout does nothing.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        output_names: Sequence[str],
        program: Program,
        names: Mapping[str, str],
        source: str,
    ) -> None:
        super().__init__()
        self.inputs = tuple(inputs)
        self.output_names = tuple(output_names)
        self.onnx_names = dict(names)
        self.source = source
        self._program = program
        self.forward = types.MethodType(_forward(self.inputs), self)

    def compute(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The outputs for the inputs of one call."""
        given = self._bound(args, kwargs)
        device = next((g.device for g in given if isinstance(g, Tensor)), None)
        if device is None or device.type == "cpu":
            return self._run(given)
        with device:  # tensors made of sizes alone are made there
            return self._run(given)

    def _run(self, given: Sequence[Any]) -> Any:
        program = self._program
        values: list[Any] = [*given, *[None] * (program.count - len(given))]
        for slot, path, attribute in program.held:
            values[slot] = getattr(self._child(path), attribute)
        for slot, value in program.literals:
            values[slot] = value
        for step in program.steps:
            call = self._child(step.path) if step.compute is None else step.compute
            made = call(*[values[index] for index in step.reads])
            if len(step.writes) == 1:
                values[step.writes[0]] = made
            else:
                for index, value in zip(step.writes, made, strict=False):
                    values[index] = value
            for index in step.done:
                values[index] = None
        return program.assemble(tuple(values[slot] for slot in program.outputs))

    def _child(self, path: tuple[str, ...]) -> nn.Module:
        module: nn.Module = self
        for part in path:
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        if len(args) > len(self.inputs):
            raise InputError(f"{self.source} takes {self._wanted()}, but {len(args)} inputs were given")
        found: list[Any] = list(args)
        for entry in self.inputs[len(args) :]:
            if entry.name not in kwargs and entry.original not in kwargs:
                raise InputError(f"{self.source} takes {self._wanted()}; {entry.name!r} is missing")
            found.append(kwargs[entry.name] if entry.name in kwargs else kwargs[entry.original])
        unknown = set(kwargs) - {name for entry in self.inputs[len(args) :] for name in (entry.name, entry.original)}
        if unknown:
            raise InputError(f"{self.source} takes {self._wanted()}; {named(sorted(unknown))} was given as well")
        return found if torch.compiler.is_compiling() else self._checked(found)

    def _wanted(self) -> str:
        return f"{len(self.inputs)} inputs ({', '.join(entry.name for entry in self.inputs)})"

    def _checked(self, given: list[Any]) -> list[Any]:
        """Sizes that the file fixes, sizes of one name, kinds of number."""
        sizes: dict[str, tuple[int, str]] = {}
        for index, (entry, value) in enumerate(zip(self.inputs, given, strict=True)):
            if not isinstance(value, Tensor):
                raise InputError(f"input {entry.name!r} of {self.source} must be a tensor, not {type(value).__name__}")
            given[index] = self._typed(entry, value)
            if entry.shape is None:
                continue
            wanted = tuple("?" if size is None else size for size in entry.shape)
            if value.dim() != len(wanted):
                raise InputError(
                    f"input {entry.name!r} of {self.source} has shape {tuple(value.shape)}; the file says {wanted}"
                )
            for axis, size in enumerate(value.shape):
                declared = entry.shape[axis]
                if isinstance(declared, int) and declared != size:
                    raise InputError(
                        f"input {entry.name!r} of {self.source} has shape {tuple(value.shape)}, but the file fixes "
                        f"{wanted}"
                        + (": give batches of that size, or export with a dynamic batch" if axis == 0 else "")
                    )
                label = declared if isinstance(declared, str) else "the batch" if axis == 0 and declared is None else ""
                if label and sizes.setdefault(label, (size, entry.name))[0] != size:
                    raise InputError(
                        f"inputs {sizes[label][1]!r} and {entry.name!r} of {self.source} differ in {label!r}: "
                        f"{sizes[label][0]} and {size}; give both the same size"
                    )
        return given

    def _typed(self, entry: Input, value: Tensor) -> Tensor:
        if entry.dtype is None or value.dtype == entry.dtype:
            return value
        if value.is_floating_point() and entry.dtype.is_floating_point:
            return value  # the network may have been moved to another precision
        wanted = str(entry.dtype).removeprefix("torch.")
        if value.is_floating_point() or entry.dtype.is_floating_point or torch.bool in (entry.dtype, value.dtype):
            raise InputError(
                f"input {entry.name!r} of {self.source} is {str(value.dtype).removeprefix('torch.')}; the file says "
                f"{wanted}: convert it (x.to(torch.{wanted}))"
            )
        return value.to(entry.dtype)


def _forward(inputs: Sequence[Input]) -> Callable[..., Any]:
    """A forward that shows the graph's inputs as its parameters: loaders and exporters read their names there."""

    def forward(self: GraphNetwork, *args: Any, **kwargs: Any) -> Any:
        return self.compute(args, kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", kind), *(inspect.Parameter(entry.name, kind) for entry in inputs)]
    )
    return forward
