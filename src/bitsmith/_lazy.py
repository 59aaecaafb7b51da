"""Names of a module that are loaded when they are asked for: importing Bitsmith costs little."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loader(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module`` (PEP 562). ``places``: name -> the module of this package that has it."""

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__package__}.{places[name]}"), name)

    return load
