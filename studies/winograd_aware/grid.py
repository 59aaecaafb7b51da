"""What is held against what: how the convolutions are computed, and whether the network was trained for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from benchmarks.logit_peers import float_logits
from benchmarks.paired import divergence
from numpy.typing import NDArray
from torch import Tensor, nn

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.data import first_inputs
from bitsmith.learn.finetune import divergence as batch_divergence
from bitsmith.model.network import duplicate, network
from bitsmith.sampling import RandomAccess
from bitsmith.technique import Technique

from .._guided import Subject
from .._images import Augmented, jpeg_training

Array = NDArray[Any]
BATCH = 32
"""Samples of a training step."""
TEMPERATURE = 4.0

AFTER, CORRECTED, SHIPPED = "post-training", "post-training, bias corrected", "post-training, as shipped"
ROUNDED = "post-training, rounded transforms"
TRAINED, FIXED, FLEX = "trained", "trained, rounded transforms", "trained, flex"
"""The routes. Shipped: as OpenVINO runs it, with integer additions and pooling; bias corrected too.
Rounded: the three transforms in as many bits as the taps, the paper's static; everywhere else they are exact, but for
:data:`FLEX`, where they are rounded and trained."""

MATRICES = ("at", "bt", "g")
"""The trained transforms' names in their cells."""


@dataclass(frozen=True)
class Form:
    """``technique``: of the 3x3 convolutions of stride 1 but the first; ``rest``: of the other convolutions and linear
    layers. None: float. ``own``: techniques of single sites instead."""

    name: str
    technique: Technique | None
    rest: Technique | None = None
    own: tuple[tuple[str, Technique], ...] = ()

    @property
    def winograd(self) -> bs.Winograd | None:
        return self.technique if isinstance(self.technique, bs.Winograd) else None

    def by(self, route: str) -> Form:
        """With the transforms that the route has."""
        if route not in (ROUNDED, FIXED, FLEX) or self.winograd is None:
            return self
        return dataclasses.replace(self, technique=dataclasses.replace(self.winograd, transforms="flex"))


INT8 = bs.Int(8, 8)
TARGET = bs.targets.OpenVino(1, kernels=True)
TILES: tuple[Literal[2, 4, 6], ...] = (2, 4, 6)
FLOAT, DIRECT = Form("direct fp32", None), Form("direct int8", INT8, INT8)
FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        FLOAT,
        *(Form(f"F{tile} fp32", bs.Winograd(tile, 32)) for tile in TILES),
        DIRECT,
        *(Form(f"F{tile} int8", bs.Winograd(tile, 8), INT8) for tile in TILES),
        Form("F4 16-bit taps", bs.Winograd(4, 16), INT8),
    )
}

SECONDS: Mapping[str, tuple[float, float]] = {
    "direct fp32": (1.0, 0.15),
    "F2 fp32": (3.0, 0.25),
    "F4 fp32": (2.5, 0.2),
    "F6 fp32": (2.5, 0.2),
    "direct int8": (1.5, 0.3),
    "F2 int8": (7.5, 0.4),
    "F4 int8": (4.5, 0.3),
    "F6 int8": (6.0, 0.4),
    "F4 16-bit taps": (6.0, 0.35),
}
"""To apply and test a form, and of one training step of 32 images, on one core of a Zen 5: for the estimate."""


@dataclass(frozen=True)
class Settings:
    """Of a training. ``rate``: Adam's first; ``images``: "lossless", or "jpeg" for the 50,000 lossy ones."""

    steps: int
    rate: float
    images: str = "lossless"


@dataclass(frozen=True)
class Cell:
    """One network of the study. ``settings``: None where nothing is trained."""

    form: Form
    route: str
    seed: int
    settings: Settings | None = None

    @property
    def name(self) -> str:
        settings = self.settings
        how = "" if settings is None else f", {settings.steps} steps at {settings.rate:g}, {settings.images}"
        return f"{self.form.name}, {self.route}{how}, seed {self.seed}"

    @property
    def seconds(self) -> float:
        """About what it takes."""
        once, step = SECONDS.get(self.form.name, SECONDS["F2 int8"])
        return once + step * (0 if self.settings is None else self.settings.steps)


def softened(output: Tensor, reference: Tensor) -> Tensor:
    """What training minimizes: the divergence from the float network at :data:`TEMPERATURE` (Hinton et al. 2015,
    arXiv:1503.02531). On images that it was trained on the network is too sure for a temperature of 1 to tell much."""
    return TEMPERATURE**2 * batch_divergence(output / TEMPERATURE, reference / TEMPERATURE)


