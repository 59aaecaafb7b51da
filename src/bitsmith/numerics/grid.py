"""The grid of a uniform quantizer as trained parameters: its step, and where bits are inferred its range."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..site import Backward, Learn
from .rounding import round_through, slope

MAX_LEVELS = 256
"""Integers of 8 bits: what is learned can be stored."""

GAUSSIAN_STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""By bits: the uniform step of least squared error of a normal variable, in its standard deviations (Max 1960,
doi:10.1109/TIT.1960.1057548)."""


class _Uniform(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, step: Tensor, low: Tensor, high: Tensor, backward: Backward, strength: float) -> Tensor:
        return torch.minimum(torch.maximum(x, low), high).div_(step).round_().mul_(step)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.how = inputs[4:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, low, high = ctx.saved_tensors
        below, above = x < low, x > high
        inside = ~(below | above)
        residual = x / step
        residual.sub_(residual.round())
        to_x = gradient * inside
        found: list[Tensor | None] = [None] * 6
        if ctx.needs_input_grad[1]:
            found[1] = -(to_x * residual).sum_to_size(step.shape)
        if ctx.needs_input_grad[2]:
            found[2] = (gradient * below).sum_to_size(low.shape)
        if ctx.needs_input_grad[3]:
            found[3] = (gradient * above).sum_to_size(high.shape)
        if ctx.needs_input_grad[0]:
            # beyond the limits the residual means nothing, and the inverse tanh's factor is finite all the same
            found[0] = to_x if ctx.how[0] == "ste" else to_x * slope(residual, gradient, *ctx.how)
        return tuple(found)


def uniform(
    x: Tensor, step: Tensor, low: Tensor, high: Tensor, backward: Backward = "ste", strength: float = 5e-3
) -> Tensor:
    """``Q(x) = step * round(clip(x, low, high) / step)``, float32, the shape of ``x``.

    ``step``, ``low``, ``high``: shapes that broadcast to that of ``x``. The gradient by ``x`` is that of
    :func:`~.rounding.round_through` between the limits and 0 beyond; by ``step`` it is ``(Q(x) - x) / step`` between
    and 0 beyond; by the limit that was passed 1 (Uhlich et al. 2020, arXiv:1905.11452, section 2). With limits that
    are multiples of the step, ``low = -m step`` and ``high = n step``, the chain rule adds ``-m`` and ``n`` beyond: the
    learned step size of Esser et al. 2020 (LSQ, arXiv:1902.08153, eq. 3).
    """
    found: Tensor = _Uniform.apply(x.float(), step, low, high, backward, strength)  # type: ignore[no-untyped-call]
    return found


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Grid(nn.Module):
    """Step and limits that are trained: ``step = step_0 2^a``, ``low = low_0 2^b``, ``high = high_0 2^b``.

    The parameters ``log_step`` (a) and, with inferred bits, ``log_range`` (b) have the shape of the step and are 0 at
    the start. In powers of two they stay positive, and an optimizer's step means the same for a grid of 2 and of 8
    bits (as in Jain et al. 2020, arXiv:1903.08066). There the form normalised by the clipping limit c with n levels,
    ``c round(n clip(x / c)) / n``, has the gradient of the step's, as ``c = n step``: they are one.

    ``fixed``: nothing is trained, only the gradient of the rounding is chosen. ``step``: the limits are ``low_level``
    and ``high_level`` steps; the gradient by the step is multiplied by ``1 / sqrt(elements * high_level)`` (LSQ,
    section 2.2). ``step_range``: bits are inferred, see :meth:`bits`, :meth:`clip_gradient`, :meth:`hold_bits` and
    :meth:`observe_bits`. The step is kept between 1/255 of the whole range (1/254 if that reaches below 0), so that
    integers of 8 bits hold the levels, and its larger half: one level.
    """

    log_step: Tensor
    log_range: Tensor
    first_step: Tensor

    def __init__(self, learn: Learn, step: Tensor, low_level: Tensor, high_level: Tensor, elements: int) -> None:
        """``step``: float32 of any shape; ``low_level`` <= 0 < ``high_level``: whole numbers of its shape or ();
        ``elements``: how many values one step is for."""
        super().__init__()
        self.learn = learn
        self.register_buffer("first_step", step.detach().clone().float())
        self.register_buffer("low_level", low_level.detach().clone().float())
        self.register_buffer("high_level", high_level.detach().clone().float())
        zeros = torch.zeros_like(self.first_step)
        if learn.form != "fixed":
            self.log_step = nn.Parameter(zeros.clone())
        if learn.form == "step_range":
            self.log_range = nn.Parameter(zeros.clone())
        self.mode: Literal["free", "held", "observed"] = "free"
        self.factor = 1.0 / math.sqrt(max(elements, 1) * max(float(high_level.max()), 1.0))

    @property
    def infers_bits(self) -> bool:
        return self.learn.form == "step_range"

    def hold_bits(self, hold: bool, fill: bool = False) -> None:
        """Train the step alone from here on, with the levels as they are now, or step and range again; in place.
        ``fill``: with all levels that the bits hold, over the same range."""
        self._mode("held" if hold else "free")
        if self.infers_bits and fill:
            with torch.no_grad():
                bits, step, (least, greatest) = self.bits(), self.values()[0], self.levels()
                low, high = _levels_of(bits, self.get_buffer("low_level") < 0)
                finer = torch.maximum(greatest / high, torch.where(low < 0, least / low.clamp(max=-1), 0.0))
                more = (bits > 1) & (finer < 1)
                self._put(torch.where(more, finer * step, step), low.where(more, least), high.where(more, greatest))

    def observe_bits(self) -> None:
        """Train the step alone from here on, with the levels as they are now; in place. The gradients of rounding and
        of clipping come apart, until :meth:`tie_gradients` puts them together."""
        self._mode("observed")

    def tie_gradients(self) -> float:
        """Give step and limits one gradient, so that the levels stay. Gives what it was by the logarithm to base 2 of
        the step alone, summed: what rounding to this grid costs, as it grows with the step (see
        :mod:`bitsmith.learn.allocation`)."""
        with torch.no_grad():
            rounding, clipping = self.log_step.grad, self.log_range.grad
            if rounding is None or clipping is None:
                return 0.0
            both = (rounding + clipping) * self.factor
            slope = float(rounding.sum())
            rounding.copy_(both)
            clipping.copy_(both)
        return slope

    def set_bits(self, bits: int) -> None:
        """So many bits in every slice, 2 to 8, in place; each step grows or shrinks by the ratio of
        :data:`GAUSSIAN_STEPS`."""
        with torch.no_grad():
            before = self.bits().round().int().tolist()
            old = torch.tensor([GAUSSIAN_STEPS[b] for b in (before if isinstance(before, list) else [before])])
            step = self.values()[0]
            low, high = _levels_of(torch.full_like(step, float(bits)), self.get_buffer("low_level") < 0)
            self._put(step * (GAUSSIAN_STEPS[bits] / old.to(step)).view(step.shape), low, high)

    def _mode(self, mode: Literal["free", "held", "observed"]) -> None:
        if not self.infers_bits:
            return
        with torch.no_grad():
            self._put(self.values()[0], *self.levels())
        self.mode = mode

    def _put(self, step: Tensor, low: Tensor, high: Tensor) -> None:
        for name, value in (("first_step", step), ("low_level", low), ("high_level", high)):
            self.get_buffer(name).copy_(value)
        with torch.no_grad():
            self.log_step.zero_()
            self.log_range.zero_()

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(step, low, high)``, each of the shape of the step, with their gradients."""
        low_level, high_level = self.get_buffer("low_level"), self.get_buffer("high_level")
        if self.learn.form == "fixed":
            return self.first_step, self.first_step * low_level, self.first_step * high_level
        step = self.first_step * torch.exp2(self.log_step)
        if self.learn.form == "step" or self.mode == "held":
            step = _Scaled.apply(step, self.factor)  # type: ignore[no-untyped-call]
            return step, step * low_level, step * high_level
        widest = self.first_step * torch.exp2(self.log_range)
        low, high = widest * low_level, widest * high_level
        if self.mode == "observed":
            return step, low, high
        most = MAX_LEVELS - 1 - (low_level < 0).float()  # both ends may be rounded up
        step = torch.minimum(torch.maximum(step, (high - low) / most), torch.maximum(high, -low))
        return step, low, high

    def levels(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest level, whole numbers of the shape of the step, the gradient straight-through."""
        step, low, high = self.values()
        return round_through(low / step), round_through(high / step)

    def bits(self) -> Tensor:
        """``ceil(log2(levels))`` of the shape of the step, at least 1: for ``q_max = n step`` on both sides of 0
        that is ``ceil(log2(n + 1)) + 1`` (arXiv:1905.11452, section 2.2). The gradient passes rounding and ceiling."""
        least, greatest = self.levels()
        exact = torch.log2((greatest - least + 1).clamp(min=1.0))
        whole = torch.ceil(exact.detach() - 1e-6).clamp(min=1.0)
        return exact + (whole - exact).detach()

    def forward(self, x: Tensor, view: tuple[int, ...] | None = None) -> Tensor:
        """:func:`uniform` of ``x``; ``view``: the shape in which step and limits broadcast to that of ``x``."""
        step, low, high = (value if view is None else value.view(view) for value in self.values())
        return uniform(x, step, low, high, self.learn.backward, self.learn.strength)

    def clip_gradient(self) -> None:
        """Clip the gradients by the step and by the limits to plus and minus the step (Schaefer et al. 2022,
        arXiv:2206.07741), in place; where bits are inferred, and between backward and the optimizer's step."""
        if not self.infers_bits:
            return
        with torch.no_grad():
            step, low, high = self.values()
            for parameter, value in ((self.log_step, step), (self.log_range, torch.maximum(high, -low))):
                if parameter.grad is not None:  # by powers of two
                    most = math.log(2) * value * step
                    parameter.grad.copy_(torch.minimum(torch.maximum(parameter.grad, -most), most))

    def extra_repr(self) -> str:
        return f"{self.learn}, {self.first_step.numel()} of them"


def _levels_of(bits: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest integer of so many bits, float32, the shape of ``bits``."""
    half = torch.exp2(bits - 1)
    return torch.where(signed, -half, 0.0), torch.where(signed, half, 2 * half) - 1
