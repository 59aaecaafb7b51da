"""DS-CNN for keyword spotting: Zhang et al. 2017, "Hello Edge", arXiv:1711.07128, section 3.6 and table 5.

A convolution over time and frequency, depthwise separable blocks, and the mean over both; TensorFlow's SAME padding.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from .blocks import ConvNorm, same_padding
from .weights import WeightsError, build, load_arrays, read_npz

Size = Literal["S", "M", "L"]

INPUT_SHAPE = (1, 49, 10)
"""One channel, 49 frames, 10 MFCC."""

# channels, blocks, strides of the first convolution and of the first depthwise one (ARM-software/ML-KWS-for-MCU)
_SIZES: dict[str, tuple[int, int, tuple[int, int], tuple[int, int]]] = {
    "S": (64, 4, (2, 2), (1, 1)),
    "M": (172, 4, (2, 1), (2, 2)),
    "L": (276, 5, (2, 1), (2, 2)),
}


class DsCnn(nn.Module):
    """(n, 1, 49, 10) MFCC -> (n, num_classes) logits."""

    def __init__(self, size: Size = "S", num_classes: int = 12) -> None:
        super().__init__()
        if size not in _SIZES:
            raise ValueError(f"DsCnn(size={size!r}): must be one of {', '.join(_SIZES)}")
        channels, blocks, first, second = _SIZES[size]
        shape = (INPUT_SHAPE[1], INPUT_SHAPE[2])
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv_1=_layer(1, channels, (10, 4), first, shape))
        shape = _strided(shape, first)
        for index in range(1, blocks + 1):
            stride = second if index == 1 else (1, 1)
            depthwise = _layer(channels, channels, (3, 3), stride, shape, groups=channels)
            pointwise = _layer(channels, channels, (1, 1), (1, 1), shape)
            layers[f"conv_ds_{index}"] = nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))
            shape = _strided(shape, stride)
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc1(self.pool(self.features(x)).flatten(1))
        return logits


def _strided(shape: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // stride[0]), -(-shape[1] // stride[1])


def _layer(
    channels_in: int,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    shape: tuple[int, int],
    groups: int = 1,
) -> ConvNorm:
    """``shape``: height and width of the input, which TensorFlow's padding depends on."""
    top, bottom = same_padding(shape[0], kernel[0], stride[0])
    left, right = same_padding(shape[1], kernel[1], stride[1])
    padding = (top, bottom, left, right)
    return ConvNorm(channels_in, channels, kernel, stride=stride, padding=padding, groups=groups, bias=True, eps=1e-3)


def ds_cnn(size: Size = "S", num_classes: int = 12, seed: int = 0) -> DsCnn:
    """DS-CNN of random weights, in evaluation mode. Multiply-accumulates: S 2.7 M, M 9.8 M, L 28.4 M."""
    return build(lambda: DsCnn(size, num_classes), seed)


def pretrained_ds_cnn(root: str | Path) -> DsCnn:
    """DS-CNN S with ARM's weights for the 12 classes of Speech Commands, in evaluation mode.

    ``root``: the folder that :func:`bitsmith.zoo.data.data_root` finds. Raises ``FileNotFoundError`` without
    ``kws_models/ds_cnn_s.npz``, ``WeightsError`` for a file of other content.
    """
    path = Path(root) / "kws_models" / "ds_cnn_s.npz"
    return load_arrays(DsCnn("S"), {_key(name, path): array for name, array in read_npz(path).items()}, path).eval()


def _key(name: str, path: Path) -> str:
    """``conv_1.weight``, ``conv_1.norm.bias``, ``conv_ds_1.depthwise_norm.bias`` as keys of :class:`DsCnn`."""
    layer, _, part = name.rpartition(".")
    if not layer:
        raise WeightsError(f"{path}: {name} is no part of DS-CNN")
    if layer == "fc1":
        return name
    if layer.endswith(("_norm", ".norm")):
        return f"features.{layer[:-5]}.norm.{part}"
    return f"features.{layer}.conv.{part}"
