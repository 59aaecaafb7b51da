"""Orthogonal variable spreading factor codes: which they are, which of them hold most of given weights."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_INDEPENDENT = 1e-9
"""A code whose part outside those chosen before has less than this of its energy adds nothing."""


def box(axes: Sequence[int]) -> tuple[int, ...]:
    """Each size rounded up to a power of two: a code has so many entries by axis, and is cropped to ``axes``.

    >>> box((64, 3, 3))
    (64, 4, 4)
    """
    return tuple(1 << (size - 1).bit_length() for size in axes)


def tree(length: int) -> Tensor:
    """All codes of a length that is a power of two, int8 [length, length] of +1 and -1, in the order of the code tree:
    below ``c`` are ``(c, c)`` and ``(c, -c)`` (Adachi et al. 1997, doi:10.1049/el:19970037). Raises ``ValueError`` for
    another length.

    >>> tree(4).tolist()
    [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]
    """
    if length < 1 or length & (length - 1):
        raise ValueError(f"codes have a length that is a power of two, not {length}")
    found = torch.ones(1, 1, dtype=torch.int8)
    while found.shape[1] < length:
        found = torch.stack((torch.cat((found, found), 1), torch.cat((found, -found), 1)), 1).flatten(0, 1)
    return found


def codes(index: Tensor, axes: Sequence[int]) -> Tensor:
    """Those codes as filters of shape ``axes``: int8 ``[count, *axes]``.

    ``index``: int64 numbers in the tree of length ``prod(box(axes))``. A code is laid out over the box row by row and
    cropped at the end of each axis.

    >>> codes(torch.tensor([5]), (3, 3)).tolist()
    [[[1, 1, -1], [1, 1, -1], [-1, -1, 1]]]
    """
    sizes = box(axes)
    found = torch.ones(len(index), *[1] * len(axes), dtype=torch.int8, device=index.device)
    left = index
    # a code over a box is the outer product of codes along its axes; the number's highest digits are the last axis's
    for axis, size in enumerate(sizes):
        number, left = left % size, left // size
        along = tree(size)[:, : axes[axis]].to(index.device)[number]
        found = found * along.view(len(index), *[axes[axis] if k == axis else 1 for k in range(len(axes))])
    return found


def first(count: int) -> Tensor:
    """The first ``count`` codes of the tree, int64."""
    return torch.arange(count)


def chosen(vectors: Tensor, count: int) -> Tensor:
    """Numbers of ``count`` linearly independent codes, in the order in which they were chosen: each takes most of the
    energy that the ones before it leave of ``vectors`` (orthogonal matching pursuit of all vectors at once: Tropp et
    al. 2006, doi:10.1016/j.sigpro.2005.05.030).

    ``vectors``: ``[m, *axes]``, any floating type. Raises ``ValueError`` for more codes than entries of a vector.
    """
    axes = tuple(vectors.shape[1:])
    total = math.prod(axes)
    if not 1 <= count <= total:
        raise ValueError(f"{count} codes: {total} entries have 1 to {total} independent ones")
    sizes = box(axes)
    whole = [k for k, size in enumerate(axes) if size == sizes[k]]
    cropped = [k for k in range(len(axes)) if k not in whole]
    # along an axis that is not cropped codes are orthogonal: one group for each code there, without any in common
    values = vectors.detach().double()
    for axis in whole:
        along = tree(axes[axis]).to(values) / math.sqrt(axes[axis])
        values = (values.movedim(axis + 1, -1) @ along.T).movedim(-1, axis + 1)
    values = values.permute(*[k + 1 for k in whole], 0, *[k + 1 for k in cropped])
    groups = math.prod(axes[k] for k in whole)
    rest = [axes[k] for k in cropped]
    values = values.reshape(groups, vectors.shape[0], math.prod(rest))
    small = math.prod(sizes[k] for k in cropped)
    inner = codes(torch.arange(small), rest).reshape(small, -1).to(values)
    picks, gains = _pursuit(values.transpose(1, 2) @ values, inner, min(count, values.shape[2]))
    return _numbers(_merged(gains.tolist(), picks.tolist(), count), axes, whole, cropped).to(vectors.device)


def _pursuit(moments: Tensor, inner: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Codes by group in the order of choice [groups, steps], and the energy that each took.

    ``moments``: sums of v v^T by group [groups, n, n]; ``inner``: codes [L, n], the same for all groups.
    """
    left = inner.expand(len(moments), -1, -1).clone()  # what of each code is outside the chosen ones
    norm = left.square().sum(2)
    least = _INDEPENDENT * norm
    energy = torch.einsum("gln,gln->gl", left @ moments, left)
    picks, gains = [], []
    for _ in range(steps):
        score = torch.where(norm > least, energy.clamp(min=0.0) / norm.clamp(min=1e-300), -1.0)
        gain, pick = score.max(1)
        picks.append(pick)
        gains.append(gain)
        unit = left.gather(1, pick[:, None, None].expand(-1, 1, left.shape[2])).squeeze(1)
        unit = unit / unit.norm(dim=1, keepdim=True)
        moved = torch.einsum("gnm,gm->gn", moments, unit)
        share = torch.einsum("gln,gn->gl", left, unit)
        both = torch.einsum("gln,gn->gl", left, moved)
        energy = energy - 2 * share * both + share.square() * (unit * moved).sum(1, keepdim=True)
        left = left - share[:, :, None] * unit[:, None]
        norm = norm - share.square()
    return torch.stack(picks, 1), torch.stack(gains, 1)


def _merged(gains: Sequence[Sequence[float]], picks: Sequence[Sequence[int]], count: int) -> list[tuple[int, int]]:
    """``count`` pairs of group and code, always the next of the group that gains most."""
    heads = [(-row[0], group, 0) for group, row in enumerate(gains)]
    heapq.heapify(heads)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        _, group, place = heapq.heappop(heads)
        found.append((group, picks[group][place]))
        if place + 1 < len(gains[group]):
            heapq.heappush(heads, (-gains[group][place + 1], group, place + 1))
    return found


def _numbers(
    pairs: Sequence[tuple[int, int]], axes: Sequence[int], whole: Sequence[int], cropped: Sequence[int]
) -> Tensor:
    """Group (digits of the whole axes, row by row) and code of the cropped box as numbers of the tree over all axes."""
    sizes = box(axes)
    found = []
    for group, code in pairs:
        digits = dict.fromkeys(range(len(axes)), 0)
        for axis in reversed(whole):
            group, digits[axis] = divmod(group, sizes[axis])
        for axis in cropped:
            code, digits[axis] = divmod(code, sizes[axis])
        number, unit = 0, 1
        for axis, size in enumerate(sizes):
            number, unit = number + unit * digits[axis], unit * size
        found.append(number)
    return torch.tensor(found)


def coefficients(vectors: Tensor, index: Tensor) -> Tensor:
    """Least squares: ``a`` float64 [m, count] that minimizes ``|vectors - a codes(index)|``; of dependent codes the
    least ``a``. ``vectors``: ``[m, *axes]``."""
    axes = tuple(vectors.shape[1:])
    wanted = vectors.detach().double().flatten(1)
    matrix = codes(index, axes).flatten(1).double()
    if box(axes) == axes:
        return wanted @ matrix.T / matrix.shape[1]
    gram = matrix @ matrix.T
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed and float(factor.diagonal().square().min()) > 1e-6 * float(gram.diagonal().max()):
        solved: Tensor = torch.cholesky_solve(matrix @ wanted.T, factor)
        return solved.T
    inverse: Tensor = torch.linalg.pinv(matrix)
    return wanted @ inverse
