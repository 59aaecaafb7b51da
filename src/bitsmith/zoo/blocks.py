"""What several of the networks are made of."""

from __future__ import annotations

from torch import Tensor, nn

Padding = tuple[int, int, int, int]
"""Zeros added at the top, bottom, left and right of a map."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis, (before, after): ceil(size / stride) outputs, the odd zero at the end.

    >>> same_padding(49, 10, 2), same_padding(5, 3, 1)
    ((4, 5), (1, 1))
    """
    outputs = -(-size // stride)
    total = max(0, (outputs - 1) * stride + kernel - size)
    return total // 2, total - total // 2


class ConvNorm(nn.Module):
    """Zero padding, convolution, batch normalisation and, if ``relu`` is given, that activation.

    ``padding``: top, bottom, left, right. The convolution pads itself where both sides are equal.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: Padding = (0, 0, 0, 0),
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        relu: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        top, bottom, left, right = padding
        own = (top, left) if top == bottom and left == right else (0, 0)
        self.pad = nn.Identity() if own != (0, 0) or not any(padding) else nn.ZeroPad2d((left, right, top, bottom))
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=own, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(channels, eps=eps)
        self.relu = nn.Identity() if relu is None else relu()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.norm(self.conv(self.pad(x))))
        return out


def divisible(channels: float, divisor: int = 8) -> int:
    """``channels`` rounded to a multiple of ``divisor``, but by less than 10 % downwards (as MobileNetV2's authors do).

    >>> divisible(32 * 0.75), divisible(24 * 0.35), divisible(16 * 0.1)
    (24, 8, 8)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, arXiv:1801.04381, figure 4d: 1x1 expansion, depthwise ``kernel``, linear 1x1 projection.

    (n, channels_in, h, w) -> (n, channels, h / stride, w / stride), with a shortcut where the shape stays.
    """

    def __init__(
        self, channels_in: int, channels: int, *, stride: int, expansion: int, kernel: int = 3, eps: float = 1e-5
    ) -> None:
        super().__init__()
        inner = channels_in * expansion
        expand = [_conv_norm_relu6(channels_in, inner, 1, eps=eps)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_norm_relu6(inner, inner, kernel, stride=stride, groups=inner, eps=eps),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels, eps=eps),
        )
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.shortcut else out


class InvertedResidualNet(nn.Module):
    """MobileNetV2 and what follows its form: (n, 3, h, w) -> (n, num_classes); keys as torchvision's MobileNetV2.

    ``stem``, ``last``: channels of the first 3x3 convolution, of stride 2, and of the 1x1 convolution before pooling.
    ``stages``: rows of kernel, expansion, channels, blocks, stride of the first block.
    """

    def __init__(
        self,
        stem: int,
        stages: tuple[tuple[int, int, int, int, int], ...],
        last: int,
        num_classes: int,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm_relu6(3, stem, 3, stride=2, eps=eps)]
        channels_in = stem
        for kernel, expansion, channels, blocks, first in stages:
            for block in range(blocks):
                stride = first if block == 0 else 1
                layers.append(
                    InvertedResidual(channels_in, channels, stride=stride, expansion=expansion, kernel=kernel, eps=eps)
                )
                channels_in = channels
        layers.append(_conv_norm_relu6(channels_in, last, 1, eps=eps))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def _conv_norm_relu6(
    channels_in: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1, eps: float
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels, eps=eps),
        nn.ReLU6(),
    )
