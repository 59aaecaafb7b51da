"""What sites lose together: a quadratic form in which every two of them meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..plan import Plan
from ..task import Task, TaskError
from ._gates import Batch, GatedNetwork, batches, differentiable, gated
from .base import Meter, Pair, Scores

_WIDEST = 1024
"""Outputs of more numbers per sample get the empirical Fisher matrix: their Hessian would not fit."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class InterLayer:
    """Second-order loss of sites and of every two sites together, after Schaefer et al. 2023 (arXiv:2306.04879).

    The loss of a set S of changed sites is ``1/2 sum over l, m in S of d_l' H_lm d_m``, where ``d_l`` is what the
    technique changes at the output of site l (weights and activations alike, so any operation has one) and H the
    Hessian of the loss by these outputs. The abstract says that dependencies between layers enter, not how: this form
    is ours.

    ``form="gauss_newton"``: ``J' H_out J`` with the Hessian ``H_out`` of what is lost by the network's output
    (Schraudolph 2002): never negative. ``draws`` random directions of it for each sample, one backward each, give all
    pairs at once. ``of="output"``: what is lost is the squared error of the output, relative to its power; ``"loss"``:
    the task's loss (of outputs with more than 1024 numbers a sample, its empirical Fisher matrix). On confident
    networks the second is nearly 0 wherever the first is not, and orders worse. ``form="hessian"``: the Hessian of the
    task's loss, one Hessian-vector product for each pair.

    ``samples``: of the calibration data, at most. ``mu`` weights what two sites lose together; 0 leaves the plain
    diagonal. ``shrink``: each such term by ``1 - (standard error / mean)^2``, at least 0, as most are nothing but noise
    (Gauss-Newton form; positive-part James-Stein of each alone).
    """

    form: Literal["gauss_newton", "hessian"] = "gauss_newton"
    of: Literal["output", "loss"] = "output"
    samples: int = 128
    draws: int = 1
    mu: float = 1.0
    shrink: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in ("gauss_newton", "hessian"):
            raise ValueError(f"InterLayer(form={self.form!r}): must be 'gauss_newton' or 'hessian'")
        if self.of not in ("output", "loss"):
            raise ValueError(f"InterLayer(of={self.of!r}): must be 'output' or 'loss'")
        if self.samples < 1 or self.draws < 1:
            raise ValueError(f"InterLayer(samples={self.samples}, draws={self.draws}): must be at least 1")
        if not 0.0 <= self.mu < float("inf"):
            raise ValueError(f"InterLayer(mu={self.mu}): must be a number of 0 or more")

    def __call__(
        self, model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]
    ) -> Scores:
        if (self.form == "hessian" or self.of == "loss") and task.loss is None:
            raise TaskError(
                f"InterLayer(form={self.form!r}, of={self.of!r}) needs Task(loss=...), such as "
                "torch.nn.functional.cross_entropy"
            )
        if not pairs:
            return Scores({})
        meter = Meter()
        network = gated(pairs, simulate)
        notes: dict[str, str] = {}
        with differentiable(network.net):
            if self.form == "hessian":
                matrix = self._hessian(network, task, meter)
            else:
                matrix = self._gauss_newton(network, task, meter, notes)
        return self._scores(pairs, matrix, meter, notes)

    def _gauss_newton(self, network: GatedNetwork, task: Task, meter: Meter, notes: dict[str, str]) -> Matrix:
        generator = torch.Generator().manual_seed(self.seed)
        count = network.gates.count
        total, squares, power, samples = np.zeros((count, count)), np.zeros((count, count)), 0.0, 0
        for batch, gate in batches(network, task, self.samples, per_sample=True):
            meter.forwards += batch.size * (1 + network.techniques)
            samples += batch.size
            power += float(batch.logits.detach().double().square().sum())
            directions = self._directions(batch, task, generator, notes)
            for k, direction in enumerate(directions):
                (slope,) = torch.autograd.grad(
                    (batch.logits * direction).sum(), gate, retain_graph=k + 1 < len(directions)
                )
                found = slope.double().numpy()
                total += found.T @ found / len(directions)
                squares += np.square(found).T @ np.square(found) / len(directions)
                meter.backwards += batch.size
        scale = 0.5 / samples if self.of == "loss" else 1.0 / max(power, 1e-300)
        return scale * (_shrunk(total, squares, samples * self.draws, self.draws) if self.shrink else total)

    def _directions(self, batch: Batch, task: Task, generator: torch.Generator, notes: dict[str, str]) -> list[Tensor]:
        if self.of == "loss":
            return _directions(batch, task, self.draws, generator, notes)
        return [_signs(batch.logits, generator) for _ in range(self.draws)]

    def _hessian(self, network: GatedNetwork, task: Task, meter: Meter) -> Matrix:
        assert task.loss is not None
        count = network.gates.count
        total, samples = np.zeros((count, count)), 0
        for batch, gate in batches(network, task, self.samples, per_sample=False):
            meter.forwards += batch.size * (1 + network.techniques)
            (slope,) = torch.autograd.grad(task.loss(batch.output, batch.target), gate, create_graph=True)
            meter.backwards += batch.size
            for index in range(count):
                (row,) = torch.autograd.grad(slope[index], gate, retain_graph=True)
                total[index] += 0.5 * batch.size * row.double().numpy()
                meter.backwards += 2 * batch.size  # through the forward and through its backward
            samples += batch.size
        return (total + total.T) / (2 * samples)

    def _scores(self, pairs: Sequence[Pair], matrix: Matrix, meter: Meter, notes: dict[str, str]) -> Scores:
        skipped = {
            pair: "its output or a derivative of it is not finite"
            for k, pair in enumerate(pairs)
            if not np.isfinite(matrix[k, k])
        }
        losses = {pair: float(matrix[k, k]) for k, pair in enumerate(pairs) if pair not in skipped}
        below = sum(loss < 0 for loss in losses.values())
        if below:
            notes["below 0"] = f"{below} of {len(losses)} second-order losses are negative and stay so"
        cross = {
            (one, other): 2.0 * self.mu * float(matrix[j, k])
            for j, one in enumerate(pairs)
            for k, other in enumerate(pairs[:j])
            if self.mu and one[0] != other[0] and one in losses and other in losses and np.isfinite(matrix[j, k])
        }
        return Scores(losses, cross, skipped, meter.spent(), notes)


