"""Golden numbers: what each runtime gives for one tiny int8 network. Run this file to write them again.

Rewrite them only when a change of the numbers is meant, and say in the commit which and why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

import bitsmith as bs  # noqa: E402
from smallnet import Batch, Small  # noqa: E402 (found through the line above)

TARGETS: dict[str, Callable[[], bs.targets.Target]] = {
    "onnxruntime": lambda: bs.targets.OnnxRuntime(threads=1),
    "openvino": lambda: bs.targets.OpenVino(threads=1),
}
SAMPLES = 4


def seeded() -> Small:
    """The network with numbers from one generator, in an order that is written here."""
    model = Small(width=4).eval()
    generator = torch.Generator().manual_seed(20261120)
    with torch.no_grad():
        for name in sorted(model.state_dict()):
            tensor = model.state_dict()[name]
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                spread = (2 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.2
                tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
    return model


def data(seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(SAMPLES, 3, 12, 12, generator=generator), torch.zeros(SAMPLES, dtype=torch.int64))]


def computed(name: str) -> dict[str, Any]:
    """Plan, realised precisions and outputs of the int8 network as that runtime computes it."""
    target, calibration, (x, _) = TARGETS[name](), data(1), data(2)[0]
    net = bs.quantize(seeded(), calibration, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.xml" if name == "openvino" else "model.onnx")
        artifact = bs.export(net, target, path, x, batch=SAMPLES)
        (output,) = target.run(artifact, [x.numpy()])
        realised = {site: got.precision for site, got in target.inspect(artifact).items()}
    return {
        "plan": bs.plan_of(net).to_json()["sites"],
        "realised": realised,
        "outputs": [[round(float(value), 6) for value in row] for row in output],
        "versions": dict(artifact.versions),
    }


def main() -> None:
    for name in TARGETS:
        path = HERE / f"{name}.json"
        path.write_text(json.dumps(computed(name), indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
