"""Palettes: few values that many weights share. Rows are clustered apart, each one-dimensional, so sorting does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BINS = 2048
_CUTS, _WORK = 1024, 1e8
"""Places where a cluster may end in the exact start: at most so many, and so few that steps * places^2 stay below."""


def kmeans(values: Tensor, count: int, importance: Tensor | None = None, iterations: int = 100) -> Tensor:
    """The ``count`` values by which each row is best replaced: (rows, n) -> (rows, count), ascending, float32.

    Lloyd's algorithm (1982, doi:10.1109/TIT.1982.1056489) on sorted rows, where a cluster is an interval and its mean
    a difference of running sums: an iteration costs ``count log n``. It starts from three sets: the best intervals by
    dynamic programming (Fisher 1958, doi:10.1080/01621459.1958.10501479), which is the optimum of a row of at most
    1024 values, and of a longer one among intervals that end at 1024 places; evenly spread values (Han et al. 2016,
    arXiv:1510.00149, section 3.2); and values spread by the cube root of the density (Panter and Dite 1951,
    doi:10.1109/JRPROC.1951.230419). The best end is kept by row. ``importance``: weight of every value's squared
    error, shaped as ``values``, 0 or more. A row of at most ``count`` different values keeps them.

    >>> kmeans(torch.tensor([[0.0, 0.1, 1.0, 1.1]]), 2)
    tensor([[0.0500, 1.0500]])
    """
    ordered, weight = _ordered(values.detach().float(), importance)
    if weight is None:
        count_of = torch.arange(ordered.shape[1] + 1, dtype=ordered.dtype, device=ordered.device)
        sums = [count_of.expand(len(ordered), -1), _running(ordered), _running(ordered.square())]
    else:
        felt = weight * ordered
        sums = [_running(weight), _running(felt), _running(felt.mul_(ordered))]
    best, least = torch.empty(0), torch.empty(0)
    starts = (_spread(ordered, sums[0], count, power) for power in (0.0, 1 / 3))
    for start in (_grouped(ordered, sums, count), *starts):
        found, error = _lloyd(ordered, sums, start, iterations)
        if not len(best):
            best, least = found, error
        else:
            best = torch.where((error < least)[:, None], found, best)
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    for row in (distinct <= count).nonzero().flatten().tolist():
        own: Tensor = torch.unique(ordered[row])
        best[row] = torch.cat((own, own[-1:].expand(count - len(own))))
    return best.float()


def uniform(values: Tensor, count: int) -> Tensor:
    """``count`` evenly spread values from the least to the greatest of each row: (rows, n) -> (rows, count)."""
    low, high = values.detach().float().aminmax(dim=1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, count, device=values.device)


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """The index of the value of an ascending codebook nearest to each weight; of two equally near, the lower.

    ``values`` (rows, n), ``codebook`` (rows, k) -> int64 (rows, n).
    """
    middle = (codebook[:, 1:] + codebook[:, :-1]) / 2
    return torch.searchsorted(middle.contiguous(), values.detach().to(middle.dtype).contiguous())


def looked_up(codebook: Tensor, index: Tensor) -> Tensor:
    """Entries of each row's codebook: (rows, k), (rows, n) -> (rows, n)."""
    return codebook.gather(1, index)


def soft(values: Tensor, codebook: Tensor, temperature: float, iterations: int = 5) -> tuple[Tensor, Tensor]:
    """Differentiable k-means (Cho et al. 2022, arXiv:2108.12659, section 3): (soft weights, values of the palette).

    Attention ``a = softmax(-|w - c| / tau)``, ``c <- sum a w / sum a``, repeated; the weights are ``a c``. ``tau`` is
    ``temperature`` times the mean distance of neighbouring values of ``codebook``, so that it means the same at any
    scale. Shapes as in :func:`nearest`. The gradient by ``values`` goes through all ``iterations``, as in the paper;
    all but the last are computed again for it, so that the (rows x n x k) numbers of no more than one are held.
    """
    spacing = codebook.detach()
    gap = (spacing.amax(1) - spacing.amin(1)) / max(codebook.shape[1] - 1, 1)
    tau = (temperature * gap).clamp_min(torch.finfo(values.dtype).tiny)[:, None, None]
    centres = codebook
    for _ in range(iterations - 1):
        centres = _Moved.apply(values, centres, tau)  # type: ignore[no-untyped-call]
    attention = _attention(values, centres, tau)
    centres = _attended(values, attention, centres)
    return torch.einsum("rnk,rk->rn", attention, centres), centres


