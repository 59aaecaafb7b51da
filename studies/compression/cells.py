"""One compressed network: how its plan is made, how many bytes its file has, and what it scores."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
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
from .._workers import Reopened
from .forms import FORMS, TRAINED_FORMS, Form, computes

RESNET, DS_CNN, MOBILENET = "ResNet-20", "DS-CNN S", "MobileNetV1"
NETWORKS = (RESNET, DS_CNN, MOBILENET)
CALIBRATION = {RESNET: 256, DS_CNN: 256, MOBILENET: 64}
"""Samples that a seed draws."""
TEST = {RESNET: 1000, DS_CNN: None, MOBILENET: 200}
FULL_TEST = {RESNET: 1000, DS_CNN: None, MOBILENET: 700}

NARROW = 32
"""Layers of fewer weights for an output channel (depthwise ones, the first on an image) keep 8 bits and all weights."""

AFTER, TRAINED = "after", "trained"
STEPS = {RESNET: 40, DS_CNN: 200}
RATE = 1e-3
BATCH = 50


@dataclass(frozen=True)
class Cell:
    network: str
    form: str
    route: str = AFTER
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.network}, {self.form}{', trained' if self.route == TRAINED else ''}, seed {self.seed}"


class Bed(Reopened):
    """The networks, their data, and the target whose files are weighed. Each process opens them once."""

    def __init__(self, root: Path, full: bool) -> None:
        self.root, self.full = root, full
        self.target = bs.targets.OnnxRuntime(threads=1)
        self._subjects: dict[str, Subject] = {}
        self._records: dict[str, bs.Record] = {}

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
            "narrow": NARROW,
            "test": (FULL_TEST if self.full else TEST)[cell.network],
            "calibration": CALIBRATION[cell.network],
            "library": library("techniques", "prepare", "numerics", "export", "learn"),
        }

    def record(self, cell: Cell) -> dict[str, Any]:
        """Test accuracy; of the first seed, bytes of the file too, and with Huffman-coded weights."""
        start, cpu = time.perf_counter(), time.process_time()
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
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        return {**record, **seconds}

    def plan(self, subject: Subject, form: Form, example: Tensor) -> bs.Plan:
        record = self.recorded(subject, example)
        if form.technique is None:
            return bs.Plan({}, form.steps)
        sites = {}
        for name, site in record.sites.items():
            here = at(form, site)
            if here is not None and (not computes(here) or self.target.supports(here, site)):
                sites[name] = here
        plan: bs.Plan = self.target.adapt(bs.Plan(sites), record)
        return plan.replace(prepare=form.steps)

    def recorded(self, subject: Subject, example: Tensor) -> bs.Record:
        if subject.name not in self._records:
            self._records[subject.name] = network(subject.model, example).record
        return self._records[subject.name]

    def weights(self, name: str, form: Form = FORMS["float"]) -> float:
        """Bytes of weights and biases as the form stores them, without any graph."""
        subject = self.subject(name)
        example = subject.samples[:1]
        planned = self.plan(subject, form, example).sites
        bits = 0.0
        for site_name, site in self.recorded(subject, example).sites.items():
            if site.weight:
                here = planned.get(site_name)
                bits += 32.0 * site.weight.shape[0]
                bits += here.bits(site) if here is not None else 32.0 * site.weight.numel
        return bits / 8


def at(form: Form, site: bs.Site) -> bs.Technique | None:
    """The technique of a form at a site: the first that fits, of those for a narrow layer or for any other."""
    technique, weight = form.technique, site.weight
    if technique is None:
        return None
    if weight is None:
        tried = [bs.Int(8, 8)] if computes(technique) else []
    elif form.narrow and weight.numel < NARROW * weight.shape[0]:
        tried = narrow(technique)
    else:
        tried = [technique, *ungrouped(technique)]
    return next((one for one in tried if one.fits(site)), None)


def narrow(technique: bs.Technique) -> list[bs.Technique]:
    """What a layer of few weights for a channel gets: the integers that the others compute in, or 8-bit weights."""
    if computes(technique):
        return [bs.Int(8, 8)]
    return [] if isinstance(technique, bs.Sparse) else [bs.Int(8, None)]


def ungrouped(technique: bs.Technique) -> list[bs.Technique]:
    """The technique for layers whose channels do not divide into its groups."""
    if isinstance(technique, bs.Int) and technique.group:
        return [replace(technique, granularity="channel", group=0)]
    return [replace(technique, group=0)] if isinstance(technique, bs.Palette) and technique.group else []


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
