"""Arguments that several commands share, and the values that their words stand for."""

from __future__ import annotations

import ast
import difflib
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..plan import Budget
    from ..targets.base import Target
    from ..technique import Technique

QUANTITIES = ("ms", "mib", "mj", "mm2", "drop")


class ArgumentError(ValueError):
    """A word on the command line that stands for nothing: says what would."""


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="file.py:function or package.module:function, build() -> nn.Module"
    )


def add_data(parser: ArgumentParser, task: bool = False) -> None:
    wanted = "task() -> bitsmith.Task" if task else "task() -> bitsmith.Task, or a function that returns a loader"
    parser.add_argument("--data", required=True, metavar="DATA", help=f"file.py:function, {wanted}")


def add_target(parser: ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--target",
        required=required,
        metavar="TARGET",
        help="onnxruntime, openvino, 'OpenVino(threads=4)', or your own: file.py:function",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads of the target (default: 2, or 1 of 1 CPU)"
    )


def add_out(parser: ArgumentParser, what: str, metavar: str = "DIR") -> None:
    parser.add_argument("-o", "--out", required=True, type=Path, metavar=metavar, help=what)


def add_seed(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same result (0)")


def add_batch(parser: ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size that is timed (1)")


def add_budget(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--drop", type=float, metavar="X", help="of the metric's mean, absolute: 0.01 is one point")
    group.add_argument("--ms", type=float, metavar="X", help="milliseconds per batch")
    group.add_argument("--mib", type=float, metavar="X", help="MiB (2^20 bytes) of the exported file")
    group.add_argument("--mj", type=float, metavar="X", help="millijoules per batch, on targets that have energy")
    group.add_argument("--mm2", type=float, metavar="X", help="square millimetres, on targets that model a chip")
    group.add_argument("--minimize", choices=QUANTITIES, help="what to minimize (ms, if --drop is the only limit)")


def add_techniques(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--techniques",
        nargs="+",
        metavar="T",
        help="what may be put at a site, such as 'Int(8, 8)' 'Int(4, 8)'; explore also takes: all",
    )


def positive(text: str) -> int:
    """A whole number from 1.

    >>> positive("2")
    2
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def budget(options: Namespace) -> Budget:
    """The limits that were given; at least one must be."""
    from ..plan import Budget

    limits = {name: getattr(options, name) for name in QUANTITIES if getattr(options, name) is not None}
    if not limits:
        raise ArgumentError("no limit was given: add --drop 0.01, --ms, --mib, --mj or --mm2")
    return Budget(**limits)


def techniques(texts: Iterable[str] | None) -> list[Technique] | None:
    """The techniques that the texts write down; None stays None."""
    if texts is None:
        return None
    from ..technique import Technique

    classes = technique_classes()
    found: list[Technique] = []
    for text in texts:
        value = construct(text, classes)
        if not isinstance(value, Technique):
            names = ", ".join(name for name, kind in classes.items() if issubclass(kind, Technique))
            raise ArgumentError(f"{text!r} is not a technique; there are {names}")
        found.append(value)
    return found


def technique_classes() -> dict[str, type]:
    """The built-in techniques by name, and the two data types that their fields take."""
    from .. import techniques as package
    from ..site import Format, Range
    from ..technique import Technique

    return {**_built_in(package, Technique), "Range": Range, "Format": Format}


def _built_in(package: ModuleType, base: type) -> dict[str, Any]:
    """The public subclasses of ``base`` in a package's modules: one a file, so none can be forgotten in a list."""
    import importlib
    import inspect
    import pkgutil

    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            public = isinstance(value, type) and not name.startswith("_") and value.__module__ == module.__name__
            public = public and not inspect.isabstract(value)
            if public and issubclass(value, base) and value is not base:
                found[name] = value
    return found


def target(name: str, threads: int | None = None) -> Target:
    """The target that a name (``openvino``), a value (``OpenVino(threads=4)``) or ``file.py:function`` stands for."""
    from ..targets.base import Target

    if ":" in name and "(" not in name:
        from ..model.load import called, load_object

        found = load_object(name)
        found = found if isinstance(found, Target) else called(found, name)
        if not isinstance(found, Target):
            raise ArgumentError(f"--target {name} gave {type(found).__name__}; a bitsmith Target was expected")
        return found
    classes = target_classes()
    known = {**classes, **{kind.name: kind for kind in classes.values()}}
    plain = known.get(name)
    if plain is not None:
        found = _default_target(plain, threads)
    else:
        found = construct(name, known)
        if threads is not None:
            raise ArgumentError(f"--threads {threads} and --target {name!r}: say the threads in one place only")
    assert isinstance(found, Target)
    return found


def _default_target(kind: type[Target], threads: int | None) -> Target:
    import dataclasses

    fields: list[str] = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    if threads is not None and "threads" not in fields:
        raise ArgumentError(f"--threads {threads}: the target {kind.name} has no threads")
    settings = {"threads": threads or default_threads()} if "threads" in fields else {}
    try:
        return kind(**settings)
    except TypeError as error:
        said = str(error).replace(".__init__()", "()")
        raise ArgumentError(f"{kind.name} needs its settings, as in --target '{kind.__name__}(...)': {said}") from None


def target_classes() -> dict[str, type[Target]]:
    """The built-in targets by class name; one whose runtime is not installed is there all the same."""
    from .. import targets as package
    from ..targets.base import Target

    return _built_in(package, Target)


def default_threads() -> int:
    """Two, or what the machine has."""
    return min(2, os.cpu_count() or 1)


def construct(text: str, classes: Mapping[str, type]) -> Any:
    """The value that ``Name(1, key=2)`` writes: a call of one of ``classes`` with literals, or with such calls.

    The text is read, never evaluated: any other expression is an error.

    >>> construct("complex(1, imag=2)", {"complex": complex})
    (1+2j)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ArgumentError(f"{text!r} cannot be read; write a value such as {_example(classes)!r}") from None
    if isinstance(tree, ast.Name):
        tree = ast.Call(func=tree, args=[], keywords=[])
    if not isinstance(tree, ast.Call):
        raise ArgumentError(f"{text!r} is not one of {', '.join(classes)}; write a value such as {_example(classes)!r}")
    return _value(tree, classes, text)


def _value(node: ast.expr, classes: Mapping[str, type], text: str) -> Any:
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ArgumentError(
                f"{text!r}: {ast.unparse(node)!r} is not a plain value; numbers, strings, None, True, False and "
                f"{', '.join(classes)} may stand there"
            ) from None
    kind = classes.get(node.func.id) if isinstance(node.func, ast.Name) else None
    if kind is None:
        written = ast.unparse(node.func)
        close = difflib.get_close_matches(written, classes, n=3, cutoff=0.5)
        place = "" if written == text.strip() else f"{text!r}: "
        raise ArgumentError(f"{place}{written!r} is none of {', '.join(close or classes)}")
    starred = [part for part in node.args if isinstance(part, ast.Starred)]
    if starred or any(keyword.arg is None for keyword in node.keywords):
        raise ArgumentError(f"{text!r}: * and ** cannot stand there; write each argument")
    args = [_value(part, classes, text) for part in node.args]
    named = {str(keyword.arg): _value(keyword.value, classes, text) for keyword in node.keywords}
    try:
        return kind(*args, **named)
    except TypeError as error:
        raise ArgumentError(f"{text!r}: {str(error).replace('.__init__()', '()')}") from None


def _example(classes: Mapping[str, type]) -> str:
    return "Int(8, 8)" if "Int" in classes else next(iter(classes), "")
