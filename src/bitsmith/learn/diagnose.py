"""Where in a network a value first stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Forward, call, describe, tensors_in
from ..model.apply import build, computer_of, is_applied
from ..model.flow import tensors
from ..model.network import duplicate, network
from ..plan import Plan
from .loop import active_cells


@dataclass(frozen=True)
class Finding:
    """``site``: the first whose output is not finite, None where there is none; ``text``: what was found, in words."""

    site: str | None
    text: str


def first_not_finite(
    net: nn.Module, inputs: Any, forward: Forward | None, run: Callable[[Callable[[], Any]], Any] = lambda work: work()
) -> Finding:
    """Run the batch again through a copy of the network, looking at the output of every site.

    ``run``: calls what it is given in the setting of the failing step (random numbers, precision). Looked at first are
    inputs and parameters, then sites in order, then the penalties of cells. Infinities may be meant (a mask): the first
    NaN is named beside the first infinity.
    """
    if any(_bad(x) for x in tensors_in(inputs)):
        return Finding(None, f"the inputs, {describe(inputs)}, have NaN or infinite values: clean the data")
    wrong = next((name for name, value in net.named_parameters() if _bad(value)), None)
    if wrong is not None:
        return Finding(None, f"the parameter {wrong!r} is not finite after the step before")
    try:
        outputs = _outputs(net, inputs, forward, run)
    except Exception as error:  # whatever the model raises on such values
        return Finding(None, f"the batch could not be run again to find the site ({type(error).__name__}: {error})")
    first = next(iter(outputs), None)
    if first is not None:
        text = f"the first value that is not finite comes from the site {first!r}, {outputs[first][0]}"
        nan = next((name for name, (_, has_nan) in outputs.items() if has_nan), None)
        return Finding(first, text if nan in (None, first) else f"{text}; the first NaN from {nan!r}")
    for cell in active_cells(net):
        penalty = cell.penalty()
        if penalty is not None and _bad(penalty):
            return Finding(cell.site, f"the penalty of the cell at the site {cell.site!r} is {float(penalty.detach())}")
    return Finding(None, "the output of every site is finite, so the loss itself makes it")


def _outputs(
    net: nn.Module, inputs: Any, forward: Forward | None, run: Callable[[Callable[[], Any]], Any]
) -> dict[str, tuple[str, bool]]:
    """By site whose output is not finite, in order: what it has, and whether a NaN is among it."""
    copy = duplicate(net)
    if not is_applied(copy):
        copy = build(network(copy, inputs, forward=forward), Plan(), ())
    computer = computer_of(copy)
    computer.name_everything()
    found: dict[str, tuple[str, bool]] = {}

    def seen(name: str, output: Any) -> Any:
        for value in tensors(output):
            if name not in found and _bad(value):
                nan = int(torch.isnan(value).sum())
                infinite = int(torch.isinf(value).sum())
                kind = computer.record_sites[name].kind
                said = f"{kind}: {nan} NaN and {infinite} infinite of {value.numel()} values"
                found[name] = (said, nan > 0)
        return output

    compute, compute_module = computer.compute, computer.compute_module
    computer.__dict__["compute"] = lambda name, *rest: seen(name, compute(name, *rest))
    computer.__dict__["compute_module"] = lambda name, *rest: seen(name, compute_module(name, *rest))
    with torch.no_grad():
        run(lambda: call(copy, inputs, forward))
    return found


def _bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(value.isfinite().all())
