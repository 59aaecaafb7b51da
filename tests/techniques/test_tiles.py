"""What Winograd is said to compute, against convolutions whose operations are counted one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsmith as bs
from bitsmith.model.network import network
from bitsmith.numerics.winograd import transforms
from bitsmith.site import Site
from bitsmith.techniques._tiles import additions, additions_back


@dataclass
class Counter:
    """Operations between variables; products with constants are free."""

    multiply: int = 0
    add: int = 0


@dataclass
class Number:
    value: Fraction
    counter: Counter = field(repr=False)

    def __add__(self, other: Number) -> Number:
        self.counter.add += 1
        return Number(self.value + other.value, self.counter)

    def __sub__(self, other: Number) -> Number:
        return self + other.__rmul__(-1)

    def __mul__(self, other: Number) -> Number:
        self.counter.multiply += 1
        return Number(self.value * other.value, self.counter)

    def __rmul__(self, constant: int) -> Number:
        return Number(constant * self.value, self.counter)


Line = Callable[[Sequence[Number]], list[Number]]


def into_2(d: Sequence[Number]) -> list[Number]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def back_2(f: Sequence[Number]) -> list[Number]:
    a, b = f[1] + f[2], f[1] - f[2]
    return [f[0] + a, b - f[3]]


def into_4(d: Sequence[Number]) -> list[Number]:
    """Lavin and Gray's form, 12 additions: each product is with a power of 2."""
    a, b, c, e = d[4] - 4 * d[2], d[3] - 4 * d[1], d[4] - d[2], d[3] - d[1]
    return [c + 4 * (d[0] - d[2]), a + b, a - b, c + 2 * e, c - 2 * e, (d[5] - d[3]) - 4 * e]


def back_4(f: Sequence[Number]) -> list[Number]:
    a, b, c, e = f[1] + f[2], f[1] - f[2], f[3] + f[4], f[3] - f[4]
    return [(f[0] + a) + c, b + 2 * e, a + 4 * c, (b + 8 * e) + f[5]]


LINES: dict[int, tuple[Line, Line]] = {2: (into_2, back_2), 4: (into_4, back_4)}


def ran(line: Line, values: Sequence[int]) -> tuple[list[Fraction], int]:
    counter = Counter()
    found = line([Number(Fraction(value), counter) for value in values])
    return [number.value for number in found], counter.add


@pytest.mark.parametrize("tile", [2, 4])
def test_a_transform_of_one_axis_takes_as_many_additions_as_its_straight_line_form(tile: int) -> None:
    own = transforms(tile)
    for line, matrix, counted in (
        (LINES[tile][0], own.bt, additions(own.bt)),
        (LINES[tile][1], own.at, additions_back(own.at)),
    ):
        values = [3, -1, 4, 1, -5, 9][: len(matrix[0])]
        found, added = ran(line, values)
        expected = [sum(c * v for c, v in zip(row, values, strict=True)) for row in matrix]
        # a tap may carry another sign or factor in the package: it is what the other transforms undo
        assert all(abs(a) == abs(b) for a, b in zip(found, expected, strict=True))
        assert added == counted


def both_axes(line: Line, tile: list[list[Number]]) -> list[list[Number]]:
    """Down the columns, then along the rows."""
    down = list(zip(*(line(column) for column in zip(*tile, strict=True)), strict=True))
    return [line(row) for row in down]


