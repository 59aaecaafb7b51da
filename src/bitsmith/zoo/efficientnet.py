"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) for integer hardware.

As its publisher describes it (tensorflow/tpu, models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6 in
place of swish. Convolutions pad equally on both sides, where TensorFlow pads the odd zero at the end: shapes and costs
are the same.
"""

from __future__ import annotations

from .blocks import InvertedResidualNet
from .weights import build

# kernel, expansion, channels, blocks, stride
_STAGES = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


def efficientnet_lite0(num_classes: int = 1000, seed: int = 0) -> InvertedResidualNet:
    """Random weights, in evaluation mode: (n, 3, 224, 224) -> (n, num_classes), 4.65 M parameters, 0.4 G
    multiply-accumulates."""
    return build(lambda: InvertedResidualNet(32, _STAGES, 1280, num_classes, eps=1e-3), seed)
