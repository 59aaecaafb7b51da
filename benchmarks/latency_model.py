"""How well the learned table of costs foretells the latency of plans that it never saw: ResNet-20, two runtimes.

Twenty mixed plans whose share of integer sites is spread evenly from 0 to 100 %, every second one in runs of
neighbouring sites, are timed whole, interleaved, and held against ``Profile.predict``. Two controls stand beside the
figures: the error of predicting the mean for every plan, and the rank correlation of the odd with the even rounds of
the measurement itself, which no model can be asked to beat.

One thread by default: on two shared virtual processors the level of one and the same file moves by 10 % between two
runs of this program, which says nothing about the table (``--threads 2`` shows it).
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import bitsmith as bs
from benchmarks.harness import Benchmark, table
from bitsmith import targets
from bitsmith.bench import Bench
from bitsmith.metrics import top1
from bitsmith.profile import measure
from bitsmith.targets.base import Target, Timing
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import load_npz

PARTS = {"onnxruntime": (1.0, 1.5), "openvino": (1.0, 1.5)}
PLANS = 20
BARS = {"error": 0.05, "against the mean": 0.5, "against split halves": 0.95}


def no_losses(model: nn.Module, task: bs.Task, pairs: Sequence[Any], simulate: Any) -> Iterator[float]:
    """Only times matter here."""
    return iter([0.0] * len(pairs))


def trained() -> tuple[nn.Module, torch.Tensor, str]:
    """ResNet-20 and 64 images: the pretrained weights and CIFAR-10 where the data folder has them, else random."""
    net, root = resnet20().eval(), data_root()
    if root is None or not (root / "cifar10_models" / "resnet20.npz").is_file():
        torch.manual_seed(0)
        return resnet20().eval(), torch.randn(64, 3, 32, 32), "random weights and images"
    load_npz(net, root / "cifar10_models" / "resnet20.npz")
    images = torch.from_numpy(normalise_cifar(cifar10(root)["x_train"][:64]))
    return net, images, "pretrained weights, CIFAR-10"


def unseen(
    sites: Sequence[str], fitted: Callable[[bs.Plan], bool], technique: bs.Technique, seed: int
) -> list[bs.Plan]:
    """Mixed plans with shares (of the sites that may change) at the middles of ``PLANS`` equal parts of 0 to 100 %.

    A plan that was ``fitted`` on is drawn again.
    """
    generator = random.Random(seed)
    plans: list[bs.Plan] = []
    while len(plans) < PLANS:
        index = len(plans)
        count = max(1, min(round((index + 0.5) / PLANS * len(sites)), len(sites) - 1))
        if index % 2:
            chosen = set(generator.sample(sites, count))
        else:
            # neighbours: the sites in order, cut into stretches of 5 that are shuffled; the first of them change
            offset = generator.randrange(5)
            stretches = [sites[max(0, i) : i + 5] for i in range(-offset, len(sites), 5)]
            generator.shuffle(stretches)
            chosen = set([site for stretch in stretches for site in stretch][:count])
        plan = bs.Plan({site: technique for site in sites if site in chosen})
        if not fitted(plan) and plan not in plans:
            plans.append(plan)
    return plans


def run(bench: Benchmark, target: Target) -> None:
    net, images, what = trained()
    labels = torch.zeros(len(images), dtype=torch.long)  # no accuracy is measured
    task = bs.Task([(images, labels)], [(images, labels)], metric=top1)
    setup = Bench.open(net, task, target, seed=0)
    technique = bs.Int(8, 8)
    start = time.perf_counter()
    profile = measure(setup, [technique], no_losses)
    learned_s = time.perf_counter() - start

    sites = [site for site, rows in profile.options().items() if len(rows) > 1]
    record = setup.net.record
    probes = {path.stem for path in (setup.folder / "artifacts").iterdir()}
    plans = unseen(sites, lambda plan: target.adapt(plan, record).digest()[:16] in probes, technique, seed=20)
    macs = {site: record.sites[site].macs for site in sites}
    adapted = [target.adapt(plan, record) for plan in plans]
    float_plan = target.adapt(bs.Plan(), record)
    rounds = 400 if bench.options.full else 200
    timings = setup.times([float_plan, *adapted], rounds)
    predicted = [profile.predict(plan)["ms"] for plan in plans]
    judge(bench, target, profile, plans, macs, timings, predicted, rounds, learned_s, what)


def judge(
    bench: Benchmark,
    target: Target,
    profile: bs.Profile,
    plans: Sequence[bs.Plan],
    macs: dict[str, int],
    timings: Sequence[Timing],
    predicted: Sequence[float],
    rounds: int,
    learned_s: float,
    what: str,
) -> None:
    whole, tests = timings[0], timings[1:]
    measured = np.array([t.ms for t in tests])
    errors = np.abs(np.array(predicted) - measured) / measured
    rows = []
    for plan, timing, ms, error in zip(plans, tests, predicted, errors, strict=True):
        share = len(plan) / len(macs)
        by_macs = sum(macs[site] for site in plan) / sum(macs.values())
        rows.append((f"{share:.0%}", f"{by_macs:.0%}", ms, timing.ms, timing.spread, f"{error:.1%}"))
        bench.row(
            target.name, sites=len(plan), share=share, share_of_macs=by_macs, predicted_ms=ms, measured_ms=timing.ms,
            spread_ms=timing.spread, error=float(error),
        )  # fmt: skip
    table(
        f"{target.name}: ResNet-20 ({what}), batch 1, {bench.options.threads} threads, {rounds} interleaved rounds, "
        "ms are medians +- half the interquartile range",
        ("int8 sites", "int8 MACs", "predicted", "measured", "+-", "error"),
        rows,
    )
    error = float(np.median(errors))
    control = float(np.median(np.abs(measured.mean() - measured) / measured))
    halves = correlation(
        [statistics.median(t.samples[0::2]) for t in tests], [statistics.median(t.samples[1::2]) for t in tests]
    )
    rank = correlation(predicted, measured)
    notes = {name: float(text.split()[0]) for name, text in profile.notes.items()}
    # relative to the float plan and by lower quartiles: what is left when other work disturbs the measurement
    low = np.array([float(np.quantile(t.samples, 0.25)) for t in timings])
    foretold = np.array(predicted) / profile.predict(bs.Plan())["ms"]
    calm = float(np.median(np.abs(foretold * low[0] / low[1:] - 1.0)))
    disturbed = float(np.median(measured / low[1:]))
    figures = {
        "median error": error,
        "control: error of predicting the mean": control,
        "rank correlation": rank,
        "control: odd against even rounds": halves,
        "median error of lower quartiles relative to the float plan's": calm,
        "disturbance: median over lower quartile (quiet: 1.0)": disturbed,
        "worst error": float(errors.max()),
        "learning, s": learned_s,
        "probes": int(notes["probes"]),
        "error foretold by leaving probes out": notes["fit error"],
        "float whole, ms, while learning": notes["float, whole"],
        "float, sum of its sites by the profiler": notes["float, sum of sites"],
        "float whole, ms, while testing": whole.ms,
    }
    table(f"{target.name}: figures and controls", ("", "value"), figures.items())
    bench.row(
        target.name, summary=True, weights=what, rounds=rounds, **{k.replace(" ", "_"): v for k, v in figures.items()}
    )
    bench.judge(f"{target.name}: median error", 100 * error, 100 * BARS["error"], " %")
    bench.judge(f"{target.name}: of the mean's error", error / control, BARS["against the mean"])
    bench.judge(f"{target.name}: rank of split-half", rank / halves, BARS["against split halves"], at_least=True)


def correlation(a: Sequence[float] | np.ndarray[Any, Any], b: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def main() -> int:
    bench = Benchmark("latency_model", PARTS, (__doc__ or "").splitlines()[0], default_threads=1)
    bench.start()
    threads = bench.options.threads
    for part in bench.chosen:
        run(bench, targets.OnnxRuntime(threads=threads) if part == "onnxruntime" else targets.OpenVino(threads=threads))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
