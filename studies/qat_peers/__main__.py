"""Quantization-aware training of ResNet-20 at few bits, ours and the peers': ``python -m studies.qat_peers``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.harness import table
from benchmarks.peers import quantized_share, quiet
from benchmarks.qat_peers import TRAINERS, Trainer, layers, learned
from torch import Tensor, nn

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.data import items
from bitsmith.zoo.data import data_root

from .._command import Study, spread
from .._resnet20 import network, task_of

BITS = ((4, 4), (2, 4))
"""Weights, activations: of every convolution and linear layer, the first and the last too."""
CALIBRATION, BATCH = 4, 64
STEPS, FULL_STEPS = 60, 2000
RATES = (3e-4, 1e-3)
"""Adam's: for every trainer and number of bits the one that is best on the validation images at the tuning seed."""
TUNING_SEED = 100
OF_GRIDS = 30
"""Our learned steps are powers of two: their rate is so many times that of the weights."""

OURS: Mapping[str, Trainer] = {
    "bitsmith": Trainer("bitsmith", "bitsmith", "Int at convolutions and linear layers, learned steps", learned),
    "bitsmith, ranges stay": Trainer("bitsmith", "bitsmith", "Int at convolutions and linear layers", layers),
}
"""What is held against the peers: ``build(model, batches, w, a)`` gives a module in training mode."""
TRAINED: Mapping[str, Trainer] = {**OURS, **{name: TRAINERS[name] for name in ("brevitas", "torchao")}}


class Bed:
    """The pretrained network and its images: those that train and calibrate, that choose rates, and that test."""

    def __init__(self, model: nn.Module, task: bs.Task) -> None:
        self.model = model
        self.parts = {"training": _whole(task.calibration), "validation": _whole(task.validation)}
        self.parts["test"] = _whole(task.test)

    def key(self, name: str, bits: tuple[int, int], rate: float, steps: int, seed: int, split: str) -> dict[str, Any]:
        package, trainer = Path(bs.__file__).parent, TRAINED[name]
        sources = sorted((package / "numerics").glob("*.py"))
        sources += [Path(__file__), package / "techniques" / "int_.py", package / "model" / "apply.py"]
        peer = "" if name in OURS else trainer.version
        how = {"trainer": name, "settings": trainer.settings, "version": peer, "code": hash_files(sources)}
        return {**how, "bits": bits, "rate": rate, "steps": steps, "seed": seed, "split": split}

    def record(
        self, name: str, bits: tuple[int, int], rate: float, steps: int, seed: int, split: str
    ) -> dict[str, float]:
        """Accuracy before and after, and the part of the multiplications whose operands lie on 8-bit grids or less."""
        x, y = self.parts["training"]
        draw = torch.Generator().manual_seed(seed)
        first = x[torch.randperm(len(x), generator=draw)[: CALIBRATION * BATCH]].split(BATCH)
        with quiet():
            net = TRAINED[name].build(self.model, list(first), *bits)
            share = quantized_share(net, first[0][:8])
            before = accuracy(net, *self.parts[split])
            loss = train(net, x, y, rate, steps, draw)
            after = accuracy(net, *self.parts[split])
        return {"before": before, "accuracy": after, "loss": loss, "share": share, "samples": len(self.parts[split][1])}


def _whole(loader: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*items(loader, "qat_peers"), strict=True)
    return torch.cat(x), torch.cat(y)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()  # torchao's gives nothing back
    with torch.no_grad():
        right = [net(part).argmax(1) == label for part, label in zip(x.split(100), y.split(100), strict=True)]
    net.train()
    return float(torch.cat(right).double().mean())


def train(net: nn.Module, x: Tensor, y: Tensor, rate: float, steps: int, draw: torch.Generator) -> float:
    """Adam, half a cosine, images flipped by a coin, normalisations in training mode; the loss of the last tenth."""
    grids = [p for name, p in net.named_parameters() if ".grid.log_" in name]
    known = {id(p) for p in grids}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": grids, "lr": OF_GRIDS * rate}], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        flipped = torch.rand(BATCH, 1, 1, 1, generator=draw) < 0.5
        images = torch.where(flipped, x[rows].flip(3), x[rows])
        loss = F.cross_entropy(net(images), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return statistics.fmean(losses[-max(1, steps // 10) :])


def run(study: Study, bed: Bed) -> None:
    options = study.options
    lines = []
    for bits in BITS:
        found: dict[str, list[dict[str, float]]] = {}
        rates: dict[str, float] = {}
        for name in TRAINED:
            tried: dict[float, float] = {}
            for rate in RATES:
                setting = (name, bits, rate, options.steps, TUNING_SEED, "validation")
                record = study.row("qat", bed.key(*setting), f"rate, {setting}", partial(bed.record, *setting))
                if record is not None:
                    tried[rate] = record["accuracy"]
            if len(tried) == len(RATES):
                rates[name] = max(tried, key=lambda rate: tried[rate])
        for seed in range(options.seeds):
            for name, rate in rates.items():
                setting = (name, bits, rate, options.steps, seed, "test")
                record = study.row("qat", bed.key(*setting), f"{setting}", partial(bed.record, *setting))
                if record is not None:
                    found.setdefault(name, []).append(record)
                    row = {"trainer": name, "w": bits[0], "a": bits[1], "rate": rate, "seed": seed}
                    study.rows.append({**row, "steps": options.steps, **record})
        for name, records in found.items():
            after = [record["accuracy"] for record in records]
            shown = [spread((record["before"] for record in records), percent=True), spread(after, percent=True)]
            share = min(record["share"] for record in records)
            lines.append([f"W{bits[0]}A{bits[1]}", name, f"{rates[name]:g}", str(len(records)), *shown, f"{share:.0%}"])
    heads = ["bits", "trained by", "rate", "seeds", "top-1 % before", "top-1 % after", "MACs on grids"]
    count = len(bed.parts["test"][1])
    table(f"ResNet-20 (reduced), {options.steps} steps of {BATCH} images, {count} test images", heads, lines)


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "qat_peers",
        __doc__ or "",
        25.0,
        argv,
        parts=("all",),
        seeds=3,
        full=f"{FULL_STEPS} steps, no limit of time: hours",
        store="qat_peers",
        more={"steps": (int, None, f"of each training ({STEPS}; {FULL_STEPS} with --full)")},
    )
    options = study.options
    options.steps = options.steps or (FULL_STEPS if options.full else STEPS)
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    study.part(1.0)
    run(study, Bed(network(root), task_of(root)))
    study.finish()


if __name__ == "__main__":
    main()
