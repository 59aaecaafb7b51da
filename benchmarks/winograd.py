"""Native Winograd convolutions against the runtimes' own int8, layer by layer and in whole networks.

    python -m benchmarks.winograd [--full] [--threads 1] [--only layers|products|networks]

Batch 1, fixed shapes, everything through the targets and files that users have. *Layers*: ten equal 3x3 convolutions
with weights of their own behind one another (weights come from memory, not from a cache): a tenth of the *chain*, and
what a layer takes *inside*, the difference to a chain of two by eight, without the floating images at both ends; on one
thread both are held against the bar. One *alone*, with its weights in the caches. *Products*: the share of the dot
product's peak that the kernels' innermost loop attains.
*Networks*: ResNet-18 and -50 shapes and a VGG-16 trunk, random weights with statistics of real images, ResNet-20 with
its own; against the fastest int8 file in OpenVINO (Bitsmith's, ONNX Runtime's quantizer's, NNCF's), each opened five
times. ``accelerate`` chooses the convolutions by their measured times, in each of them that is an ONNX file. All files
take turns; then the fastest and our accelerated one alone, as a user runs one network, and with no luck of the fastest
of many: that ratio is judged.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.accelerate import Accelerated, accelerate
from bitsmith.data import Unlabelled
from bitsmith.export.forms import openvino_form
from bitsmith.export.onnx import to_onnx
from bitsmith.export.program import applied_program
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import cifar10, imagenet_calibration, normalise_cifar, normalise_imagenet
from bitsmith.zoo.resnet import resnet18, resnet50
from bitsmith.zoo.statistics import settle_statistics
from bitsmith.zoo.vgg import vgg
from bitsmith.zoo.weights import load_npz

from .harness import Benchmark, Samples, interleaved, ratio, table
from .int8_peers import Source, made, silent, write_float
from .runtimes import OFF, Run, opened, sqnr

PARTS = {"layers": (4.0, 12.0), "products": (0.5, 0.5), "networks": (14.0, 40.0)}
DEPTHS = (10, 2, 1)
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
FORMS = {"F2 int8": bs.Winograd(2), "F4 int8": bs.Winograd(4), "F4 16 bits": bs.Winograd(4, 16)}
CALIBRATION, HELD_OUT, OPENINGS = 8, 8, 5


def bar_of(form: str, channels: int, size: int) -> float | None:
    """Of a layer's speed over the fastest runtime's; None: none was set."""
    if form == "F2 int8":
        return 1.2 if size == 7 else 1.45
    if form == "F4 int8":
        return 2.0 if size >= 14 else None
    return 1.3 if size >= 28 else None


# -- layers ------------------------------------------------------------------------------------------------------------


def chain(channels: int, depth: int) -> nn.Module:
    """Convolutions with bias and ReLU behind one another, weights as He et al. initialise them."""
    torch.manual_seed(channels + depth)
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def layers(bench: Benchmark) -> None:
    longest, shortest, alone = DEPTHS
    heads = ["layer", "where", "computed by", "ms a layer", "x fastest", "quartiles", "CPU ms", "dB"]
    lines = []
    for channels, size in LAYERS:
        times, cpu, db = one_shape(bench, channels, size)
        names = [name for name, depth in times if depth == longest]
        ends = {name: difference(times[name, longest], times[name, shortest]) for name in names}
        for where, depth, found in (
            ("chain", longest, {name: each(times[name, longest], longest) for name in names}),
            ("inside", longest, ends),
            ("alone", alone, {name: times[name, alone] for name in names}),
        ):
            rival = min(("OpenVINO", "ONNX Runtime"), key=lambda name: found[name].median)
            for name, samples in found.items():
                gain, processor = ratio(found[rival], samples), cpu[name, depth] / depth
                cells = [f"{channels}@{size}", where, name, f"{samples.median:.3f}", f"{gain.median:.2f}"]
                spread = "{:.2f} to {:.2f}".format(*gain.quartiles)
                lines.append([*cells, spread, f"{processor:.3f}", f"{db[name, depth]:.1f}"])
                row = {"channels": channels, "size": size, "where": where, "file": name, "rival": rival}
                figures = {"ms": samples.median, "cpu": processor, "gain": gain.median, "db": db[name, depth]}
                bench.row("layers", **row, **figures, quartiles=gain.quartiles)
                bar = bar_of(name, channels, size) if name in FORMS and where != "alone" else None
                if bar is not None and bench.threads == 1:
                    bench.judge(f"{name} {channels}@{size}, {where}", gain.median, bar, "x", at_least=True)
    table(f"3x3 convolutions, {bench.threads} threads", heads, lines)


def each(chain_of: Samples, depth: int) -> Samples:
    """ms of one layer of a chain, its float images at both ends included."""
    return Samples(tuple(ms / depth for ms in chain_of.ms))


def difference(longest: Samples, shortest: Samples) -> Samples:
    """ms of one layer inside a chain, round by round."""
    layers_between = DEPTHS[0] - DEPTHS[1]
    return Samples(tuple((a - b) / layers_between for a, b in zip(longest.ms, shortest.ms, strict=True)))


Key = tuple[str, int]
"""What computes, and how many layers."""
Figures = tuple[dict[Key, Samples], dict[Key, float], dict[Key, float]]


def one_shape(bench: Benchmark, channels: int, size: int) -> Figures:
    """ms, CPU ms and SQNR to float (dB, one random input) of whole chains."""
    draw = torch.Generator().manual_seed(size)
    data = [torch.randn(1, channels, size, size, generator=draw).relu() for _ in range(CALIBRATION)]
    openvino, native = bs.targets.OpenVino(bench.threads), bs.targets.OpenVino(bench.threads, kernels=True)
    plans: dict[str, tuple[Any, bs.Technique]] = {
        "OpenVINO": (openvino, bs.Int(8, 8)),
        "ONNX Runtime": (bs.targets.OnnxRuntime(bench.threads), bs.Int(8, 8)),
        **{name: (native, form) for name, form in FORMS.items()},
    }
    x = torch.randn(1, channels, size, size, generator=draw).relu()
    with tempfile.TemporaryDirectory(prefix="winograd-") as folder:
        runs: dict[Key, Callable[[], Any]] = {}
        db = {}
        for depth in DEPTHS:
            model = chain(channels, depth)
            with torch.inference_mode():
                reference = [model(x).numpy()]
            for name, (target, technique) in plans.items():
                net = bs.quantize(model, Unlabelled(data), target, technique, prepare=(), choose=False)
                suffix = ".onnx" if target.name == "onnxruntime" else ".xml"
                artifact = bs.export(net, target, Path(folder) / f"{name.replace(' ', '')}{depth}{suffix}", x)
                run = opened(target.name, artifact.path, bench.threads, disabled=OFF)
                db[name, depth] = sqnr(reference, run([x.numpy()]))
                runs[name, depth] = partial(run, [x.numpy()])
        rounds = 200 if bench.options.full else 60
        named = {f"{name} {depth}": run for (name, depth), run in runs.items()}
        times = interleaved(named, rounds, refill=True)
        cpu = {key: cpu_ms(run, rounds) for key, run in runs.items()}
    return {(name, depth): times[f"{name} {depth}"] for name, depth in runs}, cpu, db


def products(bench: Benchmark) -> None:
    """The innermost loop alone, weights and image in the caches, against the dot product in registers."""
    import bitsmith_kernels as kernels

    isa, lines = kernels.isas()[0], []
    print(f"{isa}, built by {kernels.compiler()}")
    for name, form in FORMS.items():
        tile, bits = form.tile, form.tap_bits
        peak = kernels.peak(isa, bits)
        for channels, _ in LAYERS:
            taps, rng = (tile + 2) ** 2, np.random.default_rng(channels)
            u = rng.integers(-127, 128, (taps, channels, channels), np.int16 if bits == 16 else np.int8)
            us = np.full((taps, channels), 1e-3)
            layer = kernels.Winograd(tile, bits, u, np.full((taps, channels), 1024), us, None, isa=isa)
            rounds = max(1, int(0.02 * peak / max(layer.multiply(1), 1)))
            shares = []
            for _ in range(11):
                start = time.thread_time()
                shares.append(layer.multiply(rounds) / (time.thread_time() - start) / peak)
            low, middle, high = statistics.quantiles(shares, n=4)
            figures = [f"{middle * peak / 1e9:.0f}", f"{peak / 1e9:.0f}", f"{middle:.0%}", f"{low:.0%} to {high:.0%}"]
            lines.append([name, channels, *figures])
            bench.row("products", form=name, channels=channels, share=middle, peak=peak, isa=isa, by=kernels.compiler())
            if bits == 8:
                bench.judge(f"products of {name}, {channels} channels", middle, 0.85, at_least=True)
    table("products alone, one core", ["form", "channels", "GMAC/s", "peak", "share of it", "quartiles"], lines)


def cpu_ms(run: Callable[[], Any], rounds: int) -> float:
    """Median CPU time of the whole process, its threads included."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        found.append((time.process_time() - start) * 1e3)
    return statistics.median(found)


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """``open(root)``: the float network and images, one each. ``bars``: of the ratio to the fastest int8 file, by
    threads."""

    open: Callable[[Path], tuple[nn.Module, Tensor]]
    bars: Mapping[int, float]


