"""From what was seen to limits, and from limits to a scale and a zero point."""

from __future__ import annotations

import hashlib
import math
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..site import Format, Range
from .statistics import TensorStatistics

Vector = NDArray[np.float64]

MIN_SCALE = 2.0**-40
"""No scale is smaller: products of two scales stay far from float32's denormal numbers."""

_FRACTIONS = np.linspace(1.0, 1 / 80, 80)  # widest first, so that ties keep the wider range
_COARSE = np.linspace(1.0, 1 / 16, 16)
_BLOCK = 16384  # elements worked on at a time, so that they stay in the cache

_KNOWN: WeakKeyDictionary[TensorStatistics, dict[tuple[Format, int], tuple[float, float]]] = WeakKeyDictionary()
"""Limits that were searched for: steps build one network several times from the same histograms."""
_REMEMBERED = 512
_shrunk: dict[tuple[bytes, tuple[int, ...], Format], Vector] = {}
"""Factors of the last so many weights that were searched, by content."""


def limits(statistics: TensorStatistics, fmt: Format) -> tuple[float, float]:
    """The interval ``low <= 0 <= high`` to be represented, by ``fmt.range``.

    ``minmax``: the extremes. ``percentile``: two-sided. ``mse``: least expected squared error of clipping and
    rounding, integrated in closed form over the histogram (exact zeros have none). ``entropy``: least Kullback-Leibler
    divergence between the clipped and the quantized histogram (S. Migacz, "8-bit inference with TensorRT", GTC 2017),
    both sides clipped at one magnitude. From the last two a symmetric format gets ``(-t, t)``, or ``(0, t)`` if
    unsigned.
    Raises ``ValueError`` when nothing was seen or a histogram is needed and missing.
    """
    if statistics.count == 0:
        raise ValueError("no range: the statistics have seen no values; run calibration data through the model first")
    known, key = _KNOWN.setdefault(statistics, {}), (fmt, statistics.count)
    if key not in known:
        known[key] = _limits(statistics, fmt)
    return known[key]


def _limits(statistics: TensorStatistics, fmt: Format) -> tuple[float, float]:
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    method, percentile = fmt.range.method, fmt.range.percentile
    if method == "minmax" or low == high:
        return low, high
    counts = statistics.nonzero_histogram.numpy()
    edges = statistics.edges.numpy()
    if method == "percentile":
        if percentile == 100.0:
            return low, high
        assert statistics.histogram is not None
        cumulative = np.cumsum(statistics.histogram.numpy())
        below, above = (_quantile(cumulative, edges, p / 100) for p in (100 - percentile, percentile))
        return min(max(below, low), 0.0), max(min(above, high), 0.0)
    if not counts.any():  # the sample held zeros only
        return low, high
    return _least_squares(counts, edges, low, high, fmt) if method == "mse" else _entropy(counts, edges, low, high, fmt)


def qparams(low: float, high: float, fmt: Format) -> tuple[float, int]:
    """Scale (a float32 value, at least ``MIN_SCALE``) and zero point (one of ``fmt.levels``) for an interval.

    The interval is first widened to hold 0, which is represented exactly; rounding the zero point moves the limits by
    at most half a step. An affine interval from ``-x`` to ``x`` of 8 bits or more leaves one level out instead: its
    zero point is exact. Symmetric signed: zero point 0, ``scale = max|.| / (2^(bits-1) - 1)``. Symmetric unsigned: zero
    point 0, ``scale = high / (2^bits - 1)``, and ``low`` must not be negative (``ValueError``). An interval without
    width (a tensor of zeros) is taken as magnitude 1.

    >>> qparams(-1.0, 1.0, Format(8, signed=True, symmetric=True))[0] == float(torch.tensor(1 / 127))
    True
    >>> qparams(0.0, 255.0, Format(8)), qparams(-1.0, 254.0, Format(8))
    ((1.0, 0), (1.0, 1))
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"qparams(low={low}, high={high}): must be finite, low <= high")
    if fmt.symmetric and not fmt.signed and low < 0:
        raise ValueError(
            f"qparams(low={low}): {fmt} is unsigned and has no zero point; use a signed or an affine format"
        )
    scale, zero_point = _qparams(np.array([low]), np.array([high]), fmt)
    return float(scale[0]), int(zero_point[0])


def weight_qparams(
    weight: Tensor, bits: int, symmetric: bool, axis: int | None, group: int | None, range: Range
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int64) of a weight.

    ``axis=None``: one pair, shapes (). ``axis``: one per channel, (C,). ``group``: one per ``group`` neighbours along
    dimension 1 (the reduction axis) of every output channel, (O, I / group); ``axis`` must be 0.
    Symmetric: signed, zero point 0, greatest magnitude at ``2^(bits-1) - 1``; else unsigned with a zero point.
    ``mse`` tries 80 shrink factors of the extremes; ``percentile`` takes the nearest rank; ``entropy`` is per tensor
    only (a channel has too few weights for a histogram). A channel of zeros gets the widest channel's range.
    Raises ``ValueError`` on a group that does not divide, or a method that does not apply.
    """
    fmt = Format(bits, signed=symmetric, symmetric=symmetric, range=range)
    weight = weight.detach().float()
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise ValueError(f"weight of shape {tuple(weight.shape)} is empty or holds NaN or inf: it cannot be quantized")
    if range.method == "entropy" and axis is not None:
        raise ValueError(
            "Range('entropy') of a weight is per tensor only: use 'minmax', 'percentile' or 'mse' per channel"
        )
    rows, shape = _rows(weight, axis, group)
    if range.method == "entropy":
        statistics = TensorStatistics(histogram=True, subsample=weight.numel())
        statistics.update(weight)
        pair = limits(statistics, fmt)
        low, high = np.array([pair[0]]), np.array([pair[1]])
    else:
        if range.method == "percentile":
            rank = math.ceil(range.percentile / 100 * rows.shape[1])
            least, greatest = rows.kthvalue(rows.shape[1] + 1 - rank, 1).values, rows.kthvalue(rank, 1).values
        else:
            least, greatest = rows.aminmax(dim=1)
        low, high = least.cpu().double().clamp(max=0).numpy(), greatest.cpu().double().clamp(min=0).numpy()
        if range.method == "mse":
            factor = _shrink(rows, low, high, fmt)
            low, high = low * factor, high * factor
    scale, zero_point = _qparams(low, high, fmt)
    device = weight.device
    return (
        torch.from_numpy(scale.astype(np.float32)).reshape(shape).to(device),
        torch.from_numpy(zero_point).reshape(shape).to(device),
    )


