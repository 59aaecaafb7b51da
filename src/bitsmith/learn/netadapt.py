"""NetAdapt: channels go, group by group, until the target's measured time fits."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data import first_inputs
from ..deploy import export
from ..model.apply import apply
from ..model.network import duplicate, network
from ..plan import Plan
from ..prepare._channels import ChannelGroup, channel_groups
from ..prepare._layers import layers
from ..prepare.channels import PruneChannels
from ..progress import Progress, Silent
from ..site import Record
from ..targets.base import Source, Target, Timing
from ..task import Task, score
from .finetune import finetune
from .loop import Loss

Counts = Mapping[str, int]


class NetAdaptError(ValueError):
    """A budget that no network with these groups of channels keeps, or a network none of whose channels may go."""


@dataclass(frozen=True)
class AdaptedStep:
    """One iteration: ``group`` has ``left`` channels now, the network a predicted ``cost`` and a validation ``score``;
    ``tried``: how many groups were tried."""

    group: str
    left: int
    cost: float
    score: float
    tried: int


@dataclass(frozen=True)
class Adapted:
    """What :func:`netadapt` gives. ``model``: the smaller network. ``left``: channels of every group that shrank.

    ``steps``: what was done. ``cost``, ``first_cost``: predicted at the end and at the start, in ms unless a ``cost``
    was given. ``table_error``: median relative error of the table on the networks it was made from, each predicted
    without itself; None without a table. ``timing``, ``first_timing``: measured side by side at the end, None where
    nothing is exported.
    """

    model: nn.Module
    left: Mapping[str, int]
    steps: tuple[AdaptedStep, ...]
    cost: float
    first_cost: float
    source: Source
    table_error: float | None = None
    timing: Timing | None = None
    first_timing: Timing | None = None


def netadapt(
    model: nn.Module,
    task: Task,
    target: Target,
    budget: float,
    *,
    batch: int = 1,
    cost: Callable[[Record], float] | None = None,
    train: Iterable[Any] | None = None,
    loss: Loss | None = None,
    short: int = 0,
    long: int = 0,
    lr: float = 1e-3,
    cut: float = 0.025,
    decay: float = 0.96,
    divisor: int = 8,
    samples: int = 0,
    probes: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> Adapted:
    """NetAdapt (Yang et al. 2018, ECCV, arXiv:1804.03230, algorithm 1): a smaller network within ``budget``.

    Each iteration must take ``cut`` of the first cost away, ``decay`` times as much as the one before. Every group of
    channels (:func:`~bitsmith.groups_of_channels`) is tried: it keeps as many as meet that, a multiple of ``divisor``,
    those of largest norm, weights restored from ``samples`` samples as :class:`~bitsmith.PruneChannels` does; the
    network is trained for ``short`` steps of ``train`` with ``loss``, and scored on the validation data. The best
    stays. At the end it is trained for ``long`` steps. The defaults of ``cut`` and ``decay`` are those of the authors'
    code.

    ``budget``: ms per batch of ``batch`` samples on ``target``. The cost of a network is read from a table: ``probes``
    networks of random widths are exported and profiled there, and each layer's time interpolated in its input and
    output channels, ``a + b in + c out + d in out`` with no negative coefficient. A modelled target computes its time
    instead. ``cost``: of a record, in any unit, takes the place of both: an energy, for energy-aware pruning (Yang et
    al. 2017, arXiv:1611.05128).

    Reads calibration and validation data. The model is not changed. Raises :class:`NetAdaptError` for a budget below
    the smallest design.
    """
    for name, value, low, high in (("cut", cut, 0.0, 1.0), ("decay", decay, 0.0, 1.0 + 1e-12)):
        if not low < value < high:
            raise ValueError(f"netadapt({name}={value}): must be above 0 and at most 1")
    if not budget > 0:
        raise ValueError(f"netadapt(budget={budget}): must be above 0")
    if (short or long) and train is None:
        raise ValueError("netadapt: training needs train= (a loader), and loss= unless it is the task's")
    progress = progress or Silent()
    example = first_inputs(task.calibration)
    net = network(model, example, forward=task.forward)
    groups = {name: group for name, group in channel_groups(net.record).items() if not group.locked}
    if not groups:
        raise NetAdaptError("netadapt: the network has no group of channels that may shrink")
    first = {name: group.channels for name, group in groups.items()}
    work = _Work(task, example, target, batch, groups, first, samples, seed)
    predict = work.predictor(model, cost, probes, divisor, progress)
    start = now = predict(first)
    least = predict({name: min(divisor, count) for name, count in first.items()})
    if least > budget:
        raise NetAdaptError(
            f"netadapt(budget={budget:.4g}): the smallest design, {divisor} channels in every group, costs "
            f"{least:.4g}; give more, or a smaller divisor"
        )
    current, counts, amount = duplicate(model), dict(first), cut * start
    steps: list[AdaptedStep] = []
    progress.start(f"taking channels away: {start:.4g} to {budget:.4g}", 1000)
    while now > budget:
        goal = max(now - amount, budget)
        options = {name: n for name in groups if (n := _most(counts, name, goal, divisor, predict)) is not None}
        if not options:
            amount /= 2
            if amount < 1e-4 * start:
                raise NetAdaptError(
                    f"netadapt: no group alone takes the cost below {now:.4g}; the budget is {budget:.4g}"
                )
            continue
        best: tuple[float, float, str, nn.Module] | None = None
        for name, count in options.items():
            smaller = work.pruned(current, {name: count})
            if short:
                smaller = finetune(smaller, train, loss or task.loss, steps=short, lr=lr, seed=seed)  # type: ignore[arg-type]
            found = score(smaller, task, "validation").mean * (-1 if task.lower else 1)
            rank = found, -predict({**counts, name: count})
            if best is None or rank > best[:2]:
                best = *rank, name, smaller
        assert best is not None
        value, negative, chosen, current = best
        before, counts[chosen], now = now, options[chosen], -negative
        steps.append(AdaptedStep(chosen, counts[chosen], now, value * (-1 if task.lower else 1), len(options)))
        progress.advance(max(1, round(1000 * (before - now) / (start - budget))))
        amount *= decay
    if long:
        current = finetune(current, train, loss or task.loss, steps=long, lr=lr, seed=seed)  # type: ignore[arg-type]
    left = {name: count for name, count in counts.items() if count < first[name]}
    timings = work.timed(model, current) if cost is None and target.source == "measured" else (None, None)
    return Adapted(current, left, tuple(steps), now, start, target.source, work.table_error, timings[1], timings[0])


def _most(counts: Counts, name: str, goal: float, divisor: int, predict: Callable[[Counts], float]) -> int | None:
    """The largest number of channels of a group, a multiple of the divisor, with which the cost is no more than the
    goal; None if there is none."""
    low, high = 1, (counts[name] - 1) // divisor
    if high < 1 or predict({**counts, name: divisor}) > goal:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if predict({**counts, name: middle * divisor}) <= goal else (low, middle - 1)
    return low * divisor


class _Work:
    """Networks of other widths, and what they cost."""

    def __init__(
        self,
        task: Task,
        example: Any,
        target: Target,
        batch: int,
        groups: Mapping[str, ChannelGroup],
        first: Counts,
        samples: int,
        seed: int,
    ) -> None:
        self.task, self.example, self.target, self.batch = task, example, target, batch
        self.groups, self.first, self.samples, self.seed = groups, first, samples, seed
        self.table_error: float | None = None

    def pruned(self, model: nn.Module, left: Counts, restore: bool = True) -> nn.Module:
        """A copy of the model with other numbers of channels."""
        net = network(duplicate(model), self.example, forward=self.task.forward)
        less = tuple((name, n) for name, n in left.items())
        known = channel_groups(net.record)
        if all(known[name].channels == n for name, n in less):
            return net.model
        step = PruneChannels(left=less, samples=self.samples if restore else 0, seed=self.seed)
        return step.prepare(net, Plan(), self.task.calibration).model

    def timed(self, *models: nn.Module) -> list[Timing]:
        with tempfile.TemporaryDirectory() as folder:
            return self.target.measure([self._file(m, Path(folder), k) for k, m in enumerate(models)])

    def _file(self, model: nn.Module, folder: Path, number: int) -> Any:
        suffix = "xml" if self.target.name == "openvino" else "onnx"
        named = apply(model, Plan(), self.task.calibration, forward=self.task.forward)  # nodes get their sites' names
        return export(named, self.target, folder / f"{number}.{suffix}", self.example, self.batch)

    def predictor(
        self,
        model: nn.Module,
        cost: Callable[[Record], float] | None,
        probes: int,
        divisor: int,
        progress: Progress,
    ) -> Callable[[Counts], float]:
        """The cost of a network with those numbers of channels."""
        computed = self.target.computed(
            Plan(), network(model, self.example, forward=self.task.forward).record, self.batch
        )
        if cost is None and computed is None:
            return self._table(model, probes, divisor, progress)
        known: dict[tuple[tuple[str, int], ...], float] = {}

        def found(counts: Counts) -> float:
            key = tuple(sorted(counts.items()))
            if key not in known:
                small = self.pruned(model, counts, restore=False)
                record = network(small, self.example, forward=self.task.forward).record
                timing = None if cost is not None else self.target.computed(Plan(), record, self.batch)
                known[key] = cost(record) if cost is not None else timing.ms  # type: ignore[union-attr]
            return known[key]

        return found

    def _table(self, model: nn.Module, probes: int, divisor: int, progress: Progress) -> Callable[[Counts], float]:
        generator = random.Random(self.seed)
        widths = [dict(self.first)]
        for index in range(max(probes, 6) - 1):
            share = (index + 1) / max(probes, 6)
            widths.append(
                {
                    name: min(
                        n, max(divisor, round(n * min(1.0, share + generator.uniform(-0.2, 0.2)) / divisor) * divisor)
                    )
                    for name, n in self.first.items()
                }
            )
        rows: list[dict[str, float]] = []
        wholes: list[float] = []
        progress.start(f"timing {len(widths)} networks of other widths on {self.target.name}", len(widths))
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for index, counts in enumerate(widths):
                files.append(self._file(self.pruned(model, counts, restore=False), Path(folder), index))
                rows.append(dict(self.target.site_times(files[-1], rounds=12).sites))
                progress.advance()
            wholes = [timing.low for timing in self.target.measure(files, rounds=20)]
        net = network(model, self.example, forward=self.task.forward)
        table = Table(self.groups, net.record, self.first)
        errors = []
        for out in range(1, len(widths)):
            keep = [k for k in range(len(widths)) if k != out]
            table.fit([widths[k] for k in keep], [rows[k] for k in keep], [wholes[k] for k in keep])
            errors.append(abs(table(widths[out]) / wholes[out] - 1))
        table.fit(widths, rows, wholes)
        self.table_error = float(np.median(errors))
        return table


class Table:
    """The time of every layer by its input and output channels, fitted to profiles of networks of several widths."""

    def __init__(self, groups: Mapping[str, ChannelGroup], record: Record, first: Counts) -> None:
        self.first = first
        written = {layer: name for name, group in groups.items() for layer in (*group.writers, *group.through)}
        read = {layer: name for name, group in groups.items() for layer, _ in group.readers}
        read |= {layer: name for name, group in groups.items() for layer in group.through}
        self.layers = {name: (read.get(name, ""), written.get(name, "")) for name in layers(record)}
        self.heads = {member: site.name for site in record.sites.values() for member in site.epilogue}
        self.area = {
            name: math.prod(record.sites[name].out_shapes[0]) / record.sites[name].operands[1].shape[0]
            for name in self.layers
        }
        self.channels = {name: record.sites[name].operands[1].shape[0] for name in self.layers}
        self.terms: dict[str, np.ndarray[Any, Any]] = {}

    def fit(self, widths: Sequence[Counts], rows: Sequence[Mapping[str, float]], wholes: Sequence[float]) -> None:
        """``rows``: ms by site of each network; ``wholes``: its ms without a profiler."""
        times: dict[str, list[float]] = {name: [] for name in (*self.layers, "")}
        for row, whole in zip(rows, wholes, strict=True):
            factor = whole / max(sum(row.values()), 1e-9)
            own = dict.fromkeys(times, 0.0)
            for site, ms in row.items():
                head = self.heads.get(site, site)
                own[head if head in own else ""] += factor * ms
            for name, ms in own.items():
                times[name].append(ms)
        even = 1.0 / np.asarray(wholes)  # so that relative errors count
        for name, measured in times.items():
            features = np.stack([self._features(name, counts) for counts in widths])
            self.terms[name] = _fitted(features * even[:, None], np.asarray(measured) * even)

    def __call__(self, counts: Counts) -> float:
        return float(sum(self.terms[name] @ self._features(name, counts) for name in self.terms))

    def _features(self, name: str, counts: Counts) -> np.ndarray[Any, Any]:
        if not name:  # what no layer's time is part of goes with what the layers write
            written = (
                self._share(self.layers[layer][1], counts) * self.area[layer] * self.channels[layer]
                for layer in self.layers
            )
            return np.array([1.0, sum(written) / max(sum(self.area[x] * self.channels[x] for x in self.layers), 1.0)])
        a, b = (self._share(group, counts) for group in self.layers[name])
        return np.array([1.0, a, b, a * b])

    def _share(self, group: str, counts: Counts) -> float:
        return counts.get(group, self.first[group]) / self.first[group] if group else 1.0


def _fitted(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Least squares with no negative coefficient: over all subsets of few columns."""
    best, least = np.zeros(x.shape[1]), math.inf
    for size in range(1, x.shape[1] + 1):
        for chosen in itertools.combinations(range(x.shape[1]), size):
            found, *_ = np.linalg.lstsq(x[:, chosen], y, rcond=1e-9)
            error = float(np.square(x[:, chosen] @ found - y).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(x.shape[1]), error
                best[list(chosen)] = found
    return best
