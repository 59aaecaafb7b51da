"""Evaluating plans on the runtime itself, where that is faster than simulating them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._hash import hash_source, technique_key
from .bench import Bench
from .data import batch_size, call
from .plan import Plan
from .targets.base import Array, TargetError, example_arrays
from .task import evaluating

_ROUNDS = 2
_EQUAL = 1e-4
"""One rounding to bfloat16 moves a number by up to 4e-3 of itself, one to float32 by 6e-8."""
_TRUER_S = 2.0
"""So much longer may running a prepared plan take: the runtime rounds otherwise than the simulation, and near the
budget one sample decides."""


@dataclass(frozen=True)
class Runner:
    """Runs the files of plans that their times are measured with, ``bench.batch`` samples at a time: parts of one
    exported network, so that none is exported for its accuracy. ``structure``: of the model's output, which a file
    gives as a flat list. ``exact``: whether the float file computes what the model does (as seen on one batch).
    """

    bench: Bench
    structure: pytree.TreeSpec
    exact: bool = False

    def key(self) -> dict[str, Any]:
        """What a score that was run depends on besides the plan and the data."""
        target = self.bench.target
        return {"settings": target.settings(), "target": hash_source(type(target)), "batch": self.bench.batch}

    def scorer(self, plan: Plan) -> Callable[[Any], Any]:
        """The output of an adapted plan for a batch of inputs, of any size."""
        run, step = self.bench.target.opened(self.bench.artifact(plan)), self.bench.batch

        def outputs(inputs: Any) -> Any:
            arrays, size = example_arrays(inputs), batch_size(inputs)
            parts: list[list[Array]] = []
            for first in range(0, size, step):
                # the last ones are filled up with the last sample
                chosen = np.minimum(np.arange(first, first + step), size - 1)
                parts.append(run([array[chosen] for array in arrays]))
            leaves = [torch.from_numpy(np.concatenate(found)[:size]) for found in zip(*parts, strict=True)]
            return pytree.tree_unflatten(leaves, self.structure)

        return outputs


def runner(bench: Bench, inputs: Any) -> Runner | None:
    """A runner for batches like ``inputs``, or None where the target runs nothing, files and model have not one form,
    or simulating is faster.

    The float network is timed both ways; the choice is kept in the store, so that a resumed run makes the same.
    """
    if bench.target.source != "measured" or bench.task.forward is not None:
        return None
    found, mend = None, ""
    try:
        found = _runner(bench, inputs)
    except (TargetError, ValueError) as error:
        mend = f": {error}"
    if found is None:
        bench.progress.note(f"plans are evaluated by simulation, files of {bench.target.name} cannot be run so{mend}")
        return None
    key: dict[str, Any] = {**bench.model_key, **found.key(), "samples": batch_size(inputs)}
    key["threads"] = torch.get_num_threads()
    on = bench.store.get_or("evaluated on", key, lambda: _faster(found, inputs))
    return found if on == "runtime" else None


def pays(found: Runner, plan: Plan, inputs: Any, samples: int) -> bool:
    """Whether a plan with ``prepare`` steps is written and run on so many samples faster than it is simulated, or
    hardly slower: it may take an export of its own, but is what ships. Where it takes one, that is timed with the first
    such plan, and kept in the store."""
    bench, size = found.bench, batch_size(inputs)
    if bench.derives(plan):
        return True

    def faster() -> str:
        net = bench.simulate(plan)  # what it is prepared with takes its time either way
        start = time.perf_counter()
        run = found.scorer(plan)
        seconds = time.perf_counter() - start + samples / size * _seconds(lambda: run(inputs))
        with evaluating(net):
            simulated = samples / size * _seconds(lambda: call(net, inputs, None))
        return "runtime" if seconds < simulated + _TRUER_S else "simulation"

    key: dict[str, Any] = {**bench.model_key, **found.key(), "samples": size, "all": samples}
    key |= {"threads": torch.get_num_threads(), "prepare": [technique_key(step) for step in plan.prepare]}
    on: str = bench.store.get_or("evaluated on", key, faster)
    return on == "runtime"


def _runner(bench: Bench, inputs: Any) -> Runner | None:
    """None if the model's output is not made of tensors with the samples along their first axis."""
    with torch.no_grad():
        output = call(bench.model, inputs, None)
    leaves, structure = pytree.tree_flatten(dict(output) if isinstance(output, Mapping) else output)
    size = batch_size(inputs)
    if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size for leaf in leaves):
        return None
    found = Runner(bench, structure)
    again = pytree.tree_leaves(found.scorer(Plan())(inputs))
    same = len(again) == len(leaves) and all(a.shape == b.shape for a, b in zip(again, leaves, strict=True))
    if not same:
        return None
    return replace(found, exact=all(_equal(a, b) for a, b in zip(again, leaves, strict=True)))


def _equal(got: Tensor, wanted: Tensor) -> bool:
    """Whether they differ by no more than the order of float32 sums."""
    if not wanted.is_floating_point():
        return torch.equal(got.to(wanted), wanted)
    error, power = (float(torch.linalg.vector_norm(x.double())) for x in (got - wanted, wanted))
    return error <= _EQUAL * power


def _faster(found: Runner, inputs: Any) -> str:
    run = found.scorer(Plan())
    with torch.no_grad():
        simulated = _seconds(lambda: call(found.bench.model, inputs, None))
    return "runtime" if _seconds(lambda: run(inputs)) < simulated else "simulation"


def _seconds(work: Callable[[], Any]) -> float:
    """The least of a few: the first may be cold."""
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