class Bed:
    """The network that everything is made of, the data that trains it, and what is known of its float outputs.

    The calibration data of the subject's task are the pool that seeds draw from and that is trained on.
    """

    def __init__(self, subject: Subject, root: Path | None = None) -> None:
        self.subject, self.root = subject, root
        self.net = network(duplicate(subject.model), first_inputs(subject.task.calibration))
        self.sites = self.net.record.sites
        layers = [name for name, site in self.sites.items() if site.kind in ("conv2d", "linear") and site.weight]
        first = next(name for name in layers if self.sites[name].kind == "conv2d")
        self.fitting = [name for name in layers if name != first and bs.Winograd().fits(self.sites[name])]
        self.others = [name for name in layers if name not in self.fitting]
        self._reference: dict[str, Array] = {}

    @cached_property
    def code(self) -> str:
        """A hash of the files that a cell depends on, those of the subject's key left out."""
        learning = ("finetune", "loader", "loop", "parameters", "trainer")
        files = (*(f"learn/{name}.py" for name in learning), "techniques/int_.py", "techniques/winograd.py")
        own = Path(__file__).parent.parent / "_images.py"
        return hash_files([*(Path(bs.__file__).parent / file for file in files), own])

    def key(self, cell: Cell, split: str) -> dict[str, Any]:
        """What a cell's record depends on."""
        settings = None if cell.settings is None else dataclasses.asdict(cell.settings)
        form = {"technique": repr(cell.form.technique), "rest": repr(cell.form.rest)}
        form |= {"own": repr(cell.form.own)} if cell.form.own else {}
        return self.subject.key(
            **form,
            route=cell.route,
            seed=cell.seed,
            settings=settings,
            split=split,
            batch=[BATCH, TEMPERATURE],
            library=self.code,
        )

    @cached_property
    def pools(self) -> dict[str, RandomAccess]:
        """Images to train on, those that were asked for so far."""
        return {"lossless": self.subject.task.calibration}  # type: ignore[dict-item]

    def pool(self, images: str) -> RandomAccess:
        if images not in self.pools:
            assert self.root is not None
            self.pools[images] = jpeg_training(self.root, BATCH)
        return self.pools[images]

    def plan(self, form: Form) -> bs.Plan:
        sites = dict.fromkeys(self.others, form.rest) | dict.fromkeys(self.fitting, form.technique) | dict(form.own)
        return bs.Plan({name: technique for name, technique in sites.items() if technique is not None})

    def refused(self, form: Form) -> str:
        """Why OpenVINO does not run the form; "" if it does."""
        if form.technique is None:
            return "it is float"
        verdicts = (TARGET.supports(form.technique, self.sites[name]) for name in self.fitting)
        return next((str(verdict) for verdict in verdicts if not verdict), "")

    def shipped(self, form: Form) -> bs.Plan:
        """Everything that OpenVINO has 8-bit kernels for, and the form's own at its sites."""
        supported = [name for name, site in self.sites.items() if INT8.fits(site) and TARGET.supports(INT8, site)]
        own = dict.fromkeys(supported, INT8) | dict(self.plan(form).sites)
        return TARGET.adapt(bs.Plan(own), self.net.record)

    def network(self, cell: Cell) -> nn.Module:
        """The network of a cell; raises what its training raises."""
        form, drawn = cell.form.by(cell.route), self.subject.drawn(cell.seed)
        plan = self.shipped(form) if cell.route == SHIPPED else self.plan(form)
        if cell.route in (SHIPPED, CORRECTED):
            plan = plan.replace(prepare=(bs.CorrectBias(),))
        net = bs.apply(self.subject.model, plan, drawn.calibration) if plan.sites else self.subject.model
        settings = cell.settings
        if settings is None:
            return net
        if cell.route == FIXED:
            for name, parameter in net.named_parameters():
                if name.rpartition(".")[2] in MATRICES:
                    parameter.requires_grad_(False)
        return bs.finetune(
            net,
            Augmented(self.pool(settings.images), BATCH),
            steps=settings.steps,
            teacher=self.subject.model,
            distance=softened,
            lr=settings.rate,
            seed=cell.seed,
        )

    def record(self, cell: Cell, split: str) -> dict[str, Any]:
        """``right`` ("1" and "0" by sample) and ``kl`` (nats, by sample) of a cell's network."""
        net = self.network(cell).eval()
        found, target = self.outputs(net, split)
        if split not in self._reference:
            self._reference[split] = self.outputs(self.subject.model, split)[0]
        reference = self._reference[split]
        gap = float(np.abs(found - reference).max())
        kl = [float(f"{value:.6g}") for value in divergence(reference, found)]
        return {"right": bits(found.argmax(1) == target), "kl": kl, "largest gap": gap}

    def outputs(self, net: nn.Module, split: str) -> tuple[Array, Array]:
        """Logits [n, classes] and targets [n]."""
        predict, parts = float_logits(net), list(self.subject.task.loader(split))  # type: ignore[arg-type]
        return np.concatenate([predict(x) for x, _ in parts]), np.concatenate([np.asarray(y) for _, y in parts])


def bits(values: Array) -> str:
    return "".join("1" if value else "0" for value in values)


def array(text: str) -> Array:
    return np.array([letter == "1" for letter in text])
