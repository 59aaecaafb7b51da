"""All-int8 files of the same float network: ours, ONNX Runtime's quantizer's, NNCF's, each on both runtimes.

    python -m benchmarks.int8_parity [--full] [--threads 2] [--only resnet50|mobilenetv2|bert]

Batch 1, real inputs. A file counts if >= 95 % of its multiply-accumulates are read back as int8 and its SQNR to float
is within 1 dB of the best peer's that does so, or better. Bars, on each runtime: our median time <= 1.00 of the best
counting peer file's within the run's spread; for MobileNetV2 and BERT <= 0.95 on at least one runtime. And each file
runs as simulated: nearer to the simulation than float is by 3 dB at least, every site in the precision asked for.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitsmith as bs
from bitsmith.data import Unlabelled

from .harness import Benchmark, Samples, interleaved, ratio, table
from .int8_nets import SUBJECTS, Subject
from .int8_peers import Source, made, silent, write_float
from .runtimes import OFF, RUNTIMES, Array, Run, opened, opens, products, sqnr
from .verified import Proof, judge_checks, prove

PARTS = {"resnet50": (3.0, 8.0), "mobilenetv2": (2.5, 6.0), "bert": (16.0, 30.0)}
LIGHT = ("mobilenetv2", "bert")
"""Where one runtime at least has to be faster than the best peer by 5 %."""

CALIBRATION, HELD_OUT = 16, 16
OPENINGS = {"resnet50": (10, 20), "mobilenetv2": (20, 60), "bert": (6, 12)}
ROUNDS = 10
"""Every file is opened anew so often, by default and with ``--full``, for as many rounds: where its memory comes to lie
changes a time for as long as it is open, by more than the rounds differ (files of one structure show it)."""

INT8_SHARE, WITHIN_DB = 0.95, 1.0


@dataclass
class File:
    """One file on one runtime. ``kind``: ``ours`` (made for this runtime), ``peer``, ``control``, or ``other``."""

    name: str
    path: Path
    kind: str
    runtime: str
    disabled: tuple[str, ...] = ()
    bfloat16: bool = False
    seconds: float = 0.0
    db: float = float("nan")
    share: float = 0.0
    sites_share: float | None = None
    samples: list[float] = field(default_factory=list)

    def open(self, threads: int) -> Run:
        return opened(self.runtime, self.path, threads, bfloat16=self.bfloat16, disabled=self.disabled)

    @property
    def times(self) -> Samples:
        return Samples(tuple(self.samples))


def run(bench: Benchmark, net: str) -> None:
    root = bench.data()
    if root is None:
        return
    with tempfile.TemporaryDirectory(prefix="int8_parity-") as name:
        folder = Path(name)
        with silent():
            subject = SUBJECTS[net](root, CALIBRATION, HELD_OUT)
        found: dict[str, list[File]] = {runtime: [] for runtime in RUNTIMES}
        for file in files(bench, net, subject, folder):
            found[file.runtime].append(file)
        ratios = {}
        for runtime in RUNTIMES:
            measure(bench, net, subject, found[runtime])
            ratios[runtime] = judge(bench, net, runtime, found[runtime])
        known = {runtime: value for runtime, value in ratios.items() if value is not None}
        if net in LIGHT and known:
            best = min(known, key=lambda runtime: known[runtime])
            bench.judge(f"{net}: ours / best peer where it is least ({best})", known[best], 0.95, "x")


def files(bench: Benchmark, net: str, subject: Subject, folder: Path) -> Iterator[File]:
    """Everything that is compared, each file once for every runtime that reads it."""
    example = subject.calibration[0]
    source = folder / "float.onnx"
    write_float(subject.model, example, source)
    for runtime in RUNTIMES:
        yield File("float", source, "control", runtime)
    yield File("float, bf16", source, "control", "openvino", bfloat16=True)
    proofs = []
    for target in (bs.targets.OnnxRuntime(threads=bench.threads), bs.targets.OpenVino(threads=bench.threads)):
        artifact, seconds, share, proof = ours(subject, target, folder)
        name = proof.what
        proofs.append(proof)
        print(f"{name}: quantize and export, {seconds:.0f} s", flush=True)
        for runtime in RUNTIMES:
            if opens(runtime, artifact.path):
                mine = runtime == target.name
                file = File(name, artifact.path, "ours" if mine else "other", runtime, OFF, seconds=seconds)
                yield _with(file, sites_share=share if mine else None)
    judge_checks(bench, net, f"{net}: what runs and what was simulated, held-out inputs", proofs)
    entry = _input_name(source)
    feeds = [{entry: x.numpy()} for x in subject.calibration]
    for result in made(Source(source, feeds, subject.heads, subject.hidden), folder):
        if result.value is None:
            print(result.why, flush=True)
            bench.row(net, file=result.peer.name, absent=result.absent, why=result.why)
            continue
        print(f"{result.peer.name} {result.peer.version}: {result.peer.settings}; {result.seconds:.0f} s", flush=True)
        for runtime in RUNTIMES:
            if opens(runtime, result.value):
                yield File(result.peer.name, result.value, "peer", runtime, seconds=result.seconds)


def ours(subject: Subject, target: Any, folder: Path) -> tuple[bs.Artifact, float, float, Proof]:
    """Default ``quantize`` and ``export``; the seconds, the share of MACs at sites read back as int8, the proof."""
    start = time.perf_counter()
    net = bs.quantize(subject.model, Unlabelled(subject.calibration), target)
    suffix = ".onnx" if target.name == "onnxruntime" else ".xml"
    artifact = bs.export(net, target, folder / f"ours-{target.name}{suffix}", subject.calibration[0], batch=1)
    seconds = time.perf_counter() - start
    sites = bs.sites(subject.model, subject.calibration[0])
    ran = target.inspect(artifact)
    weighty = {name: site.macs for name, site in sites.items() if site.macs and site.role != "composite"}
    integer = sum(macs for name, macs in weighty.items() if name in ran and ran[name].precision == "int8")
    proof = prove(f"Bitsmith for {target.name}", net, artifact, Unlabelled(subject.held_out), target)
    return artifact, seconds, integer / sum(weighty.values()), proof


def _with(file: File, **values: Any) -> File:
    for name, value in values.items():
        setattr(file, name, value)
    return file


def _input_name(path: Path) -> str:
    import onnx

    return str(onnx.load(str(path), load_external_data=False).graph.input[0].name)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(bench: Benchmark, net: str, subject: Subject, compared: list[File]) -> None:
    """Fill in quality, share and times of the files of one runtime; a file that does not open is taken out."""
    held_out: list[list[Array]] = [[x.numpy()] for x in subject.held_out]
    with torch.no_grad():
        reference = [subject.model(x).numpy() for x in subject.held_out]
    for file in list(compared):
        try:
            if file.kind == "peer" and file.runtime == "onnxruntime":
                file.disabled = better(file, held_out[0], bench.threads)
            opened_file = file.open(bench.threads)
            file.db = sqnr(reference, [np.asarray(opened_file(x)[0]) for x in held_out])
            file.share = products(
                file.runtime, file.path, held_out[0], bfloat16=file.bfloat16, disabled=file.disabled
            ).int8
        except Exception as error:  # a file that one runtime refuses must not hide the others
            first = (str(error).strip().splitlines() or [""])[0]
            print(f"{file.name} does not run in {file.runtime} ({type(error).__name__}: {first})", flush=True)
            bench.row("refused", file=file.name, runtime=file.runtime, why=first)
            if file.kind == "ours":
                bench.miss(f"{file.name} does not run in {file.runtime}")
            compared.remove(file)
    for opening in range(OPENINGS[net][bool(bench.options.full)]):
        runs = {file.name: _bound(file.open(bench.threads), held_out[0]) for file in compared}
        times = interleaved(runs, ROUNDS, warm=3, refill=True, seed=opening)
        for file in compared:
            file.samples.extend(times[file.name].ms)
        runs.clear()
        gc.collect()


def better(file: File, x: Sequence[Array], threads: int) -> tuple[str, ...]:
    """The optimizers to switch off for a peer's file: none, or ours, whichever runs it faster."""
    runs = {off: _bound(opened(file.runtime, file.path, threads, disabled=off), x) for off in ((), OFF)}
    times = interleaved({str(off): call for off, call in runs.items()}, rounds=15, warm=3)
    return min(runs, key=lambda off: times[str(off)].median)


