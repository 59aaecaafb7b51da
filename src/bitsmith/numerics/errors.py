"""How far one tensor is from another, in the terms of the field. Computed in float64."""

from __future__ import annotations

import math

from torch import Tensor


def relative_squared_error(reference: Tensor, test: Tensor) -> float:
    """Power of the error over power of the reference, over all elements (any equal shapes); unitless, 0 if equal.

    inf if the reference is all zero and the other is not. Raises ``ValueError`` on unequal shapes.

    >>> import torch
    >>> relative_squared_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    0.01
    """
    if reference.shape != test.shape:
        raise ValueError(f"cannot compare shapes {tuple(reference.shape)} and {tuple(test.shape)}: they must be equal")
    signal = reference.detach().double()
    error = float((test.detach().double() - signal).square().sum())
    if error == 0.0:
        return 0.0
    power = float(signal.square().sum())
    return error / power if power else math.inf


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 log10(signal power / error power); inf if equal.

    -inf if only the reference is all zero. Raises ``ValueError`` on unequal shapes.

    >>> import torch
    >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 6)
    20.0
    """
    ratio = relative_squared_error(reference, test)
    if ratio == 0.0:
        return math.inf
    return -10.0 * math.log10(ratio) if math.isfinite(ratio) else -ratio
