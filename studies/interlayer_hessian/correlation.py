"""Predicted against true loss of random sets of sites, by every sensitivity, with and without cross terms."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from bitsmith.bench import Bench
from bitsmith.data import call, items
from bitsmith.plan import Plan
from bitsmith.sensitivity.base import Meter, Pair, Scores, Sensitivity
from bitsmith.sensitivity.hessian_trace import HessianTrace
from bitsmith.sensitivity.inter_layer import InterLayer
from bitsmith.sensitivity.noise import FirstSamples
from bitsmith.sensitivity.one_at_a_time import output_error
from bitsmith.sensitivity.pairwise import Pairwise
from bitsmith.sensitivity.quantization_error import QuantizationError
from bitsmith.task import Task, evaluating
from bitsmith.technique import Technique

from .._guided import Subject

FEWEST = 3
"""Sets of one or two sites are exact by construction for what was measured of one or two."""


@dataclass(frozen=True)
class Predictor:
    """``with_cross``: label -> whether the cross terms count. ``few_sites``: asked about a part of the sites only."""

    sensitivity: Sensitivity
    with_cross: Mapping[str, bool]
    few_sites: bool = False
    loss: bool = True


def predictors(samples: int, seed: int, hessian: bool, pairwise: bool) -> dict[str, Predictor]:
    """By name. ``samples``: of the drawn ones; the dear ones take fewer."""
    few = max(samples // 4, 8)
    found = {
        "quantization error": Predictor(QuantizationError(), {"quantization error": False}),
        "trace": Predictor(HessianTrace(samples=few, most=8, seed=seed), {"Hessian trace": False}),
        "output": Predictor(
            InterLayer(samples=samples, shrink=False, seed=seed),
            {"Gauss-Newton of output, mu=0": False, "Gauss-Newton of output, mu=1": True},
        ),
        "shrunk": Predictor(InterLayer(samples=samples, seed=seed), {"Gauss-Newton of output, mu=1, shrunk": True}),
        "loss": Predictor(
            InterLayer(of="loss", samples=samples, shrink=False, seed=seed),
            {"Gauss-Newton of loss, mu=0": False, "Gauss-Newton of loss, mu=1": True},
        ),
        "alone": Predictor(_Alone(few), {"each site measured alone": False}),
    }
    if hessian:
        form = InterLayer(form="hessian", samples=few, seed=seed)
        found["hessian"] = Predictor(form, {"Hessian of loss, mu=0": False, "Hessian of loss, mu=1": True})
    if pairwise:
        # without a loss it measures the error of the output, which is not 0 where a network is confident
        label = {"every two sites measured": True}
        found["pairwise"] = Predictor(Pairwise(samples=few), label, few_sites=True, loss=False)
    return found


@dataclass(frozen=True)
class _Alone:
    """``output_error`` on the first samples, with what it cost."""

    samples: int

    def __call__(self, model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Any) -> Scores:
        meter = Meter()
        task = dataclasses.replace(task, calibration=FirstSamples(task.calibration, self.samples, meter))
        losses = dict(zip(pairs, output_error(model, task, pairs, simulate), strict=True))
        return Scores(losses, spent=meter.spent())


def sites_for(bench: Bench, technique: Technique) -> list[str]:
    """Where it may be chosen."""
    return [
        name
        for name, site in bench.net.record.sites.items()
        if site.role == "integer" and technique.fits(site) and bench.target.supports(technique, site)
    ]


def subsets(sites: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Random sets of :data:`FEWEST` sites or more, their number uniform."""
    draw = random.Random(seed)
    fewest = min(FEWEST, len(sites))
    return [tuple(draw.sample(list(sites), draw.randint(fewest, len(sites)))) for _ in range(count)]


class Held:
    """The first batches of the validation half that hold ``samples`` (None: all), and what the float network says."""

    def __init__(self, subject: Subject, bench: Bench, samples: int | None) -> None:
        self.bench, self.forward = bench, subject.task.forward
        parts, seen = [], 0
        for inputs, target in items(subject.task.validation, "validation"):
            parts.append((inputs, target))
            seen += len(target)
            if samples is not None and seen >= samples:
                break
        self.parts = parts
        self.target = torch.cat([target for _, target in parts])
        self.float = self._logits(bench.model)

    def _logits(self, net: nn.Module) -> Tensor:
        with evaluating(net):
            return torch.cat([call(net, inputs, self.forward) for inputs, _ in self.parts])

    def truth(self, plan: Plan) -> dict[str, float]:
        """Of a plan: divergence of its classes from the float network's (KL, nats), and the drop of accuracy."""
        logits = self._logits(self.bench.simulate(plan))
        divergence = F.kl_div(
            F.log_softmax(logits.double(), -1), F.log_softmax(self.float.double(), -1), log_target=True, reduction="sum"
        )
        right = [(x.argmax(-1) == self.target).double().mean() for x in (self.float, logits)]
        return {"kl": float(divergence) / len(logits), "drop": float(right[0] - right[1]), "n": len(logits)}


def predicted(scores: Scores, technique: Technique, sites: Sequence[str], cross: bool) -> float:
    """What the scores say of a set of sites; one that was not scored counts nothing."""
    chosen = {(site, technique) for site in sites}
    total = sum(scores.losses.get(pair, 0.0) for pair in chosen)
    if cross:
        total += sum(loss for (one, other), loss in scores.cross.items() if one in chosen and other in chosen)
    return total


def correlations(
    scores: Scores, technique: Technique, with_cross: Mapping[str, bool], truths: Mapping[tuple[str, ...], Any]
) -> dict[str, dict[str, float]]:
    """Spearman's coefficient of what was predicted with the truth, by label: ``kl`` and ``drop``."""
    found = {}
    for label, cross in with_cross.items():
        said = [predicted(scores, technique, sites, cross) for sites in truths]
        found[label] = {what: _rank(said, [truth[what] for truth in truths.values()]) for what in ("kl", "drop")}
    return found


def _rank(one: Sequence[float], other: Sequence[float]) -> float:
    """NaN where all of either are the same."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return math.nan
    return float(spearmanr(one, other).statistic)


def scores_of(bench: Bench, task: Task, predictor: Predictor, pairs: Sequence[Pair]) -> Scores:
    """The scores on this draw of calibration data; quantizers stay those of the bench, so that the truth does too."""
    if not predictor.loss:
        task = dataclasses.replace(task, loss=None)
    got = predictor.sensitivity(bench.model, task, list(pairs), bench.simulate)
    assert isinstance(got, Scores)
    return got