def _bound(call: Run, x: Sequence[Array]) -> Callable[[], Any]:
    return lambda: call(x)


# -- judging ---------------------------------------------------------------------------------------------------------


def counting(peers: Sequence[File]) -> tuple[list[File], float]:
    """The peer files that count, and the least SQNR that does: 1 dB below the best that really runs in int8."""
    whole = [file for file in peers if file.share >= INT8_SHARE]
    least = max((file.db for file in whole), default=float("-inf")) - WITHIN_DB
    return [file for file in whole if file.db >= least], least


def median_interval(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median (percentile method); whole openings are drawn, ``ROUNDS`` values each."""
    openings = np.asarray(values).reshape(-1, ROUNDS)
    generator = np.random.default_rng(seed)
    drawn = openings[generator.integers(len(openings), size=(draws, len(openings)))]
    low, high = np.quantile(np.median(drawn.reshape(draws, -1), axis=1), (0.025, 0.975))
    return float(low), float(high)


def judge(bench: Benchmark, net: str, runtime: str, compared: Sequence[File]) -> float | None:
    """The table of one network on one runtime, and ours against the best counting peer: the median ratio."""
    mine = next((file for file in compared if file.kind == "ours"), None)
    peers = [file for file in compared if file.kind == "peer"]
    counted, least = counting(peers)
    best = min(counted, key=lambda file: file.times.median, default=None)
    rows = []
    for file in compared:
        low, high = file.times.quartiles
        over = ratio(file.times, mine.times).median if mine else float("nan")
        counts = {"peer": "yes" if file in counted else "no"}.get(file.kind, "")
        share = f"{file.share:.1%}" + (f" ({file.sites_share:.1%})" if file.sites_share is not None else "")
        rows.append(
            (file.name, file.times.median, f"{low:.4g} to {high:.4g}", f"{over:.3f}", f"{file.db:.1f}", share, counts)
        )
        bench.row(
            net,
            runtime=runtime,
            file=file.name,
            kind=file.kind,
            ms=file.times.median,
            ms_q1=low,
            ms_q3=high,
            over_ours=over,
            sqnr_db=file.db,
            held_out=HELD_OUT,
            int8_share=file.share,
            int8_share_of_sites=file.sites_share,
            counts=counts,
            switched_off=list(file.disabled),
            seconds_to_make=file.seconds,
        )
    rounds = len(compared[0].samples)
    table(
        f"{net} in {runtime}: batch 1, {bench.threads} threads, {rounds} interleaved rounds in "
        f"{rounds // ROUNDS} openings; SQNR to float on {HELD_OUT} held-out inputs, {CALIBRATION} for calibration",
        ("file", "ms", "quartiles", "over ours", "SQNR dB", "MACs in int8 (sites)", "counts"),
        rows,
    )
    if mine is None or best is None:
        bench.miss(f"{net} in {runtime}: nothing to compare ({'no peer file counts' if mine else 'no file of ours'})")
        return None
    where = f"{net} in {runtime}"
    bench.judge(f"{where}: our MACs in int8", mine.share, INT8_SHARE, at_least=True)
    bench.judge(f"{where}: our SQNR", mine.db, least, " dB", at_least=True)
    compared_rounds = ratio(mine.times, best.times).ms
    middle = statistics.median(compared_rounds)
    low, high = median_interval(compared_rounds)
    print(f"{where}: ours / {best.name} = {middle:.3f} (95 % of the median: {low:.3f} to {high:.3f})")
    bench.row(net, runtime=runtime, best_peer=best.name, ratio=middle, ratio_low=low, ratio_high=high)
    fastest = min(peers, key=lambda file: file.times.median)
    if fastest is not best:
        least_ratio = ratio(mine.times, fastest.times).median
        print(f"{where}: the fastest file, {fastest.name}, does not count ({fastest.db:.1f} dB, {fastest.share:.1%} "
              f"int8); ours / it = {least_ratio:.3f}")  # fmt: skip
        bench.row(net, runtime=runtime, fastest_peer=fastest.name, ratio=least_ratio)
    bench.judge(f"{where}: ours / best peer ({best.name})", middle, 1.0 + (high - low) / 2, "x")
    return middle


def main(argv: Sequence[str] | None = None) -> int:
    bench = Benchmark("int8_parity", PARTS, (__doc__ or "").splitlines()[0])
    bench.start(argv)
    return bench.run({net: _part(net) for net in PARTS})


def _part(net: str) -> Callable[[Benchmark], None]:
    return lambda bench: run(bench, net)


if __name__ == "__main__":
    sys.exit(main())
