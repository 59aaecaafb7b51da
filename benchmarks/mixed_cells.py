"""The cells of ``mixed_precision``: a network, a space of techniques, a budget, and what of it a peer tuner is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bitsmith as bs
from bitsmith._files import atomic_write
from bitsmith.data import first_inputs, items, tensors_in
from bitsmith.zoo.tasks import Batches

from .int8_peers import write_float
from .int8_tasks import NETWORKS

Array = NDArray[Any]

MODEL = bs.targets.Roofline(
    float32=50.0, bfloat16=100.0, int16=100.0, int8=200.0, int4=400.0, bandwidth_gb_s=25.0, threads=2
)
"""An accelerator that is nowhere: 4 bits twice as fast as 8, these as 16, no other cost. Its times are modelled."""

SPACES: Mapping[str, Sequence[bs.Technique]] = {
    "int8": (bs.Int(8, 8),),
    "int8_tensor": (bs.Int(8, 8, granularity="tensor"),),
    "w4": (bs.Int(8, 8), bs.Int(4, 8)),
    "modelled": (bs.Float("bfloat16"), bs.Int(8, 8), bs.Int(4, 4)),
}
MEASURED = ("int8", "int8_tensor")


@dataclass(frozen=True)
class Cell:
    """``budget``: drop of accuracy on the validation half, as a fraction."""

    network: str
    space: str
    budget: float

    @property
    def name(self) -> str:
        return f"{self.network}, {self.space}, {self.budget:.1%}"

    @property
    def folder(self) -> str:
        return f"{self.network}.{self.space}.{self.budget:g}"

    @property
    def measured(self) -> bool:
        return self.space in MEASURED


CELLS = (
    Cell("resnet20", "int8", 0.002),
    Cell("resnet20", "int8_tensor", 0.002),
    Cell("resnet20", "w4", 0.01),
    Cell("resnet20", "modelled", 0.01),
    Cell("mobilenet_v1", "int8", 0.005),
    Cell("mobilenet_v1", "int8_tensor", 0.005),
    Cell("mobilenet_v1", "w4", 0.01),
    Cell("mobilenet_v1", "modelled", 0.01),
    Cell("ds_cnn", "int8", 0.001),
    Cell("ds_cnn", "int8_tensor", 0.001),
    Cell("ds_cnn", "w4", 0.005),
    Cell("ds_cnn", "modelled", 0.01),
    Cell("minilm", "int8", 0.005),
    Cell("minilm", "int8_tensor", 0.005),
    Cell("minilm", "w4", 0.01),
    Cell("minilm", "modelled", 0.01),
)


@dataclass(frozen=True)
class Halves:
    """A float network and its held-out data, cut in two by a seed: ``task.validation`` tunes, ``task.test`` shows."""

    model: torch.nn.Module
    task: bs.Task

    def arrays(self, part: str) -> tuple[list[list[Array]], NDArray[np.int64]]:
        """The inputs of each sample in order, as a batch of one, and the classes."""
        inputs, classes = [], []
        for batch, target in items(getattr(self.task, part), part):
            tensors = [tensor.numpy() for tensor in tensors_in(batch)]
            inputs += [[array[k : k + 1] for array in tensors] for k in range(len(target))]
            classes.append(target.numpy())
        return inputs, np.concatenate(classes)


def halves(network: str, root: Path, folder: Path, seed: int = 0) -> Halves:
    """The held-out samples of a network (none that it was trained or its head fitted on), cut at random in two."""
    found = NETWORKS[network]
    task = found.task(root)
    # the validation images of CIFAR-10 and the sentences of SST-2 come from training sets, so only test data remain
    parts = [task.test] if network in ("resnet20", "minilm") else [task.validation, task.test]
    loaders = [part for part in parts if isinstance(part, Batches)]
    assert len(loaders) == len(parts)
    places = [(loader, k) for loader in loaders for k in range(loader.samples)]
    order = np.random.default_rng(seed).permutation(len(places))
    middle = len(order) // 2

    def half(chosen: NDArray[np.int64]) -> Batches:
        mine = [places[index] for index in chosen]

        def read(at: Any) -> tuple[Any, torch.Tensor]:
            picked = [mine[k] for k in (range(len(mine))[at] if isinstance(at, slice) else at)]
            got = [loader.take([k]) for loader, k in picked]
            target = torch.cat([target for _, target in got])
            if isinstance(got[0][0], Mapping):
                return {key: torch.cat([inputs[key] for inputs, _ in got]) for key in got[0][0]}, target
            return torch.cat([inputs for inputs, _ in got]), target

        return Batches(len(mine), loaders[0].batch, read)

    cut = dataclasses.replace(task, validation=half(order[:middle]), test=half(order[middle:]))
    return Halves(found.model(root, folder), cut)


def write_job(cell: Cell, data: Halves, score: float, folder: Path, threads: int) -> Path:
    """The job of a peer tuner: the float network as ONNX (batch 1), calibration and both halves, the budget."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx, samples = folder.parent / f"{cell.network}.onnx", folder.parent / f"{cell.network}.npz"
    if not onnx.exists():
        example = first_inputs(data.task.calibration)
        one = {k: v[:1] for k, v in example.items()} if isinstance(example, Mapping) else example[:1]
        write_float(data.model, one, onnx)
    if not samples.exists():
        atomic_write(samples, lambda temporary: _save(temporary, _arrays(data)))
    job = {
        "network": cell.network,
        "space": cell.space,
        "budget": cell.budget,
        "threads": threads,
        "seed": 0,
        "data": str(samples),
        "onnx": str(onnx),
        "float_score": score,
        "batch": 1,
    }
    return atomic_write(folder / "job.json", lambda temporary: temporary.write_text(json.dumps(job, indent=1)))


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub has no mapping


def _arrays(data: Halves) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for part in ("calibration", "validation", "test"):
        batches = list(items(getattr(data.task, part), part))
        first = batches[0][0]
        if isinstance(first, Mapping):
            found |= {f"{part}.{key}": torch.cat([inputs[key] for inputs, _ in batches]).numpy() for key in first}
        else:
            found[f"{part}_x"] = torch.cat([inputs for inputs, _ in batches]).numpy()
        if part != "calibration":
            found[f"{part}_y"] = torch.cat([target for _, target in batches]).numpy()
    return found
