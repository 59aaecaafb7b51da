"""Random numbers that are a function of a seed and a counter: the same on every device and behind ``torch.compile``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(shape: Sequence[int], seed: Tensor, draw: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, multiples of 2^-24: SplitMix64 (Steele, Lea and Flood 2014,
    doi:10.1145/2660193.2660195), of which draw ``d`` of n numbers takes the outputs d n + 1 to (d + 1) n.

    ``seed``, ``draw``: int64 of shape (), on the device where the numbers are wanted.

    >>> seed, first, second = torch.tensor(1), torch.tensor(0), torch.tensor(1)
    >>> torch.equal(uniform((2,), seed, first), uniform((2,), seed, second))
    False
    """
    count = math.prod(shape)
    places = torch.arange(1, count + 1, dtype=torch.int64, device=seed.device)
    z = seed + (draw * count + places) * _GAMMA  # modulo 2^64, as torch's integers wrap
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 40).float() / 2**24).view(*shape)


# 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed integers
_GAMMA, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _shifted(z: Tensor, places: int) -> Tensor:
    """Shifted to the right, zeros from the left."""
    return (z >> places) & ((1 << (64 - places)) - 1)
