"""What every training loop under a plan shares: the objective, the mode, and what cells owe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import to_device
from ..model.apply import additions_of, computer_of, is_applied
from ..technique import Cell

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, target)``: one number, the mean over the samples."""


class TrainingError(ValueError):
    """A training that cannot begin or go on: nothing to train, a loss that is not finite, a checkpoint of another
    call, a process that was lost.

    ``step``: where it stopped, from 1. ``site``: where the first value came from that is not finite. ``net``: the
    network as of the last step that was finite; each None where there is no such.
    """

    def __init__(
        self, problem: str, *, step: int | None = None, site: str | None = None, net: nn.Module | None = None
    ) -> None:
        super().__init__(problem)
        self.step, self.site, self.net = step, site, net


def active_cells(net: nn.Module) -> list[Cell]:
    """The cells of an applied network; none of another."""
    if not is_applied(net):
        return []
    return [cell for cell in additions_of(net).cells.values() if isinstance(cell, Cell)]


def objective(output: Any, target: Any, loss: Loss | None, cells: list[Cell], device: torch.device | None) -> Tensor:
    """The loss and the penalties of the cells; 0 without either."""
    total = torch.zeros((), device=device) if loss is None else loss(output, to_device(target, device))
    for cell in cells:
        penalty = cell.penalty()
        if penalty is not None:
            total = total + penalty
    return total


def training_mode(net: nn.Module, freeze_norms: bool) -> None:
    """Set a network to train, its batch normalisations to eval if they are frozen."""
    net.train()
    for module in net.modules():
        if freeze_norms and isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.eval()


def settle(net: nn.Module) -> None:
    """Put the techniques that the cells settle on into the plan of an applied network."""
    if not is_applied(net):
        return
    computer = computer_of(net)
    sites = dict(computer.plan.sites)
    for name in sites:
        cell = computer.cells[name]
        settled = cell.settle() if isinstance(cell, Cell) else None
        sites[name] = sites[name] if settled is None else settled
    if sites != computer.plan.sites:
        groups = tuple(group for group in computer.plan.groups if len({sites.get(name) for name in group}) == 1)
        computer.plan = computer.plan.replace(sites=sites, groups=groups)
