"""Winograd: 3x3 convolutions with fewer multiplications, quantized where they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..numerics import winograd as algorithm
from ..numerics.derived import Derived
from ..numerics.ranges import weight_qparams
from ..numerics.straight_through import rounded, straight_through
from ..numerics.taps import TapObserver
from ..numerics.weights import folded_affine
from ..numerics.winograd_operation import FORM, load
from ..site import Format, Range, Record, Site
from ..technique import Cell, MatrixProducts, No, Technique, Wants
from ._tiles import TileCount, counted

_MOMENTUM = 0.01
"""Of the taps' ranges in training, as in the paper's own code."""


@dataclass(frozen=True)
class Winograd(Technique):
    """Quantized Winograd convolution (Lavin and Gray 2016, arXiv:1509.09308; Fernandez-Marques 2020, arXiv:2002.10711).

    ``Y = A^T [(G w G^T) . (B^T d B)] A`` on tiles of ``tile`` x ``tile`` outputs, for convolutions of 3 weights by axis
    (3x3, 1x3, 3x1, or 3 in one dimension), stride 1, one group. ``tap_bits`` of both factors of the product: 8, with a
    scale by tap and input channel for the activations, which the weights absorb, and by tap and output channel for the
    weights (the paper has one for all taps); 16, where an accumulator of 32 bits is shared between both so that the
    error is least; or 32, all in float. Activations are read in 8 bits, unsigned
    affine unless ``signed``, as by ``Int(8, 8)``, and the sum over channels is exact.

    ``static`` transforms of 2 and 4 are computed in integers as the native kernels do, bit for bit. Tiles of 6, and
    ``flex`` transforms, which are parameters of the cell and trained (quantized to ``tap_bits``, one scale each), are
    simulated in float. ``range``, ``weight_range`` (min/max or mse), ``out``: as in :class:`~bitsmith.Int`.

    A tile of 4 at 8 bits needs training; one of 2 at 8 bits, or of 4 at 16, can be used after training.

    >>> Winograd(4, 16)
    Winograd(tile=4, tap_bits=16)
    """

    tile: Literal[2, 4, 6] = 2
    tap_bits: Literal[8, 16, 32] = 8
    transforms: Literal["static", "flex"] = "static"
    range: Range = Range()  # noqa: RUF009  (frozen)
    weight_range: Range = Range()  # noqa: RUF009
    signed: bool = False
    out: Format | None = None

    def __post_init__(self) -> None:
        if self.tile not in (2, 4, 6):
            raise ValueError(f"Winograd(tile={self.tile!r}): outputs of a tile by axis must be 2, 4 or 6")
        if self.tap_bits not in (8, 16, 32):
            raise ValueError(f"Winograd(tap_bits={self.tap_bits!r}): must be 8, 16, or 32 for float")
        if self.transforms not in ("static", "flex"):
            raise ValueError(f"Winograd(transforms={self.transforms!r}): must be 'static' or 'flex'")
        if self.weight_range.method not in ("minmax", "mse"):
            raise ValueError(f"Winograd(weight_range={self.weight_range}): must be Range('minmax') or Range('mse')")

    def __repr__(self) -> str:
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, field in type(self).__dataclass_fields__.items()
            if name in ("tile", "tap_bits") or getattr(self, name) != field.default
        ]
        return f"Winograd({', '.join(changed)})"

    def fits(self, site: Site) -> bool | No:
        refusal = _refusal(site)
        if refusal:
            return No(refusal)
        assert site.weight is not None
        channels, limit = site.weight.shape[1], algorithm.CHANNELS[self.tap_bits]
        if channels > limit:
            return No(f"{channels} input channels: a 32-bit accumulator has room for {limit} products of taps")
        return True

    def wants(self, site: Site) -> Wants:
        return Wants() if self.tap_bits == 32 else Wants(observers=(_observer(site, self.tile),))

    def reads(self, site: Site) -> tuple[Format | None, ...]:
        first = None if self.tap_bits == 32 else Format(8, self.signed, False, self.range)
        return (first, *(None,) * (len(site.operands) - 1))

    def writes(self, site: Site) -> Format | None:
        return self.out

    def form(self, site: Site) -> str:
        """``bitsmith::winograd``: neither the reference dialect nor an ordinary computation."""
        return FORM

    def bits(self, site: Site) -> float:
        """Transformed weights, a scale of float32 by tap and output channel, one of 16 bits (``mul``) or 32 by tap and
        input channel, an offset of 16 bits by input channel; trained transforms in float32."""
        weight = site.weight
        if weight is None or _refusal(site):  # stored as it was
            return super().bits(site)
        observer = _observer(site, self.tile)
        tiling = algorithm.Tiling.of(self.tile, observer.kernel, observer.pads)
        taps = tiling.taps[0] * tiling.taps[1]
        stored = float(taps * weight.shape[0] * weight.shape[1] * self.tap_bits)
        if self.tap_bits != 32:
            integer = self.transforms == "static" and self.tile in _INTEGER_TILES
            stored += 32.0 * taps * weight.shape[0]
            stored += weight.shape[1] * (16.0 * (taps + 1) if integer else 32.0 * taps)
        if self.transforms == "flex":
            m, n, r = algorithm.transforms(self.tile).sizes
            stored += 32.0 * (m * n + n * n + n * r)
        return stored

    def products(self, site: Site) -> MatrixProducts | None:
        """One product by tap: [tiles, C] @ [C, K] of ``tap_bits``, ``sum_c U[p, k, c] V[p, c, l]``."""
        if site.weight is None or _refusal(site):
            return None
        count, (outputs, depth) = self._counted(site), site.weight.shape[:2]
        made = float(count.weights * outputs * depth)
        return MatrixProducts(count.taps, count.tiles, outputs, depth, self.tap_bits, made)

    def operations(self, site: Site) -> dict[str, float] | None:
        """For a tile of P taps, m outputs, C channels in and K out (Lavin and Gray 2016, eq. 12): ``P C K``
        multiplications and additions, ``C beta + K delta`` additions of the transforms (beta 32, delta 24 in tiles of
        2; 144 and 100 in tiles of 4), and with integers ``P (C + K)`` scalings, of V to its bits and of the sums to
        real units. Trained transforms multiply by their constants as well.
        """
        products = self.products(site)
        if products is None:
            return None
        count, channels, filters = self._counted(site), products.depth, products.outputs
        tiles = float(count.tiles * site.calls)
        inner = float(products.macs * site.calls)
        found = {
            "multiply": inner + tiles * (channels * count.into_multiplied + filters * count.back_multiplied),
            "add": inner + tiles * (channels * count.into + filters * count.back),
        }
        return found if self.tap_bits == 32 else {**found, "scale": tiles * count.taps * (channels + filters)}

    def _counted(self, site: Site) -> TileCount:
        observer = _observer(site, self.tile)
        tiling = algorithm.Tiling.of(self.tile, observer.kernel, observer.pads)
        return counted(self.tile, observer.kernel, tiling, site.out_shapes[0], self.transforms == "flex")

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _WinogradCell(site, self, record)


_INTEGER_TILES = (2, 4)
"""Tiles whose input transform fits in 16 bits: those that the native kernels have."""


def _refusal(site: Site) -> str:
    """Why no Winograd convolution computes the site; "" if one can."""
    kind, arguments = site.kind, site.arguments
    if kind.startswith("conv_transpose"):
        return "a transposed convolution has no Winograd form here"
    if kind not in ("conv1d", "conv2d"):
        return f"{kind} is no convolution in one or two dimensions"
    dims = 1 if kind == "conv1d" else 2
    if len(site.operands) != 2 or not site.operands[1].constant or not site.operands[1].floating:
        return "its weights are computed while it runs; they are transformed ahead"
    if len(site.operands[0].shape) != dims + 2:
        return f"its input has {len(site.operands[0].shape)} dimensions; one of batch is needed"
    kernel = site.operands[1].shape[2:]
    for name in ("stride", "dilation", "groups"):
        value = arguments.get(name, 1)
        if any(one != 1 for one in (value if isinstance(value, (tuple, list)) else (value,))):
            return f"{name} {value}: only {name} 1 has a Winograd form here"
    if set(kernel) - {1, 3} or 3 not in kernel:
        return f"its kernel is {'x'.join(map(str, kernel))}: only 3x3, 1x3, 3x1 and, in one dimension, 3"
    padding = arguments.get("padding", 0)
    if not isinstance(padding, str) and max(_two(padding, dims)) > 2:
        return f"padding {padding}: at most 2, the kernel's size less 1"
    return ""


def _two(value: Any, dims: int) -> tuple[int, int]:
    """An argument of a convolution for the vertical and the horizontal axis; one dimension is the horizontal one."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    given = given * dims if len(given) == 1 else given
    return (0, int(given[0])) if dims == 1 else (int(given[0]), int(given[1]))


