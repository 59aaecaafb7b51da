"""Layers of signs against OpenVINO's own int8 and float32, layer by layer.

    python -m benchmarks.binary [--full] [--threads 1]

``Binary("xnor", activations=True)`` by the xor-popcount kernel in OpenVINO, batch 1 for convolutions, through the
target and the files that users have. Ten equal layers with weights of their own behind one another (weights come from
memory, not from a cache), a normalisation behind each; a ReLU too where integers or floats are computed, which costs
them nothing. A tenth of the chain, the floating ends included; all files take turns, the second of two runs counts. CPU
ms is processor time, which other work on the machine moves less. The bar: no slower than int8, in CPU ms on one thread.

It is a speed alone: what signs lose of accuracy is in studies/binary_networks.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.data import Unlabelled
from bitsmith.targets import _openvino_kernels

from .harness import Benchmark, Samples, interleaved, ratio, table

PARTS = {"layers": (1.5, 5.0)}
DEPTH = 10
CONVOLUTIONS = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Channels and size of 3x3 convolutions of batch 1."""
LINEAR = ((512, 1), (512, 256), (2048, 1), (2048, 64))
"""Channels and rows."""
SIGNS = bs.Binary("xnor", activations=True)
ROUNDS, MANY = 51, 201


def chain(channels: int, linear: bool, rectified: bool) -> nn.Module:
    """Layers and their normalisations, weights as torch initialises them."""
    torch.manual_seed(channels)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layer = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        norm = nn.BatchNorm1d(channels) if linear else nn.BatchNorm2d(channels)
        layers += [layer, norm, *((nn.ReLU(),) if rectified else ())]
    return nn.Sequential(*layers)


def exported(
    target: Any, technique: bs.Technique | None, channels: int, x: Tensor, folder: Path
) -> tuple[bs.Artifact, str]:
    """The file of a chain, and in what its layers ran."""
    signs = isinstance(technique, bs.Binary)
    net = chain(channels, x.dim() == 2, rectified=not signs).train()
    with torch.no_grad():
        net(torch.randn(64, *x.shape[1:]) if x.dim() == 2 else x)  # statistics of something
    net.eval()
    data = Unlabelled([x])
    if isinstance(technique, bs.Int):
        net = bs.quantize(net, data, target, technique, prepare=(), choose=False)
    else:
        found = bs.sites(net, x) if technique is not None else {}
        plan = {name: technique for name in found if technique is not None and technique.fits(found[name])}
        net = bs.apply(net, bs.Plan(plan), data)
    folder.mkdir()
    artifact = bs.export(net, target, folder / "net.xml", x, batch=len(x))
    ran = target.inspect(artifact)
    return artifact, ", ".join(sorted({found.precision for found in ran.values()} - {"folded", "removed"}))


Figures = tuple[Samples, Samples, str]
"""ms and processor ms of a whole chain, and in what its layers ran."""


def one_shape(bench: Benchmark, channels: int, x: Tensor) -> dict[str, Figures]:
    """Of float32, int8 and signs."""
    target = bs.targets.OpenVino(bench.threads, kernels=True)
    forms = {"float32": None, "int8": bs.Int(8, 8), "signs": SIGNS}
    with tempfile.TemporaryDirectory() as root:
        files = {name: exported(target, technique, channels, x, Path(root) / name) for name, technique in forms.items()}
        runs = {name: target.opened(artifact) for name, (artifact, _) in files.items()}
        given = [x.numpy()]
        cpu: dict[str, list[float]] = {name: [] for name in runs}

        def once(name: str) -> None:
            start = time.process_time()
            runs[name](given)
            cpu[name].append((time.process_time() - start) * 1e3)

        rounds = MANY if bench.options.full else ROUNDS
        times = interleaved({name: functools.partial(once, name) for name in runs}, rounds, refill=True)
    # of every two calls the second, as in the wall-clock times
    return {name: (times[name], Samples(tuple(cpu[name][1::2][-rounds:])), files[name][1]) for name in forms}


def layers(bench: Benchmark) -> None:
    lines = []
    draw = torch.Generator().manual_seed(0)
    shapes = [(f"3x3 {c}@{s}", c, torch.randn(1, c, s, s, generator=draw)) for c, s in CONVOLUTIONS]
    shapes += [(f"linear {c}, {rows} rows", c, torch.randn(rows, c, generator=draw)) for c, rows in LINEAR]
    for name, channels, x in shapes:
        found = one_shape(bench, channels, x)
        for form, (wall, cpu, ran) in found.items():
            line, row = [name, form, ran], {"layer": name, "form": form, "ran": ran}
            for kind, samples, rival in (("cpu", cpu, found["int8"][1]), ("ms", wall, found["int8"][0])):
                gain, ends = ratio(rival, samples), [one / DEPTH for one in samples.quartiles]
                line += [f"{samples.median / DEPTH:.4f}", "{:.4f} to {:.4f}".format(*ends)]
                line += ["{:.2f} ({:.2f} to {:.2f})".format(gain.median, *gain.quartiles)]
                row |= {kind: samples.median / DEPTH, f"{kind} quartiles": ends}
                row |= {f"{kind} gain": gain.median, f"{kind} gains": gain.quartiles}
            lines.append(line)
            bench.row("layers", **row)
        if found["signs"][2] != "binary":
            bench.miss(f"{name}: layers of signs ran as {found['signs'][2]}")
        kind = 1 if bench.threads == 1 else 0
        bench.judge(name, ratio(found["int8"][kind], found["signs"][kind]).median, 1.0, "x", at_least=True)
    figures = ["quartiles", "x int8 (quartiles)"]
    heads = ["layer", "asked", "ran", "CPU ms a layer", *figures, "wall ms", *figures]
    table(f"Layers of signs, {bench.threads} threads", heads, lines)


def main() -> int:
    bench = Benchmark("binary", PARTS, default_threads=1, description=(__doc__ or "").partition("\n")[0])
    bench.start()
    missing = _openvino_kernels.missing_signs()
    if missing is not None:
        bench.miss(str(missing))
        return bench.finish()
    return bench.run({"layers": layers})


if __name__ == "__main__":
    sys.exit(main())
