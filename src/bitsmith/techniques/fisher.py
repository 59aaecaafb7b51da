"""FisherPalettes: values of palettes chosen by what the loss feels of each weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..data import batch_size, call, items, tensors_in
from ..model.network import Network, duplicate
from ..plan import Plan
from ..prepare._layers import layers, tensor_at
from ..technique import PrepareError, Step, Technique
from .palette import Palette


@dataclass(frozen=True)
class FisherPalettes(Step):
    """Sensitivity-weighted k-means (Kim et al. 2024, SqueezeLLM, arXiv:2306.07629, section 4.1).

    For sites under :class:`Palette`, by itself or inside ``Int(of=...)``: each weight's squared error counts as much as
    the diagonal of the Fisher information says, ``E[(d log p(y | x) / d w)^2]``, over ``samples`` calibration samples.
    ``y`` is drawn from what the network predicts, so no label is read: from the softmax of its first output's last axis
    (``categorical``), or normally around it (``gaussian``). The paper takes the gradient of the training loss.

    Steps that change weights go before this one. Layers that are called once and share their weight with nobody;
    others weigh all errors alike. Raises ``PrepareError`` where there is none.
    """

    values_only: ClassVar[bool] = True

    samples: int = 64
    output: Literal["categorical", "gaussian"] = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"FisherPalettes(samples={self.samples!r}): must be a whole number, 1 or more")
        if self.output not in ("categorical", "gaussian"):
            raise ValueError(f"FisherPalettes(output={self.output!r}): must be 'categorical' or 'gaussian'")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        own = layers(net.record)
        found = {name: own[name] for name, technique in plan.sites.items() if name in own and has_palette(technique)}
        if not found:
            raise PrepareError(
                "FisherPalettes: the plan puts Palette(...) at no convolution or linear layer that is called once and "
                "shares its weight with nobody; give such sites one, or leave the step out"
            )
        model = duplicate(net.model).eval()
        weights = {name: tensor_at(model, layer.key).requires_grad_(True) for name, layer in found.items()}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        generator = torch.Generator().manual_seed(self.seed)
        count = 0
        for inputs in _single(data, self.samples):
            with torch.enable_grad():
                first = next(x for x in tensors_in(call(model, inputs, net.forward)) if x.is_floating_point())
                gradients = torch.autograd.grad(self._score(first, generator), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += gradient.square()
            count += 1
        importance = {(name, 1): total / max(count, 1) for name, total in sums.items()}
        known = {**net.record.importance, **importance}
        return dataclasses.replace(net, record=dataclasses.replace(net.record, importance=known))

    def _score(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient is that of ``log p(y | x)`` for a ``y`` that was drawn."""
        rows = output.reshape(-1, output.shape[-1]).float()
        if self.output == "gaussian":
            noise = torch.randn(rows.shape, generator=generator).to(rows.device)
            return (rows * noise).sum()
        drawn = torch.multinomial(rows.detach().softmax(1).cpu(), 1, generator=generator).to(rows.device)
        return rows.log_softmax(1).gather(1, drawn).sum()


def has_palette(technique: Technique | None) -> bool:
    """Whether a technique is a palette, or has one inside."""
    return technique is not None and (isinstance(technique, Palette) or has_palette(getattr(technique, "of", None)))


def _single(data: Any, samples: int) -> Iterator[Any]:
    """The inputs of the first samples, each by itself."""
    seen = 0
    for inputs, _ in items(data, "calibration"):
        for index in range(batch_size(inputs)):
            if seen == samples:
                return
            yield _at(inputs, index)
            seen += 1


def _at(inputs: Any, index: int) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _at(value, index) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_at(value, index) for value in inputs)
    return inputs[index : index + 1] if isinstance(inputs, Tensor) and inputs.dim() else inputs
