"""GPTQ: rounding a layer column by column, the columns that follow making up for the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model.network import Network
from ..numerics.ranges import weight_qparams
from ..plan import Plan
from ..technique import Step
from ._sequential import Matrix, Problem, Rounded, bounds, round_weights, spread


@dataclass(frozen=True)
class Gptq(Step):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).

    Layer by layer in execution order. The weights that one input meets (a column) are rounded to nearest together, and
    what that costs in the layer's output is taken back by the columns that are still free: with the Hessian
    ``H = 2 X X' + damp mean(diag) I`` of the rows X that the layers before give now that they are rounded, each update
    is read off the Cholesky factor of its inverse. Columns of a ``block`` are updated at once, the others behind it.

    ``act_order``: columns by falling diagonal of H instead of by index. Groups of a row (``Int(granularity="group")``)
    get their scales and zero points when the first of their columns is reached, from weights that hold the errors so
    far; with ``act_order``, and where an earlier step has fixed them, they keep those that the technique chose.

    ``damp`` is ten times the paper's: measured on a transformer with some thousand tokens; with convolutional networks
    the paper's 0.01 was better (docs/post_training.md). At most ``samples`` samples and ``rows`` of their output
    positions (a convolution's patches, a token's features) make up X. Inputs that were always 0 are rounded to nearest
    (the paper's code drops their weights).

    For sites of integer weights, convolutions and linear layers, that are called once and share their weight
    with nobody; others (embeddings, recurrent loops, tied weights) are left alone.
    """

    values_only: ClassVar[bool] = True

    damp: float = 0.1
    block: int = 128
    act_order: bool = False
    samples: int = 256
    rows: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "samples", "rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"Gptq({name}={getattr(self, name)!r}): must be a whole number, 1 or more")
        if not self.damp > 0:
            raise ValueError(f"Gptq(damp={self.damp}): must be above 0, or H may have no inverse")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        return round_weights(net, plan, data, self.samples, self.rows, self.seed, False, self._solve, "Gptq")

    def _solve(self, problem: Problem) -> Rounded:
        matrix = problem.matrix
        hessian = torch.bmm(problem.x.mT, problem.x).mul_(2).double()
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        order = None
        if self.act_order:
            order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
            hessian = hessian.gather(1, order[:, :, None].expand_as(hessian))
            hessian = hessian.gather(2, order[:, None].expand_as(hessian))
        return self._round(matrix, inverse_factor(hessian, self.damp), order)

    def _round(self, matrix: Matrix, factor: Tensor, order: Tensor | None) -> Rounded:
        """``factor``: upper Cholesky factor of the inverse Hessian, (groups, in, in), columns in that order."""
        width = matrix.weight.shape[-1]
        part = width // matrix.scale.shape[-1]
        free = matrix.weight.clone()
        scale = matrix.scale.clone()
        zero = matrix.zero.clone()
        step, origin = (spread(values, width).expand_as(free) for values in (scale, zero))
        if order is not None:
            along = order[:, None].expand_as(free)
            free, step, origin = (values.gather(2, along) for values in (free, step, origin))
        late = scale.shape[-1] > 1 and order is None and not matrix.fixed
        # a group never reaches beyond its block, where its weights would not hold all errors yet
        block = -(-self.block // part) * part if late else self.block
        integers = torch.empty_like(free)
        for start in range(0, width, block):
            here = slice(start, min(start + block, width))
            weight, inner = free[:, :, here].clone(), factor[:, here, here]
            errors = torch.empty_like(weight)
            for j in range(weight.shape[-1]):
                k = start + j
                if late and k % part == 0:
                    scale[:, :, k // part], zero[:, :, k // part] = _grid(matrix, weight[:, :, j : j + part])
                size = scale[:, :, k // part] if late else step[:, :, k]
                limits = bounds(matrix.format, zero[:, :, k // part] if late else origin[:, :, k])
                integers[:, :, k] = (weight[:, :, j] / size).round_().clamp_(*limits)
                errors[:, :, j] = (weight[:, :, j] - integers[:, :, k] * size) / inner[:, j, j, None]
                weight[:, :, j + 1 :].baddbmm_(errors[:, :, j, None], inner[:, None, j, j + 1 :], alpha=-1)
            free[:, :, here.stop :].baddbmm_(errors, factor[:, here, here.stop :], alpha=-1)
        if order is not None:
            integers = torch.empty_like(integers).scatter_(2, along, integers)
        return Rounded(integers, scale, zero)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper U with ``U' U`` the inverse of the damped Hessian, float32; in float64 inside. ``hessian`` is changed."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # an input that is always 0 depends on no other; where all are, any diagonal does
    diagonal += damp * torch.where(mean > 0, mean, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _grid(matrix: Matrix, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of (groups, out, some), as the technique would choose them: (groups, out)."""
    rows = weight.reshape(-1, weight.shape[-1])
    scale, zero = weight_qparams(rows, matrix.format.bits, matrix.format.symmetric, 0, None, matrix.range)
    return scale.reshape(weight.shape[:2]), zero.reshape(weight.shape[:2]).float()
