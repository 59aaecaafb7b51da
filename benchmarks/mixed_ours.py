"""What ``mixed_precision`` asks of Bitsmith for a cell: a plan, what finding it took, a peer's plan in our terms."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import bitsmith as bs
from bitsmith.bench import Bench, suffix
from bitsmith.evaluate import Evaluator
from bitsmith.optimize import steps_for
from bitsmith.profile import Profile, measure
from bitsmith.search import BudgetError, Result, search
from bitsmith.targets.base import Target

from .mixed_cells import MODEL, SPACES, Cell, Halves


@dataclass(frozen=True)
class Found:
    """A plan and its file. ``passes``: full evaluation sets forwarded; ``sensitivity``: the same of the sensitivity, a
    backward counted two. ``seconds``: wall time of profile and search. ``profiling``: of the profile alone."""

    plan: bs.Plan
    path: Path
    met: bool
    passes: float
    sensitivity: float
    seconds: float
    profiling: float
    changed: int
    result: Result | None = None


def target_of(runtime: str, threads: int) -> Target:
    """``onnxruntime``, ``openvino`` or the modelled accelerator."""
    if runtime == "modelled":
        return MODEL
    return bs.targets.OnnxRuntime(threads) if runtime == "onnxruntime" else bs.targets.OpenVino(threads)


def optimized(cell: Cell, data: Halves, runtime: str, threads: int, folder: Path) -> tuple[Found, Bench]:
    """What ``optimize`` does up to its report, with its defaults."""
    target = target_of(runtime, threads)
    start = time.perf_counter()
    bench = Bench.open(data.model, data.task, target, folder=folder)
    profiled = measure(bench, SPACES[cell.space])
    profiling = time.perf_counter() - start
    evaluate = Evaluator(bench, steps_for(bench))
    met = True
    try:
        result = search(profiled, bs.Budget(drop=cell.budget), evaluate=evaluate)
    except BudgetError as error:
        result, met = error.best, False
    plan = evaluate.adapted(result.plan)
    seconds = time.perf_counter() - start
    total = evaluate.gradual.reference.n
    found = _found(bench, plan, profiled, folder / f"ours{suffix(target)}", result, met)
    return dataclasses.replace(
        found,
        passes=result.samples / total,
        sensitivity=profiled.spent.passes / total,
        seconds=seconds,
        profiling=profiling,
    ), bench


def everywhere(cell: Cell, bench: Bench, folder: Path) -> Found:
    """The control: the last technique of the space at every site that takes it."""
    technique, target = SPACES[cell.space][-1], bench.target
    sites = {
        name: technique
        for name, site in bench.net.record.sites.items()
        if site.role == "integer" and technique.fits(site) and target.supports(technique, site)
    }
    plan = bench.adapted(bs.Plan(sites)).replace(prepare=steps_for(bench))  # what every plan of ours has
    return _found(bench, plan, None, folder / f"everywhere{suffix(target)}", None, True)


def _found(
    bench: Bench, plan: bs.Plan, profiled: Profile | None, path: Path, result: Result | None, met: bool
) -> Found:
    artifact = bench.target.export(bench.simulate(plan), path, bench.example, bench.batch)
    changed = sum(technique != bs.Float() for technique in plan.sites.values())
    return Found(plan, artifact.path, met, 0.0, 0.0, 0.0, 0.0, changed, result)


def translated(plan: Mapping[str, int | str], space: str, bench: Bench, tuner: str) -> bs.Plan:
    """A peer's bits by weight as a plan of ours, for the model's time. Activations have as many bits, in ``w4`` and
    with MCT, which has no others, 8.

    Sites without a weight get the fewest bits of the space, in favour of the peer, whose own choice is not told.
    """
    narrow = SPACES[space][-1]
    sites: dict[str, bs.Technique] = {}
    for name, site in bench.net.record.sites.items():
        if site.role != "integer":
            continue
        weight = site.weight
        bits = None if weight is None else _bits(plan, (name, site.path, *weight.parameters))
        technique: bs.Technique = narrow
        if weight is not None:
            if bits is None or bits == "float" or int(bits) >= 16:
                technique = bs.Float("bfloat16") if space == "modelled" else bs.Float()
            else:
                eight = space == "w4" or tuner == "mct_mixed_precision"
                technique = bs.Int(int(bits), 8 if eight else max(int(bits), 4))
        if technique.fits(site) and bench.target.supports(technique, site):
            sites[name] = technique
    return bs.Plan({name: t for name, t in sites.items() if t != bs.Float()})


def _bits(plan: Mapping[str, int | str], names: tuple[str, ...]) -> int | str | None:
    """The bits of a weight under one of its names; None where the peer names no such one."""
    for name in names:
        for key, bits in plan.items():
            if name and (key == name or key.startswith((f"{name}.", f"{name}_")) or key == f"{name}.weight"):
                return bits
    return None


def modelled_ms(bench: Bench, plan: bs.Plan) -> float:
    """The model's time of a plan."""
    (timing,) = bench.times([plan])
    return timing.ms
