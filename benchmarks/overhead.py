"""What the simulation costs: forward against the peers', calibration time and memory, import time.

    python -m benchmarks.overhead [--full] [--only forward|calibration|memory|import]

Bars: the simulated int8 forward of a ResNet-50 shape is no slower than the fastest peer's; calibration over 256 images
takes <= 1.3 x 256 plain forwards for min/max and <= 2.0 x for histograms; its peak memory with 512 samples is within
10 % of that with 32; ``import bitsmith`` takes <= 0.3 s beyond ``import torch``.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitsmith.data import Unlabelled
from bitsmith.model.apply import build, quantizer
from bitsmith.model.calibrate import calibrate
from bitsmith.model.formats import place
from bitsmith.model.network import Network, network
from bitsmith.plan import Plan
from bitsmith.site import Range, RangeMethod
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.techniques.int_ import Int
from bitsmith.zoo.resnet import ResNet, resnet50
from bitsmith.zoo.statistics import settle_statistics

from .harness import Benchmark, interleaved, ratio, table
from .peers import PEERS, quantized_share, quiet

KINDS = ("conv2d", "linear", "add", "adaptive_avg_pool2d")
SHAPE = (3, 224, 224)
PARTS = {"forward": (4.0, 10.0), "calibration": (6.0, 14.0), "memory": (3.0, 6.0), "import": (1.0, 2.0)}


def images(count: int, seed: int) -> Tensor:
    """Random inputs (count, 3, 224, 224): only shapes and finite ranges count here."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def settled() -> ResNet:
    """ResNet-50 of random weights whose activations keep one order of magnitude."""
    return settle_statistics(resnet50(), Unlabelled([images(8, 3)]))


def full_plan(net: Network, limits: Range) -> Plan:
    """8 bits for every layer, addition and pooling, as ONNX Runtime needs it."""
    sites = [name for name, site in net.record.sites.items() if site.kind in KINDS]
    return OnnxRuntime(threads=2).adapt(Plan(dict.fromkeys(sites, Int(8, 8, range=limits))), net.record)


def sqnr(reference: Tensor, output: Any) -> float:
    """Signal to noise of the simulated output against float, in dB."""
    output = getattr(output, "value", output)  # Brevitas returns a QuantTensor where it is asked to
    noise = (reference - output).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


# -- a. forward ----------------------------------------------------------------------------------------------------


def forward(bench: Benchmark) -> None:
    model, x = settled(), images(8, 0)
    batches = [images(8, seed) for seed in (1, 2)]
    net = network(model, x)
    versions = {"float": "", "bitsmith": importlib.metadata.version("bitsmith")}
    settings = {"float": "eager", "bitsmith": "Int(8, 8), OnnxRuntime().adapt, layers + additions + pooling"}
    models: dict[str, Callable[[Tensor], Any]] = {
        "float": model,
        "bitsmith": build(net, full_plan(net, Range()), [(batch, None) for batch in batches]),
    }
    for peer in PEERS.values():
        try:
            with quiet():
                versions[peer.name], settings[peer.name] = peer.version, peer.settings
                models[peer.name] = peer.build(model, batches)
        except importlib.metadata.PackageNotFoundError:
            bench.miss(f'{peer.name} is not installed (pip install -c constraints.txt -e ".[peers]")')
        except Exception as error:  # a peer that breaks must not hide the others
            bench.miss(f"{peer.name} did not run ({type(error).__name__}: {error})")
    gc.collect()
    with torch.no_grad(), quiet():
        reference = model(x)
        quality = {name: sqnr(reference, run(x)) for name, run in models.items() if name != "float"}
        shares = {name: quantized_share(run, x[:1]) for name, run in models.items()}
        runs = {name: (lambda run=run: run(x)) for name, run in models.items()}
        times = interleaved(runs, rounds=41 if bench.options.full else 15)
    rows = []
    for name, samples in times.items():
        low, high = samples.quartiles
        of_float = ratio(samples, times["float"]).median
        row = {
            "name": name,
            "version": versions[name],
            "ms": samples.median,
            "ms_q1": low,
            "ms_q3": high,
            "of_float": of_float,
            "mac_share": shares[name],
            "sqnr_db": quality.get(name),
            "batch": len(x),
            "settings": settings[name],
        }
        bench.row("forward", **row)
        decibel = f"{quality[name]:.1f}" if name in quality else ""
        spread, part = f"{low:.4g} to {high:.4g}", f"{shares[name]:.1%}"
        first = f"{name} {versions[name]}"
        rows.append((first, samples.median, spread, f"{of_float:.2f}", part, decibel, settings[name]))
    table(
        "Simulated int8 forward, ResNet-50 shape, batch 8, no_grad (wall clock, interleaved)",
        ("", "ms", "quartiles", "x float", "MACs in int8", "SQNR dB", "settings"),
        rows,
    )
    for name, share in shares.items():
        if name != "float" and share < 0.95:
            bench.miss(f"{name} quantizes only {share:.1%} of the MACs, which is no comparison")
    if shares["float"] > 0.0:
        bench.miss("the check of the grid takes the float model for quantized")
    peers = [name for name in times if name not in ("float", "bitsmith")]
    if peers:
        fastest = min(peers, key=lambda name: times[name].median)
        bench.judge(f"forward / fastest peer ({fastest})", ratio(times["bitsmith"], times[fastest]).median, 1.0, "x")


# -- b. calibration ------------------------------------------------------------------------------------------------


