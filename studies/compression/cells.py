"""One compressed network: how its plan is made, how many bytes its file has, and what it scores."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.data import items
from bitsmith.model.network import network
from bitsmith.task import Task, score
from bitsmith.zoo.ds_cnn import pretrained_ds_cnn
from bitsmith.zoo.mobilenet import pretrained_mobilenet_v1
from bitsmith.zoo.tasks import ds_cnn_task, mobilenet_v1_task

from .. import _resnet20
from .._guided import library

RESNET, DS_CNN, MOBILENET = "ResNet-20", "DS-CNN S", "MobileNetV1"
NETWORKS = (RESNET, DS_CNN, MOBILENET)
CALIBRATION = {RESNET: 256, DS_CNN: 256, MOBILENET: 64}
"""Samples that a seed draws."""
TEST = {RESNET: 1000, DS_CNN: None, MOBILENET: 200}
FULL_TEST = {RESNET: 1000, DS_CNN: None, MOBILENET: 700}

PRUNED_FROM = 1024
"""Layers of fewer weights are not pruned: depthwise ones, which have 9 for a channel."""

AFTER, TRAINED = "after", "trained"
STEPS = {RESNET: 60, DS_CNN: 300}
RATE = 1e-3
BATCH = 50

GPT, FISHER, BIAS = bs.SparseGpt(), bs.FisherPalettes(64), bs.CorrectBias()
HALF, THIRD, TWO_OF_FOUR = bs.Sparse(0.5), bs.Sparse(0.3), bs.Sparse(0.5, "n:m")
CHANNELS, RESTORED = bs.PruneChannels(0.75, divisor=4), bs.PruneChannels(0.75, divisor=4, samples=256)


@dataclass(frozen=True)
class Form:
    """``technique`` at every layer that it fits, others stay float; ``steps`` before. ``drawn``: whether what comes out
    depends on the calibration samples, and so on the seed."""

    technique: bs.Technique | None = None
    steps: tuple[bs.Step, ...] = ()
    family: str = "composed"

    @property
    def drawn(self) -> bool:
        reads = isinstance(self.technique, bs.Int) and self.technique.a is not None
        return reads or any(step != CHANNELS for step in self.steps)


FORMS: Mapping[str, Form] = {
    "float": Form(family="float"),
    "int8": Form(bs.Int(8, 8), family="integers"),
    "int4 weights": Form(bs.Int(4, None), family="integers"),
    "palette of 6 bits": Form(bs.Palette(6), family="palettes"),
    "palette of 4 bits": Form(bs.Palette(4), family="palettes"),
    "palette of 3 bits": Form(bs.Palette(3), family="palettes"),
    "palette of 2 bits": Form(bs.Palette(2), family="palettes"),
    "palette of 4 bits, biases corrected": Form(bs.Palette(4), (BIAS,), "palettes"),
    "palette of 3 bits, biases corrected": Form(bs.Palette(3), (BIAS,), "palettes"),
    "palette of 4 bits, Fisher": Form(bs.Palette(4), (FISHER,), "palettes"),
    "palette of 3 bits, Fisher": Form(bs.Palette(3), (FISHER,), "palettes"),
    "half of the weights": Form(HALF, family="pruned"),
    "half, SparseGPT": Form(HALF, (GPT,), "pruned"),
    "0.3 of the weights": Form(THIRD, family="pruned"),
    "0.3, SparseGPT": Form(THIRD, (GPT,), "pruned"),
    "2 of 4": Form(TWO_OF_FOUR, family="pruned"),
    "2 of 4, SparseGPT": Form(TWO_OF_FOUR, (GPT,), "pruned"),
    "0.75 of the channels": Form(None, (CHANNELS,), "pruned"),
    "0.75 of the channels, restored": Form(None, (RESTORED,), "pruned"),
    "half (SparseGPT), palette of 4": Form(bs.Palette(4, of=HALF), (GPT, BIAS)),
    "int8, palette of 4": Form(bs.Int(8, 8, of=bs.Palette(4)), (BIAS,)),
    "half (SparseGPT), int8": Form(bs.Int(8, 8, of=HALF), (GPT,)),
    "half (SparseGPT), int8, palette of 4": Form(bs.Int(8, 8, of=bs.Palette(4, of=HALF)), (GPT, BIAS)),
    "0.3 (SparseGPT), int8, palette of 3": Form(bs.Int(8, 8, of=bs.Palette(3, of=THIRD)), (GPT, BIAS)),
}

TRAINED_FORMS: Mapping[str, Form] = {
    "palette of 2 bits": FORMS["palette of 2 bits"],
    "palette of 2 bits, soft": Form(bs.Palette(2, learn="soft"), family="palettes"),
    "0.3 of the weights": FORMS["0.3 of the weights"],
    "0.3 of the weights, gradually": Form(bs.Sparse(0.3, schedule="polynomial", every=4), family="pruned"),
    "0.75 of the channels, restored": FORMS["0.75 of the channels, restored"],
    "0.3 (SparseGPT), int8, palette of 3": FORMS["0.3 (SparseGPT), int8, palette of 3"],
}

FEW = (
    *("float", "int8", "int4 weights", "palette of 6 bits", "palette of 4 bits", "palette of 4 bits, Fisher"),
    *("half of the weights", "half, SparseGPT", "int8, palette of 4", "half (SparseGPT), int8, palette of 4"),
)
"""Of MobileNetV1, unless --full."""


@dataclass(frozen=True)
class Cell:
    network: str
    form: str
    route: str = AFTER
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.network}, {self.form}{', trained' if self.route == TRAINED else ''}, seed {self.seed}"


class Bed:
    """The networks, their data, and the target whose files are weighed."""

    def __init__(self, root: Path, full: bool) -> None:
        self.root, self.full = root, full
        self.target = bs.targets.OnnxRuntime(threads=1)
        self._subjects: dict[str, Subject] = {}

    def subject(self, name: str) -> Subject:
        if name not in self._subjects:
            self._subjects[name] = Subject(name, self.root, (FULL_TEST if self.full else TEST)[name])
        return self._subjects[name]

    def key(self, cell: Cell) -> dict[str, Any]:
        form = (TRAINED_FORMS if cell.route == TRAINED else FORMS)[cell.form]
        return {
            "network": cell.network,
            "form": repr(form),
            "route": (cell.route, STEPS[cell.network], RATE) if cell.route == TRAINED else cell.route,
            "seed": cell.seed,
            "pruned from": PRUNED_FROM,
            "test": (FULL_TEST if self.full else TEST)[cell.network],
            "calibration": CALIBRATION[cell.network],
            "library": library("techniques", "prepare", "numerics", "export", "learn"),
        }

    def record(self, cell: Cell) -> dict[str, Any]:
        """Test accuracy; of the first seed, bytes of the file too, and with Huffman-coded weights."""
        start = time.perf_counter()
        subject, trained = self.subject(cell.network), cell.route == TRAINED
        form = (TRAINED_FORMS if trained else FORMS)[cell.form]
        calibration = subject.drawn(cell.seed)
        example = calibration[0][0][:1]
        net = bs.apply(subject.model, self.plan(subject, form, example), calibration, seed=cell.seed).eval()
        if trained:
            net = bs.finetune(
                net,
                subject.training(cell.seed),
                steps=STEPS[cell.network],
                teacher=subject.model,
                lr=RATE,
                seed=cell.seed,
            ).eval()
        found = score(net, subject.task, "test")
        record: dict[str, Any] = {"accuracy": found.mean, "samples": found.n}
        if cell.seed == 0:
            with tempfile.TemporaryDirectory() as folder:
                record["bytes"] = bs.export(net, self.target, Path(folder) / "net.onnx", example).bytes
            sizes = bs.coded_sizes(net, example).values()
            record["coded"] = record["bytes"] + sum(min(0.0, one.huffman - one.plain) for one in sizes) / 8
        return {**record, "seconds": time.perf_counter() - start}

    def plan(self, subject: Subject, form: Form, example: Tensor) -> bs.Plan:
        record = network(subject.model, example).record
        technique = form.technique
        if technique is None:
            return bs.Plan({}, form.steps)
        sites = {}
        for name, site in record.sites.items():
            here = technique if site.weight and site.weight.numel >= PRUNED_FROM else whole(technique)
            if site.weight and here is not None and here.fits(site):
                sites[name] = here
        if isinstance(technique, bs.Int) and technique.a is not None:
            plain = bs.Int(8, 8)
            for name, site in record.sites.items():
                if name not in sites and plain.fits(site) and self.target.supports(plain, site):
                    sites[name] = plain
        plan: bs.Plan = self.target.adapt(bs.Plan(sites), record)
        return plan.replace(prepare=form.steps)


def whole(technique: bs.Technique | None) -> bs.Technique | None:
    """The technique without pruning."""
    if technique is None or isinstance(technique, bs.Sparse):
        return None
    if isinstance(technique, (bs.Int, bs.Palette)):
        return replace(technique, of=whole(technique.of))  # type: ignore[arg-type]
    return technique


class Subject:
    def __init__(self, name: str, root: Path, test: int | None) -> None:
        self.name = name
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731
        self.model: nn.Module
        self.task: Task
        if name == RESNET:
            self.model, self.task = _resnet20.network(root), _resnet20.task_of(root)
        elif name == DS_CNN:
            self.model, self.task = pretrained_ds_cnn(root), ds_cnn_task(root, test=test, tell=quiet)
        else:
            self.model = pretrained_mobilenet_v1(root)
            self.task = mobilenet_v1_task(root, test=test, batch=20, tell=quiet)

    @cached_property
    def samples(self) -> Tensor:
        return torch.cat([inputs for inputs, _ in items(self.task.calibration, "calibration")])

    def drawn(self, seed: int) -> list[tuple[Tensor, None]]:
        """Calibration samples of a seed, without classes."""
        chosen = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(seed))
        x = self.samples[chosen[: CALIBRATION[self.name]]]
        return [(part, None) for part in x.split(BATCH)]

    def training(self, seed: int) -> list[tuple[Tensor, None]]:
        """All calibration samples in the order of a seed: the teacher says what they are."""
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(seed + 1000))
        return [(part, None) for part in self.samples[order].split(BATCH)]
