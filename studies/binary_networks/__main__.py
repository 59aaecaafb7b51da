"""Optimizing binary networks; bit errors; tasks in a row: ``python -m studies.binary_networks``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

import bitsmith as bs
from bitsmith._hash import hash_files
from bitsmith.zoo.data import data_root

from .._command import RESULTS, Study, spread
from . import tables
from .nets import CLIPPINGS, Data, cifar_data, mnist_data
from .parts import bit_errors, in_a_row, pretrained
from .train import FLOAT, OPTIMIZERS, SCRATCH, Setting, float_network, record

SHARES = {"tune": 0.3, "mnist": 0.45, "errors": 0.12, "tasks": 0.13, "cifar": 0.2, "resnet": 0.1}
"""Of the time, by part."""
DEFAULT = ("mnist", "errors", "tasks", "cifar", "resnet")

STEPS = {
    "tune": (300, 300),
    "mnist": (200, 27_500),
    "errors": (300, 5500),
    "tasks": (200, 5500),
    "cifar": (80, 15_000),
    "resnet": (20, 2000),
}
"""Of one training: by default, and with --full. 550 steps are one pass through MNIST, 30 one through CIFAR's 3000."""

WANTED = {"mnist": 0.9, "cifar": 0.3}
"""Validation accuracies that steps are counted to."""

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
RATE: Mapping[str, float] = {"SGD": 3.0, "momentum": 3.0, "RMSprop": 0.03, "Adam": 0.03}
"""The best that ``--only tune`` looked at, on validation images at a seed that no result has, from scratch and without
clipping."""
TUNING_SEED = 100

CIFAR_OPTIMIZERS = ("momentum", "Adam")
SCALINGS = ("none", "xnor", "learned")
PLASTICITIES = (0.0, 1.35)
TASKS = 3
TASK_RATES = (5e-3, 0.05, 0.5)
"""The published one and more: so few steps leave latent weights far below 1 there, where m protects nothing."""
RESNET_RATE = 1e-3


class Bench:
    """The study's data, its float networks, and where records are kept."""

    def __init__(self, study: Study, root: Path) -> None:
        self.study, self.root = study, root
        self.data = cache(lambda name: (mnist_data if name == "mlp" else cifar_data)(root))
        self._states: dict[Any, Mapping[str, Tensor]] = {}
        package = Path(bs.__file__).parent
        files = ("techniques/binary.py", "numerics/binarize.py", "learn/metaplastic.py")
        own = [Path(__file__).parent / name for name in ("nets.py", "train.py", "parts.py")]
        self.code = hash_files([*(package / name for name in files), *own])

    def steps(self, part: str) -> int:
        given = self.study.options.steps
        return given if given else STEPS[part][self.study.options.full]

    def row(self, part: str, setting: Setting, compute: Callable[[], dict[str, Any]], **more: Any) -> Any:
        """A record from the store or made; a row of the results for it."""
        key = {"part": part, **dataclasses.asdict(setting), **more, "code": self.code}
        extra = "".join(f", {name} {value}" for name, value in more.items())
        found = self.study.row("binary networks", key, f"{part}, {setting.name}{extra}", compute)
        if found is not None:
            self.study.rows.append({"part": part, **dataclasses.asdict(setting), **more, **found})
        return found

    def grid(self, part: str, settings: Sequence[Setting]) -> tables.Records:
        records = [(setting, self.row(part, setting, partial(self._one, setting))) for setting in settings]
        return [(setting, one) for setting, one in records if one is not None]

    def _one(self, setting: Setting) -> dict[str, Any]:
        data: Data = self.data(setting.network)
        return record(setting, data, self._state(setting, data) if setting.start == FLOAT else None)

    def _state(self, setting: Setting, data: Data) -> Mapping[str, Tensor]:
        key = (setting.network, setting.seed, setting.float_steps, setting.float_rate)
        if key not in self._states:
            self._states[key] = float_network(setting, data).state_dict()
        return self._states[key]


def cells(network: str, optimizers: Sequence[str], seeds: int, steps: int) -> Iterator[Setting]:
    """Seed by seed, so that time that runs out leaves whole seeds."""
    for seed in range(seeds):
        for start, optimizer, clipping in itertools.product((SCRATCH, FLOAT), optimizers, CLIPPINGS):
            float_steps = steps if start == FLOAT else 0
            yield Setting(network, optimizer, clipping, start, seed, steps, RATE[optimizer], float_steps)


def tune(bench: Bench) -> None:
    """The rate of each optimizer."""
    from benchmarks.harness import table

    steps, lines = bench.steps("tune"), []
    for optimizer in OPTIMIZERS:
        rates = [rate for rate in RATES if (rate <= 3e-2) == (optimizer in ("RMSprop", "Adam"))]
        settings = [Setting("mlp", optimizer, "no clipping", SCRATCH, TUNING_SEED, steps, rate) for rate in rates]
        found = {setting.rate: one["last"] for setting, one in bench.grid("tune", settings)}
        lines.append([optimizer, *("-" if rate not in found else f"{found[rate]:.2%}" for rate in RATES)])
    title = f"Rates, validation accuracy after {steps} steps from scratch without clipping, seed {TUNING_SEED}"
    table(title, ["optimizer", *(f"{rate:g}" for rate in RATES)], lines)


