"""Evaluating plans on the runtime itself, where that is faster than simulating them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._hash import hash_source
from .bench import Bench
from .data import batch_size, call
from .export.program import with_batch
from .plan import Plan
from .targets.base import Target, TargetError, example_arrays

_ROUNDS = 3


@dataclass
class Runner:
    """Runs the exported files of plans on batches of ``bench.batch`` samples; files come from one export of the whole.

    ``structure``: of the model's output, which a file gives as a flat list.
    """

    bench: Bench
    structure: pytree.TreeSpec

    def key(self) -> dict[str, Any]:
        """What a score that was run depends on besides the plan and the data."""
        target = self.bench.target
        return {"settings": target.settings(), "target": hash_source(type(target)), "torch": torch.__version__}

    def scorer(self, plan: Plan) -> Callable[[Any], Any]:
        """The output of a plan for at most ``bench.batch`` samples of inputs."""
        artifact, target, batch = self.bench.artifact(plan), self.bench.target, self.bench.batch

        def run(inputs: Any) -> Any:
            size = batch_size(inputs)
            found = target.run(artifact, example_arrays(inputs if size == batch else with_batch(inputs, batch)))
            leaves = [torch.as_tensor(array)[:size] for array in found]
            return pytree.tree_unflatten(leaves, self.structure)

        return run


def runner(bench: Bench, everywhere: Plan, inputs: Any) -> Runner | None:
    """A runner for batches like ``inputs``, or None where the target runs nothing or simulating is not slower.

    ``everywhere``: the adapted plan whose parts will be evaluated. Both ways are timed on that plan and those inputs;
    the choice is kept in the store, so that a resumed run makes the same one.
    """
    if type(bench.target).write is Target.write or bench.target.source != "measured" or bench.task.forward is not None:
        return None
    key: dict[str, Any] = {**bench.model_key, "target": bench.target.settings(), "plan": bench.plan_key(everywhere)}
    key |= {"batch": batch_size(inputs), "threads": torch.get_num_threads()}
    chosen = bench.store.get("evaluated on", key)
    if chosen == "simulation":
        return None
    try:
        found, ratio = _tried(bench, everywhere, inputs, timed=chosen is None)
    except TargetError as error:
        bench.progress.note(f"plans are evaluated by simulation: {error}")
        found, ratio = None, 1.0
    if found is None or ratio >= 1.0:
        bench.store.put("evaluated on", key, "simulation")
        return None
    bench.store.put("evaluated on", key, "runtime")
    return found


def _tried(bench: Bench, everywhere: Plan, inputs: Any, timed: bool) -> tuple[Runner | None, float]:
    """The runner, and its time over the simulation's; (None, 1) where files and model do not have one form."""
    with torch.no_grad():
        output = call(bench.model, inputs, None)
    leaves, structure = pytree.tree_flatten(_plain(output))
    size = batch_size(inputs)
    same_axis = all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size for leaf in leaves)
    own = dataclasses.replace(bench, batch=size, folder=bench.folder / f"batch{size}", _artifacts={}, _whole=None)
    own.folder.mkdir(parents=True, exist_ok=True)
    own.everywhere(everywhere)
    found = Runner(own, structure)
    if not same_axis or len(own.artifact(everywhere).outputs) != len(leaves):
        return None, 1.0
    if not timed:
        return found, 0.0
    net, run = bench.simulate(everywhere), found.scorer(everywhere)
    with torch.no_grad():
        simulated = _least_seconds(lambda: call(net, inputs, None))
    return found, _least_seconds(lambda: run(inputs)) / max(simulated, 1e-9)


def _plain(output: Any) -> Any:
    """An output object (as Hugging Face models give) as a mapping of its tensors."""
    return dict(output) if isinstance(output, Mapping) else output


def _least_seconds(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
