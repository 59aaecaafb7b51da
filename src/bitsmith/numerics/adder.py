"""Negative L1 distances in place of products: the arithmetic of adder layers, and its three gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

FilterGradient = Literal["full", "sign"]

_ELEMENTS = 2**22
"""Of the patches that are laid out at once: 16 MiB of float32."""
_TILE = 2**16
"""Elements of patches by pass of a gradient: both of its buffers stay in a core's cache."""
_WRITTEN = 2**24
"""Elements of a difference that an exported program may write: output channels are taken in turn beyond."""


@dataclass(frozen=True)
class Geometry:
    """How a 2-d convolution takes its patches: sizes by axis, in pixels; ``pads`` top, bottom, left, right. None of it
    for a linear layer, which has :data:`LINEAR`."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    def out(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output. Raises ``ValueError`` where the input is smaller than a patch."""
        found = []
        for axis in (0, 1):
            room = size[axis] + self.pads[2 * axis] + self.pads[2 * axis + 1]
            found.append((room - self.dilation[axis] * (self.kernel[axis] - 1) - 1) // self.stride[axis] + 1)
        if min(found) < 1:
            raise ValueError(f"an input of {tuple(size)} pixels is smaller than a patch of {self.kernel}")
        return found[0], found[1]

    def flat(self) -> list[int]:
        """As an operation of ``torch.library`` takes it.

        >>> Geometry.of(Geometry((3, 3), groups=2).flat()) == Geometry((3, 3), groups=2)
        True
        """
        return [*self.kernel, *self.stride, *self.dilation, *self.pads, self.groups]

    @classmethod
    def of(cls, flat: Sequence[int]) -> Geometry:
        """From what :meth:`flat` gives."""
        a, b, c, d, e, f, top, bottom, left, right, groups = flat
        return cls((a, b), (c, d), (e, f), (top, bottom, left, right), groups)


LINEAR = Geometry((0, 0))


def pair(value: Any) -> tuple[int, int]:
    """
    >>> pair(3), pair((2, 1)), pair([4])
    ((3, 3), (2, 1), (4, 4))
    """
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return (int(sizes[0]), int(sizes[-1]))


def pads_of(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """What ``padding`` of a convolution (a number, one by axis, ``same``, ``valid``) adds at each side.

    >>> pads_of("same", (3, 2), (1, 1))
    (1, 1, 0, 1)
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    high, wide = pair(padding)
    return high, high, wide, wide


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """[n, c, h, w] -> the values that each output sees, [groups, n * outputs, c / groups * kernel], zeros where it is
    padded. Of :data:`LINEAR`: [m, k] -> [1, m, k]."""
    if geometry == LINEAR:
        return x.unsqueeze(0)
    top, bottom, left, right = geometry.pads
    padded = F.pad(x, (left, right, top, bottom))
    found = F.unfold(padded, geometry.kernel, geometry.dilation, 0, geometry.stride)
    return found.view(len(x), geometry.groups, -1, found.shape[2]).permute(1, 0, 3, 2).flatten(1, 2).contiguous()


def scattered(rows: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """The adjoint of :func:`patches`: what of ``rows`` belongs to each pixel, added up, of shape ``shape``."""
    if geometry == LINEAR:
        return rows.squeeze(0)
    count, _, height, width = shape
    top, bottom, left, right = geometry.pads
    found = (
        rows.view(geometry.groups, count, -1, rows.shape[2])
        .permute(1, 0, 3, 2)
        .reshape(count, -1, rows.shape[1] // count)
    )
    size = height + top + bottom, width + left + right
    padded = F.fold(found, size, geometry.kernel, geometry.dilation, 0, geometry.stride)
    return padded[:, :, top : top + height, left : left + width]


def negative_distance(
    x: Tensor, weight: Tensor, geometry: Geometry, gradient: FilterGradient = "full", rate: float | None = None
) -> Tensor:
    """``Y[o] = -sum |X - F[o]|`` over the values that an output sees (Chen et al. 2020, arXiv:1912.13200, eq. 2).

    ``x``: [n, c, h, w], ``weight``: [out, c / groups, kh, kw]; for :data:`LINEAR` [m, k] and [out, k]. Gradients (with
    g the output's): of the filters ``sum g (X - F)`` (``full``) or ``sum g sign(X - F)`` (``sign``); of the input
    ``sum g clamp(F - X, -1, 1)`` (section 3.2). ``rate``, the paper's eta: the filters' gradient is then multiplied by
    ``eta sqrt(k) / |gradient|``, k being the layer's number of weights (section 3.3). No second derivatives.

    No difference is held for more than a tile of patches: by the native kernels of ``bitsmith_kernels`` for float32 on
    the CPU where they are installed, else in passes over the patches of a few images.
    """
    found: Tensor = _Distance.apply(x, weight, geometry, gradient, rate)  # type: ignore[no-untyped-call]
    return found


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry, gradient: str, rate: float | None) -> Tensor:
        if torch.compiler.is_exporting():
            return _written_out(x, weight, geometry)
        if torch.compiler.is_compiling():
            made: Tensor = torch.ops.bitsmith.adder(x, weight, geometry.flat())
            return made
        return outputs(x, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.geometry, ctx.gradient, ctx.rate = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        by_input = by_filter = None
        if ctx.needs_input_grad[0]:
            compiling = torch.compiler.is_compiling()
            by_input = (
                torch.ops.bitsmith.adder_input_gradient(x, weight, given, geometry.flat())
                if compiling
                else input_gradient(x, weight, given, geometry)
            )
        if ctx.needs_input_grad[1]:
            by_filter = filter_gradient(x, weight, given, geometry, ctx.gradient)
            if ctx.rate is not None:
                by_filter = by_filter * (ctx.rate * math.sqrt(by_filter.numel()) / by_filter.norm().clamp(min=1e-12))
        return by_input, by_filter, None, None, None


# -- the parts -------------------------------------------------------------------------------------------------------


def outputs(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """:func:`negative_distance` without its gradients."""
    native = _native(x, geometry)
    if native is not None:
        return _from_native(native.forward(*_images(x, weight), threads=torch.get_num_threads()), x, geometry)
    filters = _grouped(weight, geometry)
    rows = torch.cat(
        [-torch.cdist(*_exact(patches(part, geometry), filters), p=1.0) for part in _parts(x, geometry)], 1
    )
    return _laid_out(rows, x, weight, geometry)


def input_gradient(x: Tensor, weight: Tensor, given: Tensor, geometry: Geometry) -> Tensor:
    """``sum g clamp(F - X, -1, 1)``, of the shape of ``x``. ``given``: the gradient of the output."""
    native = _native(x, geometry)
    if native is not None:
        behind = _images(given)[0]
        pulled = native.input_gradient(*_images(x, weight), behind, threads=torch.get_num_threads())
        return _from_native(pulled, x, geometry)
    filters, found, start = _grouped(weight, geometry), [], 0
    for part in _parts(x, geometry):
        behind = _rows(given[start : start + len(part)], geometry)
        start += len(part)
        seen, filters = _exact(patches(part, geometry), filters)
        found.append(scattered(_pulled(seen, filters, behind.to(seen.dtype)), part.shape, geometry))
    return torch.cat(found).to(x.dtype)


def filter_gradient(x: Tensor, weight: Tensor, given: Tensor, geometry: Geometry, gradient: FilterGradient) -> Tensor:
    """``sum g (X - F)``, or with the sign of the difference, of the shape of ``weight``."""
    given = given.to(weight.dtype)
    if gradient == "full":  # sum g X is the gradient of a convolution's weights
        if geometry == LINEAR:
            return given.T @ x.to(weight.dtype) - given.sum(0)[:, None] * weight
        top, bottom, left, right = geometry.pads
        padded = F.pad(x, (left, right, top, bottom)).to(weight.dtype)
        room = geometry.stride, 0, geometry.dilation, geometry.groups
        products: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            padded, weight.shape, given, *room
        )
        # columns and rows that no patch reaches are no part of it
        return products - given.sum((0, 2, 3))[:, None, None, None] * weight
    filters = _grouped(weight, geometry)
    found, start = torch.zeros_like(filters), 0
    for part in _parts(x, geometry):
        behind = _rows(given[start : start + len(part)], geometry)
        start += len(part)
        seen = patches(part, geometry).to(weight.dtype)
        for group in range(geometry.groups):
            found[group] += _signs(seen[group], filters[group], behind[group])
    return found.reshape(weight.shape)


def _signs(seen: Tensor, filters: Tensor, behind: Tensor) -> Tensor:
    """``sum g sign(X - F)``: [outputs, k], [out, k] and [outputs, out] -> [out, k]."""
    if _native(seen, LINEAR) is not None:
        # the clipped gradient with the parts exchanged; magnified, whatever is not 0 is clipped
        large = 1e20
        return input_gradient(filters * large, seen * large, behind.T.contiguous(), LINEAR)
    found = torch.zeros_like(filters)
    for rows in _tiles(seen[None]):
        for channel in range(len(filters)):
            sign = torch.sub(seen[rows], filters[channel]).sign_()
            found[channel] += behind[rows, channel] @ sign
    return found


def _pulled(seen: Tensor, filters: Tensor, behind: Tensor) -> Tensor:
    """Of the patches [groups, outputs, k], by tiles: two buffers that stay in cache, output channel by channel."""
    found = torch.zeros_like(seen)
    for rows in _tiles(seen):
        values, total = seen[:, rows], found[:, rows]
        buffer = torch.empty_like(values)
        for channel in range(filters.shape[1]):
            torch.sub(filters[:, channel, None], values, out=buffer).clamp_(-1.0, 1.0)
            total.addcmul_(buffer, behind[:, rows, channel, None])
    return found


def _written_out(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """In operations that every runtime has, for export: differences are written, of so many output channels in turn."""
    seen, filters = patches(x, geometry), _grouped(weight, geometry)
    room = max(1, _WRITTEN // max(1, seen.numel()))
    rows = [-(seen[:, :, None] - some[:, None]).abs().sum(3) for some in torch.split(filters, room, 1)]
    return _laid_out(rows[0] if len(rows) == 1 else torch.cat(rows, 2), x, weight, geometry)


# -- shapes ----------------------------------------------------------------------------------------------------------


def _exact(seen: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, or in float32."""
    dtype = torch.float64 if seen.dtype == torch.float64 else torch.float32
    return seen.to(dtype), filters.to(dtype)


def _grouped(weight: Tensor, geometry: Geometry) -> Tensor:
    """[groups, out / groups, values of a patch]."""
    return weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)


def _rows(given: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of the outputs as [groups, outputs, out / groups]."""
    if geometry == LINEAR:
        return given.unsqueeze(0)
    count, channels = given.shape[:2]
    split = given.reshape(count, geometry.groups, channels // geometry.groups, -1)
    return split.permute(1, 0, 3, 2).flatten(1, 2).contiguous()


def _laid_out(rows: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """[groups, outputs, out / groups] as the layer's output."""
    if geometry == LINEAR:
        return rows[0].to(x.dtype)
    high, wide = geometry.out(x.shape[2:])
    found = rows.transpose(1, 2).reshape(len(weight), len(x), high, wide)
    return found.transpose(0, 1).contiguous().to(x.dtype)


def _parts(x: Tensor, geometry: Geometry) -> Sequence[Tensor]:
    """Images in turn, as many as :data:`_ELEMENTS` has room for."""
    each = x.shape[1]
    if geometry != LINEAR:
        each *= math.prod(geometry.out(x.shape[2:])) * math.prod(geometry.kernel)
    return torch.split(x, max(1, _ELEMENTS // max(each, 1)))


def _tiles(seen: Tensor) -> Iterator[slice]:
    count = max(1, _TILE // max(1, seen.shape[0] * seen.shape[2]))
    yield from (slice(start, start + count) for start in range(0, seen.shape[1], count))


# -- native kernels, and what torch.compile sees ---------------------------------------------------------------------


@functools.cache
def _kernels() -> Any:
    """The class of ``bitsmith_kernels``, None where it is not installed or older than adder layers."""
    try:
        import bitsmith_kernels

        bitsmith_kernels.adder_isas()
    except (ImportError, AttributeError):
        return None
    return bitsmith_kernels.AdderLayer


@functools.lru_cache(256)
def _layer(geometry: Geometry) -> Any:
    if geometry == LINEAR:
        return _kernels()()
    return _kernels()(geometry.stride, geometry.dilation, geometry.pads, geometry.groups)


def _native(x: Tensor, geometry: Geometry) -> Any:
    """What computes it natively, None where nothing does."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel()
    return _layer(geometry) if fits and _kernels() is not None else None


def _images(*given: Tensor) -> list[Any]:
    """float32 arrays of four axes: a row of a linear layer is an image of one pixel."""
    arrays = [np.ascontiguousarray(x.detach().float().numpy()) for x in given]
    return [a.reshape(*a.shape, 1, 1) if a.ndim == 2 else a for a in arrays]


def _from_native(made: Any, x: Tensor, geometry: Geometry) -> Tensor:
    found = torch.from_numpy(made)
    return found.flatten(1) if geometry == LINEAR else found


_loaded = False


def load() -> None:
    """Register ``bitsmith::adder`` and ``bitsmith::adder_input_gradient``, which ``torch.compile`` leaves alone; free
    after the first time."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    forward = torch.library.custom_op(
        "bitsmith::adder",
        lambda x, weight, geometry: outputs(x, weight, Geometry.of(geometry)),
        mutates_args=(),
        schema="(Tensor x, Tensor weight, int[] geometry) -> Tensor",
    )
    forward.register_fake(_shape)
    backward = torch.library.custom_op(
        "bitsmith::adder_input_gradient",
        lambda x, weight, given, geometry: input_gradient(x, weight, given, Geometry.of(geometry)),
        mutates_args=(),
        schema="(Tensor x, Tensor weight, Tensor given, int[] geometry) -> Tensor",
    )
    backward.register_fake(lambda x, weight, given, geometry: x.new_empty(x.shape))


def _shape(x: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    found = Geometry.of(geometry)
    places = () if found == LINEAR else found.out(x.shape[2:])
    return x.new_empty((x.shape[0], weight.shape[0], *places))
