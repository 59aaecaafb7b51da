"""Int: uniform integer quantization of weights and activations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..numerics import dialect
from ..numerics.derived import Derived
from ..numerics.grid import Grid
from ..numerics.quantizer import Quantizer
from ..numerics.ranges import weight_qparams
from ..numerics.weights import dequantize_bias, fake_quantize_weight, folded_affine, integers_of, learned_weight
from ..site import Format, Learn, Range, Record, Site
from ..technique import Cell, No, Technique
from ._weights import Weights, WeightTechnique

Granularity = Literal["tensor", "channel", "group"]

_OUT_FIRST = ("conv1d", "conv2d", "conv3d", "linear", "embedding")
_INT32_BIAS = ("conv1d", "conv2d", "conv3d", "linear")
_FOLDING = _INT32_BIAS


@dataclass(frozen=True)
class Int(Technique):
    """Uniform integer quantization (Jacob et al. 2018, arXiv:1712.05877, eq. 1: ``r = S (q - Z)``).

    ``w``: weight bits, 2 to 8. ``a``: activation bits, 2 to 8 or 16, or None: weights only. Activations are affine
    unless ``symmetric``, unsigned unless ``signed``; weights symmetric unless ``affine_weights``. ``granularity`` of
    the weight scales: per ``tensor``, per output ``channel``, or per ``group`` of that many entries of the reduction
    axis (axis 1). ``range``, ``weight_range``: how limits are chosen. ``out``: integer format of the output behind
    its epilogue; runtimes that need one get it from ``target.adapt``. ``unsigned``: operands, by position, that are
    never negative and stored so whatever ``signed`` says: one bit more for what comes from a softmax. ``learn``: how
    the activations' grid is trained, and ``weight_learn`` that of the weights; None keeps what calibration chose. Where
    bits are learned, ``w`` and ``a`` are those at the start, and what ``settle`` gives has those at the end. ``of``:
    the weights that are quantized are those that a :class:`~bitsmith.Sparse` or :class:`~bitsmith.Palette` left; the
    values of a palette are then integers of the grid.

    >>> Int(8, 8)
    Int(w=8, a=8)
    >>> Int(4, None, granularity="group", group=32)
    Int(w=4, a=None, granularity='group', group=32)
    """

    w: int = 8
    a: int | None = 8
    symmetric: bool = False
    signed: bool = False
    affine_weights: bool = False
    granularity: Granularity = "channel"
    group: int = 0
    range: Range = Range()  # noqa: RUF009  (frozen)
    weight_range: Range = Range()  # noqa: RUF009
    out: Format | None = None
    unsigned: tuple[int, ...] = ()
    learn: Learn | None = None
    weight_learn: Learn | None = None
    of: WeightTechnique | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.w, int) or not 2 <= self.w <= 8:
            raise ValueError(f"Int(w={self.w!r}): weight bits must be 2 to 8; leave the site out of the plan for float")
        if self.a is not None and not (2 <= self.a <= 8 or self.a == 16):
            raise ValueError(f"Int(a={self.a!r}): activation bits must be 2 to 8, 16, or None for weights only")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(f"Int(granularity={self.granularity!r}): must be 'tensor', 'channel' or 'group'")
        if (self.granularity == "group") != (self.group > 0):
            raise ValueError("Int: granularity='group' and group=N (above 0) go together")
        if self.weight_range.method == "entropy" and self.granularity != "tensor":
            raise ValueError("Int: weight_range=Range('entropy') needs granularity='tensor': a channel has few weights")
        if self.learn is not None and (self.a is None or self.a > 8):
            raise ValueError(f"Int(a={self.a}, learn={self.learn}): grids of 2 to 8 bits are learned")
        if self.weight_learn is not None and self.affine_weights:
            raise ValueError("Int(affine_weights=True, weight_learn=...): grids of symmetric weights are learned")
        if self.of is not None and not isinstance(self.of, WeightTechnique):
            raise ValueError(f"Int(of={self.of!r}): weights that another technique left: Sparse(...), Palette(...)")
        if self.of is not None and (self.affine_weights or self.granularity == "group"):
            raise ValueError("Int(of=...): weights that another technique left have one symmetric scale per channel")

    def __repr__(self) -> str:
        return f"Int({', '.join(f'{name}={value!r}' for name, value in self._changed())})"

    def label(self) -> str:
        """Formats and ranges by their short names; what a target put in is left to the file.

        >>> Int(8, 8, out=Format(8), range=Range("mse")).label()
        'Int(w=8, a=8, range=mse)'
        """
        parts = []
        for name, value in self._changed():
            if name not in ("out", "unsigned"):
                short = value.method if isinstance(value, Range) else value.form if isinstance(value, Learn) else None
                parts.append(f"{name}={repr(value) if short is None else short}")
        return f"Int({', '.join(parts)})"

    def _changed(self) -> list[tuple[str, Any]]:
        """The bits, and every other field that is not at its default."""
        given = {name: getattr(self, name) for name in _DEFAULTS}
        return [(name, value) for name, value in given.items() if name in ("w", "a") or value != _DEFAULTS[name]]

    def fits(self, site: Site) -> bool | No:
        if site.role != "integer":
            return No(
                f"{site.kind} is computed in float; its inside can be planned"
                if site.role == "composite"
                else f"{site.kind} is computed in float"
            )
        weight = site.weight
        if self.a is None and weight is None:
            return No("it has no weight, and Int(a=None) quantizes weights only")
        if self.granularity == "group" and weight is not None:
            if len(weight.shape) < 2 or site.kind not in _OUT_FIRST:
                return No(f"weights of {site.kind} have no groups along axis 1")
            if weight.shape[1] % self.group:
                return No(f"the reduction axis has {weight.shape[1]} entries, not a multiple of group={self.group}")
        return True if self.of is None else self.of.fits(site)

    def reads(self, site: Site) -> tuple[Format | None, ...]:
        if self.a is None:
            return (None,) * len(site.operands)
        return tuple(
            Format(self.a, self.signed and k not in self.unsigned, self.symmetric, self.range, self.learn)
            if o.floating and not o.constant
            else None
            for k, o in enumerate(site.operands)
        )

    def writes(self, site: Site) -> Format | None:
        return self.out

    def form(self, site: Site) -> str:
        return "dialect"

    def bits(self, site: Site) -> float:
        """Integers, one float32 scale per tensor, channel or group, and one byte per zero point if affine."""
        weight = site.weight
        if weight is None:
            return 0.0
        scales = 1
        if self.granularity == "channel":
            axis = _axis(site)
            scales = 1 if axis is None else weight.shape[axis]
        elif self.granularity == "group":
            scales = weight.numel // self.group
        integers = weight.numel * self.w if self.of is None else self.of.stored(site, self.w)
        return integers + scales * (32.0 + (8.0 if self.affine_weights else 0.0))

    def compact(self) -> bool:
        return self.of is not None

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _IntCell(site, self, record)


_DEFAULTS: dict[str, Any] = {name: field.default for name, field in Int.__dataclass_fields__.items()}


def _axis(site: Site) -> int | None:
    """The output-channel axis of the site's weight; None where it has none."""
    weight = site.weight
    assert weight is not None
    if site.kind == "einsum":
        return _einsum_axis(str(site.arguments.get("equation", "")), site.operands.index(weight))
    if site.kind in _OUT_FIRST:
        return 0
    if site.kind.startswith("conv_transpose"):
        return 1
    # a matrix product: the axis of the weight that is not summed over
    last = len(weight.shape) - 1
    return last if site.operands.index(weight) == 1 else max(last - 1, 0)


