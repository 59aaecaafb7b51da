"""Operators that read or write at indices: Gather, Scatter, TopK and the like. Negative indices count from the end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host
from .graph import Built, Call, Compute, Given, Operator, Own, Weight


def _gather(call: Call) -> Compute | Built:
    axis = call.attribute("axis", 0)
    table, where = call.constant(0), call.constant(1)
    if table is not None and axis == 0 and table.dim() == 2 and table.is_floating_point():
        # the rows of a table of vectors: an embedding
        return Built(_embedding, (Given(1, tensor=True), Own("weight")), {"weight": call.weight(0)})
    if where is None:
        if table is not None:
            weight = call.weight(0, learned=table.is_floating_point())
            return Built(lambda x, at: _take(x, at, axis), (Own("weight"), Given(1)), {"weight": weight})
        return lambda x, at: _take(x, at, axis)
    if where.dim() == 0:
        at = int(where)
        return Built(lambda x: x.select(axis, at), (Given(0, tensor=True),))
    found = tuple(where.flatten().tolist())
    if where.dim() == 1 and len(found) == 1 and found[0] >= 0:
        return Built(lambda x: x.narrow(axis, found[0], 1), (Given(0, tensor=True),))
    return Built(
        lambda x, index: _take(x, index, axis),
        (Given(0, tensor=True), Own("index")),
        {"index": Weight(where, call.graph.key(call.node.inputs[1]), learned=False)},
    )


def _embedding(index: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(index, weight)


def _take(x: Tensor, index: Any, axis: int) -> Tensor:
    if not isinstance(index, Tensor):
        if not isinstance(index, tuple):
            return x.select(axis, index)
        index = host.as_tensor(index, x.device)
    index = _positive(index, x.shape[axis])
    if index.dim() == 1:
        return x.index_select(axis, index)
    axis %= x.dim()
    taken = x.index_select(axis, index.flatten())
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _positive(index: Tensor, size: Any) -> Tensor:
    return torch.where(index < 0, index + size, index)


def _gather_elements(call: Call) -> Compute:
    axis = call.attribute("axis", 0)
    return lambda x, index: torch.gather(x, axis, _positive(index, x.shape[axis]))


def _rows(x: Tensor, index: Tensor, batch: int) -> tuple[Tensor, ...]:
    """Indices of the first ``batch`` axes, which run along with ``index``'s own, and those that ``index`` gives."""
    along = tuple(
        torch.arange(index.shape[axis], device=x.device).reshape(
            *(-1 if a == axis else 1 for a in range(index.dim() - 1))
        )
        for axis in range(batch)
    )
    given = tuple(_positive(at, x.shape[batch + i]) for i, at in enumerate(index.unbind(-1)))
    return along + given


def _gather_nd(call: Call) -> Compute:
    batch = call.attribute("batch_dims", 0)
    return lambda x, index: x[_rows(x, index, batch)]


def _scatter_nd(call: Call) -> Compute:
    reduction = call.attribute("reduction", "none")
    if reduction not in ("none", "add"):
        # several updates of one place cannot be multiplied or compared by index_put
        return lambda x, index, updates: _scatter_rows(x, index, updates, _REDUCTIONS[reduction])
    return lambda x, index, updates: x.index_put(_rows(x, index, 0), updates, accumulate=reduction == "add")


