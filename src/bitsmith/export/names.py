"""Where a node of an exported graph came from: the names of sites and tensors inside module paths.

An applied network keeps its cells at ``_bitsmith.cells.<key of the site>`` and its activation quantizers at
``_bitsmith.tensors.<key of the tensor>|<format>``. Exporters carry module paths along with every node; this file is
the one place that reads them.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..model.intercept import CHILD
from ..model.keys import decode_key
from ..site import contains

CELLS = f"{CHILD}.cells."
TENSORS = f"{CHILD}.tensors."


def site_names(net: nn.Module) -> list[str]:
    """The sites of an applied network in execution order, without those whose inside is computed instead."""
    names = [decode_key(name[len(CELLS) :]) for name, _ in net.named_modules() if _is_cell(name)]
    return [name for name in names if not any(contains(name, other) for other in names)]


def _is_cell(path: str) -> bool:
    return path.startswith(CELLS) and "." not in path[len(CELLS) :]


@dataclass(frozen=True)
class Origin:
    """Whose computation a node is: of a ``site``, or of the conversion of a ``tensor`` into ``format``; else neither.

    ``path``: the innermost module's path, "" at the top.
    """

    site: str = ""
    tensor: str = ""
    format: str = ""
    path: str = ""


def parse_scopes(scopes: str | Iterable[str]) -> Origin:
    """The origin from module paths, outermost first (a list, or the list as text), as exporters give them.

    The innermost cell wins; a quantizer called inside a cell is the tensor's, not the site's.

    >>> parse_scopes("['', 'layer1.0', '_bitsmith.cells.layer1/0:add', '_bitsmith.tensors.layer1/0:add|u8', 'q']")
    Origin(site='', tensor='layer1.0:add', format='u8', path='layer1.0')
    >>> parse_scopes(["", "conv", "_bitsmith.cells.conv", "conv2d"]).site
    'conv'
    """
    return _parsed(scopes) if isinstance(scopes, str) else _origin(list(scopes))


@functools.lru_cache(2**14)  # the files of a plan's parts have the same nodes
def _parsed(scopes: str) -> Origin:
    try:
        return _origin(list(ast.literal_eval(scopes)))
    except (ValueError, SyntaxError):
        return Origin()


def _origin(paths: list[str]) -> Origin:
    own = [path for path in paths[:-1] if path and CELLS not in path and TENSORS not in path]
    path = own[-1] if own else ""
    for scope in reversed(paths):
        if TENSORS in scope:
            key, _, kind = scope.partition(TENSORS)[2].partition(".")[0].rpartition("|")
            return Origin(tensor=decode_key(key), format=kind, path=path)
        if CELLS in scope:
            return Origin(site=decode_key(scope.partition(CELLS)[2].partition(".")[0]), path=path)
    return Origin(path=path)
