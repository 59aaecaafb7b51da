"""Distances and their gradients against the equations written out in float64; memory; torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitsmith.numerics import adder

SQUARE = adder.Geometry((3, 3), pads=(1, 1, 1, 1))


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native kernels where they are installed, and without."""
    if request.param == "torch":
        monkeypatch.setattr(adder, "_kernels", lambda: None)
    elif adder._kernels() is None:
        pytest.skip("bitsmith_kernels is not installed, or has no adder layers")
    return str(request.param)


def written_out(x: Tensor, w: Tensor, g: Tensor, geometry: adder.Geometry) -> dict[str, Tensor]:
    """One output pixel, one filter at a time."""
    x, w, g = x.detach().double(), w.detach().double(), g.double()
    if geometry == adder.LINEAR:
        x, w, g = (t[:, :, None, None] for t in (x, w, g))
        geometry = adder.Geometry((1, 1))
    top, bottom, left, right = geometry.pads
    padded = F.pad(x, (left, right, top, bottom))
    found = {"y": torch.zeros_like(g), "full": torch.zeros_like(w), "sign": torch.zeros_like(w)}
    pull = torch.zeros_like(padded)
    each = w.shape[1]
    for o in range(len(w)):
        group = o // (len(w) // geometry.groups)
        channels = torch.arange(group * each, (group + 1) * each)[:, None, None]
        for i in range(g.shape[2]):
            for j in range(g.shape[3]):
                rows = i * geometry.stride[0] + geometry.dilation[0] * torch.arange(w.shape[2])[:, None]
                columns = j * geometry.stride[1] + geometry.dilation[1] * torch.arange(w.shape[3])
                difference = padded[:, channels, rows, columns] - w[o]
                behind = g[:, o, i, j, None, None, None]
                found["y"][:, o, i, j] = -difference.abs().sum((1, 2, 3))
                found["full"][o] += (behind * difference).sum(0)
                found["sign"][o] += (behind * difference.sign()).sum(0)
                pull[:, channels, rows, columns] += behind * (-difference).clamp(-1, 1)
    found["x"] = pull[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return found


GEOMETRIES = st.builds(
    adder.Geometry,
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    groups=st.integers(1, 2),
)


def compared(geometry: adder.Geometry, x: Tensor, w: Tensor, exact: bool, seed: int) -> None:
    for gradient in ("full", "sign"):
        y = adder.negative_distance(x, w, geometry, gradient)  # type: ignore[arg-type]
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        by_x, by_w = torch.autograd.grad(y, (x, w), g)
        wanted = written_out(x, w, g, geometry)
        room = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 1e-4}
        for got, name in ((y, "y"), (by_x, "x"), (by_w, gradient)):
            torch.testing.assert_close(got.detach().double(), wanted[name].reshape(got.shape), **room)


@given(GEOMETRIES, st.booleans(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6), st.data())
@settings(max_examples=40, deadline=None)
def test_a_convolution_against_the_equations(
    geometry: adder.Geometry, exact: bool, channels: int, filters: int, seed: int, data: st.DataObject
) -> None:
    size = [data.draw(st.integers(d * (k - 1) + 1, 8)) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if exact else torch.float32
    x = torch.randn(2, channels * geometry.groups, *size, generator=generator, dtype=dtype, requires_grad=True)
    shape = filters * geometry.groups, channels, *geometry.kernel
    w = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    compared(geometry, x, w, exact, seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_cases_on_every_path(path: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for geometry, shape in (
        (adder.LINEAR, (7, 5)),
        (SQUARE, (2, 5, 9, 7)),
        (adder.Geometry((3, 2), (2, 1), (1, 2), (1, 0, 0, 2), 2), (3, 4, 7, 8)),
    ):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        patch = (5,) if geometry == adder.LINEAR else (shape[1] // geometry.groups, *geometry.kernel)
        w = torch.randn(6, *patch, dtype=dtype, requires_grad=True)
        compared(geometry, x, w, dtype == torch.float64, 1)


def test_many_parts_and_tiles_are_put_together(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(adder, "_ELEMENTS", 3000)
    monkeypatch.setattr(adder, "_TILE", 500)
    x = torch.randn(5, 3, 8, 8, requires_grad=True)
    compared(SQUARE, x, torch.randn(4, 3, 3, 3, requires_grad=True), False, 2)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_the_adaptive_rate_gives_every_layer_the_same_norm_by_weight(size: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, 8, 8), torch.randn(6, 3, 3, 3, requires_grad=True)
    y = adder.negative_distance(x, w, SQUARE, "full", 0.2)
    y.backward(size * torch.randn_like(y))
    assert w.grad is not None
    assert float(w.grad.norm()) == pytest.approx(0.2 * (6 * 27) ** 0.5, rel=1e-4)


def test_where_nothing_is_to_be_learned_the_rate_divides_by_nothing() -> None:
    w = torch.zeros(2, 3, requires_grad=True)
    adder.negative_distance(torch.zeros(4, 3), w, adder.LINEAR, "full", 0.2).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [[0.0] * 3] * 2


class Largest(TorchDispatchMode):
    """The greatest number of elements that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_tensor_holds_more_than_some_patches(path: str) -> None:
    x, w = torch.randn(64, 16, 32, 32, requires_grad=True), torch.randn(32, 16, 3, 3, requires_grad=True)
    with Largest() as seen:
        adder.negative_distance(x, w, SQUARE, "full", 0.2).sum().backward()
    naive = 64 * 32 * 32 * 16 * 9 * 32  # every difference
    assert seen.elements <= max(adder._ELEMENTS, 64 * 32 * 34 * 34) < naive / 50


# torch's tracer makes an object of the class of its own accord
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_it_is_the_same() -> None:
    torch.manual_seed(0)
    adder.load()

    def step(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(adder.negative_distance(x * 2, w, SQUARE, "full", 0.2) + 20)

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6).clone().requires_grad_()
        w = torch.linspace(-2, 2, 4 * 27).view(4, 3, 3, 3).clone().requires_grad_()
        y = function(x, w)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, w.grad))
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other)


def test_a_patch_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="smaller than a patch"):
        adder.negative_distance(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), adder.Geometry((3, 3)))