def _qparams(low: Vector, high: Vector, fmt: Format) -> tuple[Vector, NDArray[np.int64]]:
    """:func:`qparams` of many intervals; the scales are float32 values held in float64."""
    least, greatest = fmt.levels
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    width = (np.maximum(-low, high) if fmt.signed else high) if fmt.symmetric else high - low
    width = np.where(width == 0.0, width.max() or 1.0, width)
    steps = np.full_like(width, greatest if fmt.symmetric else greatest - least)
    if not fmt.symmetric and fmt.bits >= 8:
        # the zero point would lie half way between two levels, and with it every pixel k / 127.5 - 1, where runtimes
        # round differently and rounding errs most
        steps = np.where((high > 0) & np.isclose(-low, high, rtol=1e-6, atol=0.0), steps - 1, steps)
    scale = np.maximum(width / steps, MIN_SCALE)
    scale = scale.astype(np.float32).astype(np.float64)
    zero = np.zeros_like(scale) if fmt.symmetric else np.clip(np.rint(least - low / scale), least, greatest)
    return scale, zero.astype(np.int64)


def _quantile(cumulative: Vector, edges: Vector, q: float) -> float:
    """The value below which the fraction ``q`` of the counts lies, linear within its bin."""
    target = q * cumulative[-1]
    index = min(int(np.searchsorted(cumulative, target, side="left")), len(cumulative) - 1)
    before = cumulative[index - 1] if index else 0.0
    inside = cumulative[index] - before
    fraction = (target - before) / inside if inside > 0 else 0.0
    return float(edges[index] + fraction * (edges[index + 1] - edges[index]))


def _squared_error(counts: Vector, edges: Vector, low: Vector, high: Vector, fmt: Format) -> Vector:
    """Expected squared error of the quantizer for each interval, values being uniform within their bin.

    With ``t = x / scale`` the error ``t - k`` (``k`` the nearest level) has the continuous antiderivative
    ``k / 12 + (t - k)^3 / 3``, inside the range and beyond it.
    """
    scale, zero_point = _qparams(low, high, fmt)
    least, greatest = fmt.levels
    t = edges / scale[:, None]
    level = np.clip(np.rint(t), (least - zero_point)[:, None], (greatest - zero_point)[:, None])
    integral = np.diff(level / 12 + (t - level) ** 3 / 3, axis=1)
    errors: Vector = (integral @ counts) * scale**3 / (edges[1] - edges[0])
    return errors


def _least_squares(counts: Vector, edges: Vector, low: float, high: float, fmt: Format) -> tuple[float, float]:
    def best(lows: Vector, highs: Vector) -> tuple[float, float]:
        index = int(np.argmin(_squared_error(counts, edges, lows, highs, fmt)))
        return float(lows[index]), float(highs[index])

    if fmt.symmetric:
        reach = max(-low, high) * _FRACTIONS
        return best(-reach if fmt.signed else 0.0 * reach, reach)
    if low == 0.0 or high == 0.0:
        return best(low * _FRACTIONS, high * _FRACTIONS)
    # both ends on a coarse grid, then one at a time
    lows, highs = np.meshgrid(low * _COARSE, high * _COARSE)
    chosen = best(lows.ravel(), highs.ravel())
    chosen = best(low * _FRACTIONS, np.full_like(_FRACTIONS, chosen[1]))
    return best(np.full_like(_FRACTIONS, chosen[0]), high * _FRACTIONS)


