"""Optimize the pretrained CIFAR ResNet-20 for ONNX Runtime and OpenVINO.

    python examples/resnet20.py [--target onnxruntime|openvino|both] [--drop 0.01] [-o out/]

Needs the real data and weights: the folder in BITSMITH_DATA, or ../shared/data.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.report.data import Report
from bitsmith.report.terminal import summary
from bitsmith.targets import Target
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import load_npz

BATCH = 50


def main(argv: Sequence[str] | None = None) -> int:
    """0: every target met the budget. 1: one did not (its closest plan is saved). 2: there is no data."""
    parser = argparse.ArgumentParser(description="Optimize the pretrained CIFAR ResNet-20.")
    parser.add_argument("--target", choices=("onnxruntime", "openvino", "both"), default="both")
    parser.add_argument("--drop", type=float, default=0.01, help="accuracy that may be lost, absolute (0.01)")
    parser.add_argument("-o", "--out", type=Path, default=Path("out"), help="gets a folder for each target (out)")
    parser.add_argument("--calibration", type=int, default=256, metavar="N", help="images for ranges and losses (256)")
    parser.add_argument("--validation", type=int, default=1000, metavar="N", help="images that choose the plan (1000)")
    parser.add_argument("--test", type=int, default=1000, metavar="N", help="images for the report (1000)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="of the runtime")
    options = parser.parse_args(argv)

    root = data_root()
    if root is None:
        print("no data folder: set BITSMITH_DATA to the one that holds cifar10/ and cifar10_models/", file=sys.stderr)
        return 2
    model = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
    task = cifar_task(root, options.calibration, options.validation, options.test)
    names = ("onnxruntime", "openvino") if options.target == "both" else (options.target,)
    met = [optimize(model, task, target(name, options.threads), options.drop, options.out / name) for name in names]
    return 0 if all(met) else 1


def cifar_task(root: Path, calibration: int, validation: int, test: int) -> bs.Task:
    """Calibration and validation: different images of ``x_train``. Test: ``x_test``, which the search never reads."""
    data = cifar10(root)
    if calibration + validation > len(data["x_train"]):
        raise SystemExit(f"x_train has {len(data['x_train'])} images: ask for fewer than {calibration + validation}")

    def batches(split: str, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        images = torch.from_numpy(normalise_cifar(data[f"x_{split}"][start:stop]))
        classes = torch.from_numpy(data[f"y_{split}"][start:stop])
        return list(zip(torch.split(images, BATCH), torch.split(classes, BATCH), strict=True))

    print(f"calibration: {calibration} images of CIFAR-10's training set")
    print(
        f"validation: {validation} other images of the training set. The network was trained on that set, so its "
        "accuracy on them is optimistic; they only choose between plans"
    )
    print(f"test: {min(test, len(data['x_test']))} images that neither training nor search has read, for the report")
    return bs.Task(
        calibration=batches("train", 0, calibration),
        validation=batches("train", calibration, calibration + validation),
        test=batches("test", 0, test),
        metric=bs.metrics.top1,
        loss=F.cross_entropy,
    )


def target(name: str, threads: int) -> Target:
    if name == "onnxruntime":
        return bs.targets.OnnxRuntime(threads=threads)
    return bs.targets.OpenVino(threads=threads)


def optimize(model: nn.Module, task: bs.Task, target: Target, drop: float, folder: Path) -> bool:
    """The main job, with its summary on the terminal; False if no plan met the budget."""
    print(f"\n== {target.name}, at most {drop:.3f} accuracy lost on the validation images")
    title = f"CIFAR ResNet-20 on {target.name}"
    try:
        found = bs.optimize(model, task, target, bs.Budget(drop=drop), folder=folder, progress=Lines(), title=title)
    except bs.BudgetError as error:
        print(error, file=sys.stderr)
        tell(bs.Report.load(folder / "report.json"), folder)
        return False
    tell(found.report, folder)
    return True


def tell(report: Report, folder: Path) -> None:
    summary(report)
    if report.plan_metric is not None:
        p, n = report.plan_metric.value, report.plan_metric.n
        points = 100 * math.sqrt(p * (1 - p) / n)
        print(f"{n} test images: the standard error of this accuracy is {points:.1f} points")
    print(f"open {folder / 'report.html'}")


class Lines:
    """Progress as lines: what begins, and what is worth reading."""

    def start(self, task: str, total: int | None = None) -> None:
        print(f"  {task}" + (f" ({total} steps)" if total else ""), flush=True)

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
