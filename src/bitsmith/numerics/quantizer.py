"""The quantizer of one activation tensor: one number format, one scale, one zero point."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..site import Format
from . import dialect
from .grid import Grid

# scale, zero point, 1 / scale, least and greatest level relative to the zero point
_Constants = tuple[float, int, float, int, int]


class Quantizer(nn.Module):
    """Rounds a tensor to an integer format and back; any shape, float32/bfloat16/float16 in, float32 out.

    Under ``torch.export`` and ``torch.compile`` it is the reference dialect with constants; in eager it is the same
    arithmetic done in place, bit for bit. The gradient is straight-through: 1 where the level is inside the range, 0
    where it is clipped.

    ``scale`` (float32) and ``zero_point`` (int32) are buffers of shape (), for the state dict. Change them by
    :meth:`set` or ``load_state_dict``, never in place: what computes is a Python copy. Where ``fmt.learn`` says so
    both follow the trained ``grid``, whose gradient is ``Grid``'s; ``elements``: the values of one sample.

    Several cells may read one tensor through one quantizer, so the last output is handed out again to who asks with
    the same, unchanged tensor. By default only while somebody else keeps that output alive. With ``shared = True`` it
    is kept as long as its input lives, which is right if memory under the input is not rewritten behind torch's back
    (a numpy array) or :meth:`reset` is called between. Outputs with a gradient are never handed out twice
    (activation checkpointing counts what each call saves).
    """

    scale: Tensor
    zero_point: Tensor
    shared: bool
    _constants: _Constants
    # (input, its version, output, its version, constants); a class attribute, so that a copy starts without one
    _memo: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor] | list[Tensor], int, _Constants] | None = None

    def __init__(self, fmt: Format, scale: float, zero_point: int, elements: int = 1) -> None:
        super().__init__()
        dialect.load()
        self.fmt = fmt
        self.shared = False
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.set(scale, zero_point)
        self.grid: Grid | None = None
        if fmt.learn is not None:
            low, high = self._constants[3:]
            low_level, high_level = torch.tensor(float(low)), torch.tensor(float(high))
            self.grid = Grid(fmt.learn, self.scale, low_level, high_level, elements)
            self._seen: tuple[int, ...] = ()

    def set(self, scale: float, zero_point: int) -> None:
        """Change both; ``scale`` is rounded to float32. Raises ``ValueError`` on an impossible scale or zero point."""
        constants = _constants(self.fmt, scale, zero_point)
        self.scale = torch.tensor(constants[0], dtype=torch.float32, device=self.scale.device)
        self.zero_point = torch.tensor(constants[1], dtype=torch.int32, device=self.zero_point.device)
        self._constants = constants

    def reset(self) -> None:
        """Forget the last output."""
        self.__dict__.pop("_memo", None)

    def follow(self) -> None:
        """Take scale, zero point and bits from the trained grid, if there is one and it has moved."""
        grid = self.grid
        if grid is None or grid.learn.form == "fixed" or torch.compiler.is_compiling():
            return
        seen = tuple(parameter._version for parameter in grid.parameters())
        if seen == self._seen:
            return
        with torch.no_grad():
            scale = float(grid.values()[0])
            low, high = (int(level) for level in grid.levels())
            if grid.infers_bits:
                self.fmt = dataclasses.replace(self.fmt, bits=max(2, int(grid.bits())))
        least = self.fmt.levels[0]
        zero_point = 0 if self.fmt.symmetric else least - low
        self.set(scale, zero_point)
        self._constants = (*self._constants[:3], low, high)
        self._seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        constants = self._constants
        scale, zero_point = constants[:2]
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"Quantizer takes float32, bfloat16 or float16, got {x.dtype}; convert the model by .float()"
            )
        trains = torch.is_grad_enabled() and (x.requires_grad or self.trained)
        if self.grid is not None and trains and not torch.compiler.is_exporting():
            learned: Tensor = self.grid(x)
            return learned
        if torch.compiler.is_compiling():
            if trains and not torch.compiler.is_exporting():
                x = x.to(torch.float32)
                return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *self.fmt.levels)
            low, high = constants[3:]
            return dialect.quantize_dequantize(x, scale, zero_point, self.fmt, (low + zero_point, high + zero_point))
        if trains:
            return _trained(x.to(torch.float32), constants)
        if x.is_inference():  # has no version to tell whether it changed
            return _compute(x, constants)
        memo = self._memo
        if memo is not None and memo[0]() is x and memo[1] == x._version and memo[4] is constants:
            kept = memo[2]() if isinstance(memo[2], weakref.ref) else memo[2][0]
            if kept is not None and kept._version == memo[3]:
                return kept
        output = _compute(x, constants)
        if output.is_inference():
            return output
        if self.shared:
            box = [output]
            # the box is emptied when the input dies; nobody can then ask for it
            memo = (weakref.ref(x, lambda _: box.clear()), x._version, box, output._version, constants)
        else:
            memo = (weakref.ref(x), x._version, weakref.ref(output), output._version, constants)
        self.__dict__["_memo"] = (
            memo  # nn.Module.__setattr__ would cost more than the rest; one store, so threads agree
        )
        return output

    def into(self, x: Tensor, target: Tensor) -> Tensor:
        """``target``, which now holds the quantized ``x`` (may be ``target`` itself): for operations in place.

        Shapes as the operation's own: that of ``x`` is that of ``target``. Gradients pass as in :meth:`forward`.
        """
        self.follow()
        fast = x.dtype == target.dtype == torch.float32 and not torch.is_grad_enabled()
        if not fast or torch.compiler.is_compiling():
            return target.copy_(self(x))
        scale, _, inverse, low, high = self._constants
        return torch.mul(x, inverse, out=target).round_().clamp_(low, high).mul_(scale)

    @property
    def trained(self) -> bool:
        """Whether a parameter of its own follows the loss."""
        return self.grid is not None and any(parameter.requires_grad for parameter in self.grid.parameters())

    @property
    def rectifies(self) -> bool:
        """Whether nothing below 0 passes, so that a ReLU in front of it changes nothing."""
        return self._constants[3] == 0

    def integers(self, x: Tensor) -> Tensor:
        """The integers that stand for ``x``: same shape, type by :func:`~.dialect.storage`."""
        self.follow()
        scale, zero_point, _, low, high = self._constants
        return dialect.quantize(x.detach(), scale, zero_point, self.fmt, (low + zero_point, high + zero_point))

    def extra_repr(self) -> str:
        return f"{self.fmt}, scale={self._constants[0]:.6g}, zero_point={self._constants[1]}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_memo"}

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # .half() must not round the scale
        self.scale = torch.tensor(self._constants[0], dtype=torch.float32, device=self.scale.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.grid is None or self.grid.learn.form == "fixed":
            self.set(float(self.scale), int(self.zero_point))
        else:
            self._seen = ()  # the grid is loaded behind this, and says how many bits there are


def _constants(fmt: Format, scale: float, zero_point: int) -> _Constants:
    low, high = fmt.levels
    scale = float(torch.tensor(scale, dtype=torch.float32)) if math.isfinite(scale) else scale
    if not 2.0**-126 <= scale < math.inf:
        raise ValueError(f"Quantizer(scale={scale}): must be positive, finite and no denormal number in float32")
    if not low <= zero_point <= high or (fmt.symmetric and zero_point != 0):
        raise ValueError(
            f"Quantizer(zero_point={zero_point}): {fmt} has {'0 only' if fmt.symmetric else f'{low} to {high}'}"
        )
    return scale, int(zero_point), 1.0 / scale, low - zero_point, high - zero_point


def _compute(x: Tensor, constants: _Constants) -> Tensor:
    # Four vectorised passes in place: the dialect makes seven new tensors, fake_quantize is a scalar kernel. Blocks
    # that fit the cache gain 1.4x more on one thread, but lose 20x on two when other processes share the cores.
    scale, _, inverse, low, high = constants
    return torch.mul(x.to(torch.float32), inverse).round_().clamp_(low, high).mul_(scale)


_KEPT = frozenset({"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0"})
"""Operations that keep what they give for their own backward."""


def _trained(x: Tensor, constants: _Constants) -> Tensor:
    """With a gradient. Where ``x`` is kept anyway it says where the gradient passes; else a mask does."""
    edges = _edges(constants) if type(x.grad_fn).__name__ in _KEPT else None
    result: Tensor
    if edges is None:
        result, _ = _StraightThrough.apply(x, constants)  # type: ignore[no-untyped-call]
    else:
        result = _StraightThroughKept.apply(x, constants, edges)  # type: ignore[no-untyped-call]
    return result


@functools.lru_cache(maxsize=4096)
def _edges(constants: _Constants) -> tuple[float, float] | None:
    """The greatest float32 whose level is clipped from below and the least that is clipped from above; None where they
    were not found among the neighbours of their real values (overflow, denormal numbers)."""
    scale, _, inverse, low, high = constants
    found = []
    for bound, index in ((low - 1, -1), (high, 0)):
        middle = torch.tensor((bound + 0.5) * scale, dtype=torch.float32)
        near = (middle.view(torch.int32) + torch.arange(-8, 9, dtype=torch.int32)).view(torch.float32).sort().values
        above = (torch.mul(near, inverse).round_() > bound).tolist()
        first = above.index(True) if True in above else 0
        if first == 0 or not all(above[first:]):
            return None
        found.append(float(near[first + index]))
    return found[0], found[1]


class _StraightThroughKept(torch.autograd.Function):
    """The quantized values of a tensor that stays: one pass back, no more memory, the same bits as with a mask."""

    @staticmethod
    def forward(x: Tensor, constants: _Constants, edges: tuple[float, float]) -> Tensor:
        return _compute(x, constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.edges = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.edges), None, None


class _StraightThrough(torch.autograd.Function):
    """The quantized values, and where the gradient passes (six times faster than fake_quantize forward)."""

    @staticmethod
    def forward(x: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
        scale, _, inverse, low, high = constants
        level = torch.mul(x, inverse).round_()
        clipped = level.clamp(low, high)
        inside = clipped == level
        return clipped.mul_(scale), inside

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None
