"""Palettizing MobileNetV1 after training: seconds and squared error, beside coremltools in the same run.

    python -m benchmarks.palettize [--full] [--threads 2]

MobileNetV1 of width 1 at 224 px with random weights (4.2 M), k-means for each layer (coremltools folds normalisations).
*Ours*: `bitsmith.apply` of a plan with `Palette(w)` everywhere, recording included. *coremltools* (`pip install
coremltools`): `palettize_weights` of the converted model, without the conversion. Error: of all weights together, in dB
of signal to noise, each against the weights that it was given. Bar: 20 s.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import additions_of, materialised
from bitsmith.model.keys import encode_key
from bitsmith.model.network import network
from bitsmith.zoo.mobilenet import mobilenet_v1

from .harness import Benchmark, table

PARTS = {"palettize": (1.5, 4.0)}
BITS = (2, 4, 6)
SECONDS = 20.0


def ours(model: nn.Module, x: Tensor, bits: int) -> Callable[[], nn.Module]:
    technique = bs.Palette(bits)

    def run() -> nn.Module:
        sites = bs.sites(model, x)
        plan = bs.Plan({name: technique for name, site in sites.items() if technique.fits(site)})
        return bs.apply(model, plan, [(x, None)])

    return run


def our_decibels(net: nn.Module, model: nn.Module, x: Tensor) -> float:
    record = network(model, x).record
    cells = additions_of(materialised(net, lambda module: module(x))).cells
    signal = noise = 0.0
    for name in bs.plan_of(net).sites:
        wanted = record.weights[name, 1].double()
        signal += float(wanted.square().sum())
        noise += float((cells[encode_key(name)].get_buffer("weight_f").double() - wanted).square().sum())
    return 10 * float(np.log10(signal / noise))


class Peer:
    """coremltools' model, converted once."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.tools = _coremltools()
        program = torch.export.export(model, (x,)).run_decompositions({})
        target = self.tools.target.iOS18
        with _quiet():
            self.model = self.tools.convert(program, minimum_deployment_target=target, convert_to="mlprogram")

    def run(self, bits: int) -> Callable[[], Any]:
        import coremltools.optimize.coreml as optimize

        how = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0)
        config = optimize.OptimizationConfig(global_config=how)

        def run() -> Any:
            with _quiet():
                return optimize.palettize_weights(self.model, config)

        return run

    def decibels(self, palettized: Any) -> float:
        import coremltools.optimize.coreml as optimize

        with _quiet():
            plain = optimize.get_weights_metadata(self.model, weight_threshold=0)
            again = optimize.get_weights_metadata(optimize.decompress_weights(palettized), weight_threshold=0)
        pairs = [[np.asarray(one.val, np.float64) for one in found.values()] for found in (plain, again)]
        wanted, got = ([array for array in arrays if array.ndim > 1] for arrays in pairs)
        # names change on the way, the order of the layers does not
        if [array.shape for array in wanted] != [array.shape for array in got]:
            return float("nan")
        signal = sum(float(np.square(a).sum()) for a in wanted)
        noise = sum(float(np.square(b - a).sum()) for a, b in zip(wanted, got, strict=True))
        return 10 * float(np.log10(signal / noise))


def _coremltools() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("coremltools").setLevel(logging.CRITICAL)
        import coremltools

        return coremltools


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def palettize(benchmark: Benchmark) -> None:
    model, x = mobilenet_v1(), torch.zeros(1, 3, 224, 224)
    peer: Peer | None = None
    try:
        peer = Peer(model, x)
    except ImportError:
        benchmark.miss("coremltools is missing: pip install -c constraints.txt coremltools")
    rounds = 5 if benchmark.options.full else 2
    lines = []
    for bits in BITS:
        runs = {"bitsmith": ours(model, x, bits), **({"coremltools": peer.run(bits)} if peer is not None else {})}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        spent: dict[str, list[float]] = {name: [] for name in runs}
        made: dict[str, Any] = {}
        for _ in range(rounds):
            for name, run in runs.items():
                start, before = time.perf_counter(), sum(os.times()[:4])
                made[name] = run()
                seconds[name].append(time.perf_counter() - start)
                spent[name].append(sum(os.times()[:4]) - before)
        for name, times in seconds.items():
            mine = peer is None or name == "bitsmith"
            found = our_decibels(made[name], model, x) if mine or peer is None else peer.decibels(made[name])
            benchmark.row("palettize", bits=bits, library=name, seconds=times, cpu=spent[name], db=found)
            both = [f"{min(values):.2f} to {max(values):.2f}" for values in (times, spent[name])]
            lines.append([str(bits), name, *both, f"{found:.2f}"])
        benchmark.judge(f"{bits} bits, slowest round", max(seconds["bitsmith"]), SECONDS, " s")
    table(
        "MobileNetV1, k-means of every layer",
        ["bits", "library", "seconds", "of the processors", "signal to noise of weights, dB"],
        lines,
    )


def main(argv: Sequence[str] | None = None) -> int:
    benchmark = Benchmark("palettize", PARTS, __doc__ or "")
    benchmark.start(argv)
    return benchmark.run({"palettize": palettize})


if __name__ == "__main__":
    sys.exit(main())
