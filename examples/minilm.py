"""Optimize the sentence encoder all-MiniLM-L6-v2 with a head for SST-2, for ONNX Runtime and OpenVINO.

    python examples/minilm.py [--target onnxruntime|openvino|both] [--drop 0.01] [-o out/]

Needs ``pip install "bitsmith[text]"`` and the real data: the folder in BITSMITH_DATA, or ../shared/data. The head is
fitted once and kept in the output folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import parser, run
from torch import nn

import bitsmith as bs
from bitsmith.zoo.tasks import minilm_task
from bitsmith.zoo.text import minilm_sst2


def main(argv: Sequence[str] | None = None) -> int:
    """0: every target met the budget. 1: one did not (its closest plan is saved). 2: data or a package is missing."""
    options = parser("all-MiniLM-L6-v2 on SST-2", "sentences", 64, 500, 872).parse_args(argv)

    def load(root: Path) -> tuple[nn.Module, bs.Task]:
        counts = {"calibration": options.calibration, "validation": options.validation, "test": options.test}
        task = minilm_task(root, **counts)
        return minilm_sst2(root, folder=options.out), task

    return run("MiniLM on SST-2", options, load)


if __name__ == "__main__":
    raise SystemExit(main())
