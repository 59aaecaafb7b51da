"""The statistics of batch normalisations, measured again under the weights that were trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Forward, call
from .loop import TrainingError

_Norm = nn.modules.batchnorm._BatchNorm


def batch_norms(net: nn.Module) -> list[_Norm]:
    """The batch normalisations that keep statistics."""
    return [
        module
        for module in net.modules()
        if isinstance(module, _Norm) and module.track_running_stats and module.running_mean is not None
    ]


@torch.no_grad()
def reestimate_norms(net: nn.Module, inputs: Iterable[Any], forward: Forward | None = None) -> None:
    """Replace the statistics of every batch normalisation by their mean over these batches, in place.

    What ``torch.optim.swa_utils.update_bn`` computes (Izmailov et al. 2018, arXiv:1803.05407, section 3.2), with two
    differences that a plan needs. Everything but the normalisations is in eval: what ships is what they see. And the
    old statistics stay in place until the end, since a cell that folds a normalisation rounds its weights by them:
    starting from mean 0 and variance 1 would measure other weights. A normalisation that no batch reaches keeps its
    own. Training flags are kept. Raises :class:`TrainingError` where there is no batch normalisation.
    """
    norms = batch_norms(net)
    if not norms:
        raise TrainingError("reestimate: the network has no batch normalisation with running statistics; leave it out")
    flags = [(module, module.training) for module in net.modules()]
    swaps = [_Swap(norm) for norm in norms]
    try:
        net.eval()
        for norm in norms:
            norm.train()
        for item in inputs:
            call(net, item, forward)
    finally:
        for swap in swaps:
            swap.close()
        for module, training in flags:
            module.training = training
    for swap in swaps:
        swap.finish()


class _Swap:
    """Statistics of its own that one normalisation sees while it runs, and nobody else."""

    def __init__(self, norm: _Norm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.norm, self.momentum = norm, norm.momentum
        self.ours: tuple[Tensor, ...] = (
            torch.zeros_like(norm.running_mean),
            torch.ones_like(norm.running_var),
            torch.zeros((), dtype=torch.long, device=norm.running_mean.device),
        )
        self.theirs: tuple[Any, ...] = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        self.handles = (
            norm.register_forward_pre_hook(self._enter),
            norm.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, norm: Any, args: Any) -> None:
        self._set(self.ours, None)  # a momentum of None is the mean over the batches

    def _leave(self, norm: Any, args: Any, output: Any) -> None:
        self._set(self.theirs, self.momentum)

    def _set(self, statistics: tuple[Any, ...], momentum: float | None) -> None:
        norm: Any = self.norm
        norm.running_mean, norm.running_var, norm.num_batches_tracked = statistics
        norm.momentum = momentum

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def finish(self) -> None:
        """Take over what was measured."""
        if int(self.ours[2]) > 0:
            for old, new in zip(self.theirs, self.ours, strict=True):
                old.copy_(new)
