"""What is held against what: bits that are learned, and the same bits everywhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.data import first_inputs
from bitsmith.learn.finetune import divergence
from bitsmith.model.network import duplicate, network
from bitsmith.sampling import shuffled
from bitsmith.site import Backward
from bitsmith.task import Task

from .._images import Augmented

BATCH = 64
CALIBRATION = 256
"""Samples that ranges are chosen on, drawn by a seed."""
TEMPERATURE = 4.0
ENDS = 8
"""Bits of the first and the last layer; where bits are learned, theirs at the start."""
GRANULARITY = {"sliced": "channel", "per tensor": "tensor"}


@dataclass(frozen=True)
class Cell:
    """One network of the study.

    ``bits``: everywhere but at the :data:`ENDS`. With ``share`` bits are learned until weights and activations of one
    sample together take ``share`` of what ``bits`` everywhere take, by ``method`` with ``moves`` or ``rhythm``.
    ``steps``: of the training, or of its three phases. ``weights``, ``activations``: the derivative of rounding.
    """

    bits: int
    seed: int
    steps: tuple[int, ...]
    share: float | None = None
    grain: Literal["sliced", "per tensor"] = "sliced"
    weights: Backward = "ste"
    activations: Backward = "ste"
    method: Literal["allocation", "penalty"] = "allocation"
    moves: int = 1
    rhythm: int = 1
    rate: float = 1e-3
    grid_rate: float = 3e-2

    @property
    def name(self) -> str:
        if self.share is None:
            return f"{self.bits} bits everywhere"
        how = f"moved {self.moves} times" if self.method == "allocation" else f"grids every {self.rhythm}"
        return (
            f"{self.method}, {self.share:.0%} of {self.bits} bits, {self.grain}, {self.weights} and "
            f"{self.activations}, {how}"
        )


def files() -> list[Path]:
    """What a cell's record depends on."""
    root = Path(bs.__file__).parent
    learn = ("precision", "size", "limits", "allocation", "penalty", "finetune", "trainer", "parameters")
    parts = (*(f"learn/{name}.py" for name in learn), "techniques/int_.py")
    more = ("numerics/grid.py", "numerics/rounding.py", "numerics/quantizer.py", "numerics/weights.py")
    here = Path(__file__)
    return [*(root / part for part in (*parts, *more)), here, here.parent.parent / "_images.py"]


def softened(output: Any, reference: Any) -> torch.Tensor:
    """The divergence from the float network at :data:`TEMPERATURE` (Hinton et al. 2015, arXiv:1503.02531)."""
    return TEMPERATURE**2 * divergence(output / TEMPERATURE, reference / TEMPERATURE)


class Bed:
    """The float network, and the images that train, choose and test."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        net = network(duplicate(model), first_inputs(task.calibration))
        layers = [name for name, site in net.record.sites.items() if bs.Int(8, 8).fits(site) and site.weight]
        self.layers, self.ends = layers, (layers[0], layers[-1])
        self.code = hash_files(files())

    def key(self, cell: Cell, split: str) -> dict[str, Any]:
        constants = [BATCH, CALIBRATION, TEMPERATURE, ENDS]
        return {"cell": dataclasses.asdict(cell), "split": split, "code": self.code, "constants": constants}

    def drawn(self, seed: int) -> list[Any]:
        source = shuffled(self.task.calibration, seed)
        assert source is not None
        return [source.batch(k, BATCH) for k in range(0, min(CALIBRATION, source.total), BATCH)]

    def plan(self, bits: int, cell: Cell, form: Literal["step", "step_range"]) -> bs.Plan:
        granularity: Any = GRANULARITY[cell.grain]
        learn, of_weights = bs.Learn(form, cell.activations), bs.Learn(form, cell.weights)
        sites = {}
        for name in self.layers:
            width = ENDS if name in self.ends else bits
            sites[name] = bs.Int(
                *(width, width),
                granularity=granularity,
                range=bs.Range("mse"),
                weight_range=bs.Range("mse"),
                learn=learn,
                weight_learn=of_weights,
            )
        return bs.Plan(sites)

    def uniform(self, cell: Cell) -> nn.Module:
        """The same bits everywhere, their steps learned (LSQ), before training."""
        return bs.apply(self.model, self.plan(cell.bits, cell, "step"), self.drawn(cell.seed))

    def bytes_of(self, bits: int, seed: int) -> float:
        """Of weights and activations with the same bits everywhere."""
        return float(bs.learned_sizes(self.uniform(Cell(bits, seed, ()))).total.detach())

    def record(self, cell: Cell, split: str) -> dict[str, Any]:
        """``right`` ("1" and "0" by sample), bytes of ``weights`` and ``activations``, and what was learned."""
        common: dict[str, Any] = {"teacher": self.model, "distance": softened, "lr": cell.rate, "freeze_norms": False}
        images = Augmented(self.task.calibration, BATCH)  # type: ignore[arg-type]
        learned: dict[str, Any] = {}
        if cell.share is None:
            (steps,) = cell.steps
            groups = {"*.grid.log_*": {"lr": cell.grid_rate}}
            net = bs.finetune(self.uniform(cell), images, steps=steps, groups=groups, seed=cell.seed, **common)
        else:
            found, rate = self.learned(cell, images, common)
            net = found.net
            learned = {
                "grid_rate": rate,
                "bits": {name: [t.w, t.a] for name, t in found.plan.sites.items() if isinstance(t, bs.Int)},
                "totals": [step.weights + step.activations for step in found.history],
            }
        sizes = bs.learned_sizes(net)
        right = self.right(net, split)
        return {
            "right": "".join("1" if one else "0" for one in right),
            "weights": float(sizes.weights.detach()),
            "activations": float(sizes.activations.detach()),
            **learned,
        }

    def learned(self, cell: Cell, images: Any, common: dict[str, Any]) -> tuple[bs.LearnedPrecision, float]:
        """With the first of some rates of the grids, each twice the one before, that keeps the limit; and that rate."""
        start = bs.apply(self.model, self.plan(cell.bits, cell, "step_range"), self.drawn(cell.seed))
        rates = [cell.grid_rate * 2**k for k in range(4)]
        assert cell.share is not None
        for rate in rates:
            try:
                found = bs.learn_precision(
                    start,
                    images,
                    steps=cell.steps,  # type: ignore[arg-type]
                    total=cell.share * self.bytes_of(cell.bits, cell.seed),
                    method=cell.method,
                    moves=cell.moves,
                    rhythm=cell.rhythm,
                    grid_lr=rate,
                    validation=self.validation(),
                    seed=cell.seed,
                    **common,
                )
            except bs.SizeError:
                if rate == rates[-1]:
                    raise
            else:
                return found, rate
        raise AssertionError("the last rate returns or raises")

    def validation(self) -> list[Any]:
        """The first 256 of the held-out training images."""
        found = []
        for x, y in self.task.validation:
            found.append((x, y))
            if sum(len(part) for _, part in found) >= 256:
                break
        return found

    def right(self, net: nn.Module, split: str) -> NDArray[np.bool_]:
        with torch.no_grad():
            parts = [(net.eval()(x).argmax(1) == y).numpy() for x, y in self.task.loader(split)]  # type: ignore[arg-type]
        return np.concatenate(parts)
