"""The post-training plans that the search finds at the same size of weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F

import bitsmith as bs
from bitsmith._hash import hash_files

from .cells import Bed, Cell, files

ACTIVATIONS = 8
"""Bits of every activation: the search has a limit on the file, which holds weights."""
WIDTHS = (2, 3, 4, 6, 8)
MACHINE = bs.targets.Roofline(float32=10.0, int8=40.0, int4=80.0, int2=160.0, bandwidth_gb_s=10.0)
"""Its times are not used."""


@dataclass(frozen=True)
class Searched:
    """Weights of at most what ``bits`` everywhere take, the bits of each layer from the exact search."""

    bits: int
    seed: int

    @property
    def name(self) -> str:
        return f"searched, weights of {self.bits} bits, post-training"


def key(bed: Bed, cell: Searched, split: str) -> dict[str, Any]:
    code = hash_files([*files(), Path(__file__)])
    return {"searched": dataclasses.asdict(cell), "split": split, "code": code}


def record(bed: Bed, cell: Searched, split: str) -> dict[str, Any]:
    task = dataclasses.replace(bed.task, calibration=bed.drawn(cell.seed), loss=F.cross_entropy)
    ranges: dict[str, Any] = {"range": bs.Range("mse"), "weight_range": bs.Range("mse")}
    techniques = [bs.Int(width, ACTIVATIONS, **ranges) for width in WIDTHS]
    profile = bs.profile(bed.model, task, techniques, MACHINE)
    limit = float(bs.learned_sizes(bed.uniform(Cell(cell.bits, cell.seed, ()))).weights.detach())
    found = bs.search(profile, bs.Budget(mib=(limit + profile.fixed_bytes) / 2**20), minimize="drop")
    plan = found.plan.replace(prepare=(bs.CorrectBias(),))
    net = bs.apply(bed.model, plan, task.calibration)
    sizes = bs.learned_sizes(net)
    return {
        "right": "".join("1" if one else "0" for one in bed.right(net, split)),
        "weights": float(sizes.weights.detach()),
        "activations": float(sizes.activations.detach()),
        "bits": {name: [t.w, t.a] for name, t in plan.sites.items() if isinstance(t, bs.Int)},
    }
