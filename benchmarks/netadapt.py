"""Channels taken away by measured time: NetAdapt, uniform widths and int8 on MobileNetV1 in OpenVINO.

    python -m benchmarks.netadapt [--full] [--small] [--threads 2]

MobileNetV1 (width 0.75, 224 px, Keras' weights); `--small`: DS-CNN S, in a minute or two. *Uniform*: the same part of
every group's channels. *NetAdapt*: the table is measured in the run, candidates are scored on validation samples. No
image with a class is at hand to train on, so nobody is trained: weights that read removed channels are fitted by least
squares on calibration samples, the same for both. *int8* is the default of `bitsmith.quantize` on each network. All
files are timed in turn; accuracy is that of the simulation on test samples. Bars: NetAdapt's most accurate network is
no slower than the uniform one of no more accuracy, and the table predicts times within 10 % (median).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

import bitsmith as bs
from bitsmith.task import Task, score
from bitsmith.zoo.ds_cnn import pretrained_ds_cnn
from bitsmith.zoo.mobilenet import pretrained_mobilenet_v1
from bitsmith.zoo.tasks import ds_cnn_task, mobilenet_v1_task

from .harness import Benchmark, table

PARTS = {"netadapt": (20.0, 90.0)}
BUDGETS = (0.85, 0.7)
"""Parts of the first network's time."""
WIDTHS = (0.9, 0.8)
SAMPLES = 64
"""Calibration samples that weights are fitted to again."""
TABLE_ERROR = 0.1


@dataclass(frozen=True)
class Made:
    name: str
    net: nn.Module
    accuracy: float
    predicted: float | None = None


def subject(benchmark: Benchmark, root: Path) -> tuple[nn.Module, Task, int]:
    """The network, its task, and the multiple that numbers of channels keep to."""
    if benchmark.options.small:
        return pretrained_ds_cnn(root), ds_cnn_task(root, validation=400, calibration=SAMPLES), 4
    test = None if benchmark.options.full else 300
    return pretrained_mobilenet_v1(root), mobilenet_v1_task(root, validation=100, test=test, batch=20), 8


def netadapt(benchmark: Benchmark) -> None:
    root = benchmark.data()
    if root is None:
        return
    model, task, divisor = subject(benchmark, root)
    target = bs.targets.OpenVino(threads=benchmark.threads)
    widths = [("float", model), *((f"uniform {w:g}", _uniform(model, task, w, divisor)) for w in WIDTHS)]
    predicted: dict[str, float] = {}
    first: bs.Adapted | None = None
    for part in BUDGETS:
        if first is None:  # a budget that holds at once: the cost to begin with, and the table's error
            first = bs.netadapt(model, task, target, 1e9, divisor=divisor)
            benchmark.judge("table, median error", first.table_error or 0.0, TABLE_ERROR)
        found = bs.netadapt(
            model, task, target, part * first.first_cost, divisor=divisor, cut=0.08, decay=1.0, samples=SAMPLES
        )
        widths.append((f"NetAdapt {part:g}", found.model))
        predicted[widths[-1][0]] = found.cost
        benchmark.row("netadapt", budget=part, cost=found.cost, steps=[vars(step) for step in found.steps])
    made = []
    for name, net in widths:
        made.append(Made(name, net, score(net, task, "test").mean, predicted.get(name)))
        quantized = bs.quantize(net, task.calibration, target=target)
        made.append(
            replace(made[-1], name=f"{name}, int8", net=quantized, accuracy=score(quantized, task, "test").mean)
        )
    with tempfile.TemporaryDirectory() as folder:
        example = next(iter(task.calibration))
        x = example[0][:1] if isinstance(example, tuple) else example[:1]
        files = [bs.export(one.net, target, Path(folder) / f"{k}.xml", x) for k, one in enumerate(made)]
        timings = target.measure(files, rounds=100 if benchmark.options.full else 40)
        lines = []
        for one, file, timing in zip(made, files, timings, strict=True):
            said = "-" if one.predicted is None or "int8" in one.name else f"{one.predicted:.3g}"
            lines.append(
                [
                    one.name,
                    f"{timing.ms:.3g} ± {timing.spread:.2g}",
                    said,
                    f"{file.mib:.2f}",
                    f"{100 * one.accuracy:.1f}",
                ]
            )
            benchmark.row("netadapt", network=one.name, ms=timing.ms, mib=file.mib, accuracy=one.accuracy)
    table("one sample at a time", ["network", "ms", "predicted ms", "MiB", "top-1, %"], lines)
    times = {one.name: timing.ms for one, timing in zip(made, timings, strict=True)}
    ours = max((one for one in made if one.name.startswith("NetAdapt") and "int8" not in one.name), key=_accuracy)
    beaten = [o for o in made if o.name.startswith("uniform") and "int8" not in o.name and o.accuracy <= ours.accuracy]
    if beaten:
        best = max(beaten, key=_accuracy)
        benchmark.judge(f"{ours.name} over {best.name}, time", times[ours.name] / times[best.name], 1.0)
    else:
        benchmark.miss(f"every uniform network is more accurate than {ours.name}")


def _accuracy(one: Made) -> float:
    return one.accuracy


def _uniform(model: nn.Module, task: Task, width: float, divisor: int) -> nn.Module:
    step = bs.PruneChannels(width, divisor=divisor, samples=SAMPLES)
    return bs.prune_channels(model, step, task.calibration)


def main(argv: Sequence[str] | None = None) -> int:
    small = {"small": "DS-CNN S instead of MobileNetV1"}
    benchmark = Benchmark("netadapt", PARTS, __doc__ or "", flags=small)
    benchmark.start(argv)
    return benchmark.run({"netadapt": netadapt})


if __name__ == "__main__":
    sys.exit(main())
