"""The pretrained ResNet-20, all int8, on both runtimes: does it run as simulated, and how do peers' files do beside it?

Proof: every site's integers against the simulation fed the same input, the outputs of 1000 images, the precision read
back. Beside it, interleaved in one run: the float file, ours, ONNX Runtime's own quantizer's, and NNCF's if it is
installed, each with its accuracy on the 1000 lossless test images (standard error about one point).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitsmith as bs
from benchmarks.harness import Benchmark, interleaved, table
from benchmarks.int8_peers import FILE_PEERS, Source, made
from benchmarks.runtimes import OFF, Run, opened
from bitsmith import targets
from bitsmith.bench import Bench
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import load_npz

PARTS = {"onnxruntime": (1.5, 2.5), "openvino": (1.5, 2.5)}
BARS = {"onnxruntime": 40.0, "openvino": 35.0}
ROUNDS = 300


def batches(images: Any, labels: Any, size: int = 50) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.from_numpy(normalise_cifar(images))
    y = torch.from_numpy(labels).long()
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def run(bench: Benchmark, target: bs.targets.Target) -> None:
    root = data_root()
    if root is None:
        bench.miss("the data folder is missing: set BITSMITH_DATA")
        return
    data = cifar10(root)
    model = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
    calibration, test = batches(data["x_train"][:256], data["y_train"][:256]), batches(data["x_test"], data["y_test"])
    task = bs.Task(calibration=calibration, validation=calibration, metric=bs.metrics.top1)
    setup = Bench.open(model, task, target)
    offered = {n: bs.Int(8, 8) for n, s in setup.net.record.sites.items() if s.role == "integer"}
    supported = {n: t for n, t in offered.items() if target.supports(t, setup.net.record.sites[n])}
    plan = target.adapt(bs.Plan(supported), setup.net.record)
    ours, base = setup.artifact(plan), setup.artifact(bs.Plan())
    check = bs.verify(setup.simulate(plan), ours, test, target=target, samples=1000)
    realised = [site.realised for site in check.sites]
    table(
        f"{target.name}: run against simulation, {check.samples} images",
        ("whole, dB", "worst site, within one step", "same class, run", "same class, float", "sites", "int8", "folded"),
        [
            (
                check.whole_db,
                check.worst_agree,
                str(check.same_class),
                str(check.float_same_class),
                len(realised),
                realised.count("int8"),
                realised.count("folded"),
            )
        ],
    )
    name = target.name
    bench.row(name, **{k: v for k, v in check.to_json().items() if not isinstance(v, list)})
    bench.judge(f"{name}: whole network", check.whole_db, BARS[name], " dB", at_least=True)
    bench.judge(f"{name}: integers within one step", check.worst_agree, 0.999, at_least=True)
    bench.judge(
        f"{name}: same class as simulated", check.same_class or 0.0, check.float_same_class or 0.0, at_least=True
    )
    bench.judge(f"{name}: sites that did not run as asked", len(check.unrealised), 0)
    threads = bench.options.threads
    files = {"float": base.path, "Bitsmith": ours.path, **dict(peers(base, calibration, setup.folder, name))}
    mine = ("float", "Bitsmith")
    opened_files = {
        label: opened(name, path, threads, disabled=OFF if label in mine else ()) for label, path in files.items()
    }
    runs = {label: functools.partial(first_output, run_it) for label, run_it in opened_files.items()}
    image = test[0][0][:1].numpy()
    timings = interleaved({label: functools.partial(run_it, image) for label, run_it in runs.items()}, ROUNDS)
    rows = []
    for label, path in files.items():
        timing, correct = timings[label], accuracy(runs[label], test)
        low, high = timing.quartiles
        over = timing.median / timings["Bitsmith"].median
        size = sum(f.stat().st_size for f in {path, path.with_suffix(".bin")} if f.exists())
        rows.append((label, timing.median, (high - low) / 2, f"{over:.2f}", f"{correct:.1%}", size))
        bench.row(name, file=label, ms=timing.median, over_ours=over, top1=correct, samples=1000, bytes=size)
    table(
        f"{name}: batch 1, {threads} threads, {ROUNDS} interleaved rounds; top-1 of 1000 lossless test images",
        ("file", "ms", "+-", "over ours", "top-1", "bytes"),
        rows,
    )


def peers(
    base: bs.Artifact, calibration: list[tuple[Any, Any]], folder: Path, runtime: str
) -> Iterator[tuple[str, Path]]:
    """Files that other tools make of the float network with the same 256 images."""
    source = folder / "float.onnx"
    if runtime == "onnxruntime":
        source = base.path
    else:
        bs.export(resnet(), targets.OnnxRuntime(), source, calibration[0][0], batch=1)
    name = base.inputs[0][0]
    feeds = [{name: x[i : i + 1].numpy()} for x, _ in calibration for i in range(len(x))]
    nncf = "NNCF ONNX, accurate" if runtime == "onnxruntime" else "NNCF OpenVINO, accurate"
    chosen = [peer for peer in FILE_PEERS if peer.name in ("ONNX Runtime, min/max", nncf)]
    for result in made(Source(source, feeds), folder, chosen):
        if result.value is None:
            print(result.why)
        else:
            yield result.peer.name, result.value


def resnet() -> torch.nn.Module:
    root = data_root()
    assert root is not None
    return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()


def accuracy(run: Callable[[Any], Any], test: list[tuple[Any, Any]]) -> float:
    """Top-1, one image at a time."""
    right = sum(int(np.argmax(run(x[i : i + 1].numpy()))) == int(y[i]) for x, y in test for i in range(len(x)))
    return right / sum(len(y) for _, y in test)


def first_output(run_it: Run, x: Any) -> Any:
    return run_it([x])[0]


def main() -> int:
    bench = Benchmark("resnet20", PARTS, (__doc__ or "").splitlines()[0])
    bench.start()
    threads = bench.options.threads
    for part in bench.chosen:
        run(bench, targets.OnnxRuntime(threads=threads) if part == "onnxruntime" else targets.OpenVino(threads=threads))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
