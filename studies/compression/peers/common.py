"""What every peer of the study shares: its job, its float network, what its result holds.

A peer is a module that the study runs in the peer's environment, ``python -m studies.compression.peers.<peer> FOLDER``.
FOLDER holds ``job.json`` and ``samples.npz``: calibration and test samples without their classes.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.ds_cnn import pretrained_ds_cnn
from bitsmith.zoo.mobilenet import pretrained_mobilenet_v1
from bitsmith.zoo.weights import load_npz

BATCH = 25
FLOAT = 32
"""Bits of a value that no technique made smaller."""


@dataclass(frozen=True)
class Job:
    """``network``: its name in the study; ``form``: what to do, by the peer's name for it; ``root``: of the data."""

    network: str
    form: str
    root: str
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """``predict``: classes of a batch. ``replaced``: float weights whose place the peer's encoding takes, in ``bits``;
    ``bytes``: of its file, where it is one for ONNX Runtime. ``layers``: how many of how many."""

    predict: Callable[[Tensor], Tensor]
    replaced: int = 0
    bits: float = 0.0
    bytes: int | None = None
    layers: str = ""


Form = Callable[[nn.Module, Tensor, Job, Path], Made]


def float_model(job: Job) -> nn.Module:
    root = Path(job.root)
    if job.network == "ResNet-20":
        return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
    return (pretrained_ds_cnn(root) if job.network == "DS-CNN S" else pretrained_mobilenet_v1(root)).eval()


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers."""
    return {name: one for name, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))}


def classes(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(x).argmax(1)
            return found

    return predict


def stored(weight: Tensor, bits: float) -> float:
    """Bits of a weight whose values take ``bits`` each: all of them, or a bit for each place and what is not 0."""
    left = int(torch.count_nonzero(weight))
    return min(weight.numel() * bits, weight.numel() + left * bits)


def main(forms: Mapping[str, Form]) -> None:
    """Run one job as a command. ``result.json`` is there at the end and says what failed."""
    folder = Path(sys.argv[1])
    said: dict[str, Any]
    torch.set_num_threads(1)
    try:
        job = Job(**json.loads((folder / "job.json").read_text()))
        torch.manual_seed(job.seed)
        with np.load(folder / "samples.npz") as found:
            calibration, test = (torch.from_numpy(found[name]) for name in ("calibration", "test"))
        made = forms[job.form](float_model(job), calibration, job, folder)
        predicted = torch.cat([made.predict(part) for part in test.split(BATCH)])
        said = {name: value for name, value in vars(made).items() if name != "predict"}
        said |= {"predicted": predicted.tolist(), "error": None}
    except Exception as error:
        traceback.print_exc()
        said = {"error": f"{type(error).__name__}: {str(error).strip()[:1000]}"}
    partial = folder / ".result.part"
    partial.write_text(json.dumps(said))
    partial.replace(folder / "result.json")
