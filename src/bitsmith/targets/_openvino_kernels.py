"""The operations of ``bitsmith-kernels`` in OpenVINO: where their extension is, and which sites they can compute."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export import binary
from ..export.translations import DOMAIN
from ..export.winograd import NCHW, OPERATION
from ..model.formats import place
from ..plan import Plan
from ..site import Format, Record, Site
from ..technique import No, Technique
from ..techniques.binary import Binary
from ..techniques.winograd import Winograd
from ._cpu import direct, integer_refusal
from .base import TargetError

if TYPE_CHECKING:
    import onnx
    import openvino as ov

    from .openvino import OpenVino

ONE_BIT = frozenset({binary.CONVOLUTION, binary.LINEAR})
"""Operations that multiply signs by signs."""

INSTALL = 'pip install ./kernels ".[kernels]", in a clone of Bitsmith, with a C++ compiler'
AGAIN = "pip install --force-reinstall --no-deps ./kernels, in a clone of Bitsmith"


@functools.cache
def extension() -> Path | No:
    """The file of the extension for the OpenVINO that is installed, or why there is none."""
    try:
        from openvino import __version__ as installed
    except ImportError as error:
        return No(f'OpenVINO is missing ({error}); install it with: pip install "bitsmith[openvino]"')
    try:
        from bitsmith_kernels import isas, openvino
    except ImportError as error:
        return No(f"the native kernels are not installed ({error}); install them with: {INSTALL}")
    try:
        found: Path = openvino.extension(installed)
        best = isas()[0]
    except ImportError as error:
        return No(str(error))
    if best == "reference":
        return No("this processor has none of the instruction sets that the native kernels are fast with")
    return found


def missing() -> No | None:
    """Why OpenVINO cannot compute our operation here; None if it can."""
    found = _known()
    return found if isinstance(found, No) else None


def missing_signs() -> No | None:
    """Why OpenVINO cannot compute layers of signs here; None if it can."""
    refusal = missing()
    if refusal is not None:
        return refusal
    import bitsmith_kernels

    if hasattr(bitsmith_kernels, "BinaryConv"):
        return None
    return No(f"these native kernels are older than those for signs; install them again with: {AGAIN}")


def core(openvino: Any, needed: bool) -> Any:
    """OpenVINO, knowing our operation if it is needed. Raises :class:`TargetError` where it cannot be loaded."""
    if not needed:
        return openvino.Core()
    found = _known()
    if isinstance(found, No):
        raise TargetError(f"the network has layers for the native kernels: {found}")
    return found


def _known() -> Any | No:
    path = extension()
    return path if isinstance(path, No) else _extended(path)


@functools.cache
def _extended(path: Path) -> Any | No:
    """Kept for good: with the last ``Core`` that knows it the library would go, under the models that it made."""
    import openvino

    made = openvino.Core()
    try:
        made.add_extension(str(path))
    except RuntimeError as error:
        last = str(error).strip().rpartition("\n")[2]  # the loader's own words
        return No(f"{path} cannot be loaded ({last}); install it again with: {AGAIN}")
    return made


def needed_by(network: Path | onnx.ModelProto) -> bool:
    """Whether a graph, or a file of OpenVINO or ONNX, has an operation of ours."""
    if isinstance(network, Path):
        names = (OPERATION.encode(), *(name.encode() for name in sorted(ONE_BIT)))
        marks = {".xml": (b'version="bitsmith"',), ".onnx": names}.get(network.suffix, ())
        return bool(marks) and any(mark in content for content in (network.read_bytes(),) for mark in marks)
    return any(node.domain == DOMAIN for node in network.graph.node)


def add_results(model: ov.Model, names: Collection[str]) -> set[str]:
    """Make results of those values that are integers of our operation, as the floats that they stand for, in NCHW."""
    from openvino import opset13

    found: set[str] = set()
    for node in model.get_ordered_ops():
        asked = node.output(0).get_names() & set(names) if node.get_type_name() == OPERATION else set()
        if not asked:
            continue
        given = node.get_attributes()
        levels = opset13.subtract(opset13.convert(node, "f32"), opset13.constant(np.float32(given["y_zero"])))
        value = opset13.multiply(levels, opset13.constant(np.float32(given["y_scale"])))
        result = opset13.result(opset13.transpose(value, opset13.constant(NCHW)))
        node.output(0).set_names(set())
        result.output(0).set_names(asked)
        model.add_results([result])
        found |= asked
    return found


def version() -> str | None:
    """Of the kernels that are installed; None where there are none."""
    try:
        import bitsmith_kernels
    except ImportError:
        return None
    return str(bitsmith_kernels.__version__)


def refusal(technique: Technique, site: Site, kernels: bool) -> No | None:
    """Why the operation does not compute a site under a technique of its form; None if it does."""
    if not kernels:
        return No("OpenVINO has no Winograd kernel; ours are used by OpenVino(kernels=True)")
    if not isinstance(technique, Winograd) or technique.transforms != "static" or technique.tile not in (2, 4):
        return No("native kernels have static transforms of tiles of 2 and 4")
    if technique.tap_bits == 32:
        return No("native kernels multiply integers of 8 or 16 bits")
    if len(site.operands[1].shape) != 4 or tuple(site.operands[1].shape[2:]) != (3, 3):
        return No("native kernels are for 3x3 in two dimensions")
    return missing()


def binary_refusal(technique: Binary, site: Site, target: OpenVino) -> No | None:
    """Why no operation multiplies the signs of a site; None if one does."""
    if not technique.activations:
        return integer_refusal(technique, site, "OpenVINO")
    if not target.kernels:
        return No(
            "size only: OpenVINO has no kernel for weights below 8 bits, it expands them to float; ours for signs is "
            "used by OpenVino(kernels=True)"
        )
    if target.bfloat16:
        return No(
            "the native kernel takes float32, and OpenVino(bfloat16=True) computes all that is not int8 in bfloat16"
        )
    if site.kind not in ("conv2d", "linear"):
        return No(
            f"the native kernel for signs is for convolutions in two dimensions and linear layers, not {site.kind}"
        )
    groups = site.arguments.get("groups", 1)
    if groups != 1:
        return No(f"{groups} groups: the native kernel for signs has one")
    weight = site.operands[1]
    products = math.prod(weight.shape[1:])
    if products > binary.MOST_PRODUCTS:
        return No(f"{products} products to a sum: the native kernel for signs has room for {binary.MOST_PRODUCTS}")
    return missing_signs()


def adapted(technique: Winograd, site: Site, kernels: bool, reduced: bool | None) -> Technique:
    """The technique on unsigned activations, or, with a warning, the direct convolution where it cannot run."""
    refused = refusal(technique, site, kernels)
    if refused is None:
        return dataclasses.replace(technique, signed=False)
    return direct(technique, site.name, refused, reduced)


def stored(sites: Mapping[str, Technique], record: Record) -> dict[str, Technique]:
    """The output of every Winograd convolution in 8 bits, which is all that the operation gives.

    Where its readers agree on a format, or it is taken into a stored sum, it has that one already.
    """
    written = {tensor for tensor, _ in place(Plan(dict(sites)), record).writes.values()}
    found = dict(sites)
    for name, technique in sites.items():
        if not isinstance(technique, Winograd) or technique.out is not None:
            continue
        tail = record.tensors[record.site(name).tail]
        behind = tail.readers[0] if len(tail.readers) == 1 and not tail.is_output else ""
        if tail.name not in written and not _taken_in(behind, tail.name, written, record):
            found[name] = dataclasses.replace(technique, out=Format(8, range=technique.range))
    return found


def _taken_in(name: str, tensor: str, written: Collection[str], record: Record) -> bool:
    """Whether the site is an addition of the tensor and another that is stored in 8 bits, as their sum is."""
    if not name or record.site(name).kind != "add":
        return False
    site = record.site(name)
    others = [operand.tensor for operand in site.activations if operand.tensor != tensor]
    return len(others) == 1 and {others[0], site.tail} <= set(written)