def _entropy(counts: Vector, edges: Vector, low: float, high: float, fmt: Format) -> tuple[float, float]:
    width = edges[1] - edges[0]
    centres = (edges[:-1] + edges[1:]) / 2
    levels = 2**fmt.bits - int(fmt.symmetric and fmt.signed)
    reach = max(-low, high)
    if fmt.symmetric and fmt.signed:
        low, high = -reach, reach
    # at least one bin per level, as in the source: narrower intervals would be free of rounding
    narrowest = min(levels * width / (high - low), 1.0)
    best, chosen = math.inf, (low, high)
    for fraction in np.linspace(1.0, narrowest, 128):
        below, above = max(low, -reach * fraction), min(high, reach * fraction)
        inside = np.flatnonzero((centres >= below) & (centres <= above))
        if not len(inside):
            continue
        first, end = inside[0], inside[-1] + 1
        kept = counts[first:end]
        clipped = kept.copy()
        clipped[0] += counts[:first].sum()
        clipped[-1] += counts[end:].sum()
        level = np.clip(((centres[first:end] - below) / (above - below) * levels).astype(np.int64), 0, levels - 1)
        occupied = kept > 0
        sums, sizes = np.bincount(level, kept, levels), np.bincount(level, occupied, levels)
        spread = np.where(occupied, sums[level] / np.maximum(sizes[level], 1), 0.0)
        divergence = _divergence(clipped, spread)
        if divergence < best:
            best, chosen = divergence, (below, above)
    return float(chosen[0]), float(chosen[1])


def _divergence(p: Vector, q: Vector) -> float:
    """Kullback-Leibler divergence of two histograms in nats; a bin that ``q`` lacks counts as one part in a million."""
    if not q.any():
        return math.inf
    p = p / p.sum()
    q = np.maximum(q / q.sum(), 1e-6)
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / q[used])))


def _rows(weight: Tensor, axis: int | None, group: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """The weight with one row per (scale, zero point), and the shape of those."""
    if group is not None:
        if axis != 0 or weight.dim() < 2 or group < 2 or weight.shape[1] % group:
            raise ValueError(
                f"weight of shape {tuple(weight.shape)} with axis={axis}, group={group}: groups need axis=0 "
                "and at least 2 neighbours that divide dimension 1"
            )
        shape = (weight.shape[0], weight.shape[1] // group)
        return weight.reshape(shape[0] * shape[1], -1), shape
    if axis is None:
        return weight.reshape(1, -1), ()
    if not -weight.dim() <= axis < weight.dim():
        raise ValueError(f"weight of shape {tuple(weight.shape)} has no axis {axis}")
    return weight.movedim(axis, 0).reshape(weight.shape[axis], -1), (weight.shape[axis],)


def _shrink(rows: Tensor, low: Vector, high: Vector, fmt: Format) -> Vector:
    """The factor by which both ends of every row leave the least squared error. Kept: a search builds the same layers
    many times."""
    values = np.ascontiguousarray(rows.cpu().numpy())
    key = hashlib.sha256(values.tobytes()).digest(), values.shape, fmt
    found = _shrunk.pop(key, None)
    if found is None:
        height = max(1, _BLOCK // values.shape[1])
        found = np.concatenate(
            [
                _shrink_factors(values[top : top + height], low[top : top + height], high[top : top + height], fmt)
                for top in range(0, len(values), height)
            ]
        )
    _shrunk[key] = found  # the last one used is the last one
    if len(_shrunk) > _REMEMBERED:
        _shrunk.pop(next(iter(_shrunk)), None)
    return found


def _shrink_factors(values: NDArray[np.float32], low: Vector, high: Vector, fmt: Format) -> Vector:
    """The factor of each of a few rows.

    Clipping loses ever more as the range shrinks, and rounding no more than a quarter of a squared step at each value:
    once the loss less that is greater than the least so far, no narrower range can be better.
    """
    least, greatest = fmt.levels
    chosen, lowest = np.ones(len(values)), np.full(len(values), np.inf)
    for fraction in _FRACTIONS:
        scale, zero_point = _qparams(low * fraction, high * fraction, fmt)
        columns = (scale, 1.0 / scale, least - zero_point, greatest - zero_point)
        step, inverse, bottom, ceiling = (column.astype(np.float32)[:, None] for column in columns)
        loss = np.zeros(len(values))
        for left in range(0, values.shape[1], _BLOCK):
            block = values[:, left : left + _BLOCK]
            error = block * inverse
            np.rint(error, out=error)
            np.maximum(error, bottom, out=error)
            np.minimum(error, ceiling, out=error)
            np.multiply(error, step, out=error)
            np.subtract(error, block, out=error)
            loss += np.einsum("ij,ij->i", error, error)
        better = loss < lowest
        chosen[better], lowest[better] = fraction, loss[better]
        if np.all(loss - values.shape[1] * scale**2 / 4 > lowest):
            break
    return chosen
