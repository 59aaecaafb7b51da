"""Winograd's minimal filtering: exact transforms, tiles of a map, and the integer path of the native kernels.

``F(m, r)`` computes m outputs of a correlation with r weights from ``T = m + r - 1`` inputs with T multiplications
(*taps*): ``y = A^T [(G w) . (B^T d)]``, in two dimensions ``Y = A^T [(G w G^T) . (B^T d B)] A`` (Lavin and Gray 2016,
arXiv:1509.09308, eqs. 8 and 10; quantized: Fernandez-Marques et al. 2020, arXiv:2002.10711). An axis that the kernel
does not extend over has ``F(1, 1)``, so that 1x3 and 3x1 kernels are the same with other matrices.

The taps of two dimensions are numbered ``p = i * T_w + j``: row i of the vertical transform, row j of the horizontal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from .straight_through import straight_through

Matrix = tuple[tuple[Fraction, ...], ...]
Pads = tuple[int, int, int, int]
"""Zeros around a map: top, left, bottom, right."""

ACCUMULATOR = 2**31 - 1
"""The greatest magnitude that an accumulator of the kernels may reach."""

CHANNELS = {8: ACCUMULATOR // (2 * 128 * 127), 16: 2**16, 32: 2**31}
"""Input channels by bits of the taps. 8 bits: of the sum and of what it begins with, for the offset is at most half of
a range that 0 is in. 16 bits: with the greatest tap there is, 25500, each weight still gets a unit."""

_EXACT_FLOAT32 = 2**24

POINTS: dict[int, tuple[Fraction, ...]] = {
    2: tuple(map(Fraction, (0, 1, -1))),
    4: tuple(map(Fraction, (0, 1, -1, 2, -2))),
    6: (*map(Fraction, (0, 1, -1, 2, -2)), Fraction(1, 2), Fraction(-1, 2)),
}
"""Finite interpolation points by tile size; the last point is infinity."""


@dataclass(frozen=True)
class Transforms:
    """``at`` [m, T], ``bt`` [T, T] and ``g`` [T, r] of one axis, exact."""

    at: Matrix
    bt: Matrix
    g: Matrix

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Outputs m, taps T, weights r."""
        return len(self.at), len(self.bt), len(self.g[0])

    @property
    def exact(self) -> bool:
        """Whether ``A^T [(G w) . (B^T d)]`` is the correlation of d and w, for all of them.

        It is bilinear: it suffices that output o takes the product of input j and weight k where ``j = o + k``, once.
        """
        m, taps, r = self.sizes
        return all(
            sum(self.at[o][i] * self.g[i][k] * self.bt[i][j] for i in range(taps)) == (j == o + k)
            for o, j, k in itertools.product(range(m), range(taps), range(r))
        )

    def scaled(self, g: Sequence[Fraction | int], a: Sequence[Fraction | int]) -> Transforms:
        """The same convolution with tap i of G times ``g[i]`` and of A times ``a[i]``, and of B divided by both."""
        return Transforms(
            tuple(tuple(x * Fraction(s) for x, s in zip(row, a, strict=True)) for row in self.at),
            tuple(tuple(x / (Fraction(s) * Fraction(t)) for x in row) for row, s, t in zip(self.bt, g, a, strict=True)),
            tuple(tuple(x * Fraction(s) for x in row) for row, s in zip(self.g, g, strict=True)),
        )

    def with_integer_input(self) -> Transforms:
        """Rows of B^T with fractions multiplied by their least common denominator, those of G divided by it."""
        factors = [math.lcm(*(x.denominator for x in row)) for row in self.bt]
        return self.scaled([Fraction(1, factor) for factor in factors], [1] * len(factors))

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """``(A^T, B^T, G)``, each entry rounded once to ``dtype``."""
        at, bt, g = (
            torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64).to(dtype)
            for matrix in (self.at, self.bt, self.g)
        )
        return at, bt, g


