"""Metaplastic: an optimizer under which latent weights of one bit forget less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Metaplastic(torch.optim.Optimizer):
    """Metaplastic update of the latent weights of binary networks (Laborieux et al. 2021,
    doi:10.1038/s41467-021-22768-y, algorithm 1).

    With Adam's update U of a weight w, where U would bring w nearer to 0 it is multiplied by ``1 - tanh^2(m w)``:
    a weight that was pushed far is hard to turn, which keeps what earlier tasks taught. ``m`` = 0 is Adam (Kingma and
    Ba 2015, arXiv:1412.6980). It applies to parameters of two axes or more, hence to weights; biases and normalisations
    follow Adam.

    ``lr``, ``betas``, ``eps``: Adam's. All may differ by parameter group. For ``finetune``:
    ``optimizer=lambda parameters: Metaplastic(parameters, m=1.35)``, and ``Binary(clip_weights="never")``, since
    weights that are clipped at 1 are protected no further.

    >>> w = torch.nn.Parameter(torch.tensor([[2.0, 2.0]]))
    >>> w.grad = torch.tensor([[1.0, -1.0]])
    >>> Metaplastic([w], lr=0.1, m=1.0).step()
    >>> [round(value, 3) for value in w.tolist()[0]]
    [1.993, 2.1]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        m: float = 1.35,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("m", m), ("eps", eps)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"Metaplastic({name}={value}): must be 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Metaplastic(betas={betas}): both must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "m": m, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. ``closure``: computes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._adam(parameter, group)
                    if group["m"] and parameter.dim() > 1:
                        kept = 1.0 - torch.tanh(group["m"] * parameter).square()
                        update = torch.where(update * parameter < 0, update * kept, update)
                    parameter.add_(update)
        return loss

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """What Adam would add to the parameter."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        count, (first, second) = float(state["step"]), group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = state["exp_avg"] / (1 - first**count)
        deviation = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
        update: Tensor = -group["lr"] * mean / deviation
        return update
