"""What a training step costs where weights are generated, or distances take the place of products.

    python -m benchmarks.layer_forms [--full] [--only net|layer] [--threads 1]

*Net*: ResNet-20, batch 64, its 18 convolutions of 3x3 that are not the first layer under each technique; forward, loss,
backward and SGD, all in turn, against the plain network. *Layer*: one convolution of each of its three widths, forward
and backward by itself. Random images and weights: what is timed does not depend on them. Bars: ``Ovsf`` at most 3 times
the plain network, ``Adder`` at most 6 times where ``bitsmith_kernels`` is installed (without it only its memory is
bounded, and it is timed, not judged).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.numerics import adder
from bitsmith.zoo.cifar_resnet import resnet20

from .harness import Benchmark, Samples, interleaved, ratio, table

PARTS = {"net": (3.0, 8.0), "layer": (1.5, 4.0)}
BATCH = 64
OVSF, ADDER = 3.0, 6.0
"""The bars, in plain steps."""
WIDTHS = ((16, 32), (32, 16), (64, 8))
"""Channels and pixels by axis."""
PLAIN, SLOW = "plain", "Adder, no kernels"

TECHNIQUES: dict[str, bs.Technique] = {
    "Ovsf 0.5": bs.Ovsf(0.5),
    "Ovsf 0.5, 8-bit": bs.Ovsf(0.5, coefficient_bits=8),
    "Ovsf 0.5 by kernel": bs.Ovsf(0.5, "kernel"),
    "Ovsf 0.5 by kernel, basis": bs.Ovsf(0.5, "kernel", compute="basis"),
    "Adder": bs.Adder(),
    "Adder, 8-bit": bs.Adder(precision=8),
    SLOW: bs.Adder(),
}
JUDGED = ("Ovsf 0.5", "Ovsf 0.5, 8-bit", "Ovsf 0.5 by kernel", "Adder", "Adder, 8-bit")
"""The form by the basis has more arithmetic in float than the plain layer; it is for machines that add cheaply."""


@contextmanager
def without_kernels() -> Iterator[None]:
    """As where ``bitsmith_kernels`` is not installed."""
    kept = adder._kernels
    adder._kernels = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        adder._kernels = kept


def slow(call: Callable[[], object]) -> Callable[[], object]:
    """The call without the native kernels."""

    def run() -> object:
        with without_kernels():
            return call()

    return run


class Step:
    """One training step of a network on one batch."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor) -> None:
        self.net, self.x, self.y = net.train(), x, y
        self.optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, momentum=0.9)

    def __call__(self) -> None:
        loss = F.cross_entropy(self.net(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def told(bench: Benchmark, part: str, what: str, times: dict[str, Samples]) -> None:
    """A table of one run, and its verdicts."""
    rows = []
    for name, samples in times.items():
        relative = ratio(samples, times[PLAIN])
        low, high = relative.quartiles
        bench.row(part, what=what, name=name, ms=samples.median, of_plain=relative.median, q1=low, q3=high)
        rows.append((name, samples.median, f"{relative.median:.2f}", f"{low:.2f} to {high:.2f}"))
        if name in JUDGED:
            bar = ADDER if name.startswith("Adder") else OVSF
            bench.judge(f"{what}: {name} / plain", relative.median, bar, "x")
    heads = ("", "ms", "of the plain one, median of rounds", "quartiles")
    table(f"A training step, {what}, {bench.threads} threads (wall clock, interleaved)", heads, rows)


def kinds(bench: Benchmark) -> dict[str, bs.Technique]:
    """Those that can be timed here."""
    if adder._kernels() is None:
        bench.miss("bitsmith_kernels is not installed or has no adder layers: 'pip install ./kernels'")
        return {name: technique for name, technique in TECHNIQUES.items() if name in (SLOW,) or "Ovsf" in name}
    return TECHNIQUES


def net(bench: Benchmark) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    model = resnet20()
    sites = bs.sites(model, x[:2])
    chosen = [
        n for n, s in sites.items() if s.weight is not None and s.weight.shape[2:] == (3, 3) and s.weight.shape[1] > 3
    ]
    steps: dict[str, Callable[[], object]] = {PLAIN: Step(model, x, y)}
    for name, technique in kinds(bench).items():
        step = Step(bs.apply(resnet20(), bs.Plan(dict.fromkeys(chosen, technique)), [(x, y)]), x, y)
        steps[name] = slow(step) if name == SLOW else step
    told(bench, "net", f"ResNet-20, batch {BATCH}", interleaved(steps, rounds=15 if bench.options.full else 7, warm=1))


def layer(bench: Benchmark) -> None:
    for channels, pixels in WIDTHS:
        torch.manual_seed(0)
        x = torch.randn(BATCH, channels, pixels, pixels, requires_grad=True)
        behind = torch.randn_like(x)
        nets = {PLAIN: nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False))}
        for name, technique in kinds(bench).items():
            nets[name] = bs.apply(nets[PLAIN], bs.Plan({"0": technique}), [(x.detach(), None)])  # type: ignore[assignment]

        def step(one: nn.Module, x: Tensor = x, behind: Tensor = behind) -> None:
            one.zero_grad()
            x.grad = None
            one(x).backward(behind)

        calls: dict[str, Callable[[], object]] = {name: functools.partial(step, one) for name, one in nets.items()}
        if SLOW in calls:
            calls[SLOW] = slow(calls[SLOW])
        what = f"{channels} channels at {pixels}x{pixels}, batch {BATCH}"
        told(bench, "layer", what, interleaved(calls, rounds=41 if bench.options.full else 15))


def main() -> int:
    bench = Benchmark("layer_forms", PARTS, "What a training step costs with generated weights, and adders.")
    bench.start()
    return bench.run({"net": net, "layer": layer})


if __name__ == "__main__":
    sys.exit(main())