def _observer(site: Site, tile: int) -> TapObserver:
    """How the site's input is cut and transformed."""
    assert site.weight is not None
    dims = 1 if site.kind == "conv1d" else 2
    sizes = site.weight.shape[2:]
    kernel = (1, sizes[0]) if dims == 1 else (sizes[0], sizes[1])
    padding = site.arguments.get("padding", 0)
    if padding == "same":
        top, left = ((size - 1) // 2 for size in kernel)
    else:
        top, left = (0, 0) if padding == "valid" else _two(padding, dims)
    return TapObserver(tile, kernel, (top, left, top, left))


@dataclass
class _Packed:
    """What a layer computes with. ``u``: integers of U [P, K, C] (real with 32 bits). ``steps``: what one unit of V
    stands for, in units of D, float64 [P, C]; ``scaling``: the same in the integer path, ``base`` [K] what its sums
    start with at one tap. ``us``: what one unit of a sum over channels stands for, float32 [P, K]."""

    u: Tensor
    steps: Tensor
    scaling: algorithm.FixedPoint | None
    base: Tensor | None
    us: Tensor
    bias: Tensor | None


_A, _B, _G = 0, 1, 2
"""Which transform."""


class _WinogradCell(Cell):
    """Input transform, taps on their grid, products summed over channels, output transform.

    ``materialise`` stores what ships, with the taps numbered as in :mod:`bitsmith.numerics.winograd`: ``u`` int8 or
    int16 [P, K, C] (float32 with 32 bits), ``us`` float32 [P, K], ``bias_f`` float32 [K]; where the integer path
    computes, ``mul`` int16 [P, C] and ``offset`` int16 [C]; else ``steps`` float32 [P, C]. ``tiling``, ``tile``,
    ``kernel``, ``bits`` and ``integer`` (whether it is the integer path) say the rest; the input's scale and zero point
    are those of ``quantizers[0]``.
    """

    fresh = True

    def __init__(self, site: Site, technique: Winograd, record: Record) -> None:
        super().__init__(site)
        load()
        self.folds = True
        observer = _observer(site, technique.tile)
        self.tile, self.bits, self.kernel = technique.tile, technique.tap_bits, observer.kernel
        self.weight_range = technique.weight_range
        self.levels = Format(8, technique.signed).levels
        self.flex = technique.transforms == "flex"
        self.integer = not self.flex and self.tile in _INTEGER_TILES and self.bits != 32
        self.tiling = algorithm.Tiling.of(self.tile, self.kernel, observer.pads)
        self.frozen = False
        self._kept: Derived[_Packed] = Derived()
        # in float64, and no buffers: the transformed weights must not depend on the precision of the model
        self.exact = algorithm.transforms(self.tile).tensors(torch.float64)
        if self.flex:
            self.at, self.bt, self.g = (nn.Parameter(matrix.float()) for matrix in self.exact)
        if self.bits == 32:
            return
        taps = self.tiling.taps[0] * self.tiling.taps[1]
        seen = record.statistics.get(((site.name, 0), observer))
        self.calibrated = seen is not None
        self.tap_limits: Tensor
        self.tap_beyond: Tensor
        self.tap_power: Tensor
        self.seen: Tensor
        assert site.weight is not None
        nothing = torch.zeros(2, taps, site.weight.shape[1])
        self.register_buffer("tap_limits", nothing if seen is None else (seen.extremes * seen.beyond).float())
        self.register_buffer("tap_beyond", torch.tensor(1.0 if seen is None else seen.beyond))
        self.register_buffer("tap_power", nothing[0] if seen is None else seen.power.float())
        self.register_buffer("seen", torch.zeros_like(nothing), persistent=False)

    def attach(self, quantizers: Any, at_read: tuple[bool, ...], norm: tuple[nn.Module, ...] = ()) -> None:
        super().attach(quantizers, at_read, norm)
        if self._source() and not self.calibrated:  # with its input in float it needs none
            raise ValueError(f"{self.site!r}: nothing was collected of its taps; see Technique.wants")

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # integers must stay what they are
                return self._forward(x, weight, rest.get("bias"))
        return self._forward(x, weight, rest.get("bias"))

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = self.read(0, x).float()
        line = given.dim() == 3
        given = given.unsqueeze(2) if line else given
        found = self._shipped(given) if self.frozen else self._simulated(given, weight, bias)
        found = found.squeeze(2) if line else found
        return found.to(x.dtype)

    # -- simulation ------------------------------------------------------------------------------------------------

    def _simulated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sources = [weight, bias, *self._statistics(), *self.parameters(), *self.buffers(), *self._source()]
        packed = self._kept.of([t for t in sources if t is not None], lambda: self._pack(weight, bias))
        if self.integer and self._source():
            tiles = algorithm.output_tiles(self._integer_taps(x, packed), self.tiling.taps)
            return self._joined(x, tiles, packed.bias)
        return self._in_float(x, packed.u.float(), packed.steps, packed.us, packed.bias)

    def _joined(self, x: Tensor, tiles: Tensor, bias: Tensor | None) -> Tensor:
        found = self.tiling.join(tiles, x.shape[0], x.shape[2], x.shape[3])
        return found if bias is None else found + bias.view(1, -1, 1, 1)

    def _integer_taps(self, x: Tensor, packed: _Packed) -> Tensor:
        """The sums over channels [P, K, L] in real units: :func:`~.numerics.winograd.integer_convolution` with
        gradients."""
        scale = self._source()[0]
        levels = x / scale
        matrix = algorithm.kronecker(*self._matrix(_B, x))
        d = algorithm.transformed(matrix, self.tiling.cut(straight_through(levels, torch.round(levels))))
        self._see(d, scale)
        scaling, base = packed.scaling, packed.base
        assert scaling is not None
        assert base is not None
        exact, tap = algorithm.exact_dtype(packed.u.shape[2], self.bits), self.tiling.mean_tap
        with torch.no_grad():
            v = algorithm.scaled_taps(d, scaling.mul, scaling.offset, tap, self.bits)
            slope = None
            if torch.is_grad_enabled() or d.requires_grad:
                inside = v == algorithm.scaled_taps(d, scaling.mul, scaling.offset, tap, 16)
                slope = inside * (scaling.mul.float() / 2**15)[:, :, None]
        acc = algorithm.accumulated(straight_through(d, v.to(exact), slope), packed.u.to(exact))
        return algorithm.with_base(acc, base, tap) * packed.us[:, :, None]

    def _in_float(self, x: Tensor, u: Tensor, steps: Tensor, us: Tensor, bias: Tensor | None) -> Tensor:
        """The same with quantizers in float, or with none where the input has none."""
        d = algorithm.transformed(algorithm.kronecker(*self._matrix(_B, x)), self.tiling.cut(x))
        source = self._source()
        if source:
            self._see(d, torch.ones_like(source[0]))
            d = rounded(d / (steps * source[0]).float()[:, :, None], 2 ** (self.bits - 1) - 1)
        f = algorithm.accumulated(d, u) * us[:, :, None]
        tiles = algorithm.transformed(algorithm.kronecker(*self._matrix(_A, x)), f)
        return self._joined(x, tiles.view(*self.tiling.m, *f.shape[1:]), bias)

    def _matrix(self, which: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A^T, B^T or G of the vertical and of the horizontal axis, in the type and at the place of ``like``; quantized
        if they are trained."""
        matrix = ((self.at, self.bt, self.g) if self.flex else self.exact)[which]
        if self.flex and self.bits != 32:
            limit = 2 ** (self.bits - 1) - 1
            unit = matrix.detach().abs().max() / limit
            matrix = rounded(matrix / unit, limit) * unit
        matrix = matrix.to(like)
        one = matrix.new_ones(1, 1)
        return matrix if self.kernel[0] == 3 else one, matrix if self.kernel[1] == 3 else one

    def _source(self) -> tuple[Tensor, ...]:
        """Scale and zero point of the input's integers; empty where it comes in float."""
        quantizer = self.quantizers[0]
        return () if quantizer is None or self.bits == 32 else (quantizer.scale, quantizer.zero_point)

    def _statistics(self) -> tuple[Any, ...]:
        if not self.norm:
            return ()
        module: Any = self.norm[0]
        return module.running_mean, module.running_var, module.weight, module.bias

    def _pack(self, weight: Tensor, bias: Tensor | None) -> _Packed:
        out = weight.shape[0]
        weight = weight.unsqueeze(2) if weight.dim() == 3 else weight
        safe: Tensor | None = None
        if self.norm:
            module: Any = self.norm[0]
            mean, variance, gamma, beta = self._statistics()
            factor, shift = folded_affine(mean, variance, gamma, beta, module.eps)
            weight = weight * factor.view(-1, 1, 1, 1)
            if module.training:
                # the normalisation itself runs, on what the grid of the folded weights makes of these weights
                safe = torch.where(factor == 0, torch.ones_like(factor), factor)
            else:
                bias = shift if bias is None else shift + bias * factor
        real = algorithm.transformed_weight(weight, *self._matrix(_G, weight.double()))
        scaling, base = None, None
        if self.bits == 32:
            steps = real.new_ones(real.shape[0], real.shape[2])
            us = torch.ones(real.shape[:2], device=real.device)
            u = real.float()
        else:
            with torch.no_grad():
                steps, bound, scaling = self._tap_steps(real)
            real = real * steps[:, None]
            with torch.no_grad():
                units = algorithm.weight_steps(real, bound, self.bits)
                if self.bits == 8 and self.weight_range != Range():
                    rows = real.detach().reshape(-1, real.shape[2])
                    units = weight_qparams(rows, 8, True, 0, None, self.weight_range)[0].view(units.shape).double()
                source = self._source()
                us = (units * source[0].double() if source else units).float()
            u = rounded(real / units[:, :, None], 2 ** (self.bits - 1) - 1)
            if scaling is not None:
                base = algorithm.base_of(u, scaling.mul, scaling.offset, self.tiling.mean_tap)
        us = us if safe is None else us / safe
        return _Packed(u, steps, scaling, base, us, bias if bias is None else bias.float().view(out))

    def _tap_steps(self, real: Tensor) -> tuple[Tensor, Tensor, algorithm.FixedPoint | None]:
        """``steps`` and ``scaling`` as in :class:`_Packed`, between them the greatest \\|V\\| [P, C]."""
        source = self._source()
        matrix = algorithm.kronecker(*self._matrix(_B, real))
        if not source:
            one = matrix.new_ones(matrix.shape[0], real.shape[2])
            return one, one, None
        scale, zero_point = source[0].double(), source[1].double()
        least, greatest = self.levels
        ends = algorithm.tap_bounds(matrix, least - zero_point, greatest - zero_point)
        limits, power = self.tap_limits.double() / scale, self.tap_power.double() / scale.square()
        # seen before the input was rounded, which moves D by so much at most
        moved = torch.where(limits[1] > limits[0], matrix.abs().sum(1, keepdim=True) / 2, 0.0)
        limits = torch.stack((limits[0] - moved, limits[1] + moved))
        if self.integer:
            scaling = algorithm.fixed_point(real, limits, power, ends, self.tiling.mean_tap, self.bits)
            return scaling.steps, scaling.bound, scaling
        limit, bound, peak = 2 ** (self.bits - 1) - 1, algorithm.greatest_of(ends), algorithm.peaks(limits, ends)
        steps = peak / limit
        if self.bits == 16:
            wanted = algorithm.shared_steps(real.detach(), algorithm.known_power(power, peak), bound)
            steps = torch.maximum(wanted, bound[:, None] / limit)
        return steps, (bound[:, None] / steps).ceil().clamp(max=limit), None

    # -- training ----------------------------------------------------------------------------------------------------

    def _see(self, d: Tensor, scale: Tensor) -> None:
        if self.training:
            low, high = d.detach().aminmax(dim=2)
            self.seen.copy_(
                torch.stack((torch.minimum(self.seen[0], low * scale), torch.maximum(self.seen[1], high * scale)))
            )

    def step(self, done: int, total: int) -> None:
        """The taps' ranges follow what was seen since the last step."""
        if self.bits != 32:
            with torch.no_grad():
                moved = self.tap_limits.lerp(self.seen * self.tap_beyond, _MOMENTUM)
                self.tap_limits.copy_(torch.where(self.seen[1] > self.seen[0], moved, self.tap_limits))
                self.seen.zero_()

    def train(self, mode: bool = True) -> _WinogradCell:
        self._kept.clear()
        super().train(mode)
        return self

    # -- export ------------------------------------------------------------------------------------------------------

    def materialise(self) -> None:
        packed = self._kept.value
        if packed is None:  # the example does not come here
            return
        if packed.scaling is not None:
            algorithm.check_accumulator(packed.u, packed.scaling, self.tiling.mean_tap, self.site)
        store = {8: torch.int8, 16: torch.int16, 32: torch.float32}[self.bits]
        self.register_buffer("u", packed.u.detach().to(store))
        self.register_buffer("us", packed.us.detach().clone())
        bias = packed.bias
        self.register_buffer("bias_f", torch.zeros_like(packed.us[0]) if bias is None else bias.detach().clone())
        if packed.scaling is not None:
            self.register_buffer("mul", packed.scaling.mul.to(torch.int16))
            self.register_buffer("offset", packed.scaling.offset.to(torch.int16))
            self.input_scale = float(self._source()[0])
        else:
            self.register_buffer("steps", packed.steps.float())
        self._kept.clear()
        self.frozen = True

    def _shipped(self, x: Tensor) -> Tensor:
        u, us, bias = (self.get_buffer(name) for name in ("u", "us", "bias_f"))
        if not (self.integer and self._source()):
            return self._in_float(x, u.float(), self.get_buffer("steps"), us, bias)
        found: Tensor = torch.ops.bitsmith.winograd(
            *(x, u, self.get_buffer("mul"), self.get_buffer("offset"), us, bias, self.input_scale),
            *(self.tile, list(self.kernel), list(self.tiling.pads), self.bits),
        )
        return found
