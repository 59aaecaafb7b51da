"""MobileNetV1 (Howard et al. 2017, arXiv:1704.04861) and MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .blocks import ConvNorm, InvertedResidualNet, divisible
from .weights import WeightsError, build, load_arrays, read_npz

# channels and stride of the 13 depthwise separable blocks: arXiv:1704.04861, table 1
_V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

# kernel, expansion, channels, blocks, stride: arXiv:1801.04381, table 2
_V2_STAGES = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (3, 6, 32, 3, 2),
    (3, 6, 64, 4, 2),
    (3, 6, 96, 3, 1),
    (3, 6, 160, 3, 2),
    (3, 6, 320, 1, 1),
)

_KERAS_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class MobileNetV1(nn.Module):
    """(n, 3, resolution, resolution), RGB as x / 127.5 - 1, -> (n, num_classes) logits, as Keras builds it.

    ``width`` multiplies every number of channels. ``resolution`` sets no shape of a parameter, only that of the input
    (``input_shape``); other multiples of 32 run as well.
    """

    def __init__(self, width: float = 1.0, resolution: int = 224, num_classes: int = 1000) -> None:
        super().__init__()
        if width <= 0 or int(64 * width) < 1:
            raise ValueError(f"MobileNetV1(width={width}): must be positive, such as 0.25, 0.5, 0.75 or 1")
        if resolution < 32 or resolution % 32:
            raise ValueError(f"MobileNetV1(resolution={resolution}): must be a multiple of 32, such as 128 or 224")
        self.input_shape = (3, resolution, resolution)
        channels = int(32 * width)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=_layer(3, channels, 3, stride=2))
        for index, (full, stride) in enumerate(_V1_BLOCKS, 1):
            layers[f"conv_dw_{index}"] = _layer(channels, channels, 3, stride=stride, groups=channels)
            layers[f"conv_pw_{index}"] = _layer(channels, int(full * width), 1)
            channels = int(full * width)
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def _layer(channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> ConvNorm:
    # Keras pads at the bottom and the right only where the stride is 2
    before = 1 if kernel == 3 and stride == 1 else 0
    after = 1 if kernel == 3 else 0
    return ConvNorm(
        channels_in,
        channels,
        (kernel, kernel),
        stride=(stride, stride),
        padding=(before, after, before, after),
        groups=groups,
        eps=1e-3,
        relu=nn.ReLU6,
    )


def mobilenet_v1(width: float = 1.0, resolution: int = 224, num_classes: int = 1000, seed: int = 0) -> MobileNetV1:
    """MobileNetV1 of random weights, in evaluation mode. Width 1 at 224 px: 4.23 M parameters, 569 M
    multiply-accumulates; width 0.75: 2.59 M and 325 M (arXiv:1704.04861, table 6)."""
    return build(lambda: MobileNetV1(width, resolution, num_classes), seed)


def pretrained_mobilenet_v1(root: str | Path) -> MobileNetV1:
    """MobileNetV1 of width 0.75 at 224 px with Keras' ImageNet weights, in evaluation mode.

    ``root``: the folder that :func:`bitsmith.zoo.data.data_root` finds. Raises ``FileNotFoundError`` without
    ``imagenet_models/mobilenet_v1_0.75_224.npz``, ``WeightsError`` for a file of other content.
    """
    path = Path(root) / "imagenet_models" / "mobilenet_v1_0.75_224.npz"
    return load_arrays(MobileNetV1(0.75), _from_keras(read_npz(path), path), path).eval()


def _from_keras(arrays: Mapping[str, NDArray[Any]], path: Path) -> dict[str, NDArray[Any]]:
    """Keras' names and layouts as torch's: HWIO -> OIHW; depthwise (H, W, C, 1) -> (C, 1, H, W)."""
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        layer, _, part = name.partition("__")
        if part == "kernel" and layer == "conv_preds" and array.shape[:2] == (1, 1):
            found["classifier.weight"] = np.ascontiguousarray(array[0, 0].T)
        elif name == "conv_preds__bias":
            found["classifier.bias"] = array
        elif part == "kernel" and array.ndim == 4:
            found[f"features.{layer}.conv.weight"] = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        elif part == "depthwise_kernel" and array.ndim == 4:
            found[f"features.{layer}.conv.weight"] = np.ascontiguousarray(array.transpose(2, 3, 0, 1))
        elif part in _KERAS_NORM:
            found[f"features.{layer.removesuffix('_bn')}.norm.{_KERAS_NORM[part]}"] = array
        else:
            raise WeightsError(f"{path}: {name} of shape {array.shape} is no part of Keras' MobileNet")
    return found


def mobilenet_v2(width: float = 1.0, num_classes: int = 1000, seed: int = 0) -> InvertedResidualNet:
    """MobileNetV2 of random weights, in evaluation mode: (n, 3, 224, 224) -> (n, num_classes). Width 1: 3.50 M
    parameters, 300 M multiply-accumulates (arXiv:1801.04381, table 4). Raises ``ValueError`` for a width <= 0."""
    if width <= 0:
        raise ValueError(f"mobilenet_v2(width={width}): must be positive, such as 0.35, 0.5, 0.75, 1 or 1.4")
    stages = tuple((k, e, divisible(c * width), n, s) for k, e, c, n, s in _V2_STAGES)
    last = divisible(1280 * max(1.0, width))
    return build(lambda: InvertedResidualNet(divisible(32 * width), stages, last, num_classes), seed)
