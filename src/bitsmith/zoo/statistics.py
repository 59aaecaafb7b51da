"""Statistics of batch normalisations from real data, so that networks of random weights compute something."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from ..data import Forward, call, items

Net = TypeVar("Net", bound=nn.Module)


def settle_statistics(model: Net, batches: Iterable[Any], *, forward: Forward | None = None) -> Net:
    """A copy of ``model`` whose batch normalisations hold the mean and variance of their inputs on ``batches``.

    ``batches``: a loader of ``(inputs, target)``, see ``bitsmith.data``; the targets are not read. All other modules
    stay in the mode they are in. Each normalisation uses the batch's own statistics while they are averaged over the
    batches with equal weight ("PreciseBN", Wu and Johnson 2021, arXiv:2105.07576, section 3), so give batches of one
    size, of 16 samples or more. Raises :class:`~bitsmith.data.DataError` for an empty loader, ``ValueError`` for a
    model without batch normalisations.
    """
    settled = copy.deepcopy(model)
    norms = [m for m in settled.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch normalisation with running statistics to settle")
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
        norm.train()
    with torch.no_grad():
        for inputs, _ in items(batches, "statistics"):
            call(settled, inputs, forward)
    for norm, training, momentum in before:
        norm.train(training)
        norm.momentum = momentum
    return settled