def cook_toom(points: Sequence[Fraction | int], m: int, r: int = 3) -> Transforms:
    """The transforms of ``F(m, r)`` from ``m + r - 2`` different finite points, and infinity.

    ``A^T = V_m^T``, ``B^T = diag(N) V_n^-T``, ``G = diag(1/N) V_r`` with n = m + r - 1, V_k the Vandermonde matrix with
    k columns (for infinity a row that ends in 1), ``N_i`` the product of ``a_i - a_j`` over the other finite points and
    1 for infinity (Winograd 1980; construction as in Barabasz et al. 2020, arXiv:1803.10986).
    Raises ``ValueError`` for a wrong number of points or for equal ones.

    >>> cook_toom((0, 1, -1), 2).exact
    True
    """
    finite = [Fraction(point) for point in points]
    n = m + r - 1
    if m < 1 or r < 1 or len(finite) != n - 1 or len(set(finite)) != len(finite):
        raise ValueError(f"cook_toom(points={list(map(str, finite))}, m={m}, r={r}): {n - 1} different points needed")
    norms = [math.prod((a - b for b in finite if b != a), start=Fraction(1)) for a in finite] + [Fraction(1)]

    def vandermonde(columns: int) -> Matrix:
        rows = [tuple(a**k for k in range(columns)) for a in finite]
        return (*rows, (*([Fraction(0)] * (columns - 1)), Fraction(1)))

    inverse = _inverse(vandermonde(n))
    at = tuple(zip(*vandermonde(m), strict=True))
    bt = tuple(tuple(norms[i] * inverse[j][i] for j in range(n)) for i in range(n))
    g = tuple(tuple(x / norm for x in row) for row, norm in zip(vandermonde(r), norms, strict=True))
    return Transforms(at, bt, g)


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss and Jordan's elimination."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for column in range(n):
        pivot = next(i for i in range(column, n) if rows[i][column] != 0)
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [x / rows[column][column] for x in rows[column]]
        for i in range(n):
            if i != column and rows[i][column] != 0:
                factor = rows[i][column]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[column], strict=True)]
    return tuple(tuple(row[n:]) for row in rows)


def transforms(tile: int, kernel: int = 3) -> Transforms:
    """Those of the techniques and kernels: for 3 weights and ``tile`` in 2, 4 and 6 outputs, or none (``kernel=1``).

    Tiles of 2 and 4 are Lavin and Gray's, with their signs; B^T holds integers for every tile. Points with +-1/2 beside
    +-2 err a tenth in float32, at 6 outputs, of what +-3/2 do.

    >>> [[int(x) for x in row] for row in transforms(2).bt]
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
    """
    if kernel == 1:
        one = ((Fraction(1),),)
        return Transforms(one, one, one)
    found = cook_toom(POINTS[tile], tile, kernel).with_integer_input()
    return found.scaled((-1, 1, 1, 1), (1, 1, 1, -1)) if tile == 2 else found


def input_matrix(tile: int, kernel: Sequence[int]) -> Tensor:
    """B^T of both axes, float32 [P, P]: integers. ``kernel``: 3 or 1 weights by axis."""
    vertical, horizontal = (transforms(tile, size).tensors()[1] for size in kernel)
    return kronecker(vertical, horizontal)


