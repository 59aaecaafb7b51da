"""The trained networks of ``int8_accuracy`` and ``int8_defaults``, and the target that both simulate 4 bits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import bitsmith as bs
from bitsmith.zoo import tasks
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.ds_cnn import pretrained_ds_cnn
from bitsmith.zoo.mobilenet import pretrained_mobilenet_v1
from bitsmith.zoo.text import minilm_sst2
from bitsmith.zoo.weights import load_npz


@dataclass(frozen=True)
class Network:
    """A trained network and its task. ``heads``, ``hidden``: of a transformer, else 0."""

    model: Callable[[Path, Path], nn.Module]
    task: Callable[[Path], bs.Task]
    heads: int = 0
    hidden: int = 0


def _quiet(line: str) -> None:
    """The tasks' own lines are said in this file's description."""


NETWORKS: Mapping[str, Network] = {
    "resnet20": Network(
        lambda root, _: load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval(),
        lambda root: tasks.cifar_task(root, calibration=256, tell=_quiet),
    ),
    "mobilenet_v1": Network(
        lambda root, _: pretrained_mobilenet_v1(root),
        # one thread computes pointwise convolutions of fewer than 16 pictures without oneDNN, and slowly
        lambda root: tasks.mobilenet_v1_task(root, calibration=128, batch=16, tell=_quiet),
    ),
    "ds_cnn": Network(
        lambda root, _: pretrained_ds_cnn(root),
        lambda root: tasks.ds_cnn_task(root, calibration=256, batch=64, tell=_quiet),
    ),
    "minilm": Network(
        lambda root, folder: minilm_sst2(root, folder=folder),
        lambda root: tasks.minilm_task(root, calibration=128, batch=32, tell=_quiet),
        heads=12,
        hidden=384,
    ),
}


class AnyBits(bs.targets.OnnxRuntime):
    """ONNX Runtime as if it had its kernels for weights of every form: what 4 bits lose can be simulated only.

    Of embeddings only 8 bits: nothing is multiplied there, and 4 of them are not what W4A8 stands for.
    """

    def supports(self, technique: bs.Technique, site: bs.Site) -> bool | bs.No:
        if isinstance(technique, bs.Int) and (site.kind != "embedding" or technique.w == 8):
            technique = dataclasses.replace(
                technique, w=8, a=technique.a or 8, granularity="channel", group=0, affine_weights=False
            )
        return super().supports(technique, site)
