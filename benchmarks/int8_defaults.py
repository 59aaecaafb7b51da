"""What ``quantize`` should do where it is not told: combinations of steps on four trained networks, validation data.

    python -m benchmarks.int8_defaults [--resume] [--threads 2] [--only PART]

Simulated in ONNX Runtime's form; mean KL divergence from float. At 8 bits the default has to have the least geometric
mean over the networks (bar 1.00). ``.w4a8``: the same at 4-bit weights. ``groups``: what GPTQ's damping should be.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import bitsmith as bs
from bitsmith.data import items

from .harness import RESULTS, Benchmark, table
from .int8_peers import silent
from .int8_tasks import NETWORKS, AnyBits
from .logit_peers import GROUP, float_logits
from .paired import divergence, mean_interval

EQUAL, SMOOTH, BIAS = bs.EqualiseDepthwise(), bs.SmoothQuant(0.85, multiply=True), bs.CorrectBias()
Settings = Mapping[str, Any]
EIGHT: Mapping[str, Settings] = {
    "nothing": {"prepare": (), "choose": False},
    "bias": {"prepare": (BIAS,), "choose": False},
    "ranges": {"prepare": ()},
    "ranges, bias": {"prepare": (BIAS,)},
    "default": {},
    "default without ranges": {"choose": False},
    "default and Equalise": {"prepare": (bs.Equalise(), EQUAL, SMOOTH, BIAS)},
    "default without SmoothQuant": {"prepare": (EQUAL, BIAS)},
    "default, SmoothQuant without multiplications": {"prepare": (EQUAL, bs.SmoothQuant(0.85), BIAS)},
    "default, SmoothQuant at 0.5": {"prepare": (EQUAL, bs.SmoothQuant(multiply=True), BIAS)},
    "default, SmoothQuant choosing": {"prepare": (EQUAL, bs.SmoothQuant(None, multiply=True), BIAS)},
}
FOUR: Mapping[str, Settings] = {
    "nothing": {"prepare": (), "choose": False},
    "bias": {"prepare": (EQUAL, BIAS)},
    "default": {},
    "GPTQ": {"prepare": (EQUAL, bs.Gptq(), BIAS)},
    "GPTQ, extremes": {"prepare": (EQUAL, bs.Gptq(), BIAS), "choose": False},
    "AdaRound": {"prepare": (EQUAL, bs.AdaRound(), BIAS)},
    "AdaRound, extremes": {"prepare": (EQUAL, bs.AdaRound(), BIAS), "choose": False},
    "AdaRound, symmetric": {"prepare": (EQUAL, bs.AdaRound(asymmetric=False), BIAS)},
}
"""All but the first with ``EqualiseDepthwise`` before and ``CorrectBias`` behind."""

SMOOTHED: Mapping[str, Settings] = {
    "GPTQ, SmoothQuant": {"prepare": (EQUAL, SMOOTH, bs.Gptq(), BIAS)},
    "GPTQ, SmoothQuant at 0.5": {"prepare": (EQUAL, bs.SmoothQuant(multiply=True), bs.Gptq(), BIAS)},
}
"""For transformers: elsewhere there is nothing to smooth."""

DAMPED: Mapping[str, Settings] = {
    "nearest": {"prepare": ()},
    **{f"GPTQ, damp {damp:g}": {"prepare": (bs.Gptq(damp=damp),)} for damp in (0.01, 0.1, 0.3, 1.0)},
    **{f"GPTQ, damp {damp:g}, act_order": {"prepare": (bs.Gptq(damp, act_order=True),)} for damp in (0.01, 0.1, 0.3)},
}
"""For weights only, in groups."""

PARTS = {
    **{"resnet20": (1.5, 1.5), "mobilenet_v1": (8.0, 8.0), "ds_cnn": (1.0, 1.0), "minilm": (8.0, 8.0)},
    "together": (0.0, 0.0),
    **{"resnet20.w4a8": (3.0, 3.0), "mobilenet_v1.w4a8": (12.0, 12.0), "ds_cnn.w4a8": (2.0, 2.0)},
    "minilm.w4a8": (25.0, 25.0),
    "together.w4a8": (0.0, 0.0),
    **{"minilm.groups": (4.0, 4.0), "minilm.affine_groups": (4.0, 4.0)},
}


def compare(bench: Benchmark, name: str, technique: bs.Int, combinations: Mapping[str, Settings], part: str) -> None:
    """One table: each combination's divergence from float on the validation samples, the least first."""
    root = bench.data()
    if root is None:
        return
    task = NETWORKS[name].task(root)
    with silent():
        model = NETWORKS[name].model(root, RESULTS / "heads")
    reference, labels = _logits(model, task), np.concatenate([np.asarray(y) for _, y in items(task.validation, "")])
    rows = []
    for label, settings in combinations.items():
        start = time.perf_counter()
        net = bs.quantize(model, task.calibration, AnyBits(bench.threads), technique, **settings)
        seconds = time.perf_counter() - start
        logits = _logits(net, task)
        kl = divergence(reference, logits)
        low, high = mean_interval(kl)
        right = float((logits.argmax(1) == labels).mean())
        rows.append((label, float(kl.mean()), f"{low:.3g} to {high:.3g}", f"{right:.2%}", f"{seconds:.0f}"))
        bench.row(part, name=label, kl=float(kl.mean()), kl_low=low, kl_high=high, accuracy=right, seconds=seconds)
        print(f"{part}: {label}, {seconds:.0f} s, KL {kl.mean():.4g}", flush=True)
    table(
        f"{name}, {technique}: {len(labels)} validation samples, float {(reference.argmax(1) == labels).mean():.2%}",
        ("steps", "KL to float", "95 %", "accuracy", "s to make"),
        sorted(rows, key=lambda row: row[1]),
    )


