"""What is put in the place of dense weights, and what that stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import bitsmith as bs

DENSE, NARROW = "dense", "dense, fewer channels"
FILTER, KERNEL, FIRST = "codes by filter", "codes by kernel", "first codes of the tree"
SCRATCH = "codes by filter, no dense start"
BASIS8, BASIS1 = "codes by filter, 8-bit coefficients", "codes by filter, signs as coefficients"
PRUNED, INTEGER, PALETTE = "pruned", "integers", "palettes"
CODES = (FILTER, KERNEL, FIRST, BASIS8, BASIS1)

Sites = Mapping[str, bs.Site]


@dataclass(frozen=True)
class Cell:
    """One trained network. ``ratio``: of the bytes of the layers that change; ``steps``: of training under the plan."""

    data: str
    form: str
    ratio: float
    seed: int
    steps: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.data}, {self.form}, {self.ratio:g}, seed {self.seed}"


def chosen(sites: Sites) -> list[str]:
    """Every convolution of more than one weight by filter but the first; the last layer is linear and stays too."""
    convolutions = [name for name, site in sites.items() if site.kind == "conv2d" and site.weight is not None]
    return convolutions[1:]


def plan_of(cell: Cell, sites: Sites) -> bs.Plan:
    """The form at every chosen site. Pruned weights take no more bits than codes of that ratio do."""
    names = chosen(sites)
    if cell.form in (DENSE, NARROW):
        return bs.Plan()
    if cell.form == PRUNED:
        return bs.Plan({name: bs.Sparse(density(sites[name], bs.Ovsf(cell.ratio).bits(sites[name]))) for name in names})
    if cell.form == INTEGER:
        return bs.Plan(dict.fromkeys(names, bs.Int(round(32 * cell.ratio), None)))
    if cell.form == PALETTE:
        return bs.Plan(dict.fromkeys(names, bs.Palette(round(32 * cell.ratio))))
    technique = {
        FILTER: bs.Ovsf(cell.ratio),
        SCRATCH: bs.Ovsf(cell.ratio),
        KERNEL: bs.Ovsf(cell.ratio, "kernel"),
        FIRST: bs.Ovsf(cell.ratio, codes="first"),
        BASIS8: bs.Ovsf(min(1.0, 4 * cell.ratio), coefficient_bits=8),
        BASIS1: bs.Ovsf(min(1.0, 32 * cell.ratio), coefficient_bits=1),
    }[cell.form]
    return bs.Plan(dict.fromkeys(names, technique))


def density(site: bs.Site, bits: float) -> float:
    """Of the weights that so many bits hold, with a bitmap or with an index each.

    >>> import torch
    >>> site = bs.sites(torch.nn.Conv2d(16, 16, 3), torch.zeros(1, 16, 4, 4))[""]
    >>> bs.Sparse(density(site, 40_000.0)).bits(site)
    39968.0
    """
    assert site.weight is not None
    places = site.weight.numel
    left = max((bits - places) / 32, bits / (32 + math.ceil(math.log2(places))))
    return max(1, min(places, math.floor(left))) / places


def stored(plan: bs.Plan, sites: Sites, parameters: int) -> tuple[float, float]:
    """Bytes of all parameters, and those of the chosen layers in parts of their float32 bytes."""
    names = chosen(sites)
    dense = sum(sites[name].parameter_bytes for name in names)
    own = sum(plan[name].bits(sites[name]) / 8 if name in plan.sites else sites[name].parameter_bytes for name in names)
    return 4 * parameters - dense + own, own / dense


def operations(plan: bs.Plan, sites: Sites) -> tuple[int, int]:
    """Additions and multiply-accumulates by sample where codes are convolved first (``compute="basis"``), of all
    layers; the others multiply."""
    additions = products = 0
    for name, site in sites.items():
        technique = plan.get(name)
        more, macs = technique.basis_operations(site) if isinstance(technique, bs.Ovsf) else (0, site.macs)
        additions, products = additions + more, products + macs
    return additions, products
