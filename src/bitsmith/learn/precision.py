"""Learning how many bits each tensor gets, under a limit on what the network takes to store."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Forward, call, device_of, items
from ..model.apply import is_applied, plan_of
from ..model.network import duplicate
from ..numerics.grid import Grid
from ..plan import Plan
from ..progress import Progress, Silent
from .finetune import divergence, finetune
from .loader import endless
from .loop import Loss, TrainingError, active_cells, objective, settle, training_mode
from .size import Count, Sizes, learned_sizes

AIM = 0.98
"""The part of a limit that training aims at."""


class SizeError(ValueError):
    """A limit on size that cannot be kept, or was not."""


@dataclass(frozen=True)
class PrecisionStep:
    """One step of the mixed phase: the loss with penalties, and bytes before the step."""

    loss: float
    weights: float
    activations: float


@dataclass(frozen=True)
class LearnedPrecision:
    """What :func:`learn_precision` found: the trained network, its plan with the bits that were learned, its sizes in
    bytes, the mixed phase step by step, and the validation loss (or the last training loss) of the state that was kept
    at its end."""

    net: nn.Module = field(repr=False)
    plan: Plan
    weights: float
    activations: float
    kept: float
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
    teacher: nn.Module | None = None,
    distance: Loss = divergence,
    lr: float = 1e-4,
    grid_lr: float = 1e-2,
    every: int = 1,
    strength: float = 100.0,
    validation: Iterable[Any] | None = None,
    judged: int = 10,
    freeze_norms: bool = True,
    forward: Forward | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearnedPrecision:
    """Train weights, steps and ranges together until the network is small enough, in three phases of ``steps`` steps
    (Schaefer et al. 2022, arXiv:2206.07741; Uhlich et al. 2020, arXiv:1905.11452).

    ``net``: from :func:`~bitsmith.apply` under a plan with ``Int(..., learn=Learn("step_range"))`` or ``weight_learn``
    of it. ``weights``, ``activations``, ``total`` (of both): limits in bytes, at least one, as :func:`learned_sizes`
    counts them, activations by ``count``.

    1. Weights and steps are trained at the bits of the start (:func:`~bitsmith.finetune`, the steps with ``grid_lr``).
    2. To the loss comes ``strength * p * sum max(0, S / 0.98 T - 1)^2`` over the sizes S that have a limit T; p rises
       from 0.01 to 1 in the first half. The grids follow Adam with ``grid_lr`` (in powers of two) every ``every``-th
       step, the weights Adam with ``lr`` that falls along half a cosine, each step. ``judged`` times, evenly, and at
       the end a state that keeps the limits is judged by its loss on ``validation`` (by its training loss without);
       the best goes on.
    3. Weights and steps again, at the bits that were learned. (The papers hold the steps in the first and the last
       phase.)

    ``loss``, ``teacher``, ``distance``, ``freeze_norms``, ``forward``, ``seed``, ``progress``: as in
    :func:`~bitsmith.finetune`. ``net`` is not changed. Raises :class:`SizeError` for a limit below what the fewest bits
    take (said before training) and where no judged state kept the limits; ``ValueError`` where nothing is learned;
    :class:`TrainingError` for a loss that is not finite.
    """
    if len(steps) != 3 or min(steps) < 0 or steps[1] < 1:
        raise ValueError(f"learn_precision(steps={steps}): three numbers of steps, that of the mixed phase at least 1")
    if every < 1 or judged < 1:
        raise ValueError(f"learn_precision(every={every}, judged={judged}): each at least 1")
    limits = _Limits({"weights": weights, "activations": activations, "total": total}, count, strength)
    if not limits.given:
        raise ValueError("learn_precision: give a limit in bytes: weights, activations or total")
    if loss is None and teacher is None:
        raise ValueError("learn_precision: give loss(output, target), a teacher, or both")
    if not is_applied(net) or not any(grid.infers_bits for grid in _grids(net)):
        raise ValueError(
            "learn_precision: no grid of the network infers bits; apply a plan with "
            'Int(..., learn=Learn("step_range"), weight_learn=Learn("step_range"))'
        )
    limits.check(net)
    progress = progress or Silent()
    common: dict[str, Any] = {
        "teacher": teacher,
        "distance": distance,
        "lr": lr,
        "groups": {"*.grid.log_*": {"lr": grid_lr}},
        "freeze_norms": freeze_norms,
        "forward": forward,
    }
    trained = duplicate(net)
    if steps[0]:
        _hold_bits(trained, True)
        trained = finetune(trained, loader, loss, steps=steps[0], seed=seed, progress=progress, **common)
        _hold_bits(trained, False)
    phase = _Mixed(trained, limits, every, steps[1], judged, progress)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed + 1)
        reference = None if teacher is None else duplicate(teacher).eval()
        phase.run(loader, loss, reference, distance, validation, lr, grid_lr, freeze_norms, forward)
    if steps[2]:
        _hold_bits(trained, True)
        trained = finetune(trained, loader, loss, steps=steps[2], seed=seed + 2, progress=progress, **common)
        _hold_bits(trained, False)
    settle(trained)
    sizes = learned_sizes(trained, count)
    return LearnedPrecision(
        trained.train(net.training),
        plan_of(trained),
        float(sizes.weights.detach()),
        float(sizes.activations.detach()),
        phase.kept,
        tuple(phase.history),
    )


@dataclass(frozen=True)
class _Limits:
    """``bytes``: by what is limited, None for what is not."""

    bytes: Mapping[str, float | None]
    count: Count
    strength: float

    @property
    def given(self) -> dict[str, float]:
        return {what: limit for what, limit in self.bytes.items() if limit is not None}

    def over(self, sizes: Sizes) -> Tensor:
        """By how much each limit is passed, relative to it: shape (limits,), 0 where it is kept."""
        return torch.stack([torch.relu(getattr(sizes, what) / limit - 1) for what, limit in self.given.items()])

    def penalty(self, sizes: Sizes, ramp: float) -> Tensor:
        """What comes to the loss. A square has no slope where it begins: it aims a little below the limits."""
        aims = [torch.relu(getattr(sizes, what) / (AIM * limit) - 1) for what, limit in self.given.items()]
        return self.strength * ramp * torch.stack(aims).square().sum()

    def check(self, net: nn.Module) -> None:
        """Raise where the fewest bits are too many: one level on each side of 0."""
        least = duplicate(net)
        with torch.no_grad():
            for grid in _grids(least):
                if grid.infers_bits:
                    grid.log_step.fill_(40.0)
            sizes = learned_sizes(least, self.count)
        for what, limit in self.given.items():
            size = float(getattr(sizes, what))
            if size > limit:
                raise SizeError(
                    f"learn_precision({what}={limit:g}): with the fewest bits everywhere it is {size:.0f} bytes, "
                    "scales and what is not learned included; raise the limit, learn more sites, or take fewer slices "
                    "(granularity='tensor')"
                )


class _Mixed:
    """The second phase, which trains ``net`` in place."""

    def __init__(
        self, net: nn.Module, limits: _Limits, every: int, steps: int, judged: int, progress: Progress
    ) -> None:
        self.net, self.limits, self.every, self.steps, self.progress = net, limits, every, steps, progress
        self.judged = {round(steps * (k + 1) / judged) for k in range(judged)} | {steps}
        self.history: list[PrecisionStep] = []
        self.kept, self.best = float("inf"), dict[str, Tensor]()

    def run(
        self,
        loader: Iterable[Any],
        loss: Loss | None,
        reference: nn.Module | None,
        distance: Loss,
        validation: Iterable[Any] | None,
        lr: float,
        grid_lr: float,
        freeze_norms: bool,
        forward: Forward | None,
    ) -> None:
        net, device, cells = self.net, device_of(self.net), active_cells(self.net)
        of_grids = [parameter for grid in _grids(net) for parameter in grid.parameters()]
        known = {id(parameter) for parameter in of_grids}
        own = [parameter for parameter in net.parameters() if parameter.requires_grad and id(parameter) not in known]
        learner = torch.optim.Adam([{"params": own, "lr": lr}, {"params": of_grids, "lr": grid_lr}])
        falling = [lambda done: 0.5 * (1 + math.cos(math.pi * done / self.steps)), lambda done: 1.0]
        schedule = torch.optim.lr_scheduler.LambdaLR(learner, falling)
        training_mode(net, freeze_norms)
        self.progress.start("learning precision", self.steps)

        def judge(inputs: Any, target: Any) -> Tensor:
            output = call(net, inputs, forward)
            total = objective(output, target, loss, cells, device)
            if reference is not None:
                with torch.no_grad():
                    wanted = call(reference, inputs, forward)
                total = total + distance(output, wanted)
            return total

        for done, (inputs, target) in zip(range(self.steps), endless(loader), strict=False):
            for cell in cells:
                cell.step(done, self.steps)
            total, sizes = judge(inputs, target), learned_sizes(net, self.limits.count)
            ramp = min(1.0, 0.01 + 0.99 * 2 * done / self.steps)
            whole = total + self.limits.penalty(sizes, ramp)
            if not bool(whole.isfinite()):
                raise TrainingError(
                    f"learn_precision: the loss is {float(whole.detach())} at step {done + 1} of {self.steps} of the "
                    f"mixed phase; a smaller lr than {lr:g} may help"
                )
            learner.zero_grad()
            whole.backward()  # type: ignore[no-untyped-call]
            for grid in _grids(net):
                grid.clip_gradient()
            if (done + 1) % self.every:
                for parameter in of_grids:
                    parameter.grad = None
            learner.step()
            schedule.step()
            bytes_now = (float(size.detach()) for size in (sizes.weights, sizes.activations))
            self.history.append(PrecisionStep(float(whole.detach()), *bytes_now))
            if done + 1 in self.judged:
                self._keep(judge, validation, float(total.detach()), freeze_norms)
            self.progress.advance()
        if not self.best:
            sizes = learned_sizes(net, self.limits.count)
            raise SizeError(
                f"learn_precision: no judged state kept the limits {self.limits.given} in bytes; the last takes "
                f"{float(sizes.weights.detach()):.0f} for weights and {float(sizes.activations.detach()):.0f} for "
                "activations. More steps, a greater grid_lr or a greater strength may help"
            )
        net.load_state_dict(self.best)
        learner.zero_grad()

    @torch.no_grad()
    def _keep(
        self, judge: Callable[[Any, Any], Tensor], validation: Iterable[Any] | None, seen: float, freeze_norms: bool
    ) -> None:
        if bool(self.limits.over(learned_sizes(self.net, self.limits.count)).any()):
            return
        if validation is not None:
            self.net.eval()
            losses = [float(judge(inputs, target)) for inputs, target in items(validation, "validation")]
            training_mode(self.net, freeze_norms)
            seen = sum(losses) / max(len(losses), 1)
        if seen <= self.kept or not self.best:
            self.kept, self.best = seen, copy.deepcopy(self.net.state_dict())


def _grids(net: nn.Module) -> list[Grid]:
    return [module for module in net.modules() if isinstance(module, Grid)]


def _hold_bits(net: nn.Module, hold: bool) -> None:
    for grid in _grids(net):
        grid.hold_bits(hold)
