"""One call from a float network to an integer one: the plan a target would be given, prepared and applied.

The defaults are among what came closest to float (geometric mean of KL divergences) on validation data of trained
networks, of the combinations of steps in benchmarks/int8_defaults.py; docs/post_training.md has the figures.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from .data import first_inputs
from .model.apply import build, prepared
from .model.calibrate import check_weights
from .model.network import network, warn_unreached
from .plan import Plan
from .prepare._layers import layers
from .prepare.adaround import AdaRound
from .prepare.correct_bias import CorrectBias
from .prepare.equalise_depthwise import EqualiseDepthwise
from .prepare.gptq import Gptq
from .prepare.ranges import choose_ranges
from .prepare.smooth import SmoothQuant
from .site import Range, UnknownSiteError
from .targets.base import Target
from .targets.onnxruntime import OnnxRuntime
from .technique import No, Step, Technique
from .techniques.int_ import Int


def quantize(
    model: nn.Module,
    calibration: Any,
    target: Target | None = None,
    technique: Technique | None = None,
    *,
    prepare: Sequence[Step] | None = None,
    choose: bool = True,
    exclude: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Put ``technique`` (``Int(8, 8)``) at every site that the target (ONNX Runtime) has a kernel for: a simulation.

    ``calibration``: a loader of ``(inputs, target)`` for ranges and steps. ``prepare``: steps before; None is
    :func:`default_steps`, ``()`` none. ``choose``: give every site the range method with the least error at its
    readers (:func:`~bitsmith.prepare.ranges.choose_ranges`) where the technique leaves it at min/max. ``exclude``:
    shell patterns of sites to leave in float; one that matches nothing is an error. ``plan_of(net)`` is the plan,
    ``export(net, target, path, example)`` writes the file. The model is not changed. Layers that the first item of the
    calibration data never reaches are named in a warning. Raises ``ValueError`` with the reasons if not one site can
    change.
    """
    target = target or OnnxRuntime()
    technique = technique or Int(8, 8)
    inputs = first_inputs(calibration)
    net = network(model, inputs, forward=forward, inside=True)
    check_weights(model)
    warn_unreached(net)
    left: set[str] = set()
    for pattern in exclude:
        hits = {name for name in net.record.sites if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise UnknownSiteError(pattern, net.record.sites)
        left |= hits
    chosen: dict[str, Technique] = {}
    reasons: dict[str, None] = {}
    for name, site in net.record.sites.items():
        if name in left:
            continue
        verdict = technique.fits(site)
        if verdict:
            verdict = target.supports(technique, site)
        if verdict:
            chosen[name] = technique
        elif isinstance(verdict, No):
            reasons[f"{site.kind}: {verdict}"] = None
    net = network(model, inputs, forward=forward, names=chosen)
    plan = target.adapt(Plan(chosen), net.record)
    if not plan.sites:
        raise ValueError(
            f"{technique} changes not one site on {target.name}: {'; '.join(reasons) or 'all are excluded'}"
        )
    if prepare is None:
        kinds = {layer.site.kind for name, layer in layers(net.record).items() if name in plan.sites}
        steps = default_steps(technique, kinds)
    else:
        steps = tuple(prepare)
    ranges = {technique.range, technique.weight_range} if isinstance(technique, Int) else set()
    if choose and ranges == {Range()}:
        # they belong to the network that will be quantized, so far as steps make it without knowing ranges
        first = tuple(itertools.takewhile(lambda step: step.keeps_function, steps))
        plan = choose_ranges(prepared(net, plan.replace(prepare=first), calibration), plan, calibration)
    return build(net, plan.replace(prepare=steps), calibration, seed=seed)


def default_steps(technique: Technique, kinds: Collection[str] = ("conv2d", "linear")) -> tuple[Step, ...]:
    """What ``quantize`` prepares a network with where it is not told. ``kinds``: of the layers that it changes.

    Weights of 8 bits take outliers in; of fewer bits they have no room for them, and their rounding is optimized: that
    of convolutional networks is learned, and in others the columns of a matrix make up for each other.

    >>> default_steps(Int(8, 8))
    (EqualiseDepthwise(limit=64.0), SmoothQuant(alpha=0.85, multiply=True), CorrectBias(samples=256))
    >>> [type(step).__name__ for step in default_steps(Int(4, 8))]
    ['EqualiseDepthwise', 'AdaRound', 'CorrectBias']
    >>> [type(step).__name__ for step in default_steps(Int(4, 8), ["linear"])]
    ['EqualiseDepthwise', 'Gptq', 'CorrectBias']
    >>> default_steps(Int(4, 8, affine_weights=True)) == default_steps(Int(4, 8))
    True
    """
    if not isinstance(technique, Int) or technique.a is None:
        return ()
    if technique.granularity == "tensor":
        return (CorrectBias(),)
    if technique.w == 8:
        return EqualiseDepthwise(), SmoothQuant(0.85, multiply=True), CorrectBias()
    rounding: tuple[Step, ...] = ()
    if kinds:
        rounding = (AdaRound() if any(kind.startswith("conv") for kind in kinds) else Gptq(),)
    return EqualiseDepthwise(), *rounding, CorrectBias()
