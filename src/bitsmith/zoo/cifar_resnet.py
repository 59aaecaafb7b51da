"""CIFAR ResNets: He et al. 2015, "Deep Residual Learning", arXiv:1512.03385, section 4.2, with option A shortcuts.

A network of depth 6n + 2 has three stages of n blocks with 16, 32 and 64 channels on 32, 16 and 8 pixel maps. A
shortcut that changes shape takes every second pixel and pads the new channels with zeros: it has no parameters.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n, c_in, h, w) -> (n, c_out, h / stride, w / stride)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: the input itself, or every ``stride``-th pixel with zero channels on both sides."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """Input (n, 3, 32, 32) float, as ``bitsmith.zoo.data.normalise_cifar`` gives it; output (n, num_classes) logits."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"CifarResNet(depth={depth}): must be 6n + 2 with n >= 1, such as 20, 32, 44 or 56")
        if num_classes < 1:
            raise ValueError(f"CifarResNet(num_classes={num_classes}): must be at least 1")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for 32x32 images (arXiv:1512.03385, table 6): 0.27 M parameters, 40.6 M multiply-accumulates.

    >>> round(sum(p.numel() for p in resnet20().parameters()) / 1e6, 2)
    0.27
    """
    return CifarResNet(20, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """ResNet-32 for 32x32 images (arXiv:1512.03385, table 6): 0.46 M parameters."""
    return CifarResNet(32, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 for 32x32 images (arXiv:1512.03385, table 6): 0.85 M parameters."""
    return CifarResNet(56, num_classes)