def _directions(
    batch: Batch, task: Task, draws: int, generator: torch.Generator, notes: dict[str, str]
) -> list[Tensor]:
    """Random directions v of the output, shaped as it is, with ``E[v v'] = H_out`` for each sample."""
    logits = batch.logits
    assert task.loss is not None
    loss = task.loss(batch.output, batch.target) * batch.size  # of each sample, if the loss is their mean
    (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
    flat = slope.reshape(batch.size, -1)
    width = flat.shape[1]
    if width > _WIDEST or not flat.requires_grad:
        notes["output"] = "empirical Fisher matrix: the output is too wide, or the loss is linear in it"
        return [slope.detach()]
    rows = [torch.autograd.grad(flat[:, k].sum(), logits, retain_graph=True)[0] for k in range(width)]
    hessian = torch.stack([row.reshape(batch.size, -1) for row in rows], 1).double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(1)
    return [
        (root @ _signs(logits, generator).reshape(batch.size, -1, 1).double()).reshape(logits.shape).to(logits.dtype)
        for _ in range(draws)
    ]


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.dtype) * 2 - 1


def _shrunk(total: Matrix, squares: Matrix, count: int, draws: int) -> Matrix:
    """Sums of products of slopes, [pairs, pairs], those off the diagonal shrunk by how far they are from 0.

    ``squares``: sums of the squared products. ``count``: samples times draws. Both sums are means over draws.
    """
    if count < 2:
        return np.diag(np.diag(total))
    mean = total * draws / count
    variance = np.maximum(squares * draws / count - mean**2, 0.0) / (count - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.nan_to_num(np.maximum(1.0 - variance / mean**2, 0.0), nan=0.0, neginf=0.0)
    np.fill_diagonal(kept, 1.0)
    shrunk: Matrix = total * kept
    return shrunk


DIAGONAL = InterLayer(samples=64, mu=0.0)
"""The default of ``profile`` and ``optimize``: each site alone, all of them from one forward and backward."""