# -- tiles of a map ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How a map is cut: ``m`` outputs and ``taps`` inputs by axis (vertical, horizontal), zeros around the map."""

    m: tuple[int, int]
    taps: tuple[int, int]
    pads: Pads

    @classmethod
    def of(cls, tile: int, kernel: Sequence[int], pads: Pads) -> Tiling:
        """Of a kernel of 3 or 1 weights by axis."""
        sizes = [transforms(tile, size).sizes for size in kernel]
        return cls((sizes[0][0], sizes[1][0]), (sizes[0][1], sizes[1][1]), pads)

    @property
    def mean_tap(self) -> int:
        """Row 1 and column 1, where the kernel extends: there alone B^T keeps the mean of a tile (its other rows sum to
        0), so D of images that are never negative is never negative there."""
        return (self.taps[1] if self.taps[0] > 1 else 0) + (1 if self.taps[1] > 1 else 0)

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Size of the output map. Raises ``ValueError`` for a map that the kernel does not fit in."""
        top, left, bottom, right = self.pads
        sizes = height + top + bottom - (self.taps[0] - self.m[0]), width + left + right - (self.taps[1] - self.m[1])
        if min(sizes) < 1:
            raise ValueError(f"a map of {height} x {width} with zeros {self.pads} around it is smaller than the kernel")
        return sizes

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """Tiles by axis; the last ones may reach beyond the map."""
        rows, columns = self.outputs(height, width)
        return -(-rows // self.m[0]), -(-columns // self.m[1])

    def cut(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> inputs of every tile [P, C, N * tiles], zeros outside the map."""
        n, channels, height, width = x.shape
        rows, columns = self.counts(height, width)
        top, left, _, _ = self.pads
        bottom = (rows - 1) * self.m[0] + self.taps[0] - height - top
        right = (columns - 1) * self.m[1] + self.taps[1] - width - left
        # a whole pad may lie beyond the last tile
        x = F.pad(x, (left, right, top, bottom))
        taps = self.taps[0] * self.taps[1]
        cut = F.unfold(x, self.taps, stride=self.m).view(n, channels, taps, rows * columns)
        return cut.permute(2, 1, 0, 3).reshape(taps, channels, n * rows * columns)

    def join(self, y: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Outputs of every tile [m_h, m_w, K, N * tiles] -> [N, K, H', W'], cropped; ``height``, ``width`` of the
        input map."""
        rows, columns = self.counts(height, width)
        out_height, out_width = self.outputs(height, width)
        y = y.view(*self.m, y.shape[2], batch, rows, columns).permute(3, 2, 4, 0, 5, 1)
        whole = y.reshape(batch, y.shape[1], rows * self.m[0], columns * self.m[1])
        return whole[:, :, :out_height, :out_width].contiguous()


def kronecker(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The matrix of a transform of both axes: ``B^T d B`` of a flattened tile is ``kronecker(B^T, B^T) d``."""
    return torch.kron(vertical.contiguous(), horizontal.contiguous())


def transformed(matrix: Tensor, tiles: Tensor) -> Tensor:
    """``matrix`` [Q, P] on the first axis of ``tiles`` [P, ...] -> [Q, ...]."""
    return (matrix @ tiles.reshape(tiles.shape[0], -1)).view(matrix.shape[0], *tiles.shape[1:])


def transformed_weight(weight: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """``G w G^T`` of weights [K, C, r_h, r_w] -> [P, K, C], in the type of the matrices."""
    found = torch.einsum("ia,kcab,jb->ijkc", vertical, weight.to(vertical.dtype), horizontal)
    return found.reshape(-1, *weight.shape[:2])


# -- the integer path --------------------------------------------------------------------------------------------------


def tap_bounds(bt: Tensor, low: Tensor | int, high: Tensor | int) -> tuple[Tensor, Tensor]:
    """Least and greatest ``D = B^T d B`` by tap, float64 [P], over all d from ``low`` to ``high`` (0 among them).

    ``bt``: the matrix of both axes, [P, P]. Interval arithmetic; each bound is attained, for the entries are free.
    """
    bt = bt.double()
    ends = torch.stack((bt * low, bt * high))
    return ends.amin(0).sum(1), ends.amax(0).sum(1)


def scaled_taps(transformed: Tensor, mul: Tensor, offset: Tensor, tap: int, bits: int) -> Tensor:
    """``V = ((D - offset) * mul + 2^14) >> 15`` by tap and channel, saturated to int8 if ``bits`` is 8: what
    ``vpmulhrsw`` computes.

    ``transformed``: D [P, C, ...], integers of magnitude below 2^15 in any type; ``mul`` [P, C], integers in 1 ..
    32767; ``offset`` [C]: integers that D of this ``tap`` may have, of the others it is 0. Gives int32.
    """
    along = mul.to(torch.int32)
    added = torch.full_like(along, 1 << 14)
    added[tap] -= offset.to(torch.int32) * along[tap]
    shape = (*mul.shape, *[1] * (transformed.dim() - 2))
    scaled = (transformed.to(torch.int32) * along.view(shape) + added.view(shape)) >> 15
    return scaled.clamp(-128, 127) if bits == 8 else scaled


def base_of(u: Tensor, mul: Tensor, offset: Tensor, tap: int) -> Tensor:
    """``(sum_c U * offset * mul + 2^14) >> 15`` of the ``tap``, [K]: what the sum over channels starts with, so that
    the offset changes nothing but rounding. int64, or float64 with the gradient where U has one."""
    factors = offset.to(torch.int64) * mul[tap].to(torch.int64)
    with torch.no_grad():
        base = ((u[tap].to(torch.int64) * factors).sum(1) + (1 << 14)) >> 15
    if not u.requires_grad:
        return base
    exact = (u[tap].double() * factors).sum(1) / 2.0**15
    return straight_through(exact, base.double())


def accumulated(v: Tensor, u: Tensor) -> Tensor:
    """``acc[p, k] = sum_c V[p, c] U[p, k, c]``: V [P, C, L] and U [P, K, C] -> [P, K, L]. Exact for integers held in
    the type of :func:`exact_dtype`, whatever the order of the sum."""
    return torch.bmm(u, v)


def with_base(acc: Tensor, base: Tensor, tap: int) -> Tensor:
    """Exact sums [P, K, L] and ``base`` [K] at one tap, rounded once to float32."""
    there = (acc[tap].double() + base[:, None]).float()
    return torch.cat((acc[:tap].float(), there[None], acc[tap + 1 :].float()))


def exact_dtype(channels: int, bits: int) -> torch.dtype:
    """The float type in which :func:`accumulated` is exact: float32 while every partial sum stays below 2^24.

    >>> exact_dtype(512, 8), exact_dtype(64, 16)
    (torch.float32, torch.float64)
    """
    return torch.float32 if bits == 8 and channels * 128 * 127 < _EXACT_FLOAT32 else torch.float64


def output_axis(f: Sequence[Tensor]) -> list[Tensor]:
    """``A^T f`` along one axis of 1, 4 or 6 taps, in the kernels' order (products are with powers of 2)."""
    if len(f) == 1:
        return [f[0]]
    if len(f) == 4:
        t, u = f[1] + f[2], f[1] - f[2]
        return [f[0] + t, u - f[3]]
    if len(f) == 6:
        a, b, c, e = f[1] + f[2], f[1] - f[2], f[3] + f[4], f[3] - f[4]
        return [(f[0] + a) + c, b + 2 * e, a + 4 * c, (b + 8 * e) + f[5]]
    raise ValueError(f"output_axis: the integer path has 1, 4 or 6 taps by axis, not {len(f)}")


def output_tiles(f: Tensor, taps: tuple[int, int]) -> Tensor:
    """``A^T f A`` of [P, ...] -> [m_h, m_w, ...]: down the columns first, then along the rows."""
    rows = f.view(*taps, *f.shape[1:]).unbind(0)
    columns = torch.stack(output_axis(rows))
    return torch.stack(output_axis(columns.unbind(1)), 1)


def integer_convolution(
    d: Tensor, u: Tensor, mul: Tensor, offset: Tensor, us: Tensor, bias: Tensor, bt: Tensor, tiling: Tiling, bits: int
) -> Tensor:
    """The native kernels' 3x3 convolution up to its ReLU, bit for bit: [N, C, H, W] -> [N, K, H', W'] float32.

    ``d``: the input's integers less their zero point, in any type. ``u`` [P, K, C]: transformed weights, integers.
    ``mul`` [P, C], ``offset`` [C] (of :attr:`Tiling.mean_tap`): see :func:`scaled_taps`. ``us`` float32 [P, K]: what
    one unit of the accumulator stands for. ``bias`` float32 [K]. ``bt``: B^T of both axes. Every float operation is
    IEEE float32, rounded to nearest even.
    """
    exact, tap = exact_dtype(u.shape[2], bits), tiling.mean_tap
    tiles = transformed(bt.float(), tiling.cut(d.float()))  # sums below 2^24: exact
    v = scaled_taps(tiles, mul, offset, tap, bits)
    acc = accumulated(v.to(exact), u.to(exact))
    f = with_base(acc, base_of(u, mul, offset, tap), tap) * us[:, :, None]
    found = tiling.join(output_tiles(f, tiling.taps), d.shape[0], d.shape[2], d.shape[3])
    return found + bias.view(1, -1, 1, 1)


def multipliers(steps: Tensor) -> Tensor:
    """``clamp(floor(2^15 / step), 1, 2^15 - 1)``, int32: ``mul`` for ``steps`` of V, in units of D."""
    wanted = torch.floor(2.0**15 / steps.double().clamp_min(2.0**-40))
    return wanted.clamp(1, 2**15 - 1).to(torch.int32)


def shared_steps(u: Tensor, power: Tensor, bound: Tensor) -> Tensor:
    """What one unit of V shall stand for where a 31-bit accumulator of 16-bit taps errs least: float64 [P, C].

    ``u``: transformed weights, real, [P, K, C]. ``power`` [P, C]: mean of D^2. ``bound`` [P]: greatest \\|D\\|
    possible. With steps t_c of V, U holds ``u_c t_c`` in a step of about ``s = S1 bound / 2^31`` with ``S1 = sum_c
    |u_c|``, whatever t is. The error by V is ``sum_c t_c^2 u_c^2 / 12`` and that by U ``s^2 / 12 sum_c power_c /
    t_c^2``; their sum is least where both are equal for each channel. All output channels share t: both are summed over
    them.
    """
    u = u.double()
    first, second = u.abs().sum(2).square().sum(1), u.square().sum(1)
    ratio = ((bound / 2.0**31).square() * first)[:, None] * power / second.clamp_min(2.0**-120)
    return ratio.pow(0.25)


@dataclass(frozen=True)
class FixedPoint:
    """How the integer path scales D: ``mul`` int32 [P, C] and ``offset`` int32 [C] of :func:`scaled_taps`, and the
    greatest ``|V|`` that follows, ``bound`` int64 [P, C]. ``steps`` float64 [P, C]: what one unit of V stands for."""

    mul: Tensor
    offset: Tensor
    bound: Tensor

    @property
    def steps(self) -> Tensor:
        return 2.0**15 / self.mul.double()


def fixed_point(
    real: Tensor, limits: Tensor, power: Tensor, ends: tuple[Tensor, Tensor], tap: int, bits: int
) -> FixedPoint:
    """For transformed weights ``real`` [P, K, C]. ``limits`` [2, P, C]: least and greatest D that 8 bits shall hold, in
    units of the input's integers; ``power`` [P, C]: mean of D^2; ``ends``: least and greatest D possible, [P]; ``tap``:
    :attr:`Tiling.mean_tap`, whose values may all be of one sign."""
    limits = torch.stack((torch.maximum(limits[0], ends[0][:, None]), torch.minimum(limits[1], ends[1][:, None])))
    offset = torch.round(limits[:, tap].mean(0)) if bits == 8 else torch.zeros_like(limits[0, tap])
    if bits == 8:
        limits[:, tap] -= offset
        mul = multipliers(peaks(limits, ends) / 127)
    else:
        peak = peaks(limits, ends)
        mul = multipliers(shared_steps(real.detach(), known_power(power, peak), greatest_of(ends)))
    offset = offset.to(torch.int32)
    return FixedPoint(mul, offset, bound_of_taps(*ends, mul, offset, tap, bits))


def greatest_of(ends: tuple[Tensor, Tensor]) -> Tensor:
    """Greatest magnitude by tap, [P]."""
    return torch.maximum(-ends[0], ends[1])


def peaks(limits: Tensor, ends: tuple[Tensor, Tensor]) -> Tensor:
    """The magnitudes that shall become the greatest level, float64 [P, C], of limits and possible ends as in
    :func:`fixed_point`.

    A channel has at least half of the greatest of its tap, for what was not seen of it: its error is then a quarter of
    that channel's. A tap that was always 0 may hold anything.
    """
    bound = greatest_of(ends)[:, None]
    found = torch.minimum(limits.double().abs().amax(0), bound)
    greatest = found.amax(1, keepdim=True)
    return torch.maximum(found, torch.where(greatest > 0, greatest / 2, bound))


def known_power(power: Tensor, peak: Tensor) -> Tensor:
    """Mean of D^2 [P, C]; where nothing but 0 was seen that of a uniform distribution up to the peak."""
    return torch.where(power > 0, power.double(), peak.square() / 3)


def bound_of_taps(low: Tensor, high: Tensor, mul: Tensor, offset: Tensor, tap: int, bits: int) -> Tensor:
    """The greatest \\|V\\| that :func:`scaled_taps` gives for D from ``low`` to ``high`` [P]: int64 [P, C] as
    ``mul``."""
    # monotone in D
    ends = [scaled_taps(end[:, None].expand(mul.shape), mul, offset, tap, bits).abs() for end in (low, high)]
    return torch.maximum(*ends).to(torch.int64)


def weight_steps(u: Tensor, bound: Tensor, bits: int) -> Tensor:
    """What one unit of U stands for, float64 [P, K]; ``u`` [P, K, C]: transformed weights times the steps of V, real.

    8 bits: greatest magnitude at 127. 16 bits: at 32767, or as coarse as ``sum_c |U| * bound < 2^31`` asks, ``bound``
    [P, C] being the greatest \\|V\\|. Where all weights are 0 it is 1.
    """
    u = u.detach().double().abs()
    if bits == 8:
        steps = u.amax(2) / 127
    else:
        # rounding adds half a unit at most to each of the C terms
        bound = bound.double()
        room = ACCUMULATOR - bound.sum(1) / 2
        steps = torch.maximum(u.amax(2) / 32767, (u * bound[:, None]).sum(2) / room[:, None])
    return torch.where(steps > 0, steps.clamp_min(2.0**-60), torch.ones_like(steps))


def check_accumulator(u: Tensor, scaling: FixedPoint, tap: int, where: str) -> int:
    """The greatest magnitude that an accumulator can reach: ``|base| + sum_c |U[p, k, c]| bound[p, c]``, greatest over
    p and k.

    ``u``: integers [P, K, C]. It holds for every partial sum, in any order. Raises ``ValueError`` that names ``where``
    if that does not fit in 32 bits.
    """
    sums = (u.abs().to(torch.int64) * scaling.bound[:, None]).sum(2)
    sums[tap] += base_of(u, scaling.mul, scaling.offset, tap).abs()
    found = int(sums.max())
    if found > ACCUMULATOR:
        raise ValueError(f"{where!r}: an accumulator could reach {found}; one of 32 bits holds {ACCUMULATOR}")
    return found
