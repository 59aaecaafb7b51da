"""Binary: weights of one bit, and activations of one bit if asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..numerics import dialect
from ..numerics.binarize import binarize, binarize_at_random, channel_scale
from ..numerics.derived import Derived
from ..numerics.noise import uniform
from ..numerics.weights import folded_affine
from ..site import Record, Site
from ..technique import Cell, No, Technique

When = Literal["never", "always"] | float
"""Of a training: in none of it, in all of it, or from that part of its steps on, in [0, 1]."""

_KINDS = ("conv1d", "conv2d", "conv3d", "linear")


@dataclass(frozen=True)
class Binary(Technique):
    """Weights of one bit (Courbariaux et al. 2015, arXiv:1511.00363; Rastegari et al. 2016, arXiv:1603.05279).

    The layer computes with ``s sign(w)``, sign(0) = +1; its own weights w stay as *latent* weights, which are trained.
    ``scaling``: s is 1 (``none``), the mean \\|w\\| of each output channel (``xnor``), or a parameter by output channel
    that begins there (``learned``). ``activations``: the sign of the input as well (arXiv:1602.02830); else it is
    float. XNOR-Net's scales of the input are not here. Zeros that a convolution pads with stay 0.

    ``stochastic``: in training a weight is +1 with probability ``clamp((w + 1) / 2, 0, 1)``, drawn in each forward;
    in eval it is the sign, and the technique that training settles on is the deterministic one.

    The gradient passes each sign straight through. ``cancel_gradient``: it is 0 where \\|x\\| > 1, of latent weights
    and of signed inputs. ``clip_weights``: latent weights are clipped to [-1, 1] after each step. Both in all of a
    training (``always``), in none (``never``), or from that part of its steps on: early in a training either only slows
    it, as Alizadeh et al. 2019 (ICLR) found. They need ``step(done, total)`` to be called before each step, as
    ``finetune`` does.

    ``error_rate``: each weight's sign is flipped with that probability, as by a memory that errs (Hirtzlin et al. 2020,
    doi:10.3389/fnins.2019.01383; :class:`~bitsmith.ResistiveBit` gives rates). Drawn anew in each forward in training
    and fixed in eval; another ``seed`` of ``apply`` is another memory.

    With ``activations`` a batch normalisation behind the layer is absorbed in eval, and what is simulated there are
    exact sums of signs, times a float32 and plus another by output channel: what the native kernel of
    ``bitsmith-kernels`` computes in OpenVINO, bit for bit. Elsewhere an exported file has the weights in 4 bits where
    the format has those, and runs them in float.

    >>> Binary(activations=True, cancel_gradient=0.5)
    Binary(activations=True, cancel_gradient=0.5)
    """

    needs_training: ClassVar[bool] = True

    scaling: Literal["none", "xnor", "learned"] = "xnor"
    activations: bool = False
    stochastic: bool = False
    cancel_gradient: When = "always"
    clip_weights: When = "always"
    error_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "xnor", "learned"):
            raise ValueError(f"Binary(scaling={self.scaling!r}): must be 'none', 'xnor' or 'learned'")
        for name in ("cancel_gradient", "clip_weights"):
            value = getattr(self, name)
            part = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
            if value not in ("never", "always") and not part:
                raise ValueError(
                    f"Binary({name}={value!r}): must be 'never', 'always', or the part of the training, 0 to 1, "
                    "from which on"
                )
        if not isinstance(self.error_rate, (int, float)) or not 0 <= self.error_rate <= 1:
            raise ValueError(f"Binary(error_rate={self.error_rate!r}): a probability must be 0 to 1")

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return f"Binary({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"

    def fits(self, site: Site) -> bool | No:
        if site.kind not in _KINDS:
            return No(f"{site.kind} is no convolution and no linear layer, whose products signs could replace")
        weight = site.weight
        if weight is None or site.operands.index(weight) != 1:
            return No("it has no weight: what it multiplies by is computed from the input")
        if self.clip_weights != "never" and not weight.key:
            return No(
                "its weight is computed from parameters, which no clipping of it could change: clip_weights='never'"
            )
        return True

    def keeps_function(self) -> bool:
        """Signs without a scale, of weights or of inputs, are of another size than what they stand for."""
        return self.scaling != "none" and not self.activations

    def form(self, site: Site) -> str:
        """``dialect``: weights are stored as integers, and a sign is a comparison."""
        return "dialect"

    def bits(self, site: Site) -> float:
        """One bit a weight, and a float32 by output channel where they are scaled."""
        weight = site.weight
        if weight is None:
            return 0.0
        return weight.numel + (0.0 if self.scaling == "none" else 32.0 * weight.shape[0])

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _BinaryCell(site, self, record, rng)


def _begun(when: When, done: int, total: int) -> bool:
    if isinstance(when, str):
        return when == "always"
    return done >= when * total


class _BinaryCell(Cell):
    """Signs of the latent weights, before them their scales.

    ``seeds`` int64 [2] and ``draw`` int64 (): what is drawn, there where anything is. ``materialise`` stores what
    ships: ``weight_q4`` int8 of -1 and +1, ``weight_scale`` (never negative: a normalisation that turns a channel's
    sign turns its weights) and ``weight_zero_point``, and ``bias_f`` [out] where a normalisation was absorbed.
    """

    fresh = True

    def __init__(self, site: Site, technique: Binary, record: Record, rng: torch.Generator) -> None:
        super().__init__(site)
        self.technique = technique
        self.folds = technique.activations
        self.frozen = False
        self.cancelling = technique.cancel_gradient == "always"
        self.clipping = technique.clip_weights == "always"
        # in a tuple, as they belong to the network; a parameter alone can be clipped in its place
        self.latent: tuple[Tensor, ...] = ()
        self.axes = 0 if site.kind == "linear" else int(site.kind[-2])  # behind that of the channels
        self._kept: Derived[tuple[Tensor, Tensor, Tensor | None]] = Derived()
        self.scale: nn.Parameter | None = None
        if technique.scaling == "learned":
            self.scale = nn.Parameter(channel_scale(record.weights[site.name, 1].detach().float()))
        self.seeds: Tensor
        self.draw: Tensor
        if technique.stochastic or technique.error_rate:
            self.register_buffer("seeds", torch.randint(2**62, (2,), generator=rng))
            self.register_buffer("draw", torch.zeros((), dtype=torch.int64))
        dialect.load()

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        given, bias = self.read(0, x), rest.get("bias")
        if self.frozen:
            return self._shipped(given, rest)
        if self.training and weight.is_leaf and weight.requires_grad:
            self.latent = (weight,)
        if self.technique.activations:
            given = binarize(given, self.cancelling)
        if self.technique.activations and not self.training:
            bits, scale, shift = self._summed(weight, bias)
            found = self.op(given, bits, **{**rest, "bias": None})  # exact, whatever the order of the sum
            found = found * self._along(scale, found) if scale.dim() else found
            return found if shift is None else found + self._along(shift, found)
        found = self.op(given, self._weight(weight), **rest)
        if not self.norm or self.norm[0].training:
            return found
        factor, shift = self._affine()
        return found * self._along(factor, found) + self._along(shift, found)

    def _along(self, factor: Tensor, like: Tensor) -> Tensor:
        """One factor by output channel."""
        return factor.to(like.dtype).view(-1, *[1] * self.axes)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Of the normalisation behind, by output channel: factor and what is added."""
        module: Any = self.norm[0]
        return folded_affine(module.running_mean, module.running_var, module.weight, module.bias, module.eps)

    def _summed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """-1 and +1, and what a sum is multiplied by and what is added to it, as they are kept in eval."""
        norm: tuple[Any, ...] = ()
        if self.norm:
            module: Any = self.norm[0]
            norm = (module.running_mean, module.running_var, module.weight, module.bias)

        def compute() -> tuple[Tensor, Tensor, Tensor | None]:
            bits, scale = self._packed(weight)
            if not self.norm or self.norm[0].training:
                return bits, scale, bias
            factor, shift = self._affine()
            return bits, scale * factor, shift if bias is None else shift + bias * factor

        if self.norm and self.norm[0].training:
            return compute()
        return self._kept.of([t for t in (*self._sources(weight), bias, *norm) if t is not None], compute)

    def _sources(self, weight: Tensor) -> list[Tensor]:
        """What the bits and their scales are made of."""
        drawn = (self.seeds, self.draw) if self.technique.error_rate else ()
        return [weight, *drawn, *(() if self.scale is None else (self.scale,))]

    def _weight(self, weight: Tensor) -> Tensor:
        if self.training:  # where weights may be drawn
            self._kept.clear()
            bits, scale = self._packed(weight)
        else:
            bits, scale, _ = self._kept.of(self._sources(weight), lambda: (*self._packed(weight), None))
        return bits if self.technique.scaling == "none" else bits * scale.view(-1, *[1] * (weight.dim() - 1))

    def _packed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """-1 and +1, and the scales [out], of which ``none`` is a 1 of shape ()."""
        if self.technique.stochastic and self.training:
            bits = binarize_at_random(weight, uniform(weight.shape, self.seeds[0], self.draw), self.cancelling)
        else:
            bits = binarize(weight, self.cancelling)
        if self.technique.error_rate:
            wrong = uniform(weight.shape, self.seeds[1], self.draw) < self.technique.error_rate
            bits = torch.where(wrong, -bits, bits)
        if self.technique.scaling == "none":
            return bits, weight.new_ones(())
        return bits, (channel_scale(weight) if self.scale is None else self.scale).to(weight.dtype)

    # -- training ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Another draw for each top-level forward in training: one that a checkpoint repeats draws the same."""
        if self.training and (self.technique.stochastic or self.technique.error_rate):
            self.draw.add_(1)

    def step(self, done: int, total: int) -> None:
        self.cancelling = _begun(self.technique.cancel_gradient, done, total)
        self.clipping = _begun(self.technique.clip_weights, done, total)
        self._clip()

    def _clip(self) -> None:
        if self.clipping:
            with torch.no_grad():
                for weight in self.latent:
                    weight.clamp_(-1.0, 1.0)

    def settle(self) -> Technique | None:
        """Deterministic; the last step's weights are clipped here."""
        self._clip()
        return dataclasses.replace(self.technique, stochastic=False) if self.technique.stochastic else None

    # -- export --------------------------------------------------------------------------------------------------------

    def materialise(self) -> None:
        if self._kept.value is None:  # the example does not come here
            return
        bits, scale, shift = (None if one is None else one.detach() for one in self._kept.value)
        assert bits is not None
        assert scale is not None
        turned = (scale < 0).view(-1, *[1] * (bits.dim() - 1))
        self.register_buffer("weight_q4", torch.where(turned, -bits, bits).to(torch.int8))
        self.register_buffer("weight_scale", scale.abs().float())
        self.register_buffer("weight_zero_point", torch.zeros(scale.shape, dtype=torch.int64, device=scale.device))
        if self.norm and shift is not None:
            self.register_buffer("bias_f", shift.float().clone())
        self._kept.clear()
        self.latent = ()
        self.frozen = True

    def _shipped(self, x: Tensor, rest: dict[str, Any]) -> Any:
        names = ("weight_q4", "weight_scale", "weight_zero_point")
        stored, scale, zero = (self.get_buffer(name) for name in names)
        weight = dialect.dequantize_weight(stored, scale, zero, 0 if scale.dim() else None, 4)
        if self.technique.activations:
            x = torch.where(x >= 0, 1.0, -1.0)  # what a native kernel is recognised by
        if "bias_f" in self._buffers:
            rest = {**rest, "bias": self.get_buffer("bias_f")}
        return self.op(x, weight, **rest)
