"""What prepare steps changed of a network's weights and biases, put into graphs that were exported without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.intercept import CHILD
from ..model.keys import encode_key
from ..plan import Plan
from ..site import Record, Site
from .derive import INTEGER, same_technique
from .rewrite import DEQUANTIZE, QUANTIZE

if TYPE_CHECKING:
    import onnx

State = Mapping[str, Tensor]
"""The state dict of a materialised network: its float parameters, the integers and scales of its cells and tensors."""

_INTEGERS = ("weight_q", "weight_q4", "bias_q", "bias_f")
"""What of a cell may differ: the graphs hold it under the name of its buffer. Scales they hold as constants."""
_NEW = "prepared."  # the end of a name says what the integers are


def changed_values(
    prepared: State, plan: Plan, fulls: Sequence[tuple[State, Plan]], base: State, record: Record
) -> list[dict[str, Tensor]] | None:
    """What the graph of each of ``fulls`` must hold instead, by state-dict key, for its sites of ``plan``.

    ``prepared``: of the plan with its steps; ``fulls``, ``base``: without any, as :func:`~.derive.derive` takes them.
    None if more than integers and biases of planned sites differ (a scale, a float weight, a bias that is new).
    """
    found: list[dict[str, Tensor]] = [{} for _ in fulls]
    shipped: set[str] = set()
    integer = {name: technique for name, technique in plan.sites.items() if isinstance(technique, INTEGER)}
    for name, technique in integer.items():
        index = next((k for k, (_, full) in enumerate(fulls) if same_technique(technique, full.get(name))), None)
        if index is None:
            return None
        prefix = f"{CHILD}.cells.{encode_key(name)}."
        mine, theirs = (
            {k: v for k, v in state.items() if k.startswith(prefix)} for state in (prepared, fulls[index][0])
        )
        if mine.keys() != theirs.keys():
            return None
        for key, value in mine.items():
            if key.removeprefix(prefix) in _INTEGERS:
                found[index][key] = value
            elif not torch.equal(value, theirs[key]):
                return None
        shipped |= _shipped(record.sites[name], any(key.removeprefix(prefix).startswith("bias_") for key in mine))
    tensors = f"{CHILD}.tensors."
    for key, value in prepared.items():
        known = (state[key] for state, _ in fulls if key in state)
        if key.startswith(tensors) and not any(torch.equal(value, other) for other in known):
            return None
    readers = _readers(record)
    for key, value in prepared.items():
        if key.startswith(f"{CHILD}.") or (key in base and torch.equal(value, base[key])):
            continue
        if key not in shipped or not readers.get(key, set()) <= integer.keys():
            return None
    return found


def with_values(model: onnx.ModelProto, values: State) -> onnx.ModelProto | None:
    """A copy with these in the place of its constants of that name; None if it has not each, of that type and shape.

    Constants that were equal may be one: two sites' under the name of one of them, or a bias of zeros and zero points,
    which stay.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {constant.name: constant for constant in copy.graph.initializer}
    for name, value in values.items():
        constant, array = constants.get(name), value.detach().cpu().contiguous().numpy()
        if constant is None or tuple(constant.dims) != array.shape:
            return None
        if onnx.helper.tensor_dtype_to_np_dtype(constant.data_type) != array.dtype:
            return None
        copy.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{_NEW}{name}"))
    for node in copy.graph.node:
        last = 1 if node.op_type in (QUANTIZE, DEQUANTIZE) else len(node.input)
        node.input[:last] = [f"{_NEW}{name}" if name in values else name for name in node.input[:last]]
    return copy


def _shipped(site: Site, bias: bool) -> set[str]:
    """State-dict keys that the cell of an integer site holds in a form of its own; ``bias``: its bias too."""
    keys = {key for operand in site.operands for key in operand.parameters}
    if bias:
        keys |= set(site.bias)
        if site.fold is not None:
            keys |= {f"{site.fold.module}.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    return keys


def _readers(record: Record) -> dict[str, set[str]]:
    """State-dict key -> the sites that read it."""
    folded = {site.fold.site for site in record.sites.values() if site.fold is not None}
    found: dict[str, set[str]] = {}
    for name, site in record.sites.items():
        for key in (*site.bias, *(key for operand in site.operands for key in operand.parameters)):
            if name not in folded:
                found.setdefault(key, set()).add(name)
    return found