def calibration(bench: Benchmark) -> None:
    model = settled()
    data = [(images(16, seed), None) for seed in range(16)]
    net = network(model, data[0][0])

    def plain() -> None:
        with torch.no_grad():
            for inputs, _ in data:
                model(inputs)

    def ours(limits: Range) -> Callable[[], None]:
        wanted = place(full_plan(net, limits), net.record).tensors

        def run() -> None:
            record = net.with_statistics(calibrate(net, wanted, data)).record
            for tensor, fmt in wanted:
                quantizer(record, tensor, fmt)

        return run

    ranges = {"minmax": Range(), "percentile": Range("percentile"), "mse": Range("mse")}
    bars = {"minmax": 1.3, "percentile": 2.0, "mse": 2.0}
    runs = {"256 plain forwards": plain, **{name: ours(method) for name, method in ranges.items()}}
    times = interleaved(runs, rounds=7 if bench.options.full else 3, warm=1)
    rows = []
    for name, samples in times.items():
        relative = ratio(samples, times["256 plain forwards"])
        low, high = relative.quartiles
        bench.row(
            "calibration",
            name=name,
            s=samples.median / 1e3,
            of_plain=relative.median,
            of_plain_q1=low,
            of_plain_q3=high,
        )
        rows.append((name, samples.median / 1e3, f"{relative.median:.2f}", f"{low:.2f} to {high:.2f}"))
        if name in bars:
            bench.judge(f"calibration {name} / plain", relative.median, bars[name], "x")
    table("Calibration over 256 images (batch 16), ranges chosen", ("", "s", "x plain", "quartiles"), rows)


# -- c. memory -----------------------------------------------------------------------------------------------------


class Fresh:
    """A loader that makes each batch when it is asked for, so that the data is never resident as a whole."""

    def __init__(self, samples: int, batch: int) -> None:
        self.samples, self.batch = samples, batch

    def __len__(self) -> int:
        return self.samples // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for index in range(len(self)):
            yield images(self.batch, index), None


def peak_mib() -> float:
    """The greatest resident memory of this process so far, in MiB.

    Not ``getrusage``: its figure survives ``exec`` and would be the parent's.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this part needs Linux")


def memory_child(samples: int, method: RangeMethod, threads: int) -> None:
    """In a process of its own: calibrate with so many samples and print the peak before and after."""
    torch.set_num_threads(threads)
    model = resnet50()  # not settled: the copy that this makes would hide what calibration takes
    data = Fresh(samples, 8)
    net = network(model, images(8, 0))
    with torch.no_grad():
        model(images(8, 0))
    before = peak_mib()
    wanted = place(full_plan(net, Range(method)), net.record).tensors
    calibrate(net, wanted, data)
    print(before, peak_mib())


def memory(bench: Benchmark) -> None:
    repeats = 5 if bench.options.full else 2
    rows = []
    for method in ("minmax", "mse"):
        peaks: dict[int, list[float]] = {32: [], 512: []}
        before: list[float] = []
        for _ in range(repeats):
            for samples, found in peaks.items():
                call = f"from benchmarks import overhead; overhead.memory_child({samples}, {method!r}, {bench.threads})"
                first, last = map(float, child(call).split())
                before.append(first)
                found.append(last)
        start = statistics.median(before)
        for samples, found in peaks.items():
            median, least, most = statistics.median(found), min(found), max(found)
            bench.row(
                "memory",
                method=method,
                samples=samples,
                peak_mib=median,
                least_mib=least,
                most_mib=most,
                start_mib=start,
            )
            cells = (f"{median:.0f}", f"{least:.0f} to {most:.0f}", f"{start:.0f}")
            rows.append((f"{method}, {samples} samples", *cells))
        growth = statistics.median(peaks[512]) / statistics.median(peaks[32])
        bench.judge(f"memory {method} 512 / 32 samples", growth, 1.1, "x")
    table("Peak resident memory of calibration (batch 8), MiB", ("", "median", "range", "before calibrating"), rows)


# -- d. import -----------------------------------------------------------------------------------------------------


HEAVY = ("onnx", "onnxruntime", "onnxscript", "openvino", "matplotlib", "scipy", "sklearn", "rich", "jinja2")


def importing(bench: Benchmark) -> None:
    codes = ("import torch", "import torch, bitsmith")
    runs: dict[str, Callable[[], Any]] = {code: functools.partial(child, code) for code in codes}
    times = interleaved(runs, rounds=31 if bench.options.full else 11)
    base, ours = times.values()
    extra = statistics.median(b - a for a, b in zip(base.ms, ours.ms, strict=True)) / 1e3
    seen = (
        f"import sys, torch; old = set(sys.modules); import bitsmith; print(*({set(HEAVY)} & (set(sys.modules) - old)))"
    )
    heavy = sorted(child(seen).split())
    rows = []
    for name, samples in times.items():
        low, high = samples.quartiles
        bench.row("import", name=name, s=samples.median / 1e3, s_q1=low / 1e3, s_q3=high / 1e3)
        rows.append((name, f"{samples.median / 1e3:.3f}", f"{low / 1e3:.3f} to {high / 1e3:.3f}"))
    table("Import, a fresh process each (wall clock, interleaved)", ("", "s", "quartiles"), rows)
    bench.judge("import bitsmith beyond torch", extra, 0.3, " s")
    if heavy:
        bench.miss(f"import bitsmith loads {', '.join(heavy)}")


def child(code: str) -> str:
    """The standard output of ``code`` in a fresh Python; what it writes as errors is seen here."""
    root = Path(__file__).parent.parent
    # an installed package has its bytecode on disk; the warm rounds write what is missing
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout


def main() -> int:
    bench = Benchmark("overhead", PARTS, "What the simulation costs, against the peers' and against bars.")
    bench.start()
    return bench.run({"forward": forward, "calibration": calibration, "memory": memory, "import": importing})


if __name__ == "__main__":
    sys.exit(main())
