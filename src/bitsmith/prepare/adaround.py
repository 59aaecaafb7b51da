"""AdaRound: learning which way each weight is rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..model.network import Network
from ..plan import Plan
from ..technique import Step
from ._sequential import Matrix, Problem, Rounded, round_weights

_ZETA, _GAMMA = 1.1, -0.1  # how far the rectified sigmoid is stretched beyond 1 and 0
_DECAY, _DECAY_SQUARE = 0.9, 0.999  # Adam's
_CHUNK = 1 << 15  # weights updated at a time, so that all their state stays in the cache
_BLOCK = 64  # columns whose changes are gathered before the others hear of them
_DAMP = 0.01  # of the mean of the Gram matrix's diagonal, towards the weights in float


@dataclass(frozen=True)
class AdaRound(Step):
    """Adaptive rounding (Nagel et al. 2020, arXiv:2004.10568, eq. 21 to 25).

    Layer by layer in execution order, whether each weight is rounded down or up is learned so that the layer's output
    behind its activation, computed from what the layers before give it now that they are rounded, comes close to the
    float network's (eq. 25). The choice is relaxed to a rectified sigmoid (eq. 23) that a regularisation (eq. 24)
    drives to 0 or 1: ``beta`` falls linearly from the first to the second value after ``warmup`` (a fraction of the
    iterations) without it. ``batch`` rows of ``rows`` output positions of at most ``samples`` samples per iteration,
    Adam with ``lr``.

    The error is divided by that of rounding to nearest, and the regularisation by the number of weights, so that
    ``reg`` has no unit (in the paper it has that of the output). A layer in which nearest was better keeps it.

    ``asymmetric=False`` holds a layer against what its float weights make of the inputs that it gets now (eq. 21), not
    against the float network: it then leaves the errors of the layers before alone. Better on a transformer, worse on
    convolutional networks (docs/post_training.md).

    ``method="descent"`` is not the paper's: it solves eq. 20 without the activation by coordinate descent over all
    integers, from nearest, on the Gram matrix of the inputs (as QuantEase, Behdin et al. 2023, arXiv:2309.01885, there
    for one network's own inputs). ``iterations`` are then sweeps at most, and the options below ``samples`` idle.

    For sites of integer weights, convolutions and linear layers, that are called once and share their weight
    with nobody; others (embeddings, recurrent loops, tied weights) are left alone. Scales are those of the technique.
    """

    values_only: ClassVar[bool] = True

    iterations: int = 500
    samples: int = 256
    rows: int = 8192
    batch: int = 256
    lr: float = 0.1
    reg: float = 100.0
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    seed: int = 0
    method: Literal["relaxation", "descent"] = "relaxation"
    asymmetric: bool = True

    def __post_init__(self) -> None:
        for name in ("iterations", "samples", "rows", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"AdaRound({name}={getattr(self, name)!r}): must be a whole number, 1 or more")
        if self.lr <= 0 or self.reg < 0:
            raise ValueError(f"AdaRound(lr={self.lr}, reg={self.reg}): lr must be above 0, reg not below")
        if len(self.beta) != 2 or min(self.beta) < 1:
            raise ValueError(f"AdaRound(beta={self.beta!r}): must be two exponents of 1 or more, (from, to)")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"AdaRound(warmup={self.warmup}): must be a fraction of the iterations, 0 to 1")
        if self.method not in ("relaxation", "descent"):
            raise ValueError(f"AdaRound(method={self.method!r}): must be 'relaxation' or 'descent'")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        asymmetric = self.asymmetric
        return round_weights(net, plan, data, self.samples, self.rows, self.seed, asymmetric, self._solve, "AdaRound")

    def _solve(self, problem: Problem) -> Rounded:
        matrix = problem.matrix
        if not self.asymmetric:
            problem = replace(problem, target=torch.baddbmm(matrix.bias[:, None], problem.x, matrix.weight.mT))
        nearest = matrix.nearest
        least = output_error(problem, nearest)
        if least == 0.0:
            return Rounded(nearest, matrix.scale, matrix.zero)
        found = descend(problem, self.iterations) if self.method == "descent" else self._relax(problem, least)
        return Rounded(found if output_error(problem, found) < least else nearest, matrix.scale, matrix.zero)

    def _relax(self, problem: Problem, error: float) -> Tensor:
        matrix, x = problem.matrix, problem.x
        rounding = _Rounding(matrix)
        goal = _clamp(problem.target, matrix.limits)
        generator = torch.Generator().manual_seed(self.seed)
        batch = min(self.batch, x.shape[1])
        warm = round(self.warmup * self.iterations)
        order = torch.empty(0, dtype=torch.long)
        for iteration in range(self.iterations):
            if len(order) < batch:
                order = torch.randperm(x.shape[1], generator=generator)
            chosen, order = order[:batch], order[batch:]
            here = x[:, chosen]
            y = torch.baddbmm(matrix.bias[:, None], here, rounding.weight.mT)
            off = _clamp(y, matrix.limits).sub_(goal[:, chosen])
            if matrix.limits is not None:
                off.mul_((y > matrix.limits[0]) & (y < matrix.limits[1]))
            gradient = torch.bmm(off.mT, here).mul_(2.0 / (batch * error))
            beta = None
            if iteration >= warm:
                done = (iteration - warm) / max(1, self.iterations - warm)
                beta = self.beta[0] + (self.beta[1] - self.beta[0]) * done
            rounding.update(gradient, iteration + 1, self.lr, self.reg / matrix.weight.numel(), beta)
        return rounding.integers


class _Rounding:
    """The relaxed choice of every weight: ``h`` between 0 (down) and 1 (up), learned through ``v`` (eq. 23).

    ``weight``: what it makes of the weights now, ``scale * (down + h)`` (eq. 22).
    """

    def __init__(self, matrix: Matrix) -> None:
        low, high = matrix.bounds
        step = matrix.step.expand_as(matrix.weight).contiguous()
        scaled = matrix.weight / step
        # beyond the range the choice is between the last two integers
        self.down = scaled.floor().clamp_(low, high - 1)
        self.step = step.view(-1)
        rest = (scaled - self.down).clamp_(0, 1).view(-1)
        self.v = torch.log((rest - _GAMMA) / (_ZETA - rest))
        self.h, self.slope = torch.empty_like(self.v), torch.empty_like(self.v)
        self.mean, self.square = torch.zeros_like(self.v), torch.zeros_like(self.v)
        self.weight = torch.empty_like(self.down)
        self.spans = [slice(i, i + _CHUNK) for i in range(0, len(self.v), _CHUNK)]
        self.buffers = torch.empty(2, min(_CHUNK, len(self.v)))
        for span in self.spans:
            self._soften(span)

    @property
    def integers(self) -> Tensor:
        return self.down + (self.h.view_as(self.down) >= 0.5)

    def update(self, gradient: Tensor, count: int, lr: float, reg: float, beta: float | None) -> None:
        """One step of Adam (Kingma and Ba 2015). ``gradient``: of the error by the weights; is overwritten."""
        flat = gradient.view(-1)
        rate = lr / (1 - _DECAY**count)
        root = 1 / math.sqrt(1 - _DECAY_SQUARE**count)
        for span in self.spans:
            g = flat[span].mul_(self.step[span])
            one, two = self.buffers[:, : len(g)]
            if beta is not None:
                # d/dh (1 - |2h - 1|^beta) = -2 beta |2h - 1|^(beta - 1) sign(2h - 1)
                torch.mul(self.h[span], 2, out=one).sub_(1)
                torch.abs(one, out=two).pow_(beta - 1)
                g.addcmul_(one.sign_(), two, value=-2 * beta * reg)
            g.mul_(self.slope[span])
            self.mean[span].lerp_(g, 1 - _DECAY)
            self.square[span].mul_(_DECAY_SQUARE).addcmul_(g, g, value=1 - _DECAY_SQUARE)
            torch.sqrt(self.square[span], out=one).mul_(root).add_(1e-12)
            self.v[span].addcdiv_(self.mean[span], one, value=-rate)
            self._soften(span)

    def _soften(self, span: slice) -> None:
        """``h = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)`` and its slope, and the weights."""
        h, slope = self.h[span], self.slope[span]
        torch.sigmoid(self.v[span], out=h).mul_(_ZETA - _GAMMA).add_(_GAMMA)
        # the sigmoid's slope by h is (h - gamma) (zeta - h) / (zeta - gamma); 0 where h is clipped
        torch.mul(h, 1 - h, out=slope)
        torch.threshold_(slope, 0.0, _GAMMA * _ZETA).sub_(_GAMMA * _ZETA).div_(_ZETA - _GAMMA)
        h.clamp_(0, 1)
        torch.add(self.down.view(-1)[span], h, out=self.weight.view(-1)[span]).mul_(self.step[span])


def output_error(problem: Problem, integers: Tensor) -> float:
    """Squared error of a layer's output behind its activation, summed over channels, mean over rows (eq. 25)."""
    matrix = problem.matrix
    y = torch.baddbmm(matrix.bias[:, None], problem.x, (integers * matrix.step).mT)
    off = _clamp(y, matrix.limits) - _clamp(problem.target, matrix.limits)
    return float(off.square_().sum(dtype=torch.float64)) / problem.x.shape[1]