def _scatter_rows(x: Tensor, index: Tensor, updates: Tensor, reduction: str) -> Tensor:
    depth = index.shape[-1]
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, at in enumerate(index.unbind(-1)):
        flat = flat * x.shape[axis] + _positive(at, x.shape[axis])
    rows = x.reshape(-1, *x.shape[depth:]).flatten(1) if x.dim() > depth else x.reshape(-1, 1)
    given = updates.reshape(-1, rows.shape[1])
    at = flat.reshape(-1, 1).expand_as(given)
    return rows.scatter_reduce(0, at, given, reduction).reshape(x.shape)


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(call: Call) -> Compute:
    axis, reduction = call.attribute("axis", 0), call.attribute("reduction", "none")

    def compute(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        at = _positive(index, x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, at, updates)
        return x.scatter_reduce(axis, at, updates, _REDUCTIONS[reduction])

    return compute


def _top_k(call: Call) -> Compute:
    axis, largest, ordered = call.attribute("axis", -1), call.attribute("largest", 1), call.attribute("sorted", 1)

    def compute(x: Tensor, k: Any) -> tuple[Tensor, Tensor]:
        # a stable sort keeps the lower index first among equals, as ONNX asks
        if not ordered:
            return tuple(torch.topk(x, host.vector(k)[0], axis, bool(largest)))  # type: ignore[return-value]
        values, index = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
        count = host.vector(k)[0]
        return values.narrow(axis, 0, count), index.narrow(axis, 0, count)

    return compute


def _one_hot(call: Call) -> Compute:
    axis = call.attribute("axis", -1)

    def compute(index: Tensor, depth: Any, values: Tensor) -> Tensor:
        size = host.vector(depth)[0]
        at = _positive(index.long(), size).unsqueeze(axis)
        shape = [1] * at.dim()
        shape[axis] = size
        steps = torch.arange(size, device=index.device).reshape(shape)
        return torch.where(at == steps, values[1], values[0])

    return compute


def _non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


def _cumulative(call: Call) -> Compute:
    exclusive, backwards = call.attribute("exclusive", 0), call.attribute("reverse", 0)

    def compute(x: Tensor, axis: Any) -> Tensor:
        at = host.vector(axis)[0]
        given = x.flip(at) if backwards else x
        made = given.cumsum(at, dtype=x.dtype)
        if exclusive:
            made = made - given
        return made.flip(at) if backwards else made

    return compute


def _extreme(largest: bool) -> Any:
    def build(call: Call) -> Compute:
        axis, keep, last = (
            call.attribute("axis", 0),
            call.attribute("keepdims", 1),
            call.attribute("select_last_index", 0),
        )
        function = torch.argmax if largest else torch.argmin

        def compute(x: Tensor) -> Tensor:
            if not last:
                return function(x, axis, bool(keep))
            return torch.rsub(function(x.flip(axis), axis, bool(keep)), x.shape[axis] - 1)

        return compute

    return build


def _take_numbers(call: Call) -> Compute:
    return host.take


def _reverse_sequence(call: Call) -> Compute:
    time, batch = call.attribute("time_axis", 0), call.attribute("batch_axis", 1)

    def compute(x: Tensor, lengths: Tensor) -> Tensor:
        given = x.movedim((time, batch), (0, 1))
        steps = torch.arange(given.shape[0], device=x.device).unsqueeze(1)
        at = torch.where(steps < lengths, lengths - 1 - steps, steps)
        at = at.reshape(*at.shape, *[1] * (given.dim() - 2)).expand_as(given)
        return given.gather(0, at).movedim((0, 1), (time, batch))

    return compute


def _compress(call: Call) -> Compute:
    axis = call.attribute("axis")

    def compute(x: Tensor, keep: Tensor) -> Tensor:
        at = torch.nonzero(keep).flatten()
        return x.flatten()[at] if axis is None else x.index_select(axis, at)

    return compute


OPERATORS: dict[str, Operator] = {
    "Gather": Operator(_gather, on_numbers=_take_numbers),
    "GatherElements": Operator(_gather_elements, ("x", "index")),
    "GatherND": Operator(_gather_nd, ("x", "index")),
    "ScatterElements": Operator(_scatter_elements, ("x", "index", "updates")),
    "ScatterND": Operator(_scatter_nd, ("x", "index", "updates")),
    "TopK": Operator(_top_k, ("x",), host=(1,)),
    "OneHot": Operator(_one_hot, ("index", "depth", "values"), host=(1,)),
    "NonZero": Operator(lambda call: _non_zero, ("x",)),
    "CumSum": Operator(_cumulative, ("x",), host=(1,)),
    "ArgMax": Operator(_extreme(True), ("x",)),
    "ArgMin": Operator(_extreme(False), ("x",)),
    "ReverseSequence": Operator(_reverse_sequence, ("x", "lengths")),
    "Compress": Operator(_compress, ("x", "keep")),
}
"""Reading and writing at indices."""