class _Moved(torch.autograd.Function):
    """One iteration, of which only its operands are kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, centres: Tensor, tau: Tensor) -> Tensor:
        ctx.save_for_backward(values, centres, tau)
        return _attended(values, _attention(values, centres, tau), centres)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, None]:
        values, centres, tau = ctx.saved_tensors
        with torch.enable_grad():
            seen, before = values.detach().requires_grad_(), centres.detach().requires_grad_()
            after = _attended(seen, _attention(seen, before, tau), before)
        by_values, by_centres = torch.autograd.grad(after, (seen, before), given)
        return by_values, by_centres, None


def _attention(values: Tensor, centres: Tensor, tau: Tensor) -> Tensor:
    return torch.softmax(-(values[:, :, None] - centres[:, None]).abs() / tau, dim=2)


def _attended(values: Tensor, attention: Tensor, centres: Tensor) -> Tensor:
    total = attention.sum(1)
    means = torch.einsum("rnk,rn->rk", attention, values) / total.clamp_min(1e-12)
    return torch.where(total > 1e-12, means, centres)


def _ordered(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each row ascending, and the importance of its values, float64. NumPy's sort takes a twentieth of torch's."""
    array = values.cpu().numpy()
    if importance is None:
        return torch.from_numpy(np.sort(array, axis=1)).to(values.device, torch.float64), None
    order = torch.from_numpy(np.argsort(array, axis=1)).to(values.device)
    weight = importance.detach().to(values.device, torch.float64).gather(1, order)
    # rows without any importance count evenly
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, torch.ones_like(weight))
    return values.gather(1, order).double(), weight


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., n entries of each row: (rows, n + 1)."""
    sums = values.new_zeros(len(values), values.shape[1] + 1)
    torch.cumsum(values, 1, out=sums[:, 1:])
    return sums


def _spread(ordered: Tensor, mass: Tensor, count: int, power: float) -> Tensor:
    """Values spread by that power of the density, whose running sums are ``mass``: (rows, count), ascending."""
    low, high = ordered[:, :1], ordered[:, -1:]
    place = torch.arange(count, dtype=ordered.dtype, device=ordered.device)
    if power == 0.0:
        return low + (high - low) * place / max(count - 1, 1)
    edges = low + (high - low) * torch.arange(1, _BINS, dtype=ordered.dtype, device=ordered.device) / _BINS
    inner = mass.gather(1, torch.searchsorted(ordered, edges))
    density = torch.cat((torch.zeros_like(low), inner, mass[:, -1:]), 1).diff(dim=1).clamp_min(0)
    share = density.pow(power).cumsum(1)
    wanted = (share[:, -1:] * ((place + 0.5) / count)).contiguous()
    return low + (high - low) * (torch.searchsorted(share, wanted).to(ordered.dtype) + 0.5) / _BINS


def _grouped(ordered: Tensor, sums: list[Tensor], count: int) -> Tensor:
    """Means of the ``count`` intervals of least squared error, of those that end at some places: (rows, count)."""
    rows, n = ordered.shape
    places = int(min(n, _CUTS, max(64.0, (_WORK / (count * rows)) ** 0.5)))
    if places == n:
        ends = torch.arange(n + 1, device=ordered.device).expand(rows, -1)
    else:
        half = places // 2  # evenly, for the tails; and where the values are
        edges = [_spread(ordered, sums[0], half, 0.0), _spread(ordered, sums[0], places - 1 - half, 1 / 3)]
        inner = torch.searchsorted(ordered, torch.cat(edges, 1).sort(1).values, right=True)
        ends = torch.cat((torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], n)), 1)
    mass, total, square = (s.gather(1, ends).cpu().numpy() for s in sums)
    centres = np.stack([_optimal(*row, count) for row in zip(mass, total, square, strict=True)])
    return torch.from_numpy(centres).to(ordered.device)


def _optimal(mass: NDArray[Any], total: NDArray[Any], square: NDArray[Any], count: int) -> NDArray[Any]:
    """Means of the best intervals, ascending, from running sums at the places where one may end: (places + 1,) each.
    ``least[j]``: the least error of what lies before place j; an empty interval costs nothing."""
    width, sums = mass[None, :] - mass[:, None], total[None, :] - total[:, None]
    some = width > 0
    cost = np.where(some, square[None, :] - square[:, None] - sums**2 / np.where(some, width, 1.0), 0.0)
    cost[np.tril_indices(len(mass), -1)] = np.inf
    least, came = cost[0], []
    for _ in range(count - 1):
        reached = least[:, None] + cost
        came.append(reached.argmin(0))
        least = reached.min(0)
    last, cuts = len(mass) - 1, [len(mass) - 1]
    for back in reversed(came):
        last = int(back[last])
        cuts.append(last)
    bounds = np.array([0, *reversed(cuts)])
    held, felt = np.diff(mass[bounds]), np.diff(total[bounds])
    means = np.where(held > 0, felt / np.where(held > 0, held, 1.0), -np.inf)
    means = np.maximum.accumulate(means)  # an empty interval repeats the one before it
    return np.where(np.isfinite(means), means, means[np.isfinite(means)].min())


def _lloyd(ordered: Tensor, sums: list[Tensor], centres: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The centres at the end, and the squared error of each row."""
    cuts = torch.empty(0)
    ends = torch.tensor([0, ordered.shape[1]], device=ordered.device).expand(len(ordered), 2)
    for _ in range(iterations):
        middle = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        found = torch.searchsorted(ordered, middle, right=True)
        if cuts.shape == found.shape and torch.equal(found, cuts):
            break
        cuts = found
        bounds = torch.cat((ends[:, :1], cuts, ends[:, 1:]), dim=1)
        count, total, square = (s.gather(1, bounds).diff(dim=1) for s in sums)
        # an empty cluster stays where it is
        centres = torch.where(count > 0, total / count.clamp_min(torch.finfo(count.dtype).tiny), centres)
        centres = centres.sort(dim=1).values
    error = (square - torch.where(count > 0, total.square() / count.clamp_min(1e-300), 0.0)).sum(1)
    return centres, error