def mnist(bench: Bench) -> None:
    steps = bench.steps("mnist")
    records = bench.grid("mnist", list(cells("mlp", tuple(OPTIMIZERS), bench.study.options.seeds, steps)))
    if records:
        said = f"MNIST, MLP 3x512, weights and activations binary, {steps} steps of 100"
        tables.grid(records, WANTED["mnist"], said)
        tables.apart(records, f"{said}: points of validation accuracy, everything else equal")
        tables.curves(records, RESULTS / "binary_networks_curves.svg")


def errors(bench: Bench) -> None:
    steps, found = bench.steps("errors"), []
    for seed in range(bench.study.options.seeds):
        setting = Setting("mlp", "Adam", "from half", FLOAT, seed, steps, RATE["Adam"], steps // 2)
        found.append(bench.row("errors", setting, partial(bit_errors, setting, bench.data("mlp"))))
    known = [one for one in found if one is not None]
    tables.memory_cells()
    if known:
        tables.errors(known, f"MNIST, MLP 3x512, all weights in a memory that errs, {steps} steps, test accuracy")
        tables.error_curve(known, RESULTS / "binary_networks_errors.svg")


def tasks(bench: Bench) -> None:
    steps, data = bench.steps("tasks"), bench.data("mlp")
    found: dict[tuple[float, float], list[Any]] = {key: [] for key in itertools.product(TASK_RATES, PLASTICITIES)}
    for seed, (rate, m) in itertools.product(range(bench.study.options.seeds), found):
        setting = Setting("mlp", "Metaplastic", "no clipping", SCRATCH, seed, steps, rate)
        one = bench.row("tasks", setting, partial(in_a_row, setting, data, m, TASKS), m=m)
        found[rate, m] += [] if one is None else [one]
    if any(found.values()):
        title = f"Permuted MNIST, MLP 3x512, {TASKS} tasks of {steps} steps in a row: test accuracy after the last"
        tables.row_of_tasks(found, title)


def cifar(bench: Bench) -> None:
    steps = bench.steps("cifar")
    records = bench.grid("cifar", list(cells("convnet", CIFAR_OPTIMIZERS, bench.study.options.seeds, steps)))
    if records:
        said = f"CIFAR-10 (3000 training images), small convnet, weights and activations binary, {steps} steps of 100"
        tables.grid(records, WANTED["cifar"], said)
        tables.apart(records, f"{said}: points of validation accuracy, everything else equal")


def resnet(bench: Bench) -> None:
    steps, data = bench.steps("resnet"), bench.data("convnet")
    found: dict[str, list[Any]] = {scaling: [] for scaling in SCALINGS}
    for seed, scaling in itertools.product(range(min(2, bench.study.options.seeds)), SCALINGS):
        setting = Setting("resnet20", "Adam", "from the start", "pretrained", seed, steps, RESNET_RATE)
        compute = partial(pretrained, data, bench.root, scaling, seed, steps, RESNET_RATE)
        one = bench.row("resnet", setting, compute, scaling=scaling)
        found[scaling] += [] if one is None else [one]
    if all(found.values()):
        title = (
            f"CIFAR-10, pretrained ResNet-20, 18 convolutions with binary weights, {steps} steps of 50 towards float"
        )
        tables.resnets(found, f"{title} ({spread((found['none'][0]['float'],), percent=True)} %)")


PARTS: Mapping[str, Callable[[Bench], None]] = {
    "tune": tune,
    "mnist": mnist,
    "errors": errors,
    "tasks": tasks,
    "cifar": cifar,
    "resnet": resnet,
}


def main(argv: Sequence[str] | None = None) -> None:
    study = Study.start(
        "binary_networks",
        "How binary networks are optimized, what bit errors cost, what metaplasticity keeps.",
        25,
        argv,
        parts=tuple(PARTS),
        seeds=3,
        full="50 passes through MNIST and more on CIFAR, every part, no limit of time: days of one core",
        store="binary_networks",
        more={"steps": (int, 0, "of every training (0: as each part has it)")},
    )
    root = data_root()
    if root is None:
        raise SystemExit("the data folder is missing: set BITSMITH_DATA")
    bench = Bench(study, root)
    names = study.chosen if study.options.only or study.options.full else list(DEFAULT)
    whole = sum(SHARES[name] for name in names)
    for name in names:
        study.part(SHARES[name] / whole)
        PARTS[name](bench)
    study.finish()


if __name__ == "__main__":
    main()
