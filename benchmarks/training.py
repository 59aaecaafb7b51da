"""What training under a plan costs: a step against float and against the peers' quantization-aware training.

    python -m benchmarks.training [--full] [--only step|memory] [--threads 1]

ResNet-20 with its weights and a new last layer, batch 128, CIFAR-10 images, training mode, SGD. *Step*: forward, loss,
backward and optimizer, in turn with all others; the part of the multiply-accumulates whose operands really lie on 8-bit
grids in that very forward (at least 95 %); and the loss before and after the same steps for all, so that nobody is fast
by not training. *Memory*: each in a process of its own, the resident memory that steps add at their peak; and what the
graph saves for its backward, each storage once. Bars: a step is no slower than the fastest peer's, and its memory no
more than the least of theirs.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import load_npz

from .harness import Benchmark, Samples, interleaved, ratio, table
from .overhead import child, peak_mib
from .peers import quantized_share, quiet
from .qat_peers import TRAINERS, Trainer

PARTS = {"step": (6.0, 15.0), "memory": (4.0, 8.0)}
BATCH, BATCHES = 128, 16
CALIBRATION = 2
STEPS = 24
"""Of each, before any is timed."""
RATE = 0.01
SHARE = 0.95

Batch = tuple[Tensor, Tensor]


def network(root: Path) -> nn.Module:
    """The pretrained ResNet-20 whose last layer starts anew: something is left to learn."""
    model = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz")
    torch.manual_seed(0)
    nn.init.kaiming_normal_(model.linear.weight)
    nn.init.zeros_(model.linear.bias)
    return model.eval()


def batches(root: Path, count: int = BATCHES) -> list[Batch]:
    """Training images in a fixed order."""
    arrays = cifar10(root)
    order = torch.randperm(len(arrays["y_train"]), generator=torch.Generator().manual_seed(0))[: count * BATCH]
    x = torch.from_numpy(normalise_cifar(arrays["x_train"][order.numpy()]))
    y = torch.from_numpy(arrays["y_train"][order.numpy()])
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


class Loop:
    """One network in training; every call is one step on the next batch and gives its loss."""

    def __init__(self, net: nn.Module, data: Sequence[Batch]) -> None:
        self.net, self.data, self.done = net, data, 0
        self.optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], RATE, momentum=0.9)

    def __call__(self) -> float:
        x, y = self.data[self.done % len(self.data)]
        self.done += 1
        output = self.net(x)
        loss = F.cross_entropy(getattr(output, "value", output), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())


def built(
    bench: Benchmark, model: nn.Module, data: Sequence[Batch], trainers: Sequence[Trainer]
) -> dict[str, nn.Module]:
    """Those that are installed and can be built; a miss for each other one."""
    found: dict[str, nn.Module] = {}
    for trainer in trainers:
        try:
            with quiet():
                assert trainer.version is not None  # raises where it is not installed
                found[trainer.name] = trainer.build(model, [x for x, _ in data[:CALIBRATION]], 8, 8)
        except importlib.metadata.PackageNotFoundError:
            bench.miss(f'{trainer.name} is not installed (pip install -c constraints.txt -e ".[peers]")')
        except Exception as error:  # a peer that breaks must not hide the others
            bench.miss(f"{trainer.name} did not run ({type(error).__name__}: {error})")
    return found


def step(bench: Benchmark) -> None:
    root = bench.data()
    if root is None:
        return
    model, data = network(root), batches(root)
    nets = built(bench, model, data, list(TRAINERS.values()))
    with quiet():
        shares = {name: quantized_share(net, data[0][0][:8]) for name, net in nets.items()}
        loops = {name: Loop(net, data) for name, net in nets.items()}
        losses = {name: [loop() for _ in range(STEPS)] for name, loop in loops.items()}
        gc.collect()
        times = interleaved(loops, rounds=31 if bench.options.full else 11)
    rows = []
    for name, samples in times.items():
        first, last = losses[name][0], statistics.fmean(losses[name][-4:])
        rows.append(_told(bench, name, samples, times["float"], shares[name], first, last))
    heads = (
        "",
        "ms",
        "quartiles",
        "x float",
        "MACs in int8",
        "loss, first",
        f"of steps {STEPS - 3} to {STEPS}",
        "settings",
    )
    table(f"A training step, ResNet-20, batch {BATCH}, {bench.threads} threads (wall clock, interleaved)", heads, rows)
    for name, share in shares.items():
        if name != "float" and share < SHARE:
            bench.miss(f"{name} quantizes only {share:.1%} of the MACs, which is no comparison")
    if shares["float"] > 0.0:
        bench.miss("the check of the grid takes the float model for quantized")
    rivals = [name for name in times if TRAINERS[name].peer]
    if rivals:
        fastest = min(rivals, key=lambda name: times[name].median)
        gain = ratio(times["bitsmith"], times[fastest])
        low, high = gain.quartiles
        print(f"bitsmith / {fastest}, round by round: {gain.median:.3f} ({low:.3f} to {high:.3f})")
        bench.judge(f"step / fastest peer ({fastest})", gain.median, 1.0, "x")
        worst = max(statistics.fmean(losses[name][-4:]) for name in ("float", *rivals))
        bench.judge(
            "loss / the greatest of float's and the peers'", statistics.fmean(losses["bitsmith"][-4:]) / worst, 1.1
        )


def _told(
    bench: Benchmark, name: str, samples: Samples, floats: Samples, share: float, first: float, last: float
) -> tuple[Any, ...]:
    low, high = samples.quartiles
    relative, trainer = ratio(samples, floats).median, TRAINERS[name]
    version = trainer.version
    times = {"ms": samples.median, "ms_q1": low, "ms_q3": high, "of_float": relative}
    how = {"mac_share": share, "loss_first": first, "loss_last": last, "batch": BATCH, "settings": trainer.settings}
    bench.row("step", name=name, version=version, **times, **how)
    spread = f"{low:.4g} to {high:.4g}"
    figures = (f"{relative:.2f}", f"{share:.1%}", f"{first:.3f}", f"{last:.3f}")
    return (f"{name} {version}".strip(), samples.median, spread, *figures, trainer.settings)


# -- memory ------------------------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """Begin the count of :func:`~.overhead.peak_mib` anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def saved_mib(loop: Callable[[], float]) -> float:
    """What one step keeps for its backward, in MiB; memory that several tensors share counts once."""
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # freed memory must not be counted as new under its old address

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loop()
    return sum(seen.values()) / 2**20