def _einsum_axis(equation: str, operand: int) -> int | None:
    """The operand's first axis that the output keeps and no other operand has.

    >>> _einsum_axis("bi,oi->bo", 1), _einsum_axis("...i,oi->...o", 1)
    (0, None)
    """
    terms, arrow, output = equation.replace(" ", "").partition("->")
    inputs = terms.split(",")
    if not arrow or "..." in equation or operand >= len(inputs):
        return None
    others = {letter for i, term in enumerate(inputs) if i != operand for letter in term}
    return next((i for i, letter in enumerate(inputs[operand]) if letter in output and letter not in others), None)


class _IntCell(Cell):
    """Weights on their grid (folded with the normalisation behind, in eval), activations on theirs."""

    fresh = True

    def __init__(self, site: Site, technique: Int, record: Record) -> None:
        super().__init__(site)
        self.folds = site.kind in _FOLDING
        self.format = Format(technique.w, signed=not technique.affine_weights, symmetric=not technique.affine_weights)
        self.frozen = False
        weight = site.weight
        self.slot = site.operands.index(weight) if weight is not None else -1
        self.axis: int | None = None
        self.technique, self.learn = technique, technique.weight_learn
        self.grid: Grid | None = None
        self.of: Weights | None = None
        self._kept: Derived[tuple[Tensor, Tensor | None]] = Derived()
        self.int32_bias = site.kind in _INT32_BIAS and technique.a is not None and not technique.group
        if weight is None:
            return
        self.axis = _axis(site) if technique.granularity != "tensor" else None
        values = record.weights[site.name, self.slot].detach().float()
        bias = record.biases.get(site.name)
        if self.folds and site.fold is not None:
            mean, variance, gamma, beta, eps = record.folds[site.name]
            factor, shift = folded_affine(mean, variance, gamma, beta, eps)
            values = values * _along(factor, values.dim())
            bias = shift + (bias * factor if bias is not None else 0.0)
        scale, zero_point = weight_qparams(
            values,
            technique.w,
            not technique.affine_weights,
            self.axis,
            technique.group or None,
            technique.weight_range,
        )
        if (fixed := record.grids.get((site.name, self.slot))) is not None:
            scale, zero_point = fixed[0].reshape(scale.shape).to(scale), fixed[1].reshape(scale.shape).to(zero_point)
        self.weight_scale: Tensor
        self.weight_zero_point: Tensor
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_point)
        self.of = (
            None if technique.of is None else technique.of.weights(site, record, values, self._along(scale, values))
        )
        self._first_bias = None if bias is None else bias.detach().float().abs()
        self.elements = values.numel()

    def attach(self, quantizers: Any, at_read: tuple[bool, ...], norm: tuple[nn.Module, ...] = ()) -> None:
        super().attach(quantizers, at_read, norm)
        source = self._input_scale()
        if source is not None and self.slot >= 0 and self._first_bias is not None:
            # a dead channel's tiny scale would make its 32-bit bias overflow
            floor = self._first_bias / (source * 2.0**30)
            floor = floor if self.weight_scale.dim() else floor.max()
            with torch.no_grad():
                self.weight_scale.copy_(torch.maximum(self.weight_scale, floor))
        if self.learn is not None and self.slot >= 0:
            low, high = self.format.levels
            scale = self.weight_scale
            levels = torch.full_like(scale, float(low)), torch.full_like(scale, float(high))
            self.grid = Grid(self.learn, scale, levels[0], levels[1], self.elements // scale.numel())
            if self.grid.infers_bits:
                self.format = dataclasses.replace(self.format, bits=8)

    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        given = [x if i == self.slot else self.read(i, x) for i, x in enumerate(operands)]
        if self.slot >= 0:
            given[self.slot], bias = self._weight_and_bias(operands[self.slot], rest.get("bias"))
            if bias is not None or "bias" in rest:
                rest["bias"] = bias
        return self.op(*given, **rest)

    # -- weights -------------------------------------------------------------------------------------------------

    def _weight_and_bias(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.frozen:
            return self._shipped(bias)
        learned = () if self.grid is None else tuple(self.grid.parameters())
        left = () if self.of is None else tuple(self.of.buffers())
        given = (weight, bias, self.weight_scale, self._input_scale(), *learned, *left, *self._statistics())
        sources = [t for t in given if t is not None]
        return self._kept.of(sources, lambda: self._simulated(weight, bias))

    def train(self, mode: bool = True) -> _IntCell:
        self._kept.clear()
        super().train(mode)
        return self

    def _statistics(self) -> tuple[Any, ...]:
        if not self.norm:
            return ()
        module: Any = self.norm[0]
        return module.running_mean, module.running_var, module.weight, module.bias

    def _simulated(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.norm:
            return self._on_grid(weight), self._bias_on_grid(bias)
        module: Any = self.norm[0]
        factor, shift = folded_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        along = _along(factor, weight.dim())
        folded = self._on_grid(weight * along)
        if module.training:
            # the normalisation itself runs, on what the grid of the folded weights makes of these weights
            safe = torch.where(along == 0, torch.ones_like(along), along)
            return folded / safe, bias
        return folded, self._bias_on_grid(shift + bias * factor if bias is not None else shift)

    def _on_grid(self, weight: Tensor) -> Tensor:
        if self.of is not None:
            weight = self.of(weight, self._along(self._scale(), weight))
        if self.grid is not None:
            return learned_weight(weight, self.grid, self.axis)
        return fake_quantize_weight(weight, self.weight_scale, self.weight_zero_point, self.axis, self.format)

    def _along(self, scale: Tensor, weight: Tensor) -> Tensor:
        """A scale shaped to multiply the weight."""
        return scale if self.axis is None else scale.reshape([-1 if i == self.axis else 1 for i in range(weight.dim())])

    def step(self, done: int, total: int) -> None:
        if self.of is not None:
            self.of.step(done, total)

    def _scale(self) -> Tensor:
        """The step of the weights, without a gradient."""
        return self.weight_scale if self.grid is None else self.grid.values()[0].detach()

    def _input_scale(self) -> Tensor | None:
        """Scale of the activation, where bias is a 32-bit integer in units of input scale x weight scale."""
        if not self.int32_bias:
            return None
        quantizer = next((q for q in self.quantizers if q is not None), None)
        return quantizer.scale if quantizer is not None else None

    def _bias_on_grid(self, bias: Tensor | None) -> Tensor | None:
        source = self._input_scale()
        if bias is None or source is None:
            return bias
        step = self._scale() * source
        rounded = torch.round(bias.detach() / step).clamp(-(2.0**31), 2.0**31 - 1) * step
        return bias + (rounded - bias.detach())

    # -- what was learned ------------------------------------------------------------------------------------------

    def weight_bits(self) -> Tensor | None:
        """Integers of each slice's bits, and for each slice a float32 step and 3 bits that say how many bits."""
        if self.grid is None or not self.grid.infers_bits:
            return None
        bits = self.grid.bits()
        return bits.mean() * self.elements + bits.numel() * (32 + 3)

    def settle(self) -> Int | None:
        """With the bits that were learned, the most of any channel or operand."""
        found = self.technique
        if self.grid is not None and self.grid.infers_bits:
            found = dataclasses.replace(found, w=max(2, int(self.grid.bits().max())))
        quantizers = [q for q in self.quantizers if isinstance(q, Quantizer) and q.grid is not None]
        for quantizer in quantizers:
            quantizer.follow()
        if quantizers and found.learn is not None and found.learn.form == "step_range":
            found = dataclasses.replace(found, a=max(quantizer.fmt.bits for quantizer in quantizers))
        return None if found == self.technique else found

    # -- export --------------------------------------------------------------------------------------------------

    def materialise(self) -> None:
        if self._kept.value is None:  # nothing to ship: no weight, or the example does not come here
            return
        weight, bias = self._kept.value
        self.weight_scale = self._scale().clone()
        integers = integers_of(weight, self.weight_scale, self.weight_zero_point, self.axis, self.format)
        self.weight_name = "weight_q4" if self.format.bits <= 4 else "weight_q"
        self.register_buffer(self.weight_name, integers)
        source = self._input_scale()
        self.bias_form = ""
        if bias is not None and source is not None:
            self.bias_form = "int32"
            step = (self.weight_scale * source).detach()
            step = step if step.dim() else step.expand(bias.shape[0]).contiguous()
            self.register_buffer("bias_scale", step)
            self.register_buffer("bias_q", torch.round(bias.double() / step.double()).to(torch.int32))
            self.register_buffer("bias_zero_point", torch.zeros(bias.shape[0], dtype=torch.int64))
        elif bias is not None and self.norm:
            self.bias_form = "float"
            self.register_buffer("bias_f", bias.detach().clone())
        self._kept.clear()
        self.frozen = True

    def _shipped(self, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = dialect.dequantize_weight(
            self.get_buffer(self.weight_name), self.weight_scale, self.weight_zero_point, self.axis, self.format.bits
        )
        if self.bias_form == "int32":
            names = ("bias_q", "bias_scale", "bias_zero_point")
            return weight, dequantize_bias(*(self.get_buffer(name) for name in names))
        return weight, self.get_buffer("bias_f") if self.bias_form else bias


def _along(factor: Tensor, dims: int) -> Tensor:
    return factor.reshape(-1, *([1] * (dims - 1)))