def _logits(model: Any, task: bs.Task) -> Any:
    predict = float_logits(model)
    return np.concatenate([predict(inputs) for inputs, _ in items(task.validation, "validation")])


def damping(bench: Benchmark, part: str, affine: bool) -> None:
    """What GPTQ's damping should be for weights only in groups: the default against the paper's 0.01."""
    groups = bs.Int(4, None, granularity="group", group=GROUP, affine_weights=affine)
    compare(bench, "minilm", groups, DAMPED, part)
    found = {row["name"]: row["kl"] for row in bench.rows if row["part"] == part}
    ours, paper = (f"GPTQ, damp {damp:g}" for damp in (bs.Gptq().damp, 0.01))
    if found:
        bench.judge(f"{part}: KL of {ours} / {paper}", found[ours] / found[paper], 1.0, "x")


def together(bench: Benchmark, suffix: str = "") -> None:
    """The geometric mean over the networks of what was measured above, of the combinations that all of them had."""
    part = f"together{suffix}"
    found: dict[str, list[float]] = {}
    measured = {row["part"] for row in bench.rows} & {f"{name}{suffix}" for name in NETWORKS}
    for row in bench.rows:
        if row["part"] in measured:
            found.setdefault(row["name"], []).append(row["kl"])
    if not found:
        bench.miss(f"{part}: no network was measured in this run")
        return
    means = {
        label: math.exp(float(np.mean(np.log(values))))
        for label, values in found.items()
        if len(values) == len(measured)
    }
    table(
        f"{len(measured)} networks together{suffix.replace('.', ', ')}",
        ("steps", "geometric mean of KL"),
        sorted(means.items(), key=lambda item: item[1]),
    )
    others = {label: value for label, value in means.items() if label != "default"}
    best = min(others, key=lambda label: others[label])
    bench.row(part, **means)
    bench.judge(f"{part}: KL of the default / best other ({best})", means["default"] / others[best], 1.0, "x")


def main(argv: Sequence[str] | None = None) -> int:
    bench = Benchmark("int8_defaults", PARTS, (__doc__ or "").splitlines()[0])
    bench.start(argv)
    parts: dict[str, Callable[[Benchmark], None]] = {
        f"together{suffix}": functools.partial(together, suffix=suffix) for suffix in ("", ".w4a8")
    }
    for name in NETWORKS:
        parts[name] = functools.partial(compare, name=name, technique=bs.Int(8, 8), combinations=EIGHT, part=name)
        four, combinations = f"{name}.w4a8", {**FOUR, **(SMOOTHED if NETWORKS[name].heads else {})}
        parts[four] = functools.partial(
            compare, name=name, technique=bs.Int(4, 8), combinations=combinations, part=four
        )
    for part, affine in (("minilm.groups", False), ("minilm.affine_groups", True)):
        parts[part] = functools.partial(damping, part=part, affine=affine)
    return bench.run(parts)


if __name__ == "__main__":
    sys.exit(main())
