"""Seeing every operation of a running model, and knowing where in the model it is.

``instrument`` prepares a copy of a model: while its forward runs, a ``TorchFunctionMode`` hands each call to a
*handler* together with the :class:`Scope` of the module that is executing. Modules that are run outside the root's
forward (activation checkpointing recomputes that way, and users call submodules) enter the mode by themselves.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ..operations import BY_FUNCTION

CHILD = "_bitsmith"
"""The child module that holds everything an applied plan adds."""

Position = tuple[tuple[int, int], ...]


class InterceptionError(RuntimeError):
    """The model cannot be seen: what hides it, and what to do."""


class Handler(Protocol):
    """What decides about the calls of one instrumented model. ``deepcopy`` of the model copies it along."""

    sees_all: bool

    def call(
        self, scope: Scope, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any: ...

    def module_call(
        self, path: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any: ...

    def begin(self, inputs: Mapping[str, Any]) -> None: ...


class Scope:
    """One execution of one module: its path and how many calls of its own were seen (for compiled replay)."""

    __slots__ = ("checkpointed", "grad", "path", "sequence")

    def __init__(self, path: str) -> None:
        self.path = path
        self.sequence = 0
        self.checkpointed = _saved_tensor_hooks()
        self.grad = torch.is_grad_enabled()


class Interceptor:
    """Shared by the hooks of one instrumented model."""

    def __init__(self, handler: Handler, parameters: tuple[str, ...] = ()) -> None:
        self.handler = handler
        self.parameters = parameters

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the root's forward by name: those of its parameters, then ``input<k>``."""
        further = [f"input{k}" for k in range(len(self.parameters), len(args))]
        return {**dict(zip((*self.parameters, *further), args, strict=False)), **kwargs}