def memory_child(name: str, threads: int, steps: int = 3) -> None:
    """In a process of its own: print the resident memory that steps add at their peak, and what the graph saves."""
    torch.set_num_threads(threads)
    root = data_root()
    assert root is not None
    data = batches(root, CALIBRATION)
    with quiet():
        net = TRAINERS[name].build(network(root), [x[:8] for x, _ in data], 8, 8)
        loop = Loop(net, data)
        gc.collect()
        forget_peak()
        before = peak_mib()
        for _ in range(steps):
            loop()
        peak = peak_mib()
        print(peak - before, saved_mib(loop))


def memory(bench: Benchmark) -> None:
    if bench.data() is None:
        return
    repeats = 5 if bench.options.full else 2
    added: dict[str, list[float]] = {}
    saved: dict[str, float] = {}
    for name in _measured(bench, repeats):
        call = f"from benchmarks import training; training.memory_child({name!r}, {bench.threads})"
        grown, kept = map(float, child(call).split()[-2:])
        added.setdefault(name, []).append(grown)
        saved[name] = kept
    rows = []
    for name, found in added.items():
        median, least, most = statistics.median(found), min(found), max(found)
        bench.row("memory", name=name, added_mib=median, least_mib=least, most_mib=most, saved_mib=saved[name])
        rows.append((name, f"{median:.0f}", f"{least:.0f} to {most:.0f}", f"{saved[name]:.1f}"))
    heads = ("", "peak added by steps", "range", "saved for backward")
    table(f"Memory of a training step, ResNet-20, batch {BATCH}, MiB", heads, rows)
    rivals = [name for name in added if TRAINERS[name].peer]
    if rivals and "bitsmith" in added:
        least = min(rivals, key=lambda name: statistics.median(added[name]))
        relative = statistics.median(added["bitsmith"]) / statistics.median(added[least])
        bench.judge(f"peak memory / least peer ({least})", relative, 1.0, "x")


def _measured(bench: Benchmark, repeats: int) -> Iterator[str]:
    """Every installed one, in turn."""
    names = []
    for trainer in TRAINERS.values():
        try:
            assert trainer.version is not None
            names.append(trainer.name)
        except importlib.metadata.PackageNotFoundError:
            bench.miss(f"{trainer.name} is not installed")
    for _ in range(repeats):
        yield from names


def main() -> int:
    bench = Benchmark("training", PARTS, "What training under a plan costs, against float and the peers'.")
    bench.start()
    parts = {"step": step, "memory": memory}
    return bench.run({name: functools.partial(part) for name, part in parts.items()})


if __name__ == "__main__":
    sys.exit(main())
