"""What the command line's own arguments name: ``file.py:function`` and ``package.module:function``.

The one place that imports something because a name says so. No file's content ever reaches it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..data import Forward
    from ..task import Task


class LoadError(ValueError):
    """A name that leads to nothing usable: says which, why, and what is close. Keeps the user's own traceback."""


def load_object(name: str) -> Any:
    """The object called ``package.module:attribute`` or ``file.py:attribute``.

    The file is imported as ``python file.py`` would see it (its folder comes first on the path), once. Raises
    :class:`LoadError`.

    >>> load_object("fractions:Fraction")
    <class 'fractions.Fraction'>
    """
    # the last colon: a Windows path has one of its own
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        known = f"; it has {_listed(_public(_module(name, name)))}" if _is_file(name) and Path(name).is_file() else ""
        example = f"{name or 'net.py'}:build" if not colon else "net.py:build"
        raise LoadError(f"{name!r}: write file.py:function or package.module:function, such as {example}{known}")
    found: Any = _module(place, name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LoadError(f"{name}: {_named(found)} has no {part!r}; {_closest(part, _public(found))}") from None
    return found


def load_model(name: str) -> nn.Module:
    """The model that ``build() -> nn.Module`` returns, in evaluation mode; a module object is taken as it is.

    ``net.onnx`` and ``net.pt2`` are files that hold a network (a ``.pt2`` is unpickled, as a ``.py`` is run).
    """
    from torch import nn

    if name.endswith((".onnx", ".pt2")):
        from .read import read

        try:
            return read(name, trusted=True)
        except ValueError as error:
            raise LoadError(str(error)) from error
    found = load_object(name)
    model = found if isinstance(found, nn.Module) else called(found, name)
    if isinstance(model, nn.Module):
        return model.eval()
    hint = "; build the model and load the weights into it: model.load_state_dict(...)" if _is_state(model) else ""
    raise LoadError(f"{name} gave {_what(model)}; a torch.nn.Module was expected{hint}")


def load_task(name: str) -> Task:
    """The task that ``task() -> bitsmith.Task`` returns; a task object is taken as it is."""
    from ..task import Task

    found = load_object(name)
    task = found if isinstance(found, Task) else called(found, name)
    if not isinstance(task, Task):
        raise LoadError(
            f"{name} gave {_what(task)}; a bitsmith.Task was expected: "
            "Task(calibration=..., validation=..., metric=bitsmith.metrics.top1)"
        )
    return task


def load_calibration(name: str) -> tuple[Iterable[Any], Forward | None]:
    """``(loader, forward)`` of a task's calibration data, or of a function that returns a loader and no task."""
    from ..data import check_loader
    from ..task import Task

    found = load_object(name)
    data = called(found, name) if callable(found) else found
    if isinstance(data, Task):
        return data.calibration, data.forward
    check_loader(data, "calibration")
    loader: Iterable[Any] = data
    return loader, None


def called(function: Any, name: str) -> Any:
    """``function()``, where ``name`` led to it; what it raises is told with its traceback (:class:`LoadError`)."""
    if not callable(function):
        raise LoadError(f"{name} is {_what(function)}; a function that takes no arguments was expected")
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise LoadError(
            f"{name}{inspect.signature(function)} needs arguments, but it is called without any: "
            "write a function without, or give them defaults"
        ) from None
    except ValueError:
        pass  # a built-in that does not tell its signature
    return _guarded(function, f"{name}() failed")


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _module(place: str, name: str) -> ModuleType:
    if _is_file(place):
        return _from_file(Path(place), name)
    _first_on_path(Path.cwd())  # the console script lacks it, python -m has it
    try:
        missing = importlib.util.find_spec(place) is None
    except (ModuleNotFoundError, ValueError):
        missing = True
    if missing:
        raise LoadError(
            f"{name}: no module is called {place!r} here or in this Python; for a file write file.py:function"
        )
    module: ModuleType = _guarded(lambda: importlib.import_module(place), f"importing {place} failed")
    return module


def _from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        beside = sorted(file.name for file in folder.glob("*.py")) if folder.is_dir() else []
        if path.is_dir():
            raise LoadError(f"{name}: {path} is a folder; name a file in it, such as {path / 'net.py'}:build")
        place = f"the folder {folder} does not exist" if not folder.is_dir() else _closest(path.name, beside)
        raise LoadError(f"{name}: there is no file {path} (from {Path.cwd()}); {place}")
    path = path.resolve()
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")  # some modules answer every other question with an error
        if isinstance(file, str) and Path(file) == path and module.__name__ != "__main__":
            return module
    _first_on_path(path.parent)
    # under its own name, so that another file of the user's that imports it gets the same module
    own = path.stem
    if not own.isidentifier() or own in sys.modules:
        own = f"_{own}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(own, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{name}: {path} is not a Python file; its name must end in .py")
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # dataclasses look their module up while it is executed
    try:
        _guarded(lambda: loader.exec_module(module), f"importing {path} failed")
    except BaseException:
        sys.modules.pop(own, None)
        raise
    return module


def _first_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _guarded(run: Callable[[], Any], failed: str) -> Any:
    try:
        return run()
    except SystemExit as error:
        raise LoadError(
            f"{failed}: it ends the program (exit {error.code}); put that under if __name__ == '__main__':"
        ) from error
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{failed}: {type(error).__name__}: {error}\n{_their_traceback(error)}") from error


def _their_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on, without this file's and the import machinery's frames."""
    told = traceback.TracebackException.from_exception(error)
    told.stack[:] = [f for f in told.stack if f.filename != __file__ and not f.filename.startswith("<frozen importlib")]
    return "".join(told.format()).rstrip()


def _public(owner: Any) -> list[str]:
    """What a user may have meant: names defined there, not what was imported into it."""
    home = owner.__name__ if isinstance(owner, ModuleType) else None
    return [
        name
        for name, value in getattr(owner, "__dict__", {}).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and (home is None or getattr(value, "__module__", home) == home)
    ]


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"closest: {', '.join(close)}" if close else f"there is {_listed(known)}"


def _listed(names: list[str]) -> str:
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "nothing"


def _named(value: Any) -> str:
    return str(getattr(value, "__file__", None) or getattr(value, "__name__", None) or type(value).__name__)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _what(value: Any) -> str:
    from ..data import describe

    return describe(value)
