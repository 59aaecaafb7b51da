"""Streaming statistics of one tensor: exact extremes, and a histogram of constant size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A tensor held NaN or inf. ``kind`` is ``"NaN"`` or ``"inf"``, ``nans`` and ``infs`` count the elements.

    It does not know the tensor's name: the caller adds the site.
    """

    def __init__(self, nans: int, infs: int, total: int) -> None:
        self.nans, self.infs, self.total = nans, infs, total
        self.kind = "NaN" if nans else "inf"
        found = " and ".join(f"{n} {kind}" for n, kind in ((nans, "NaN"), (infs, "inf")) if n)
        super().__init__(f"{found} among {total} values")


class TensorStatistics:
    """Extremes, count and (with ``histogram=True``) the distribution of a tensor seen in batches.

    ``minimum``, ``maximum``: exact over every element (inf, -inf before the first). ``count``: elements seen.
    ``histogram``: float64 counts, shape (bins,), over ``[low, high]``, which always holds 0 and every element; None
    without a histogram. It counts at most ``subsample`` elements of an update, evenly strided, scaled so that the
    counts sum to ``count``. ``zeros``: the part of those counts that is exactly 0 (ReLU outputs), which every
    quantizer represents without error.

    When a batch leaves the range, the range doubles on that side and bins merge in pairs, so every count stays in the
    bin that holds its value: the only error is resolution. The range stays below 4 times the span of the data and 0,
    so a value is known to better than 4 / bins of that span.
    """

    def __init__(self, histogram: bool = False, bins: int = 2048, subsample: int = 65536) -> None:
        if bins < 2 or bins % 2 or subsample < 1:
            raise ValueError(
                f"TensorStatistics(bins={bins}, subsample={subsample}): bins must be even, subsample positive"
            )
        self.minimum, self.maximum = math.inf, -math.inf
        self.count = 0
        self.bins, self.subsample = bins, subsample
        self.histogram: Tensor | None = torch.zeros(bins, dtype=torch.float64) if histogram else None
        self.low = self.high = self.zeros = 0.0

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape and real dtype. Raises :class:`NonFiniteError` and is unchanged then."""
        if x.numel() == 0:
            return
        flat = _flat(x.detach())
        least, greatest = torch.aminmax(flat)  # NaN propagates, so one pass over the data shows everything
        minimum, maximum = float(least), float(greatest)
        if not (math.isfinite(minimum) and math.isfinite(maximum)):
            raise NonFiniteError(int(flat.isnan().sum()), int(flat.isinf().sum()), flat.numel())
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        if self.histogram is not None:
            sample = strided(flat, self.subsample, self.count).to("cpu", torch.float64)
            weight = flat.numel() / sample.numel()
            self._cover(minimum, maximum)
            self.zeros += weight * (sample.numel() - int(sample.count_nonzero()))
            self.histogram += weight * torch.bincount(self._bin(sample), minlength=self.bins)
        self.count += flat.numel()

    def merge(self, other: TensorStatistics) -> None:
        """Take in what another one saw. Where the two ranges differ its counts are spread evenly within their bins,
        which moves a value by less than one of its bins; extremes and totals stay exact."""
        if (self.histogram is None) != (other.histogram is None):
            raise ValueError("cannot merge statistics with a histogram and statistics without one: collect both alike")
        if other.count == 0:
            return
        if self.histogram is not None and other.histogram is not None:
            self._cover(other.low, other.high)
            if (self.low, self.high, self.bins) == (other.low, other.high, other.bins):
                self.histogram += other.histogram
            elif other.low == other.high:  # nothing but zeros
                self.histogram[self._zero_bin] += other.zeros
            else:
                cumulative = np.concatenate(([0.0], np.cumsum(other.histogram.numpy())))
                spread = np.diff(np.interp(self.edges.numpy(), other.edges.numpy(), cumulative))
                self.histogram += torch.from_numpy(spread)
            self.zeros += other.zeros
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.count += other.count

    @property
    def edges(self) -> Tensor:
        """The limits of the bins, float64, shape (bins + 1,)."""
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64)

    @property
    def nonzero_histogram(self) -> Tensor:
        """The histogram without the exact zeros, float64, shape (bins,). Raises ``ValueError`` if none is kept."""
        if self.histogram is None:
            raise ValueError("these statistics have no histogram: collect them with TensorStatistics(histogram=True)")
        counts = self.histogram.clone()
        counts[self._zero_bin] -= self.zeros
        return counts.clamp_(min=0.0)  # merging may have spread some zeros into the bin beside theirs

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_json` gives back the very same numbers."""
        return {
            "minimum": self.minimum if self.count else None,
            "maximum": self.maximum if self.count else None,
            "count": self.count,
            "bins": self.bins,
            "subsample": self.subsample,
            "low": self.low,
            "high": self.high,
            "zeros": self.zeros,
            "histogram": None if self.histogram is None else self.histogram.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorStatistics:
        """Read what :meth:`to_json` wrote. Raises ``ValueError`` that says what is missing or broken."""
        try:
            counts = data["histogram"]
            statistics = cls(counts is not None, int(data["bins"]), int(data["subsample"]))
            statistics.count = int(data["count"])
            if statistics.count:
                statistics.minimum, statistics.maximum = float(data["minimum"]), float(data["maximum"])
            statistics.low, statistics.high = float(data["low"]), float(data["high"])
            statistics.zeros = float(data["zeros"])
            if counts is not None:
                statistics.histogram = torch.tensor(counts, dtype=torch.float64)
                if statistics.histogram.shape != (statistics.bins,):
                    raise ValueError(f"{len(counts)} counts for {statistics.bins} bins")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"stored tensor statistics are broken ({error!r}); collect them again") from None
        return statistics

    @property
    def _zero_bin(self) -> int:
        return int(self._bin(torch.zeros(1, dtype=torch.float64)))

    def _bin(self, x: Tensor) -> Tensor:
        """The bin of each value (float64 -> int64); all 0 while the range is empty."""
        if self.low == self.high:
            return torch.zeros(x.shape, dtype=torch.int64)
        return ((x - self.low) / (self.high - self.low) * self.bins).long().clamp_(0, self.bins - 1)

    def _cover(self, minimum: float, maximum: float) -> None:
        """Widen the range until it holds both values, and 0."""
        assert self.histogram is not None
        if self.low == self.high:  # only zeros so far
            self.low, self.high = min(0.0, minimum), max(0.0, maximum)
            self.histogram.zero_()
            self.histogram[self._zero_bin] = self.zeros
            return
        half = self.bins // 2
        while maximum > self.high or minimum < self.low:
            merged = self.histogram.view(half, 2).sum(1)
            self.histogram = torch.zeros_like(self.histogram)
            if maximum > self.high:
                self.high += self.high - self.low
                self.histogram[:half] = merged
            else:
                self.low -= self.high - self.low
                self.histogram[half:] = merged


def _flat(x: Tensor) -> Tensor:
    """All elements as one dimension, in memory order, without a copy where the memory is dense (channels last too)."""
    x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def strided(flat: Tensor, limit: int, seen: int) -> Tensor:
    """At most ``limit`` elements at an even stride that has no common divisor with the size, so that no channel or
    column is preferred; the start moves with ``seen``."""
    size = flat.numel()
    if size <= limit:
        return flat
    stride = -(-size // limit)
    while math.gcd(stride, size) != 1:
        stride += 1
    return flat[seen % stride :: stride]
