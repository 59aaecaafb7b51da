"""Distil: a short training of a whole network under its plan, towards the float network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..model.apply import build
from ..model.flow import tensors
from ..model.intercept import CHILD
from ..model.network import Network
from ..plan import Plan
from ..technique import PrepareError, Step
from .finetune import divergence, finetune
from .state import tensors_of


@dataclass(frozen=True)
class Distil(Step):
    """Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) for a few steps, before a plan is scored or run.

    The network under the plan is trained by :func:`~bitsmith.finetune` for ``steps`` batches of the calibration data,
    with Adam at ``lr`` that falls to 0, towards what the float network gives: least ``distance``, the squared ``error``
    of the outputs relative to their power, or the ``divergence`` of classes. No labels are read. Weights and biases of
    the model are kept, what cells learned beside them is not: they are built anew from these weights.

    It trains where a technique of the plan needs training, with ``always`` under every plan. Give it to
    ``profile(train=...)`` and to ``optimize(train=...)``: what needs training is then scored after it.
    """

    values_only = True

    steps: int = 50
    lr: float = 1e-3
    distance: Literal["error", "divergence"] = "error"
    always: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Distil(steps={self.steps!r}): must be a whole number, 1 or more")
        if not self.lr > 0:
            raise ValueError(f"Distil(lr={self.lr!r}): must be above 0")
        if self.distance not in ("error", "divergence"):
            raise ValueError(f"Distil(distance={self.distance!r}): must be 'error' or 'divergence'")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        if not self.always and not any(technique.needs_training for technique in plan.sites.values()):
            return net
        simulated = build(net, plan.replace(prepare=()), data, seed=self.seed)
        if not any(parameter.requires_grad for parameter in simulated.parameters()):
            raise PrepareError("Distil: no parameter of the network requires a gradient; thaw some before, or leave it")
        trained = finetune(
            simulated,
            data,
            steps=self.steps,
            teacher=net.model,
            distance=divergence if self.distance == "divergence" else output_error,
            lr=self.lr,
            forward=net.forward,
            seed=self.seed,
        )
        put_back(trained, net.model)
        return net.with_model(net.model)


def put_back(trained: nn.Module, model: nn.Module) -> None:
    """Copy the model's own tensors out of an applied network into ``model``, in place."""
    own = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors_of(trained).items():
            if not name.startswith(f"{CHILD}."):
                own[name].copy_(tensor)


def output_error(output: Any, reference: Any) -> Tensor:
    """Squared error of all floating outputs relative to their power: ``sum |y - r|^2 / sum |r|^2``, shape ()."""
    pairs = [(y, r) for y, r in zip(tensors(output), tensors(reference), strict=True) if y.is_floating_point()]
    error = torch.stack([(y.float() - r.float()).square().sum() for y, r in pairs]).sum()
    power = torch.stack([r.float().square().sum() for _, r in pairs]).sum()
    return error / power.clamp(min=torch.finfo(torch.float32).tiny)
