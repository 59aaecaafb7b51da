"""Which parameters train, in which groups, and by which optimizer."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from ..model.apply import computer_of, is_applied
from .loop import TrainingError

MakeOptimizer = Callable[[list[Any]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer, int], LRScheduler]
Groups = Mapping[str, Mapping[str, Any]]


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name. Raises :class:`TrainingError` where there is none."""
    every = dict(net.named_parameters())
    found = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
    if found:
        return found
    sites = f"; none of the {len(computer_of(net).plan)} sites of its plan has one" if is_applied(net) else ""
    if not every:
        raise TrainingError(
            f"finetune: no parameter of the network requires a gradient, as it has no parameter at all{sites}: "
            "there is nothing to train"
        )
    names = ", ".join([*every][:3])
    raise TrainingError(
        "finetune: no parameter of the network requires a gradient: "
        f"all {len(every)} are frozen ({names}, ...){sites}. "
        "Thaw some by parameter.requires_grad_(True), before bitsmith.apply, which freezes what no cell reads"
    )


def grouped(net: nn.Module, groups: Groups | None) -> list[Any]:
    """What an optimizer is given: the trainable parameters, or with ``groups`` (shell pattern of parameter names ->
    options) one parameter group by pattern and the rest in the last. The first pattern that matches counts.

    Raises :class:`TrainingError` for a pattern that no parameter matches, or frozen ones only.
    """
    found = trainable(net)
    if not groups:
        return [*found.values()]
    every = dict(net.named_parameters())
    rest = dict(found)
    made: list[Any] = []
    for pattern, options in groups.items():
        if not fnmatch.filter(every, pattern):
            close = difflib.get_close_matches(pattern, every, n=3, cutoff=0.3)
            raise TrainingError(
                f"finetune: no parameter matches the group {pattern!r}; names are such as "
                f"{', '.join(close or [*every][:3])}, and those that the plan added begin with '_bitsmith.'"
            )
        if not fnmatch.filter(found, pattern):
            frozen = ", ".join(fnmatch.filter(every, pattern)[:3])
            raise TrainingError(
                f"finetune: the group {pattern!r} names frozen parameters only: {frozen}; "
                "thaw them by requires_grad_(True), or leave the group out"
            )
        named = fnmatch.filter(rest, pattern)
        if named:
            made.append({"params": [rest.pop(name) for name in named], **options})
    return [*made, {"params": [*rest.values()]}] if rest else made


def optimizer_of(
    net: nn.Module,
    steps: int,
    lr: float,
    optimizer: MakeOptimizer | None,
    schedule: MakeSchedule | None,
    groups: Groups | None,
) -> tuple[torch.optim.Optimizer, LRScheduler | None, dict[str, nn.Parameter]]:
    """Adam and half a cosine, or those that are given, and the parameters that they train, by name. Raises
    :class:`TrainingError` where they cannot train ``net``."""
    given = grouped(net, groups)
    chosen = torch.optim.Adam(given, lr) if optimizer is None else optimizer(given)
    own = {id(parameter): name for name, parameter in net.named_parameters()}
    held = [parameter for group in chosen.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in own for parameter in held)
    if strange:
        raise TrainingError(
            f"finetune: the optimizer holds {strange} parameters that are not of the network that is trained, which is "
            "a copy: make it from what it is given, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)"
        )
    parameters = {own[id(parameter)]: parameter for parameter in held if parameter.requires_grad}
    if not parameters:
        raise TrainingError("finetune: the optimizer holds no parameter that requires a gradient: nothing would train")
    if schedule is None:
        return chosen, CosineAnnealingLR(chosen, steps) if optimizer is None else None, parameters
    made = schedule(chosen, steps)
    if isinstance(made, ReduceLROnPlateau):
        raise TrainingError(
            "finetune: ReduceLROnPlateau waits for a score, and a schedule here is stepped once by step without one; "
            "take another schedule"
        )
    return chosen, made, parameters


def described(optimizer: torch.optim.Optimizer) -> str:
    """Its class and the options of each group that are not off, as they were before a schedule changed them.

    >>> described(torch.optim.SGD([torch.zeros(2)], 0.1, momentum=0.9))
    'SGD(lr=0.1, momentum=0.9 for 1)'
    """
    groups = []
    for group in optimizer.param_groups:
        options = {name: group.get(f"initial_{name}", group[name]) for name in optimizer.defaults}
        said = ", ".join(f"{name}={value!r}" for name, value in options.items() if value or name == "lr")
        groups.append(f"{said} for {len(group['params'])}")
    return f"{type(optimizer).__name__}({'; '.join(groups)})"
