"""VGG: Simonyan and Zisserman 2014, arXiv:1409.1556, table 1 (A, B, D, E), with batch normalisation or without.

Parameters are named as torchvision's, so its state dictionaries load.
"""

from __future__ import annotations

from torch import Tensor, nn

from .weights import build

# 3x3 convolutions in each of the five stages, whose channels are 64, 128, 256, 512, 512
_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Vgg(nn.Module):
    """(n, 3, 224, 224) -> (n, num_classes) logits."""

    def __init__(self, depth: int, batch_norm: bool = False, num_classes: int = 1000) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(f"Vgg(depth={depth}): must be one of {', '.join(map(str, _DEPTHS))}")
        layers: list[nn.Module] = []
        channels_in = 3
        for channels, count in zip((64, 128, 256, 512, 512), _DEPTHS[depth], strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(channels_in, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU())
                channels_in = channels
            layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def vgg(depth: int, batch_norm: bool = False, num_classes: int = 1000, seed: int = 0) -> Vgg:
    """VGG-11, -13, -16 or -19 of random weights, in evaluation mode. VGG-16: 138 M parameters, 15.5 G
    multiply-accumulates. Raises ``ValueError`` for another depth."""
    return build(lambda: Vgg(depth, batch_norm, num_classes), seed)
