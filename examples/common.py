"""What the examples share: their options, the main job on each runtime, and its summary."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.report.data import Report
from bitsmith.report.terminal import summary
from bitsmith.targets import Target
from bitsmith.zoo.data import data_root
from bitsmith.zoo.digits import Split


def parser(name: str, samples: str, calibration: int, validation: int, test: int) -> argparse.ArgumentParser:
    """The options; the counts are the defaults, in ``samples``, such as images."""
    options = argparse.ArgumentParser(description=f"Optimize {name}.")
    options.add_argument("--target", choices=("onnxruntime", "openvino", "both"), default="both")
    options.add_argument("--drop", type=float, default=0.01, help="accuracy that may be lost, absolute (0.01)")
    options.add_argument("-o", "--out", type=Path, default=Path("out"), help="gets a folder for each target (out)")
    for part, count, use in (
        ("calibration", calibration, "for ranges and sensitivities"),
        ("validation", validation, "that choose the plan"),
        ("test", test, "for the report"),
    ):
        options.add_argument(f"--{part}", type=int, default=count, metavar="N", help=f"{samples} {use} ({count})")
    threads = min(2, os.cpu_count() or 1)
    options.add_argument("--threads", type=int, default=threads, metavar="N", help=f"of the runtime ({threads})")
    return options


def run(name: str, options: argparse.Namespace, load: Callable[[Path], tuple[nn.Module, bs.Task]]) -> int:
    """``load(data folder)`` gives the network and its task; each target gets its turn.

    0: every target met the budget. 1: one did not (its closest plan is saved). 2: data or a package is missing.
    """
    root = data_root()
    if root is None:
        print("no data folder: set BITSMITH_DATA to the one with the example's data and weights", file=sys.stderr)
        return 2
    try:
        model, task = load(root)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    names = ("onnxruntime", "openvino") if options.target == "both" else (options.target,)
    met = [
        optimize(name, model, task, target(runtime, options.threads), options.drop, options.out / runtime)
        for runtime in names
    ]
    return 0 if all(met) else 1


def target(name: str, threads: int) -> Target:
    if name == "onnxruntime":
        return bs.targets.OnnxRuntime(threads=threads)
    return bs.targets.OpenVino(threads=threads)


def optimize(name: str, model: nn.Module, task: bs.Task, target: Target, drop: float, folder: Path) -> bool:
    """The main job, with its summary on the terminal; False if no plan met the budget."""
    print(f"\n== {target.name}, at most {drop:.3f} accuracy lost on the validation data")
    title = f"{name} on {target.name}"
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
        print(f"{n} test samples: the standard error of this accuracy is {points:.1f} points")
    print(f"open {folder / 'report.html'}")


class Lines:
    """Progress as lines: what begins, and what is worth reading."""

    def start(self, task: str, total: int | None = None) -> None:
        print(f"  {task}" + (f" ({total} steps)" if total else ""), flush=True)

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


# -- networks of other frameworks, on digits --------------------------------------------------------------------------


def digits_parser(framework: str, epochs: int) -> argparse.ArgumentParser:
    """The options of an example that trains its own network."""
    options = argparse.ArgumentParser(description=f"Train a small {framework} network on digits and run it in int8.")
    options.add_argument("--target", choices=("onnxruntime", "openvino"), default="onnxruntime")
    options.add_argument("-o", "--out", type=Path, default=Path("out"), help="gets the files (out)")
    options.add_argument("--epochs", type=int, default=epochs, metavar="N", help=f"of training ({epochs})")
    threads = min(2, os.cpu_count() or 1)
    options.add_argument("--threads", type=int, default=threads, metavar="N", help=f"of the runtime ({threads})")
    return options


def quantize(name: str, model: nn.Module, parts: dict[str, Split], options: argparse.Namespace) -> None:
    """8 bits on the target, printed beside float: where, accuracy of both files on the test digits, ms of one digit."""
    runtime = target(options.target, options.threads)
    suffix = ".onnx" if options.target == "onnxruntime" else ".xml"
    options.out.mkdir(parents=True, exist_ok=True)
    calibration = batches(parts["calibration"], 32)
    one = calibration[0][0][:1]
    net = bs.quantize(model, calibration, runtime)
    files = {
        "float": bs.export(model, runtime, options.out / f"{name}_float{suffix}", one),
        "int8": bs.export(net, runtime, options.out / f"{name}_int8{suffix}", one),
    }
    print(f"\n== {name} on {runtime.name}")
    for site, found in runtime.inspect(files["int8"]).items():
        print(f"  {site:24s} {found.precision:8s} {found.reason}")
    times = runtime.measure(list(files.values()), 200)
    for (kind, file), timing in zip(files.items(), times, strict=True):
        right = sum(int(runtime.run(file, [x.numpy()])[0].argmax()) == int(y) for x, y in batches(parts["test"], 1))
        n = len(parts["test"][1])
        error = 100 * math.sqrt(right / n * (1 - right / n) / n)
        print(
            f"  {kind:5s} {100 * right / n:5.1f} % of {n} test digits (standard error {error:.1f} points), "
            f"{timing.ms:.3f} ms a digit, {file.mib:.2f} MiB"
        )
    print(f"  the file against its simulation: {bs.verify(net, files['int8'], calibration).whole_db:.1f} dB")


def batches(part: Split, size: int) -> list[tuple[Tensor, Tensor]]:
    x, y = torch.from_numpy(part[0]), torch.from_numpy(part[1])
    return list(zip(x.split(size), y.split(size), strict=True))
