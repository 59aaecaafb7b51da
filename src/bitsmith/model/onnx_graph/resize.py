"""Resize and its like: sampling at other places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host
from .graph import Call, Compute, Operator

_MODES = ("nearest", "linear", "cubic")
_PLACES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")


def _resize(call: Call) -> Compute:
    mode = call.attribute("mode", "nearest")
    place = call.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = call.attribute("nearest_mode", "round_prefer_floor")
    if mode not in _MODES or (mode == "cubic" and (place == "asymmetric" or call.attribute("exclude_outside", 0))):
        raise call.refuse(f"with mode {mode!r} and {place!r} coordinates")
    if place not in _PLACES:
        raise call.refuse(f"with {place!r} coordinates")
    if call.attribute("antialias", 0):
        raise call.refuse("with antialias")
    if mode == "cubic" and not math.isclose(call.attribute("cubic_coeff_a", -0.75), -0.75):
        raise call.refuse("with a cubic coefficient other than -0.75")
    given_axes = call.attribute("axes")
    policy = call.attribute("keep_aspect_ratio_policy", "stretch")

    def compute(x: Tensor, region: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
        axes = [a % x.dim() for a in given_axes] if given_axes is not None else list(range(x.dim()))
        given = host.vector(sizes) if sizes is not None else ()
        if given:
            ratios = [n / x.shape[a] for a, n in zip(axes, given, strict=True)]
            if policy != "stretch":
                ratio = min(ratios) if policy == "not_larger" else max(ratios)
                ratios = [ratio] * len(axes)
                given = tuple(math.floor(ratio * x.shape[a] + 0.5) for a in axes)
        else:
            ratios = list(host.vector(scales))
            given = tuple(math.floor(x.shape[a] * s) for a, s in zip(axes, ratios, strict=True))
        changed = {
            axis: (size, ratio)
            for axis, size, ratio in zip(axes, given, ratios, strict=True)
            if not (isinstance(ratio, (int, float)) and ratio == 1.0)
        }
        return _sampled(x, changed, mode, place, rounding)

    return compute


def _sampled(x: Tensor, changed: dict[int, tuple[Any, float]], mode: str, place: str, rounding: str) -> Tensor:
    rank = x.dim() - 2
    spatial = list(range(2, x.dim()))
    if changed and set(changed) <= set(spatial) and rank in (1, 2, 3):
        size = tuple(changed[a][0] if a in changed else x.shape[a] for a in spatial)
        ratios = [changed[a][1] if a in changed else 1.0 for a in spatial]
        exact = all(n == x.shape[a] * r for n, a, r in zip(size, spatial, ratios, strict=True))
        if mode == "nearest" and place == "asymmetric" and rounding == "floor" and exact:
            return F.interpolate(x, size, mode="nearest")
        half = place == "half_pixel" or (place == "pytorch_half_pixel" and all(n != 1 for n in size))
        if exact and mode == "linear" and (half or place == "align_corners"):
            name = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
            return F.interpolate(x, size, mode=name, align_corners=not half)
        if exact and mode == "cubic" and rank == 2 and (half or place == "align_corners"):
            return F.interpolate(x, size, mode="bicubic", align_corners=not half)
    for axis, (size, ratio) in changed.items():
        x = _along(x, axis, size, ratio, mode, place, rounding)
    return x


def _along(x: Tensor, axis: int, size: Any, ratio: float, mode: str, place: str, rounding: str) -> Tensor:
    """One axis: every output pixel's place in the input, and the values around it."""
    length = x.shape[axis]
    at = torch.arange(size, dtype=torch.float32, device=x.device)
    if place == "align_corners":
        at = at * ((length - 1) / (size - 1) if size > 1 else 0.0)
    elif place == "asymmetric":
        at = at / ratio
    elif place == "pytorch_half_pixel" and size == 1:
        at = torch.zeros_like(at)
    else:
        at = (at + 0.5) / ratio - 0.5
        if place == "half_pixel_symmetric":
            at = at + length / 2 * (1 - size / (ratio * length))
    if mode == "nearest":
        return x.index_select(axis, _rounded(at, rounding).long().clamp(0, length - 1))
    low = at.floor()
    part = (at - low).reshape([-1 if a == axis else 1 for a in range(x.dim())])
    if mode == "linear":
        weights: Sequence[tuple[int, Any]] = ((0, 1 - part), (1, part))
    else:
        weights = tuple((step, _cubic(part - step)) for step in (-1, 0, 1, 2))
    made = torch.zeros((), dtype=x.dtype, device=x.device)
    for step, weight in weights:
        made = made + x.index_select(axis, (low.long() + step).clamp(0, length - 1)) * weight
    return made


def _rounded(at: Tensor, rounding: str) -> Tensor:
    if rounding == "floor":
        return at.floor()
    if rounding == "ceil":
        return at.ceil()
    return (at - 0.5).ceil() if rounding == "round_prefer_floor" else (at + 0.5).floor()


def _cubic(distance: Tensor, a: float = -0.75) -> Tensor:
    """The convolution kernel of Keys 1981, eq. 15."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _grid_sample(call: Call) -> Compute:
    mode = {
        "bilinear": "bilinear",
        "linear": "bilinear",
        "nearest": "nearest",
        "bicubic": "bicubic",
        "cubic": "bicubic",
    }
    name = mode.get(call.attribute("mode", "linear"))
    if name is None:
        raise call.refuse(f"with mode {call.attribute('mode')!r}")
    pads, corners = call.attribute("padding_mode", "zeros"), bool(call.attribute("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, name, pads, corners)


OPERATORS: dict[str, Operator] = {
    "Resize": Operator(
        _resize,
        ("x",),
        host=(1, 2, 3),
        note="tf_crop_and_resize, antialias, exclude_outside, cubic with asymmetric coordinates",
    ),
    "GridSample": Operator(_grid_sample, ("x", "grid")),
}
"""Sampling at other places."""
