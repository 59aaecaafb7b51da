"""ImageNet ResNets: He et al. 2015, "Deep Residual Learning", arXiv:1512.03385, table 1.

Parameters are named as torchvision's, so its state dictionaries load. In a bottleneck the stride is in the 3x3
convolution, as there ("ResNet v1.5"). Every activation is a module of its own, for tools that go by modules.
"""

from __future__ import annotations

from torch import Tensor, nn

from .weights import build


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (n, channels_in, h, w) -> (n, width, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.downsample = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu2(out + shortcut)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut: (n, channels_in, h, w) -> (n, 4 * width, h / stride, w / stride)."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.downsample = _shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu3(out + shortcut)
        return result


def _shortcut(channels_in: int, channels: int, stride: int) -> nn.Sequential | None:
    """Option B: a 1x1 convolution where the shape changes, nothing elsewhere."""
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class ResNet(nn.Module):
    """(n, 3, 224, 224) -> (n, num_classes) logits; other heights and widths from 32 run as well.

    ``blocks``: how many in each of the four stages.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        stages = []
        for index, count in enumerate(blocks):
            width, stride = 64 << index, 1 if index == 0 else 2
            first = block(channels, width, stride)
            channels = width * block.expansion
            stages.append(nn.Sequential(first, *(block(channels, width, 1) for _ in range(count - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(num_classes: int = 1000, seed: int = 0) -> ResNet:
    """Random weights, in evaluation mode: 11.7 M parameters, 1.81 G multiply-accumulates at 224 px."""
    return build(lambda: ResNet(BasicBlock, (2, 2, 2, 2), num_classes), seed)


def resnet34(num_classes: int = 1000, seed: int = 0) -> ResNet:
    """Random weights, in evaluation mode: 21.8 M parameters, 3.66 G multiply-accumulates at 224 px."""
    return build(lambda: ResNet(BasicBlock, (3, 4, 6, 3), num_classes), seed)


def resnet50(num_classes: int = 1000, seed: int = 0) -> ResNet:
    """Random weights, in evaluation mode: 25.6 M parameters, 4.09 G multiply-accumulates at 224 px."""
    return build(lambda: ResNet(Bottleneck, (3, 4, 6, 3), num_classes), seed)
