"""One recorded forward pass: sites, shapes, costs, and which site's output feeds which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..operations import ACTIVATIONS, BY_FUNCTION, VALUE_PRESERVING, Operation, pads_with_zeros
from ..site import Fold, Operand, Record, Shape, Site, TensorInfo, inner_path
from . import decompose
from .flow import Identity, tensors
from .intercept import InterceptionError, Scope, within
from .locate import Locator

Key = tuple[str, str, int]


@dataclass
class _Slot:
    """One operand of a draft: what was seen over all its calls."""

    argument: str
    origins: set[_Origin | None]
    shape: Shape
    dtype: str
    parameters: tuple[str, ...]
    key: str
    value: Tensor | None  # of a constant

    @property
    def constant(self) -> bool:
        return self.value is not None


@dataclass(eq=False)
class _Draft:
    """A site while it is being recorded, before it has its final name."""

    key: Key
    operation: Operation | None
    slots: list[_Slot] = field(default_factory=list)
    out_shapes: tuple[Shape, ...] = ()
    out_dtypes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    tensor_arguments: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0
    macs: int = 0
    parent: Key | None = None
    opened: bool = False
    bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Origin:
    """The k-th output of a draft, or an input of the model."""

    draft: _Draft | None
    output: int
    name: str = ""


class Recorder:
    """The handler that records. ``expand``: which composites (by name so far) are to be seen inside."""

    sees_all = True

    def __init__(self, model: nn.Module, locator: Locator, inside: Callable[[str], bool]) -> None:
        self.model = model
        self.locator = locator
        self.inside = inside
        self.drafts: dict[Key, _Draft] = {}
        self.flow: Identity[_Origin] = Identity()
        self.constants: Identity[tuple[str, ...]] = Identity()
        self.escaped: set[_Origin] = set()
        self.padded: set[_Origin] = set()
        self.containers: set[str] = set()
        self.runs: dict[str, list[tuple[str, int]]] = {}
        self.open: list[Key] = []
        self.whole: list[_Draft] = []  # modules that are sites as a whole, being executed
        self.tensor_keys: dict[int, str] = {}
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.constants.mark(tensor, (key,))
            self.tensor_keys[id(tensor)] = key

    def begin(self, inputs: Mapping[str, Any]) -> None:
        return None

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(self, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operation = BY_FUNCTION.get(function)
        if self.whole:
            return self._within_module(operation, function, args, kwargs)
        if operation is None:
            return self._pass(function, args, kwargs)
        computes = self._computes(operation, args, kwargs)
        index = self.locator.enter(scope.path, operation.kind, computes)
        run = self.runs.setdefault(scope.path, [])
        if scope.sequence == 0:
            run.clear()
        scope.sequence += 1
        run.append((operation.kind, index))
        if not computes:
            return self._pass(function, args, kwargs)
        # what a composite is made of is not another module: it changes no name outside
        inside = inside_of(self.open[-1]) if self.open else ""
        self.containers.update(path for path in _ancestors(scope.path) if path.startswith(inside))
        key = (scope.path, operation.kind, index)
        draft = self._draft(key, operation)
        read = self._read(draft, operation, args, kwargs)
        if operation.role == "composite" and self.inside(provisional(key)) and decompose.available(operation.kind):
            output = self._inside(draft, operation, function, args, kwargs)
        else:
            output = function(*args, **kwargs)
        self._write(draft, output, read)
        return output

    def _inside(
        self,
        draft: _Draft,
        operation: Operation,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        self.open.append(draft.key)
        try:
            output = within(inside_of(draft.key), functools.partial(decompose.run, operation, args, kwargs))
        except decompose.ClosedError:
            return function(*args, **kwargs)
        finally:
            self.open.pop()
        draft.opened = True
        return output

    def module_call(
        self, path: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        key = (path, "module", 0)
        draft = self._draft(key, None)
        given = [t for t in (*tensors(args), *tensors(dict(kwargs))) if isinstance(t, Tensor)]
        self._operands(draft, [(f"input{i}", t) for i, t in enumerate(given)])
        self.whole.append(draft)
        try:
            output = inner(*args, **kwargs)
        finally:
            self.whole.pop()
        self._write(draft, output)
        return output

    def _within_module(
        self,
        operation: Operation | None,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Inside a module that is one site nothing else is a site; what it costs is the module's."""
        output = function(*args, **kwargs)
        if operation is not None:
            read = [tuple(t.shape) for t in operation.split(args, kwargs)[0] if isinstance(t, Tensor)]
            self.whole[-1].macs += operation.macs(read, [tuple(t.shape) for t in tensors(output)])
        return output

    def _computes(self, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the call is a site: arithmetic on activations, not bookkeeping on constants or integers."""
        if not operation.on_tensors(args, kwargs):
            return False
        found = [t for t in operation.split(args, kwargs)[0] if isinstance(t, Tensor)]
        if operation.kind in ("add", "sub", "mul"):
            # a constant beside an activation is not a meeting of two activations
            return all(self.constants.of(t) is None for t in found)
        if operation.kind == "embedding":
            return True
        return any(t.is_floating_point() and self.constants.of(t) is None for t in found)

    def _pass(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        output = function(*args, **kwargs)
        made = [t for t in tensors(output) if isinstance(t, Tensor)] if _may_hold_tensors(output) else []
        if not made:
            return output
        given = [*tensors(args), *tensors(dict(kwargs))]
        keys = [self.constants.of(t) for t in given]
        if given and all(key is not None for key in keys):
            depends = tuple(dict.fromkeys(k for key in keys if key is not None for k in key))
            for tensor in made:
                if self.constants.of(tensor) is None:
                    self.constants.mark(tensor, depends)
            return output
        padding = pads_with_zeros(function, args, kwargs)
        if (padding or function in VALUE_PRESERVING) and given:
            origin = self.flow.of(given[0])
            if padding and origin is not None:
                self.padded.add(origin)
            if origin is not None:
                for tensor in made:
                    if tensor.is_floating_point():
                        self.flow.mark(tensor, origin)
            return output
        for tensor in given:
            origin = self.flow.of(tensor)
            if origin is not None and not any(tensor is t for t in made):
                self.escaped.add(origin)
        return output

    # -- drafts --------------------------------------------------------------------------------------------------

    def _draft(self, key: Key, operation: Operation | None) -> _Draft:
        draft = self.drafts.get(key)
        if draft is None:
            draft = self.drafts[key] = _Draft(key, operation, parent=self.open[-1] if self.open else None)
        return draft

    def _read(
        self, draft: _Draft, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[Shape]:
        """Note what the call reads; the shapes of its operands."""
        operands, rest = operation.split(args, kwargs)
        if operation.variadic:
            named = [(f"{operation.operands[0]}{i}", t) for i, t in enumerate(operands)]
        else:
            names = [name for name in operation.operands if name in operation.bind(args, kwargs)]
            named = list(zip(names, operands, strict=True))
        given = [(name, t) for name, t in named if isinstance(t, Tensor)]
        self._operands(draft, given)
        if not draft.calls:
            draft.arguments = {k: v for k, v in rest.items() if _plain(v)}
            bias = rest.get("bias")
            draft.bias = (self.constants.of(bias) or ()) if isinstance(bias, Tensor) else ()
            # activations among them (masks, indices) must not be kept alive
            draft.tensor_arguments = {
                k: v for k, v in rest.items() if isinstance(v, Tensor) and self.constants.of(v) is not None
            }
        return [tuple(t.shape) for _, t in given]

    def _operands(self, draft: _Draft, named: list[tuple[str, Tensor]]) -> None:
        for position, (argument, tensor) in enumerate(named):
            origin = self.flow.of(tensor)
            depends = self.constants.of(tensor)
            if position >= len(draft.slots):
                draft.slots.append(
                    _Slot(
                        argument,
                        {origin},
                        tuple(tensor.shape),
                        str(tensor.dtype).removeprefix("torch."),
                        depends or (),
                        self.tensor_keys.get(id(tensor), ""),
                        tensor.detach() if depends else None,
                    )
                )
            else:
                slot = draft.slots[position]
                slot.origins.add(origin)
                same = self.tensor_keys.get(id(tensor), "") == slot.key and tuple(tensor.shape) == slot.shape
                if depends is None or depends != slot.parameters or not same:
                    slot.value = None  # another tensor at another call: no single weight

    def _write(self, draft: _Draft, output: Any, read: Sequence[Shape] = ()) -> None:
        made = list(tensors(output))
        if draft.operation is not None and draft.operation.kind == "multi_head_attention_forward":
            made = made[:1]
        for index, tensor in enumerate(made):
            if not draft.opened or self.flow.of(tensor) is None:  # else a site inside has written it
                self.flow.mark(tensor, _Origin(draft, index))
        if not draft.calls:
            draft.out_shapes = tuple(tuple(t.shape) for t in made)
            draft.out_dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in made)
        if draft.operation is not None and made:
            draft.macs += draft.operation.macs(read, [tuple(t.shape) for t in made])
        draft.calls += 1


def record(
    model: nn.Module,
    recorder: Recorder,
    run: Callable[[], Any],
    inputs: Mapping[str, Tensor],
) -> Record:
    """Run once in eval mode without gradients and return what was seen. ``inputs``: the model's inputs by name."""
    for name, tensor in inputs.items():
        recorder.flow.mark(tensor, _Origin(None, 0, f"@{name}"))
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            output = run()
    finally:
        for module, flag in flags.items():
            module.training = flag
    if not recorder.drafts:
        raise InterceptionError(
            f"not one site was seen in {type(model).__name__}: its forward computes outside of torch functions "
            "(TorchScript, numpy, a custom C++ operation?); give a model whose layers are torch operations"
        )
    recorder.locator.finish(recorder.containers)
    recorder.locator.sequences.update(recorder.runs)
    return _Assembly(model, recorder).assemble(output)


class _Assembly:
    """Turns drafts into sites."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.model = model
        self.recorder = recorder
        self.names: dict[Key, str] = {}
        for key in recorder.drafts:
            self.names[key] = key[0] if key[1] == "module" else recorder.locator.names[key]
        self.by_name = {self.names[key]: draft for key, draft in recorder.drafts.items()}
        self.modules = dict(model.named_modules())

    def tensor_name(self, origin: _Origin) -> str:
        if origin.draft is None:
            return origin.name
        name = self.names[origin.draft.key]
        return f"{name}#{origin.output}" if origin.output else name

    def assemble(self, output: Any) -> Record:
        sites: dict[str, Site] = {}
        shapes: dict[str, tuple[Shape, str, str]] = {}
        readers: dict[str, list[str]] = {}
        for key, draft in self.recorder.drafts.items():
            name = self.names[key]
            writes = tuple(f"{name}#{k}" if k else name for k in range(len(draft.out_shapes)))
            for tensor, shape, dtype in zip(writes, draft.out_shapes, draft.out_dtypes, strict=True):
                shapes[tensor] = (shape, dtype, name)
            operands = tuple(self._operand(name, index, slot) for index, slot in enumerate(draft.slots))
            for slot in draft.slots:
                if len(slot.origins) > 1:  # each call reads another tensor
                    self.recorder.escaped.update(o for o in slot.origins if o is not None)
            for operand in operands if not draft.opened else ():
                if not operand.constant:
                    readers.setdefault(operand.tensor, []).append(name)
                    if operand.tensor.startswith("@") or "<" in operand.tensor:
                        shapes.setdefault(operand.tensor, (operand.shape, operand.dtype, ""))
            role: Literal["integer", "float", "composite"] = draft.operation.role if draft.operation else "composite"
            sites[name] = Site(
                name=name,
                kind=key[1],
                path=key[0],
                role=role,
                operands=operands,
                writes=writes,
                out_shapes=draft.out_shapes,
                calls=draft.calls,
                macs=draft.macs,
                arguments=draft.arguments,
                tail=writes[0] if writes else name,
                parent=self.names[draft.parent] if draft.parent is not None else None,
                bias=draft.bias,
            )
        outputs = tuple(
            self.tensor_name(origin)
            for origin in (self.recorder.flow.of(t) for t in tensors(output))
            if origin is not None
        )
        escaped = {self.tensor_name(origin) for origin in self.recorder.escaped}
        infos = {
            name: TensorInfo(
                name,
                shape,
                dtype,
                producer,
                (*readers.get(name, ()), *(("?",) if name in escaped else ())),
                name in outputs,
            )
            for name, (shape, dtype, producer) in shapes.items()
        }
        padded = {self.tensor_name(origin) for origin in self.recorder.padded}
        for name in sites:
            sites[name] = self._epilogue(sites[name], sites, infos, padded)
        return Record(
            sites,
            infos,
            outputs,
            weights={
                (self.names[key], index): slot.value
                for key, draft in self.recorder.drafts.items()
                for index, slot in enumerate(draft.slots)
                if slot.value is not None
            },
            biases={
                self.names[key]: draft.tensor_arguments["bias"].detach()
                for key, draft in self.recorder.drafts.items()
                if "bias" in draft.tensor_arguments and key[1] != "batch_norm"
            },
            folds={site.name: self._statistics(site.fold) for site in sites.values() if site.fold is not None},
        )

    def _statistics(self, fold: Fold) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        module: Any = self.model.get_submodule(fold.module)
        mean, variance, gamma, beta = (
            None if tensor is None else tensor.detach()
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias)
        )
        assert mean is not None  # _fold requires both
        assert variance is not None
        return mean, variance, gamma, beta, fold.eps

    def _operand(self, name: str, index: int, slot: _Slot) -> Operand:
        origin = next(iter(slot.origins)) if len(slot.origins) == 1 else None
        tensor = self.tensor_name(origin) if origin is not None else f"{name}<{index}"
        return Operand(slot.argument, tensor, slot.shape, slot.dtype, slot.constant, slot.key, slot.parameters)

    def _epilogue(
        self, site: Site, sites: Mapping[str, Site], infos: Mapping[str, TensorInfo], padded: Set[str]
    ) -> Site:
        """The normalisation and the ReLU-like function that only this site feeds, and whether the first can fold."""
        if site.role == "composite" or not site.writes or site.kind in ACTIVATIONS or site.kind == "batch_norm":
            return site
        members: list[str] = []
        fold: Fold | None = None
        tail = site.writes[0]
        while True:
            info = infos[tail]
            if info.is_output or len(info.readers) != 1 or info.readers[0] not in sites:
                break
            if tail in padded:  # a normalisation moves the zeros too: it cannot fold into what made the rest
                break
            reader = sites[info.readers[0]]
            if reader.calls != site.calls or len(reader.writes) != 1:
                break
            if reader.kind == "batch_norm" and not members:
                fold = self._fold(reader) if _foldable(site) else None
                if fold is None:
                    break
            elif reader.kind not in ACTIVATIONS or (members and sites[members[-1]].kind in ACTIVATIONS):
                break
            members.append(reader.name)
            tail = reader.writes[0]
        return replace(site, epilogue=tuple(members), tail=tail, fold=fold)

    def _fold(self, reader: Site) -> Fold | None:
        """A normalisation folds if its statistics are the attributes of a module that is in eval."""
        draft = self.by_name[reader.name]
        module = self.modules.get(reader.path)
        if module is None or draft.arguments.get("training", False):
            return None
        for argument in ("running_mean", "running_var", "weight", "bias"):
            if getattr(module, argument, None) is not draft.tensor_arguments.get(argument):
                return None
        if draft.tensor_arguments.get("running_mean") is None:
            return None
        return Fold(reader.name, reader.path, float(draft.arguments.get("eps", 1e-5)))


def _foldable(site: Site) -> bool:
    """Whether the normalised axis of its output (the second) is the one that its weight gives."""
    if site.weight is None:
        return False
    return site.kind.startswith("conv") or (site.kind == "linear" and len(site.out_shapes[0]) == 2)


def provisional(key: Key) -> str:
    """A composite's name before it is known whether it is its module's only operation: never abbreviated."""
    path, kind, index = key
    return f"{path}:{kind}" + (f".{index}" if index else "")


def inside_of(key: Key) -> str:
    """The module path under which the inside of a composite lives."""
    return inner_path(provisional(key))


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _may_hold_tensors(value: Any) -> bool:
    return isinstance(value, (Tensor, tuple, list, Mapping))