def _clamp(y: Tensor, limits: tuple[float, float] | None) -> Tensor:
    return y.clone() if limits is None else y.clamp(*limits)


def descend(problem: Problem, sweeps: int) -> Tensor:
    """Integers that no change of a single one improves, for the squared error before the activation, from nearest.

    With the Gram matrix G of the inputs and the gradient D of half the error, the best value of weight k alone is
    ``w_k - D_k / G_kk`` on the grid. Ends early when a sweep changes less than one weight in ten thousand.
    """
    matrix, x = problem.matrix, problem.x
    low, high = (limit.expand_as(matrix.weight) for limit in matrix.bounds)
    step = matrix.step.expand_as(matrix.weight)
    # of the weights in float, whose inputs differ from the ones that are rounded for
    slack = torch.bmm((torch.baddbmm(matrix.bias[:, None], x, matrix.weight.mT) - problem.target).mT, x)
    gram = torch.bmm(x.mT, x)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += (_DAMP * diagonal.mean(1, keepdim=True)).clamp_min_(torch.finfo(torch.float32).tiny)
    q = matrix.nearest
    slack.baddbmm_(q * step - matrix.weight, gram)
    for _ in range(sweeps):
        changed = 0
        for start in range(0, q.shape[-1], _BLOCK):
            here = slice(start, start + _BLOCK)
            before = q[:, :, here].clone()
            inner, local = gram[:, here, here], slack[:, :, here].clone()
            for j in range(before.shape[-1]):
                k = start + j
                best = (q[:, :, k] - local[:, :, j] / (step[:, :, k] * diagonal[:, k, None])).round_()
                best.clamp_(low[:, :, k], high[:, :, k])
                local.baddbmm_(((best - q[:, :, k]) * step[:, :, k])[:, :, None], inner[:, j][:, None])
                q[:, :, k] = best
            moved = (q[:, :, here] - before) * step[:, :, here]
            slack.baddbmm_(moved, gram[:, here])
            changed += int(moved.count_nonzero())
        if changed < 1e-4 * q.numel():
            break
    return q
