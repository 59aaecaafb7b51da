"""Training under a plan: an ordinary loop that also calls what cells owe to training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Forward, call, device_of, items, to_device
from ..model.apply import additions_of, computer_of, is_applied
from ..model.flow import tensors
from ..model.network import duplicate
from ..progress import Progress, Silent
from ..technique import Cell

Loss = Callable[[Any, Any], Tensor]


class TrainingError(ValueError):
    """A fine-tune that cannot begin or go on: nothing to train, or a loss that is not finite."""


def divergence(output: Any, reference: Any) -> Tensor:
    """Kullback-Leibler divergence of the teacher's classes from the student's, in nats, the mean over samples: what
    distillation minimizes (Hinton et al. 2015, arXiv:1503.02531, temperature 1).

    Both hold logits along the last axis; of several outputs the sum over the floating ones.

    >>> float(divergence(torch.zeros(2, 3), torch.zeros(2, 3)))
    0.0
    """
    pairs = zip(tensors(output), tensors(reference), strict=True)
    found = [
        F.kl_div(F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1), reduction="none", log_target=True)
        .sum(-1)
        .mean()
        for a, b in pairs
        if a.is_floating_point()
    ]
    return torch.stack(found).sum()


def finetune(
    net: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    steps: int,
    teacher: nn.Module | None = None,
    distance: Loss = divergence,
    lr: float = 1e-4,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    freeze_norms: bool = True,
    forward: Forward | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of ``net``, trained for ``steps`` batches of ``loader``, in the mode (train or eval) of ``net``.

    Minimized: ``loss(output, target)``, and with a ``teacher`` (a model that is run in eval on the same inputs) beside
    it ``distance(output, reference)``, the reference being what the teacher gives; and the ``penalty`` of every cell.
    With a teacher ``loss`` may be None; then targets are not read. ``loader``: items ``(inputs, target)``, read again
    from its start as often as needed.

    Adam (Kingma and Ba 2015, arXiv:1412.6980) with ``lr`` that falls to 0 along half a cosine (Loshchilov and Hutter
    2017, arXiv:1608.03983), or ``optimizer(parameters)`` with a learning rate that stays. ``freeze_norms``: batch
    normalisations keep their statistics, so that what folds them is trained as it ships (Krishnamoorthi 2018,
    arXiv:1806.08342, section 4); False trains them as usual. Before each step every cell's ``step`` is called; at the
    end the technique that a cell's ``settle`` gives takes the place of its own in the plan of the trained network.

    ``net`` may come from :func:`~bitsmith.apply`, or be an ordinary model. Neither ``net`` nor ``teacher`` is changed.
    The same ``seed`` gives the same result, a loader's own shuffling by torch's global generator included; that
    generator is left as it was. Raises :class:`TrainingError` where nothing trains or the loss is not finite.
    """
    if steps < 1:
        raise ValueError(f"finetune(steps={steps}): at least 1")
    if loss is None and teacher is None:
        raise ValueError("finetune: give loss(output, target), a teacher, or both")
    progress = progress or Silent()
    trained, reference = duplicate(net), None if teacher is None else duplicate(teacher).eval()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError("finetune: no parameter of the network requires a gradient")
    cells = active_cells(trained)
    if optimizer is None:
        chosen: torch.optim.Optimizer = torch.optim.Adam(parameters, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
    else:
        chosen, schedule = optimizer(parameters), None
    training_mode(trained, freeze_norms)
    progress.start("fine-tuning", steps)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for done, (inputs, target) in zip(range(steps), endless(loader), strict=False):
            for cell in cells:
                cell.step(done, steps)
            output = call(trained, inputs, forward)
            total = objective(output, target, loss, cells, device_of(trained))
            if reference is not None:
                with torch.no_grad():
                    wanted = call(reference, inputs, forward)
                total = total + distance(output, wanted)
            if not bool(total.isfinite()):
                raise TrainingError(
                    f"finetune: the loss is {float(total.detach())} at step {done + 1} of {steps}; a smaller lr than "
                    f"{lr:g} may help"
                )
            chosen.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            chosen.step()
            if schedule is not None:
                schedule.step()
            progress.advance()
    chosen.zero_grad()
    settle(trained)
    return trained.train(net.training)


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


def endless(loader: Iterable[Any], role: str = "training") -> Iterator[tuple[Any, Any]]:
    """The loader's items, from its start again at its end."""
    while True:
        yield from items(loader, role)


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