def settled(build: Callable[[], nn.Module]) -> Callable[[Path], tuple[nn.Module, Tensor]]:
    """Random weights, statistics of real images."""

    def opened_from(root: Path) -> tuple[nn.Module, Tensor]:
        images = torch.from_numpy(normalise_imagenet(imagenet_calibration(root)[: CALIBRATION + HELD_OUT]))
        return settle_statistics(build().eval(), Unlabelled([images[:CALIBRATION]])), images

    return opened_from


def trained(root: Path) -> tuple[nn.Module, Tensor]:
    """ResNet-20 with its own weights, and training images of CIFAR-10."""
    images = normalise_cifar(cifar10(root)["x_train"][: CALIBRATION + HELD_OUT])
    return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval(), torch.from_numpy(images)


def trunk() -> nn.Module:
    """VGG-16's convolutions, and a linear layer on the means of their maps."""
    return nn.Sequential(vgg(16, batch_norm=True).features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


NETWORKS: Mapping[str, Network] = {
    "ResNet-18": Network(settled(resnet18), {1: 1.36, 2: 1.31}),
    "ResNet-50": Network(settled(resnet50), {1: 1.12}),
    "VGG-16 trunk": Network(settled(trunk), {1: 1.5}),
    "ResNet-20": Network(trained, {1: 1.0, 2: 1.0}),
}


def networks(bench: Benchmark) -> None:
    root = bench.data()
    if root is None:
        return
    lines: list[list[Any]] = []
    for name, network in NETWORKS.items():
        lines += one_network(bench, name, *network.open(root), network.bars)
    heads = [
        "network",
        "int8 file",
        "ms",
        "accelerated ms",
        "x itself",
        "x fastest, all in turn",
        "x fastest, alone",
        "sites",
        "dB",
        "direct dB",
    ]
    table(f"whole networks in OpenVINO, batch 1, {bench.threads} threads", heads, lines)


def one_network(
    bench: Benchmark, name: str, model: nn.Module, images: Tensor, bars: Mapping[int, float]
) -> list[list[Any]]:
    """Every int8 file of the network and what ``accelerate`` made of it."""
    singles = [images[k : k + 1] for k in range(len(images))]
    calibration, held = singles[:CALIBRATION], singles[CALIBRATION:]
    target = bs.targets.OpenVino(bench.threads, kernels=True)
    with torch.inference_mode():
        reference = [model(x).numpy() for x in held]
    with tempfile.TemporaryDirectory(prefix="winograd-") as place:
        folder = Path(place)
        files = sources(model, calibration, folder, bench.threads)
        found: dict[str, Accelerated] = {}
        for label, path in files.items():
            if path.suffix != ".onnx":  # OpenVINO's own form: a rival only
                continue
            with silent():
                found[label] = accelerate(
                    path, folder / f"{len(found)}.onnx", [x.numpy() for x in calibration], target=target, rounds=30
                )
            print(f"{name}, {label}: {found[label].replaced} of {len(found[label].layers)} replaced", flush=True)
        fast = {label: one.artifact.path for label, one in found.items()}
        files["Bitsmith"], fast["Bitsmith"] = in_form(files["Bitsmith"]), in_form(fast["Bitsmith"])
        times = openings(bench, [*files.values(), *fast.values()], held[0])
        best = min(files, key=lambda label: statistics.median(times[files[label]]))
        pair = openings(bench, [files[best], fast["Bitsmith"]], held[0])
        db = {path: quality(path, bench.threads, held, reference) for path in (*files.values(), *fast.values())}
    alone = ratios(pair[files[best]], pair[fast["Bitsmith"]])
    lines = []
    for label, path in files.items():
        before = statistics.median(times[path])
        if label not in fast:
            lines.append([name, label, f"{before:.2f}", *[""] * 6, f"{db[path]:.1f}"])
            bench.row("networks", network=name, file=label, before=before, direct_db=db[path])
            continue
        own, over = (ratios(times[p], times[fast[label]]) for p in (path, files[best]))
        after = statistics.median(times[fast[label]])
        sites = f"{found[label].replaced} of {len(found[label].layers)}"
        nearness = [f"{db[fast[label]]:.1f}", f"{db[path]:.1f}"]
        gains = [f"{statistics.median(own):.2f}", spread(over), spread(alone) if label == "Bitsmith" else ""]
        lines.append([name, label, f"{before:.2f}", f"{after:.2f}", *gains, sites, *nearness])
        row = {"network": name, "file": label, "before": before, "after": after, "gains": over, "own": own}
        bench.row("networks", **row, replaced=found[label].replaced, db=db[fast[label]], direct_db=db[path])
    bench.row("networks", network=name, alone=alone, fastest=best)
    if bench.threads in bars:
        middle = statistics.median(alone)
        bench.judge(f"{name} over {best}, the fastest int8 file", middle, bars[bench.threads], "x", at_least=True)
    return lines


def spread(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.3f} ({min(found):.2f} to {max(found):.2f})"


def sources(model: nn.Module, calibration: Sequence[Tensor], folder: Path, threads: int) -> dict[str, Path]:
    """The int8 files that are compared: ours and the peers'."""
    import onnx

    net = bs.quantize(model, Unlabelled(calibration), bs.targets.OpenVino(threads))
    program, _ = applied_program(net, calibration[0], 1)
    own = folder / "bitsmith.onnx"
    onnx.save(to_onnx(program), str(own))
    write_float(model, calibration[0], folder / "float.onnx")
    entry = onnx.load(str(folder / "float.onnx")).graph.input[0].name
    found = {"Bitsmith": own}
    for result in made(Source(folder / "float.onnx", [{entry: x.numpy()} for x in calibration]), folder):
        if result.value is not None:
            found[result.peer.name] = result.value
        elif result.value is None:
            print(result.why, flush=True)
    return found


def in_form(path: Path) -> Path:
    """As our OpenVINO target writes it, for which ``accelerate`` is not asked: it leaves the rest of a file alone."""
    import onnx

    out = path.with_suffix(".form.onnx")
    onnx.save(openvino_form(onnx.load(str(path))), str(out))
    return out


def openings(bench: Benchmark, files: Sequence[Path], x: Tensor) -> dict[Path, list[float]]:
    """Median ms of each file in each of :data:`OPENINGS`: where its memory comes to lie changes the time of a file."""
    found: dict[Path, list[float]] = {path: [] for path in files}
    rounds = (60 if bench.options.full else 20) * (1 if len(found) > 2 else 3)  # of two files more cost little
    for seed in range(OPENINGS):
        runs = {str(path): opened("openvino", path, bench.threads) for path in found}
        calls = {name: lambda run=run: run([x.numpy()]) for name, run in runs.items()}
        times = interleaved(calls, rounds, refill=True, seed=seed)
        for path in found:
            found[path].append(times[str(path)].median)
    return found


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def quality(path: Path, threads: int, held: Sequence[Tensor], reference: Sequence[Any]) -> float:
    """SQNR to float in dB, all samples together."""
    run: Run = opened("openvino", path, threads)
    return sqnr(reference, [np.asarray(run([x.numpy()])[0]) for x in held])


def main() -> int:
    bench = Benchmark("winograd", PARTS, description=(__doc__ or "").splitlines()[0], default_threads=1)
    bench.start()
    return bench.run({"layers": layers, "products": products, "networks": networks})


if __name__ == "__main__":
    sys.exit(main())