class _Mode(TorchFunctionMode):
    def __init__(self, interceptor: Interceptor) -> None:
        super().__init__()
        self.interceptor = interceptor
        self.scopes: list[Scope] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = self.interceptor.handler
        if handler.sees_all or func in BY_FUNCTION:
            return handler.call(self.scopes[-1], func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_threads = threading.local()


def _modes() -> list[_Mode]:
    modes: list[_Mode] | None = getattr(_threads, "modes", None)
    if modes is None:
        modes = _threads.modes = []
    return modes


def within(path: str, run: Callable[[], Any]) -> Any:
    """Run ``run`` with the mode on again, as if the module ``path`` were executing (for decompositions)."""
    mode = _modes()[-1]
    mode.scopes.append(Scope(path))
    try:
        with mode:
            return run()
    finally:
        mode.scopes.pop()


def nested(name: str, run: Callable[[], Any]) -> Any:
    """Inside a decomposition: run ``run`` as if a submodule ``name`` of the executing one were executing.

    Needed where one line of a decomposition computes with several weights.
    """
    mode = _modes()[-1]
    mode.scopes.append(Scope(f"{mode.scopes[-1].path}.{name}"))
    try:
        return run()
    finally:
        mode.scopes.pop()


class _Enter:
    """Forward pre-hook of one submodule."""

    def __init__(self, interceptor: Interceptor, path: str) -> None:
        self.interceptor = interceptor
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        modes = _modes()
        if not modes or modes[-1].interceptor is not self.interceptor:
            # run outside the root's forward: recomputation of a checkpoint, or the user's own call
            mode = _Mode(self.interceptor)
            modes.append(mode)
            mode.__enter__()  # type: ignore[no-untyped-call]
        modes[-1].scopes.append(Scope(self.path))


class _Leave:
    """Forward hook of one submodule, called even if the forward raised."""

    def __init__(self, interceptor: Interceptor) -> None:
        self.interceptor = interceptor

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        modes = _modes()
        if not modes or modes[-1].interceptor is not self.interceptor:
            return
        mode = modes[-1]
        mode.scopes.pop()
        if not mode.scopes:
            modes.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def run_root(
    interceptor: Interceptor, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """One top-level forward under the mode."""
    if not torch.compiler.is_compiling() and sys._getframe(1).f_code is not _FORWARD:
        warnings.warn(
            "torch.compile broke the graph inside a network that carries a plan: the whole of it runs in eager mode, "
            "with the same result (torch.compile(net, fullgraph=True) says what broke it)",
            RuntimeWarning,
            stacklevel=3,
        )
    modes = _modes()
    if not modes or modes[-1].interceptor is not interceptor:  # else the model calls itself
        interceptor.handler.begin(interceptor.named(args, kwargs))
    mode = _Mode(interceptor)
    mode.scopes.append(Scope(""))
    modes.append(mode)
    try:
        with mode:
            return forward(*args, **kwargs)
    finally:
        # whatever was left open by an exception is closed with it
        while modes.pop() is not mode:
            pass


def _root_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run_root(self.__dict__["_interceptor"], functools.partial(original, self), args, kwargs)

    return forward


_FORWARD = next(c for c in _root_forward.__code__.co_consts if isinstance(c, types.CodeType))


def _skip_pieces() -> None:
    """Keep Dynamo from compiling pieces of a network whose graph it broke: they would pass the mode twice."""
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # private to torch; without it a call in a piece is an error, never a wrong name
        return
    set_code_exec_strategy(run_root.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _module_forward(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes = _modes()
        inner = functools.partial(original, self)
        return modes[-1].interceptor.handler.module_call(path, inner, args, kwargs)

    return forward


def instrument(model: nn.Module, handler: Handler, modules: tuple[str, ...] = ()) -> Interceptor:
    """Prepare ``model`` (a copy that may be changed): its forward and its submodules' report to ``handler``.

    ``modules``: paths of modules that are sites as a whole.

    Raises ``InterceptionError`` for TorchScript modules: their operations run in C++ and cannot be seen.
    """
    interceptor = Interceptor(handler, _positional(model))
    _skip_pieces()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"the submodule {path!r}" if path else "the model"
            raise InterceptionError(
                f"{where} is a TorchScript module ({type(module).__name__}): its operations run in C++ and cannot be "
                "intercepted; give the original nn.Module"
            )
        if path and path.partition(".")[0] != CHILD:
            module.register_forward_pre_hook(_Enter(interceptor, path), prepend=True)
            module.register_forward_hook(_Leave(interceptor), always_call=True)
        if path in modules:
            module.forward = types.MethodType(_module_forward(type(module).forward, path), module)
    model.__dict__["_interceptor"] = interceptor
    model.forward = types.MethodType(_root_forward(_class_forward(model)), model)
    return interceptor


def _positional(model: nn.Module) -> tuple[str, ...]:
    """Names of the forward's parameters that may be given by position."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _class_forward(model: nn.Module) -> Callable[..., Any]:
    own = model.__dict__.get("forward")
    if own is not None:  # an instance-level forward of the user's
        return own.__func__ if isinstance(own, types.MethodType) else _without_self(own)
    return type(model).forward


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return forward


def _boundaries() -> frozenset[types.CodeType]:
    """Code of the frames that separate a module's forward from whoever called the module."""
    call = nn.Module._call_impl.__code__
    inner = [c for c in call.co_consts if isinstance(c, types.CodeType) and c.co_name == "inner"]
    return frozenset((call, run_root.__code__, within.__code__, nested.__code__, *inner))


_BOUNDARIES = _boundaries()
_BOUNDARY_IDS = frozenset(map(id, _BOUNDARIES))  # hashing a code object reads all of it
# the files of the frames between a module's forward and its caller's: torch.export puts its own in between
_CALLING = frozenset(
    str(Path(torch.__file__).parent.joinpath(*parts))
    for parts in (
        ("nn", "modules", "module.py"),
        ("fx", "_symbolic_trace.py"),
        ("fx", "experimental", "proxy_tensor.py"),
    )
)
_OWN = _Mode.__torch_function__.__code__
_REENTRANT = CheckpointFunction.forward.__code__


# Python functions of torch dispatch to the mode from their own frames in eager, from the caller's in compiled code
_DISPATCH = frozenset(
    str(inspect.getsourcefile(m)) for m in (torch.overrides, torch.functional, torch.nn.functional, torch._tensor)
)


_ranges: dict[int, tuple[types.CodeType, tuple[int, ...]]] = {}


def _place(code: types.CodeType, offset: int) -> tuple[int, int]:
    """A code object and the expression in it that is being computed.

    Told by lines and columns: the offset of one call changes when the interpreter specialises it, and Dynamo has
    offsets of its own. (``python -X no_debug_ranges`` has lines only.)
    """
    known = _ranges.get(id(code))
    if known is None:
        # the code object is kept, so that its id stays its own
        known = _ranges[id(code)] = (code, tuple(_packed(p) for p in code.co_positions()))
    return id(code), known[1][offset // 2]


def _packed(range: Iterable[int | None]) -> int:
    """Line, last line, column and last column as one number."""
    packed = 0
    for number in range:
        packed = packed << 24 | (number or 0)
    return packed


def position(outer: bool = False) -> Position:
    """Where in the executing module's forward the current call is: code and instruction of every frame up to it.

    ``outer``: and where in the caller's forward the module was called.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _OWN:
        frame = frame.f_back
    frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_code.co_filename in _DISPATCH:
        frame = frame.f_back
    found: list[tuple[int, int]] = []
    for _ in range(2 if outer else 1):
        while frame is not None and frame.f_code.co_filename in _CALLING:
            frame = frame.f_back
        while frame is not None and id(frame.f_code) not in _BOUNDARY_IDS:
            found.append(_place(frame.f_code, frame.f_lasti))
            frame = frame.f_back
    return tuple(found)


def compiled_position(outer: bool = False) -> Position | None:
    """The same while Dynamo traces, from its own frames; None if this torch does not show them."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        frame: Any = InstructionTranslator.current_tx().output.current_tx
        while frame.f_code is not _OWN:
            frame = frame.parent
        frame = frame.parent
        while frame is not None and frame.f_code.co_filename in _DISPATCH:
            frame = frame.parent
        found: list[tuple[int, int]] = []
        for _ in range(2 if outer else 1):
            while frame is not None and frame.f_code.co_filename in _CALLING:
                frame = frame.parent
            while frame is not None and id(frame.f_code) not in _BOUNDARY_IDS:
                at = frame.current_instruction.positions
                found.append((id(frame.f_code), _packed((at.lineno, at.end_lineno, at.col_offset, at.end_col_offset))))
                frame = frame.parent
        return tuple(found)
    except (ImportError, AttributeError):  # private to torch
        return None


# what torch.compiler.assume_constant_result does, which would import Dynamo (over a second) here
compiled_position._dynamo_marked_constant = True  # type: ignore[attr-defined]


def where() -> str:
    """The user's line of the current call, for messages: ``file:line``."""
    if torch.compiler.is_dynamo_compiling():
        return "a place in compiled code"
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _OWN:
        frame = frame.f_back
    while frame is not None:
        frame = frame.f_back
        if frame is not None and "/torch/" not in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown place"


def _saved_tensor_hooks() -> bool:
    """Whether saved-tensor hooks are active: non-reentrant activation checkpointing installs them."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_checkpointed_function(scope: Scope) -> bool:
    """Whether the call is inside a *function* that is checkpointed within the executing module.

    Its recomputation happens in no module, so it cannot be intercepted.
    """
    if torch.compiler.is_compiling() or not scope.grad:
        return False
    if torch.is_grad_enabled():
        return _saved_tensor_hooks() and not scope.checkpointed
    # reentrant checkpointing turns gradients off while it runs the function
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and id(frame.f_code) not in _BOUNDARY_IDS:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False
