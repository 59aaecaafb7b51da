"""Paths through the layers of a network, given by the points of a sequence: which neurons are connected.

Keller and Van Keirsbilck 2021, arXiv:2103.03543. Component ``c`` of point ``i`` is the neuron ``floor(width * x)`` that
path ``i`` visits in the layer that has that component.

``sobol``: Sobol' points with the direction numbers of Joe and Kuo 2008, each component scrambled by a random lower
triangular matrix and a shift (Matousek 1998, the affine-linear scrambling), so that neither the point 0 nor the weak
pairs of components of the plain sequence meet all networks alike. ``random``: independent uniform points.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Generator = Literal["sobol", "random"]

COMPONENTS = 21201
"""Components that the sequence has."""
DIGITS = 30
"""Binary digits of a coordinate."""


def points(count: int, component: int, seed: int, generator: Generator = "sobol") -> Tensor:
    """One component of the first ``count`` points, float64 (count,), in [0, 1). More points continue the Sobol' ones.

    >>> sorted((8 * points(8, component=3, seed=5)).floor().int().tolist())
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if count < 1:
        raise ValueError(f"points(count={count}): at least 1")
    if not 0 <= component < COMPONENTS:
        raise ValueError(f"points(component={component}): must be 0 to {COMPONENTS - 1}")
    draw = torch.Generator().manual_seed(_seed(f"{generator} {seed} {component}"))
    if generator == "random":
        return torch.rand(count, generator=draw, dtype=torch.float64)
    engine = torch.quasirandom.SobolEngine(component + 1)  # type: ignore[no-untyped-call]
    plain = engine.draw(count, dtype=torch.float64)[:, component]
    places = torch.arange(DIGITS - 1, -1, -1)
    digits = ((plain * 2**DIGITS).long()[:, None] >> places) & 1  # the first digit is that of 1/2
    matrix = torch.randint(2, (DIGITS, DIGITS), generator=draw).tril(-1) + torch.eye(DIGITS, dtype=torch.int64)
    shift = torch.randint(2, (DIGITS,), generator=draw)
    # products of 0 and 1 summed over 30 digits are exact in float64, whose matrix product is the faster one
    mixed = ((digits.double() @ matrix.double().T).long() + shift) & 1
    scrambled: Tensor = (mixed << places).sum(1).double() / 2**DIGITS
    return scrambled


def neurons(count: int, width: int, component: int, seed: int, generator: Generator = "sobol") -> Tensor:
    """The neuron of each path in a layer of ``width`` neurons: int64 (count,), 0 to ``width - 1``.

    A layer of n * m neurons seen as n channels of m positions has the channels that a layer of n has:

    >>> torch.equal(neurons(100, 12, 1, seed=0) // 3, neurons(100, 4, 1, seed=0))
    True
    """
    return (points(count, component, seed, generator) * width).long()


@dataclass(frozen=True)
class Edges:
    """The connections between two layers, each once, sorted by output and input: int64 (edges,) each. ``sign``: int8
    (edges, taps), 1 or -1, those of the first path that has the edge."""

    source: Tensor
    target: Tensor
    sign: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def signs(self, outputs: int, inputs: int) -> Tensor:
        """The signs at every connection and 0 elsewhere: int8 (outputs, inputs, taps)."""
        dense = torch.zeros(outputs, inputs, self.sign.shape[1], dtype=torch.int8)
        dense[self.target, self.source] = self.sign
        return dense


def signs(count: int, taps: int, seed: int) -> Tensor:
    """Of the weights that a path has in a layer, ``taps`` of them: int8 (count, taps), 1 or -1 by a coin for each.

    They are independent of where the paths go. A component of the sequence in their place balances the signs at every
    neuron, so that what rectified neurons have in common cancels out: such networks learned less.
    """
    draw = torch.Generator().manual_seed(_seed(f"signs {seed} {taps}"))
    coins = torch.rand(count, taps, generator=draw, dtype=torch.float64) < 0.5
    return coins.to(torch.int8) * 2 - 1


@functools.lru_cache(maxsize=256)
def edges(
    count: int,
    inputs: int,
    outputs: int,
    components: tuple[int, int],
    seed: int,
    generator: Generator = "sobol",
    taps: int = 1,
) -> Edges:
    """What ``count`` paths connect between a layer of ``inputs`` neurons and one of ``outputs``, whose components are
    given, with ``taps`` weights by edge. Paths that share an edge are coalesced. Nobody may change the result: it is
    handed out again."""
    source, target = (
        neurons(count, width, component, seed, generator)
        for width, component in zip((inputs, outputs), components, strict=True)
    )
    codes, which = torch.unique(target * inputs + source, return_inverse=True)
    first = torch.full((len(codes),), count).scatter_reduce_(0, which, torch.arange(count), "amin")
    return Edges(codes % inputs, codes // inputs, signs(count, taps, seed)[first])


def _seed(text: str) -> int:
    """Of one component or the signs: what others draw does not matter to it."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