@pytest.mark.parametrize(("tile", "height", "width"), [(2, 3, 4), (4, 5, 3)])
def test_a_whole_convolution_counted_one_by_one(tile: int, height: int, width: int) -> None:
    """2 channels to 3 filters, with the package's own matrices; every output is the direct convolution's."""
    own, counter, channels, filters = transforms(tile), Counter(), 2, 3
    taps = tile + 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 8, (channels, height + 2, width + 2), generator=generator)
    w = torch.randint(-8, 8, (filters, channels, 3, 3), generator=generator)
    flat = [Fraction(1), *[Fraction(0)] * (taps - 1)]
    # the straight-line forms are those of the package up to a factor of each tap, which the weights undo
    unit = [[flat[(j - i) % taps] for j in range(taps)] for i in range(taps)]
    lines = [[n.value for n in LINES[tile][0]([Number(v, Counter()) for v in column])] for column in unit]
    bt = list(zip(*lines, strict=True))
    factor = [
        next(a / b for a, b in zip(mine, theirs, strict=True) if b) for mine, theirs in zip(bt, own.bt, strict=True)
    ]
    ends = [[n.value for n in LINES[tile][1]([Number(v, Counter()) for v in column])] for column in unit]
    at = list(zip(*ends, strict=True))
    factor_out = [next(at[o][p] / own.at[o][p] for o in range(tile) if own.at[o][p]) for p in range(taps)]
    scale = [a * b for a, b in zip(factor, factor_out, strict=True)]
    u = [
        [
            [
                [
                    sum(own.g[p][a] * own.g[q][b] * int(w[k, c, a, b]) for a in range(3) for b in range(3))
                    / (scale[p] * scale[q])
                    for q in range(taps)
                ]
                for p in range(taps)
            ]
            for c in range(channels)
        ]
        for k in range(filters)
    ]
    direct = torch.nn.functional.conv2d(x[None].double(), w.double())[0]
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            v = []
            for c in range(channels):
                cut = [
                    [
                        Number(Fraction(int(x[c, i, j]) if i < height + 2 and j < width + 2 else 0), counter)
                        for j in range(left, left + taps)
                    ]
                    for i in range(top, top + taps)
                ]
                v.append(both_axes(LINES[tile][0], cut))
            for k in range(filters):
                sums = [
                    [Number(Fraction(0), counter) for _ in range(taps)] for _ in range(taps)
                ]  # one addition for each multiplication, as multiply-accumulate units have them
                for c in range(channels):
                    for p in range(taps):
                        for q in range(taps):
                            sums[p][q] = sums[p][q] + Number(u[k][c][p][q], counter) * v[c][p][q]
                y = both_axes(LINES[tile][1], sums)
                for i in range(min(tile, height - top)):
                    for j in range(min(tile, width - left)):
                        assert y[i][j].value == direct[k, top + i, left + j].item()
    layer = torch.nn.Conv2d(channels, filters, 3, bias=False)
    site = only_site(layer, torch.randn(1, channels, height + 2, width + 2))
    technique = bs.Winograd(tile, 32)  # type: ignore[arg-type]
    assert technique.operations(site) == {"multiply": counter.multiply, "add": counter.add}
    tiles = math.ceil(height / tile) * math.ceil(width / tile)
    assert technique.products(site) is not None
    made = bs.Winograd(tile, 8).operations(site)  # type: ignore[arg-type]
    assert made == {"multiply": counter.multiply, "add": counter.add, "scale": tiles * taps**2 * (channels + filters)}


def only_site(layer: torch.nn.Module, x: torch.Tensor) -> Site:
    (site,) = network(torch.nn.Sequential(layer).eval(), x).record.sites.values()
    return site


def test_published_counts() -> None:
    """Lavin and Gray: 32 and 24 additions of a tile of 2, 144 and 100 of a tile of 4."""
    site = only_site(torch.nn.Conv2d(1, 1, 3, padding=1), torch.randn(1, 1, 4, 4))
    two, four = bs.Winograd(2, 32).operations(site), bs.Winograd(4, 32).operations(site)
    assert two == {"multiply": 4 * 16, "add": 4 * (16 + 32 + 24)}
    assert four == {"multiply": 36, "add": 36 + 144 + 100}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from("247"),
)
def test_products_of_any_map(n: int, channels: int, filters: int, height: int, width: int, which: str) -> None:
    """In one and two dimensions; a tile reaches beyond a map that it does not divide."""
    tile = 2 if which == "2" else 4
    line = which == "7"
    layer = (torch.nn.Conv1d if line else torch.nn.Conv2d)(channels, filters, 3, padding=1)
    x = torch.randn(n, channels, width) if line else torch.randn(n, channels, height, width)
    technique = bs.Winograd(tile, 16)  # type: ignore[arg-type]
    site = only_site(layer, x)
    products, counted = technique.products(site), technique.operations(site)
    assert products is not None
    assert counted is not None
    tiles = n * (1 if line else math.ceil(height / tile)) * math.ceil(width / tile)
    taps = (tile + 2) ** (1 if line else 2)
    assert (products.count, products.positions, products.outputs, products.depth) == (taps, tiles, filters, channels)
    assert products.bits == 16
    assert counted["multiply"] == products.macs == tiles * taps * filters * channels
    # what is stored is what is multiplied with
    assert technique.bits(site) >= 16 * taps * filters * channels


def test_trained_transforms_multiply() -> None:
    site = only_site(torch.nn.Conv2d(1, 1, 3, padding=1), torch.randn(1, 1, 2, 2))
    found = bs.Winograd(2, 8, "flex").operations(site)
    # 4x4 by 4x4 twice on the way in; 2x4 by 4x4, then 2x4 by 4x2, on the way out
    assert found == {"multiply": 16 + 2 * 64 + 32 + 16, "add": 16 + 2 * 48 + 24 + 12, "scale": 32}


def test_no_other_site_has_such_products() -> None:
    site = only_site(torch.nn.Conv2d(2, 2, 5), torch.randn(1, 2, 8, 8))
    assert bs.Winograd(2).products(site) is None
    assert bs.Winograd(2).operations(site) is None
    assert bs.Int(8, 8).products(site) is None
