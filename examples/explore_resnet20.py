"""All techniques on the pretrained CIFAR ResNet-20, searched for a target: which are chosen where, and why.

    python examples/explore_resnet20.py --target chip [chip40 systolic ...] [-o explored/]

``all`` stands for every target whose packages are here. Each gets its folder: plan.json, frontier.json and
frontier.html, whose table says of each technique where it was chosen or what it lost by. What a choice loses is
measured once for all targets that simulate it alike (``runs.db``). The same on the command line, one target a time:

    file=examples/explore_resnet20.py
    bitsmith explore $file:build --data $file:task --target $file:chip \\
        --accuracy-drop 1 --objective energy --techniques all --train 20 --trials 40 -o explored/

Needs the real data and weights: the folder in BITSMITH_DATA, or ../shared/data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import bitsmith as bs
from bitsmith.cli.main import BUDGET, INTERRUPTED
from bitsmith.cli.main import main as bitsmith
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import data_root
from bitsmith.zoo.tasks import cifar_task
from bitsmith.zoo.weights import load_npz


def _root() -> Path:
    root = data_root()
    if root is None:
        raise FileNotFoundError("the data folder is missing: set BITSMITH_DATA")
    return root


def build() -> nn.Module:
    """The network with its published weights."""
    return load_npz(resnet20(), _root() / "cifar10_models" / "resnet20.npz").eval()


def task() -> bs.Task:
    """256 training images calibrate, 500 others choose, the 1000 lossless test images are forwarded once."""
    return cifar_task(_root(), calibration=256, validation=500, batch=50)


def chip() -> bs.targets.DigitalAccelerator:
    """16 x 16 units and 128 KiB in 45 nm; pruned weights are stored in the smallest form, zeros are gated."""
    return bs.targets.DigitalAccelerator("45nm", storage="best", zeros="gate")


def chip40() -> bs.targets.DigitalAccelerator:
    """The same in 40 nm."""
    return bs.targets.DigitalAccelerator("40nm", storage="best", zeros="gate")


def systolic() -> bs.targets.SystolicArray:
    """32 x 32 units, weight stationary, 45 nm."""
    return bs.targets.SystolicArray("45nm")


def unzip() -> bs.targets.UnzipFpga:
    """An engine of a Zynq 7045 at a quarter of its bandwidth; the design is an ordinary one, not searched."""
    return bs.targets.UnzipFpga(bs.targets.Design(512, 13, 64, 64), bram_kib=2452.5, gb_s=1.05)


def zigzag() -> bs.targets.ZigZag:
    """The 45 nm chip with dense weights, mapped by ZigZag."""
    return bs.targets.ZigZag(bs.targets.DigitalAccelerator("45nm"))


TARGETS = {
    "onnxruntime": ("onnxruntime", "latency", "onnxruntime"),
    "openvino": ("openvino", "latency", "openvino"),
    "kernels": ("OpenVino(threads=2, kernels=True)", "latency", "bitsmith_kernels"),
    "chip": (f"{__file__}:chip", "energy", ""),
    "chip40": (f"{__file__}:chip40", "energy", ""),
    "systolic": (f"{__file__}:systolic", "energy", ""),
    "unzip": (f"{__file__}:unzip", "latency", ""),
    "zigzag": (f"{__file__}:zigzag", "energy", "zigzag"),
}
"""Of each name: what ``bitsmith explore --target`` takes, the objective, and the package that it needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: each target has its plan. 1: no plan of one kept the limit (the closest is saved). 2: something is missing."""
    options = argparse.ArgumentParser(description="Explore all techniques on the pretrained CIFAR ResNet-20.")
    options.add_argument("--target", nargs="+", choices=(*TARGETS, "all"), required=True)
    options.add_argument("--accuracy-drop", type=float, default=1.0, metavar="P", help="points that may be lost (1)")
    options.add_argument("--trials", type=int, default=40, metavar="N", help="plans to measure (40)")
    options.add_argument("--train", type=int, default=20, metavar="STEPS", help="for what needs training (20)")
    options.add_argument("-o", "--out", type=Path, default=Path("explored"), help="gets a folder a target (explored)")
    given = options.parse_args(argv)
    here = [name for name, (_, _, package) in TARGETS.items() if not package or importlib.util.find_spec(package)]
    names = here if "all" in given.target else list(dict.fromkeys(given.target))
    said, worst = [], 0
    for name in names:
        start = time.perf_counter()
        code = explore(name, given)
        if code == INTERRUPTED:
            return code
        worst = max(worst, {0: 0, BUDGET: 1}.get(code, 2))
        path = given.out / name / "frontier.json"
        if path.exists():
            said.append(f"{name}: {told(json.loads(path.read_text()))}; {time.perf_counter() - start:.0f} s")
    print("\n" + "\n".join(said))
    return worst


def explore(name: str, given: argparse.Namespace) -> int:
    """``bitsmith explore`` for one target; its exit code."""
    target, objective, _ = TARGETS[name]
    print(f"\n== {name}: {objective}, at most {given.accuracy_drop:g} points lost on the validation data", flush=True)
    argv = ["explore", f"{__file__}:build", "--data", f"{__file__}:task", "--target", target]
    argv += ["--accuracy-drop", str(given.accuracy_drop), "--objective", objective, "--techniques", "all"]
    argv += ["--train", str(given.train), "--trials", str(given.trials)]
    return bitsmith([*argv, "--store", str(given.out / "runs.db"), "-o", str(given.out / name)])


def told(found: dict[str, object]) -> str:
    """Objective and accuracy in float and as chosen, and how many sites each chosen technique has."""
    points, control, rows = found["points"], found["float"], found["techniques"]
    assert isinstance(points, list)
    assert isinstance(rows, list)
    assert isinstance(control, dict)
    best = next((point for point in points if point["chosen"]), points[0])
    unit = str(found["minimize"])
    chosen = ", ".join(f"{row['technique']} at {row['chosen']}" for row in rows if row["chosen"])
    values = f"{control[unit]:.4g} -> {best[unit]:.4g} {unit}, {control['mib']:.2f} -> {best['mib']:.2f} MiB"
    low, high = best["drop_interval"]
    drop = f"drop {100 * best['drop']:.1f} points ({100 * low:.1f} to {100 * high:.1f}, n={best['samples']})"
    return f"{values}; {found['metric']} {control['metric']:.3f} -> {best['metric']:.3f}, {drop}; {chosen}"


if __name__ == "__main__":
    sys.exit(main())
