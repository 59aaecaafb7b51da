"""Learning how many bits each tensor gets, under a limit on what the network takes to store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..data import Forward, call, device_of
from ..model.apply import is_applied, plan_of
from ..model.network import duplicate
from ..plan import Plan
from ..progress import Progress
from .allocation import WIDTHS, Allocation
from .finetune import divergence, finetune
from .history import History
from .limits import Limits, PrecisionStep, grids
from .loop import Loss, active_cells, objective
from .penalty import Penalty
from .size import Count, learned_sizes
from .trainer import Precision


@dataclass(frozen=True)
class LearnedPrecision:
    """What :func:`learn_precision` found: the trained network, its plan with the bits that were learned, its sizes in
    bytes, and the mixed phase step by step. ``kept``: of ``method="penalty"`` the validation loss (or the training
    loss) of the state that went on from there, else None."""

    net: nn.Module = field(repr=False)
    plan: Plan
    weights: float
    activations: float
    kept: float | None
    history: tuple[PrecisionStep, ...] = field(repr=False)


def learn_precision(
    net: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    steps: tuple[int, int, int],
    weights: float | None = None,
    activations: float | None = None,
    total: float | None = None,
    count: Count = "sum",
    method: Literal["allocation", "penalty"] = "allocation",
    teacher: nn.Module | None = None,
    distance: Loss = divergence,
    lr: float = 1e-4,
    grid_lr: float = 1e-2,
    moves: int = 1,
    rhythm: int = 1,
    strength: float = 100.0,
    validation: Iterable[Any] | None = None,
    judged: int = 10,
    accumulate: int = 1,
    clip_norm: float | None = None,
    precision: Precision = "float32",
    freeze_norms: bool = True,
    checkpoint: str | Path | None = None,
    every: int = 100,
    history: History | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearnedPrecision:
    """Train a network and its bits together until it is small enough, in three phases of ``steps`` steps.

    ``net``: from :func:`~bitsmith.apply` under a plan with ``Int(..., learn=Learn("step_range"))`` or ``weight_learn``
    of it. ``weights``, ``activations``, ``total`` (of both): limits in bytes, at least one, as :func:`learned_sizes`
    counts them, activations by ``count``. In all phases weights and steps are trained, weights by Adam with ``lr``,
    grids by Adam with ``grid_lr`` (in powers of two), both falling to 0 along half a cosine over all steps.

    ``method="allocation"`` (ours): after the first phase each tensor gets the whole bits, 2 to 8, that cost the loss
    least within the limits, by the gradient that its rounding had so far (:mod:`bitsmith.learn.allocation`); ``moves``
    - 1 times more in the second phase, evenly. What a slice has is what its tensor has.

    ``method="penalty"`` (Schaefer et al. 2022, arXiv:2206.07741; Uhlich et al. 2020, arXiv:1905.11452): in the second
    phase steps *and ranges* follow the loss every ``rhythm``-th step, each slice alone, at a rate that does not fall,
    and bits are inferred from them. To the loss comes ``strength * p * sum max(0, S / 0.98 T - 1)^2`` over the sizes S
    that have a limit T; p rises from 0.01 to 1 in the first half of the phase. ``judged`` times, evenly, a state that
    keeps the limits is judged by its loss on ``validation`` (by its training loss without); the best goes on, with all
    levels that its bits hold. (The papers hold the steps in the first and the last phase.) ``validation`` is read by
    this method alone.

    All else as in :func:`~bitsmith.finetune`: ``checkpoint`` and several processes included. ``net`` is not changed.
    Raises :class:`SizeError` for a limit below what the fewest bits take (said before training where it can be), and
    where no judged state kept the limits; ``ValueError`` where nothing is learned; :class:`TrainingError` for a loss
    that is not finite.
    """
    least = {"allocation": (1, 0), "penalty": (0, 1)}
    if method not in least:
        raise ValueError(f"learn_precision(method={method!r}): must be 'allocation' or 'penalty'")
    if len(steps) != 3 or min(steps) < 0 or steps[0] < least[method][0] or steps[1] < least[method][1]:
        raise ValueError(
            f"learn_precision(steps={steps}): three numbers of steps; method={method!r} takes at least 1 in the "
            f"{'first, which it measures in' if method == 'allocation' else 'second, in which bits are learned'}"
        )
    if min(rhythm, judged, moves) < 1:
        raise ValueError(f"learn_precision(rhythm={rhythm}, judged={judged}, moves={moves}): each at least 1")
    if moves > steps[1] + 1:
        raise ValueError(f"learn_precision(moves={moves}): at most one more than the {steps[1]} steps of the phase")
    limits = Limits(weights, activations, total, count)
    if not limits.given:
        raise ValueError("learn_precision: give a limit in bytes: weights, activations or total")
    if loss is None and teacher is None:
        raise ValueError("learn_precision: give loss(output, target), a teacher, or both")
    if not is_applied(net) or not any(grid.infers_bits for grid in grids(net).values()):
        raise ValueError(
            "learn_precision: no grid of the network infers bits; apply a plan with "
            'Int(..., learn=Learn("step_range"), weight_learn=Learn("step_range"))'
        )
    limits.check(net, WIDTHS[0] if method == "allocation" else None)
    guide: Allocation | Penalty
    if method == "allocation":
        guide = Allocation(limits, steps, moves)
    else:
        device, reference = device_of(net), None if teacher is None else duplicate(teacher).eval()

        def judge(student: nn.Module, item: Any) -> Tensor:
            inputs, target = item
            output = call(student, inputs, forward)
            found = objective(output, target, loss, active_cells(student), device)
            return found if reference is None else found + distance(output, call(reference, inputs, forward))

        guide = Penalty(limits, steps, strength, rhythm, judged, judge, validation)

    def falling(optimizer: torch.optim.Optimizer, last: int) -> LRScheduler:
        """Half a cosine; grids under a penalty move at their rate until the bits are held."""

        def cosine(done: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * done / last))

        def late(done: int) -> float:
            mixed = steps[0] + steps[1]
            return 1.0 if done < mixed else 0.5 * (1 + math.cos(math.pi * (done - mixed) / max(steps[2], 1)))

        rates: list[Callable[[int], float]] = [cosine] * len(optimizer.param_groups)
        if method == "penalty":
            rates[0] = late  # the group of the grids
        return LambdaLR(optimizer, rates)

    trained = finetune(
        net,
        loader,
        loss,
        steps=sum(steps),
        teacher=teacher,
        distance=distance,
        lr=lr,
        schedule=falling,
        groups={"*.grid.log_*": {"lr": grid_lr}},
        accumulate=accumulate,
        clip_norm=clip_norm,
        precision=precision,
        freeze_norms=freeze_norms,
        guide=guide,
        checkpoint=checkpoint,
        every=every,
        history=history,
        forward=forward,
        seed=seed,
        progress=progress,
    )
    sizes = learned_sizes(trained, count)
    kept = guide.kept if isinstance(guide, Penalty) else None
    return LearnedPrecision(
        trained,
        plan_of(trained),
        float(sizes.weights.detach()),
        float(sizes.activations.detach()),
        kept,
        tuple(guide.sizes),
    )
