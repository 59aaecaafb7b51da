"""Ovsf: weights generated from binary codes and a few learned coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..numerics import ovsf
from ..numerics.binarize import binarize
from ..numerics.derived import Derived
from ..numerics.straight_through import rounded
from ..site import Record, Shape, Site
from ..technique import Cell, No, Technique
from ._masked import refusal


@dataclass(frozen=True)
class Ovsf(Technique):
    """Deterministic binary filters (Tseng et al. 2018, IJCAI): ``w = sum_j alpha_j b_j``, b_j fixed codes of +-1.

    The codes are orthogonal variable spreading factor codes, which a machine generates from their numbers; only the
    coefficients alpha are stored, and trained. ``ratio``, in (0, 1]: coefficients by weight; a vector of n weights has
    ``ceil(ratio n)``, and 1 reproduces the weights. ``scope``: a vector is a whole ``filter`` (all that one output
    channel is computed with), or one ``kernel`` of it (one input channel: 9 weights of 3x3). Codes are as long as the
    axes rounded up to powers of two, and cropped. A site has one set of codes for all its vectors.

    ``codes``: chosen by the ``energy`` that they hold of the weights that ``apply`` finds, each independent of those
    before; or the ``first`` of the code tree, a control: cropped, they are dependent (of 16 codes cropped to 3x3 the
    first 8 have rank 6), and orthogonal ones hold no more than their share. Coefficients begin at the least squares
    solution for the weights.

    ``coefficient_bits``: None for float32; 2 to 8 for integers with a scale by output channel; 1 for the sign times the
    mean magnitude of the output channel. ``compute``: ``weights`` are generated, then used; or the input is convolved
    with the codes, which takes additions only, and the result mixed by a layer of 1x1 (``basis``: Fernandez-Marques et
    al. 2018, BinaryCmd, SysML). Both compute the same.

    Needs training. No runtime here generates weights: what is exported has them all, or the two layers; ``bits`` is
    what a machine that generates them would store.

    >>> Ovsf(0.25, coefficient_bits=8)
    Ovsf(ratio=0.25, scope='filter', codes='energy', coefficient_bits=8, compute='weights')
    """

    needs_training: ClassVar[bool] = True

    ratio: float = 0.5
    scope: Literal["filter", "kernel"] = "filter"
    codes: Literal["energy", "first"] = "energy"
    coefficient_bits: int | None = None
    compute: Literal["weights", "basis"] = "weights"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"Ovsf(ratio={self.ratio!r}): must be above 0 and at most 1")
        for name, allowed in (
            ("scope", ("filter", "kernel")),
            ("codes", ("energy", "first")),
            ("compute", ("weights", "basis")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Ovsf({name}={getattr(self, name)!r}): must be {allowed[0]!r} or {allowed[1]!r}")
        bits = self.coefficient_bits
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8):
            raise ValueError(f"Ovsf(coefficient_bits={bits!r}): must be 1 to 8, or None for float32")

    def fits(self, site: Site) -> bool | No:
        reason = refusal(site)
        if reason:
            return No(reason)
        assert site.weight is not None
        if math.prod(self.axes(site)) < 2:
            return No(f"a {self.scope} of it has one weight, which a coefficient cannot be less than")
        return True

    def axes(self, site: Site) -> Shape:
        """The shape of one vector of weights: ``(input channels, *kernel)`` of a filter, or the kernel alone."""
        assert site.weight is not None
        return site.weight.shape[1 if self.scope == "filter" else 2 :]

    def coefficients(self, site: Site) -> int:
        """How many each vector has."""
        return math.ceil(self.ratio * math.prod(self.axes(site)))

    def bits(self, site: Site) -> float:
        """Coefficients, a float32 scale by output channel where they are quantized, and which codes were chosen: a bit
        for each code there is or the number of each that was, whichever is less; nothing for the first ones."""
        if not self.fits(site):  # stored as it was
            return super().bits(site)
        assert site.weight is not None
        axes, count = self.axes(site), self.coefficients(site)
        vectors = site.weight.numel // math.prod(axes)
        there = math.prod(ovsf.box(axes))
        stored = float(vectors * count * (self.coefficient_bits or 32))
        if self.coefficient_bits is not None:
            stored += 32.0 * site.weight.shape[0]
        if self.codes == "energy":
            stored += min(there, count * max(1, math.ceil(math.log2(there))))
        return stored

    def operations(self, site: Site) -> Mapping[str, float] | None:
        if self.compute != "basis":
            return None
        additions, products = self.basis_operations(site)
        return {"multiply": products, "add": additions + products}

    def basis_operations(self, site: Site) -> tuple[int, int]:
        """Additions and multiply-accumulates of the site under ``compute="basis"``, for the recorded example."""
        assert site.weight is not None
        weight, axes, count = site.weight, self.axes(site), self.coefficients(site)
        groups = int(site.arguments.get("groups", 1))
        places = site.macs // weight.numel  # outputs by channel
        basis = count * (groups if self.scope == "filter" else weight.shape[1] * groups)
        vectors = weight.numel // math.prod(axes)
        return places * basis * math.prod(axes), places * vectors * count

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _OvsfCell(site, self, record)


class _OvsfCell(Cell):
    """Weights from coefficients and codes, or the codes as layer and the coefficients as another.

    ``alpha``: [vectors, codes], trained: the coefficients times ``sqrt(codes)``, so that a step of Adam moves weights
    about as far as those of a plain layer. ``index``: int64 [codes], numbers in the code tree. ``codes``: of them +1
    and -1, [codes, weights of a vector], made again where a state is loaded. ``materialise`` stores what ships:
    ``weight_f``, the generated weights, or ``mix_f``, the weights of the layer behind the codes.
    """

    needs: ClassVar[tuple[str, ...]] = ("bias", "input")
    fresh = True

    def __init__(self, site: Site, technique: Ovsf, record: Record) -> None:
        super().__init__(site)
        weight = record.weights[site.name, 1].detach()
        self.axes, self.shape = technique.axes(site), tuple(weight.shape)
        self.bits, self.basis = technique.coefficient_bits, technique.compute == "basis"
        self.frozen = False
        vectors = weight.reshape(-1, *self.axes)
        count = technique.coefficients(site)
        index = ovsf.chosen(vectors, count) if technique.codes == "energy" else ovsf.first(count).to(weight.device)
        self.index: Tensor
        self.codes: Tensor
        self.register_buffer("index", index)
        self.register_buffer("codes", self._codes(weight.dtype), persistent=False)
        self.unit = 1.0 / math.sqrt(count)
        start = ovsf.coefficients(vectors, index) / self.unit
        self.alpha = nn.Parameter(start.to(weight.dtype).contiguous())
        self._kept: Derived[Tensor] = Derived()

    def _codes(self, dtype: torch.dtype) -> Tensor:
        return ovsf.codes(self.index, self.axes).flatten(1).to(dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.codes = self._codes(self.codes.dtype)

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        given = self.read(0, x)
        if self.basis:
            return self._through_codes(given, **rest)
        made = self.get_buffer("weight_f") if self.frozen else self._kept.of([self.alpha, self.codes], self._weight)
        return self.op(given, made.to(weight.dtype), **rest)

    def _weight(self) -> Tensor:
        return (self._coefficients() @ self.codes).view(self.shape)

    def _coefficients(self) -> Tensor:
        """As they are stored: [vectors, codes]."""
        if self.bits is None:
            return self.alpha * self.unit
        rows = self.alpha.reshape(self.shape[0], -1)
        if self.bits == 1:
            return (binarize(rows, False) * rows.abs().mean(1, keepdim=True) * self.unit).view_as(self.alpha)
        limit = 2 ** (self.bits - 1) - 1
        scale: Tensor = rows.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / limit
        return (rounded(rows / scale, limit) * scale * self.unit).view_as(self.alpha)

    def _through_codes(self, x: Tensor, **rest: Any) -> Tensor:
        """The operation with the codes as filters, behind it the mix."""
        bias = rest.pop("bias", None)
        mix = self.get_buffer("mix_f") if self.frozen else self._kept.of([self.alpha], self._coefficients)
        count, kernel = len(self.index), self.shape[2:]
        if self.kind == "linear":
            coded: Tensor = self.op(x, self.codes.to(x.dtype))
            return self.op(coded, mix.to(x.dtype), bias)  # type: ignore[no-any-return]
        groups = int(rest.pop("groups", 1))
        channels = self.shape[1] * groups
        if len(self.axes) == len(self.shape) - 1:  # whole filters: each group of channels passes all codes
            filters = self.codes.repeat(groups, 1).view(groups * count, self.shape[1], *kernel)
            made = self.op(x, filters.to(x.dtype), groups=groups, **rest)
        else:  # each channel by itself
            filters = self.codes.repeat(channels, 1).view(channels * count, 1, *kernel)
            made = self.op(x, filters.to(x.dtype), groups=channels, **rest)
        mixing = mix.reshape(self.shape[0], -1, *[1] * len(kernel))
        found: Tensor = self.op(made, mixing.to(x.dtype), bias, groups=groups)
        return found

    def materialise(self) -> None:
        if self._kept.value is None:  # the example does not come here
            return
        self.register_buffer("mix_f" if self.basis else "weight_f", self._kept.value.detach().clone())
        self._kept.clear()
        self.frozen = True
