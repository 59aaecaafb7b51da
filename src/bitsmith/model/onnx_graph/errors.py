"""What can be wrong with a file, with the graph in it, and with the inputs given to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class OnnxError(ValueError):
    """A file, a graph or an input that cannot be used: what, where, what to do."""


class OnnxFileError(OnnxError):
    """Not a readable ONNX file: missing, truncated, of another kind, or without its external data."""


class InvalidGraphError(OnnxError):
    """The graph contradicts itself: shapes that do not fit, sizes beyond int64, values that nobody computes."""


class UnsupportedError(OnnxError):
    """A valid graph of a kind that is not read: control flow, quantized, float16, another operator set."""


class QuantizedError(UnsupportedError):
    """A graph of integers: there is no float network in it to start from."""


class UnsupportedOperatorError(UnsupportedError):
    """Operators that have no translation. ``operators``: their names, each with the nodes that use it."""

    def __init__(self, operators: Mapping[str, Iterable[str]], where: str) -> None:
        self.operators = {name: tuple(nodes) for name, nodes in operators.items()}
        listed = "; ".join(f"{name} at {named(nodes)}" for name, nodes in self.operators.items())
        custom = any("::" in name for name in self.operators)
        super().__init__(
            f"{where} uses {len(self.operators)} operators that are not supported: {listed}. "
            + ("Export without custom domains (a plain float32 ONNX file), or " if custom else "Export ")
            + "the network from its own framework as a torch.nn.Module; docs/onnx_operators.md lists what is supported"
        )


class InputError(OnnxError):
    """Inputs that do not fit the graph's: their number, names, types or sizes."""


def named(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are.

    >>> named(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    found = list(names)
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(repr(name) for name in found[:most]) + rest
