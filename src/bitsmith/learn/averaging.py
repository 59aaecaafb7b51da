"""The moving average of a network's weights while it trains."""

from __future__ import annotations

import torch
from torch import nn

from .state import State, copied, tensors_of


class MovingAverage:
    """``a <- decay * a + (1 - decay) * w`` after each step, of all weights and buffers in floating point; the first
    average is what the first step left (Polyak and Juditsky 1992 averaged evenly; this is the exponential form).

    The arithmetic is that of ``torch.optim.swa_utils.get_ema_multi_avg_fn``. A copy of the module itself, as
    ``AveragedModel`` keeps, would leave behind what cells hold beside their buffers. Integers are copied.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay}: the decay must be from 0 to below 1, such as 0.999")
        self.decay = decay
        self.values: State = {}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """After a step of the optimizer."""
        if not self.values:
            self.values = copied(net)
            return
        for name, tensor in tensors_of(net).items():
            if tensor.is_floating_point() or tensor.is_complex():
                self.values[name].lerp_(tensor, 1 - self.decay)
            else:
                self.values[name].copy_(tensor)
