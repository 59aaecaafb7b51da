"""An activation quantizer whose range follows what it sees while training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..site import Format
from .quantizer import Quantizer
from .ranges import MIN_SCALE, qparams
from .statistics import strided
from .straight_through import straight_through


class RunningQuantizer(nn.Module):
    """Rounds a tensor to an integer format and back, in a range that it tracks in training mode.

    ``percentile``: in percent, what lies outside the range of one batch on each side (Tailor et al. 2021,
    arXiv:2008.05000, section 3.3); None: nothing does. ``momentum``: the weight of a new batch in the running mean of
    the limits; None: the limits only widen. ``clips``: no gradient where a value lies outside; else it is 1 everywhere.
    ``sample``: elements of a batch that percentiles are taken of, evenly strided; 0: all.

    Rows that are ``protected`` stay as they are and do not move the range. Before it has seen anything it rounds each
    tensor in that tensor's own range. ``low``, ``high`` (float32) and ``seen`` (batches, int64) are buffers ().
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(
        self,
        fmt: Format,
        percentile: float | None = None,
        momentum: float | None = 0.01,
        clips: bool = True,
        sample: int = 0,
    ) -> None:
        super().__init__()
        self.percentile, self.momentum, self.clips, self.sample = percentile, momentum, clips, sample
        self.grid = Quantizer(fmt, 1.0, 0)
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._ready = False  # whether anything was seen, without a look into the tensor

    def forward(self, x: Tensor, protected: Tensor | None = None) -> Tensor:
        """``x`` (n, ...) on the grid, float32; ``protected``: bool (n,), rows that stay as they are."""
        if not x.numel():
            return x
        if self.training:
            self._follow(x.detach(), protected)
        if not self._ready:
            value = self._momentary(x)
        else:
            value = self.grid(x) if self.clips else straight_through(x, self.grid(x.detach()))
        if protected is None:
            return value
        if not value.requires_grad:  # few rows: cheaper than another tensor of the whole
            value[protected] = x[protected].to(value.dtype)
            return value
        return torch.where(protected.view(-1, *[1] * (x.dim() - 1)), x, value)

    @torch.no_grad()
    def _follow(self, x: Tensor, protected: Tensor | None) -> None:
        ends = self._ends(x, protected)
        if ends is None:
            return
        low, high = ends
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("it holds NaN or infinity: the training has diverged, or the inputs are not finite")
        if self._ready:
            before, after = float(self.low), float(self.high)
            if self.momentum is None:
                low, high = min(low, before), max(high, after)
            else:
                low, high = before + self.momentum * (low - before), after + self.momentum * (high - after)
        self.low.fill_(low)
        self.high.fill_(high)
        self.seen += 1
        self._ready = True
        self.grid.set(*qparams(min(low, 0.0), max(high, 0.0), self.grid.fmt))

    def _ends(self, x: Tensor, protected: Tensor | None) -> tuple[float, float] | None:
        """The limits of one batch; None where every row is protected."""
        if self.percentile is None:
            least, greatest = x.reshape(x.shape[0], -1).aminmax(dim=1) if protected is not None else x.aminmax()
            if protected is not None:
                least, greatest = least[~protected], greatest[~protected]
            return (float(least.min()), float(greatest.max())) if least.numel() else None
        flat = x.reshape(-1)
        if protected is not None:
            kept = (~protected).view(-1, 1).expand(-1, x.numel() // x.shape[0]).reshape(-1)
            if self.sample:
                seen = int(self.seen)
                flat, kept = strided(flat, self.sample, seen), strided(kept, self.sample, seen)
            flat = flat[kept]
        elif self.sample:
            flat = strided(flat, self.sample, int(self.seen))
        count = flat.numel()
        if not count:
            return None
        outside = int(count * self.percentile / 100)  # on each side
        return float(flat.kthvalue(outside + 1).values), float(flat.kthvalue(count - outside).values)

    def _momentary(self, x: Tensor) -> Tensor:
        least, greatest = self.grid.fmt.levels
        value = x.detach().float()
        low, high = value.amin().clamp(max=0.0), value.amax().clamp(min=0.0)
        scale = ((high - low) / (greatest - least)).clamp(min=MIN_SCALE)
        zero = (least - low / scale).round().clamp(least, greatest)
        return straight_through(x, (((value / scale).round() + zero).clamp(least, greatest) - zero) * scale)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.seen)

    def extra_repr(self) -> str:
        return f"percentile={self.percentile}, momentum={self.momentum}, seen={int(self.seen)}"
