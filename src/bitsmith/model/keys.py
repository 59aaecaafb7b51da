"""Names of cells and quantizers as keys of modules, which must not hold a dot; and back."""

from __future__ import annotations

from ..site import Format


def encode_key(name: str) -> str:
    """A site or tensor name as a module key.

    >>> encode_key("layer1.0:add")
    'layer1/0:add'
    """
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")


def decode_key(key: str) -> str:
    """The inverse of :func:`encode_key`."""
    return key.replace("/", ".").replace("~1", "/").replace("~0", "~")


def tensor_key(tensor: str, fmt: Format) -> str:
    """The key of the quantizer of a tensor in a format.

    >>> tensor_key("layer1.0:relu", Format(8))
    'layer1/0:relu|u8'
    """
    detail = "" if fmt.range == type(fmt.range)() else f"-{fmt.range.method}{fmt.range.percentile:g}".replace(".", "_")
    if fmt.learn is not None:
        detail += f"-{fmt.learn.form}-{fmt.learn.backward}{fmt.learn.strength:g}".replace(".", "_")
    return f"{encode_key(tensor)}|{fmt}{detail}"
