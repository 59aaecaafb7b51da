"""What profile, evaluation and verification share: one recorded network, one target, one store, one float artifact.

Every figure is asked from the store first; its key is the content that the figure depends on.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._files import check_writable
from ._hash import hash_files, hash_function, hash_json, hash_source, hash_state, technique_key
from ._memory import give_back, keep_freed
from .chosen import ChosenRanges
from .compare import Score
from .data import digest, first_inputs
from .export.program import with_batch
from .metrics import source_digest
from .model.apply import build, prepared
from .model.calibrate import calibrate
from .model.formats import Read, place
from .model.network import Network, duplicate, network, warn_unreached
from .model.stages import moved
from .numerics.statistics import TensorStatistics
from .plan import Plan
from .progress import Progress, Silent
from .site import Format
from .store import Store
from .targets.base import CALM, Artifact, SiteTimes, Target, TargetError, Timing, unrest
from .task import Split, Task, score
from .technique import Observer, Technique

if TYPE_CHECKING:
    from .export.graphs import Graphs


_READY = 3
"""So many prepared networks are kept: a plan that is scored is often exported next."""


@dataclass(eq=False)
class Bench:
    """Measures one model on one target. Internal: the verbs make one, use it and let it go.

    ``model`` is a copy: the user's is never run, and may change meanwhile. From then on the process (a worker's, too)
    keeps memory that is freed; what is free when the bench goes is given back.
    """

    model: nn.Module
    task: Task
    target: Target
    store: Store
    net: Network
    folder: Path
    batch: int = 1
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    choose: bool = True
    _artifacts: dict[str, Artifact] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _graphs: Graphs | None = None
    _ready: dict[str, Network] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: nn.Module,
        task: Task,
        target: Target,
        *,
        store: Store | str | Path | None = None,
        folder: str | Path | None = None,
        names: Sequence[str] = (),
        batch: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Bench:
        """Record the model on its first calibration inputs. ``folder``: of the artifacts; None: a temporary one.

        Raises ``TargetError`` for a target that only writes files.
        """
        if not target.runs:
            raise TargetError(
                f"{target.name} writes files and runs none here: search with the target of a runtime that is here, as "
                f"OnnxRuntime(), then export that plan's network with {type(target).__name__}"
            )
        net = network(duplicate(model), first_inputs(task.calibration), forward=task.forward, names=names)
        warn_unreached(net)
        opened = store if isinstance(store, Store) else Store(store)
        root = Path(tempfile.mkdtemp(prefix="bitsmith-") if folder is None else check_writable(folder))
        bench = cls(net.model, task, target, opened, net, root, batch, seed, progress or Silent())
        if folder is None:
            weakref.finalize(bench, shutil.rmtree, root, ignore_errors=True)
        if opened is not store:
            weakref.finalize(bench, opened.close)
        return bench

    def __post_init__(self) -> None:
        keep_freed()
        weakref.finalize(self, give_back)

    # -- keys ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def model_key(self) -> dict[str, str]:
        """The weights, the recorded trace, and the code that computes: the package's and the model's own."""
        trace = [
            (
                *(site.name, site.kind, site.calls, site.macs, site.out_shapes, site.epilogue),
                [(operand.tensor, operand.shape, operand.dtype) for operand in site.operands],
                {name: repr(value) for name, value in site.arguments.items()},
            )
            for site in self.net.record.sites.values()
        ]
        classes = {type(module) for module in self.model.modules() if not type(module).__module__.startswith("torch.")}
        code = [code_key(), *sorted(hash_function(module) for module in classes)]
        if self.task.forward is not None:
            code.append(source_digest(self.task.forward))
        return {"state": hash_state(self.model), "trace": hash_json(trace), "code": hash_json(code)}

    @functools.cached_property
    def calibration_key(self) -> str:
        return digest(self.task.calibration, "calibration")

    def data_key(self, split: Split) -> str:
        """The ordered bytes of a split's samples."""
        if split not in self._digests:
            self._digests[split] = digest(self.task.loader(split), split)
        return self._digests[split]

    def plan_key(self, plan: Plan) -> dict[str, Any]:
        return {
            "prepare": [technique_key(step) for step in plan.prepare],
            "sites": {name: technique_key(plan[name]) for name in sorted(plan.sites)},
        }

    # -- simulation ----------------------------------------------------------------------------------------------

    def ranges(self, formats: Sequence[tuple[str, Format]], observers: Iterable[tuple[Read, Observer]] = ()) -> None:
        """Have statistics for these tensors, and what ``observers`` ask for at these (site, operand): from the store,
        or collected in one pass over the calibration data. What observers collect is not stored."""
        known: dict[Any, Any] = dict(self.net.record.statistics)
        histograms: dict[str, bool] = {}
        for tensor, fmt in formats:
            histograms[tensor] = histograms.get(tensor, False) or fmt.range.needs_histogram
        missing: dict[str, bool] = {}
        for tensor, histogram in histograms.items():
            have = known.get(tensor)
            if have is not None and (have.histogram is not None or not histogram):
                continue
            found = None if histogram else self.store.look("range", self._range_key(tensor, True))
            found = found or self.store.get("range", self._range_key(tensor, histogram))
            if found is None:
                missing[tensor] = histogram
            else:
                known[tensor] = TensorStatistics.from_json(found)
        self.net = self.net.with_statistics(known)
        unseen = [item for item in observers if item not in known]
        if not missing and not unseen:
            return
        wanted = [(tensor, fmt) for tensor, fmt in formats if tensor in missing]
        self.net = self.net.with_statistics(calibrate(self.net, [*wanted, *unseen], self.task.calibration))
        for tensor, histogram in missing.items():
            statistics = self.net.record.statistics[tensor]
            self.store.put("range", self._range_key(tensor, histogram), statistics.to_json())

    def _range_key(self, tensor: str, histogram: bool) -> dict[str, Any]:
        return {**self.model_key, "data": self.calibration_key, "tensor": tensor, "histogram": histogram}

    def adapted(self, plan: Plan) -> Plan:
        """The plan as the target needs it, with the range methods that were chosen for its techniques."""
        return self.refined(self.target.adapt(plan, self.net.record))

    def refined(self, plan: Plan) -> Plan:
        """The plan with the range methods that were chosen for its techniques (:class:`ChosenRanges`)."""
        return self.chosen.refined(plan, self._told) if self.choose else plan

    @functools.cached_property
    def chosen(self) -> ChosenRanges:
        """The range methods of each technique."""
        key = {**self.model_key, "data": self.calibration_key}
        return ChosenRanges(self.net, self.target, self.task.calibration, self.store, key, self._observed)

    def _observed(self, formats: Sequence[tuple[str, Format]]) -> Network:
        self.ranges(formats)
        return self.net

    def _told(self, technique: Technique) -> None:
        self.progress.note(f"choosing range methods for {technique}")

    def trial(self, plan: Plan) -> nn.Module:
        """The applied network of a plan that is not adapted: what a sensitivity measures."""
        return self.simulate(self.refined(plan))

    def simulate(self, plan: Plan) -> nn.Module:
        """The applied network of an adapted plan."""
        net = self.observed(plan)
        if not plan.prepare:
            return build(net, plan, self.task.calibration, seed=self.seed)
        key = plan.digest()
        ready = self._ready.pop(key, None) or prepared(net, plan, self.task.calibration)
        self._ready[key] = ready  # the last one used is the last one
        if len(self._ready) > _READY:
            del self._ready[next(iter(self._ready))]
        return build(net, plan, self.task.calibration, seed=self.seed, ready=ready)

    def observed(self, plan: Plan) -> Network:
        """The network with what an adapted plan needs of the float network's statistics, and without those that it
        needs of another."""
        placement, elsewhere = place(plan, self.net.record), moved(plan, self.net.record)
        formats = [found for found in placement.tensors if found[0] not in elsewhere]
        self.ranges(formats, [found for found in placement.observers.items() if found not in elsewhere])
        return self.net.without(elsewhere) if elsewhere else self.net

    def score(self, plan: Plan | None, split: Split = "validation") -> Score:
        """The metric of an adapted plan, or of the float model (None, or a plan that changes nothing)."""
        if plan is not None and plan.empty:
            plan = None
        found = self.store.get_or(
            "accuracy",
            self.score_key(plan, split),
            lambda: score(self.model if plan is None else self.simulate(plan), self.task, split).to_json(),
        )
        return Score.from_json(found)

    def score_key(self, plan: Plan | None, split: Split) -> dict[str, Any]:
        """What a score depends on."""
        return {
            **self.model_key,
            "plan": None if plan is None else self.plan_key(plan),
            "calibration": self.calibration_key,
            "data": self.data_key(split),
            "metric": [self.task.name, self.task.lower, source_digest(self.task.evaluate or self.task.scored_by)],
            "draws": self.task.draws,
            "seed": self.seed,
        }

    # -- the runtime ---------------------------------------------------------------------------------------------

    @property
    def example(self) -> Any:
        """The first calibration inputs, cut to the batch size that is timed."""
        return with_batch(first_inputs(self.task.calibration), self.batch)

    def artifact(self, plan: Plan) -> Artifact:
        """The exported file of an adapted plan, derived from :meth:`everywhere` where it is a part of those."""
        digest = plan.digest()
        if digest not in self._artifacts:
            path = self.folder / "artifacts" / f"{digest[:16]}{suffix(self.target)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self._derived(plan, path)
            self._artifacts[digest] = found or self.target.export(self.simulate(plan), path, self.example, self.batch)
        return self._artifacts[digest]

    def everywhere(self, plans: Sequence[Plan]) -> None:
        """Export each of these adapted plans once, when first needed: files whose sites are all computed as in one of
        them, or in float, then come in milliseconds."""
        if type(self.target).write is not Target.write:
            from .export.graphs import Graphs

            known, self._graphs = self._graphs, Graphs(plans, self.simulate, self.example, self.batch)
            if known is not None:
                self._graphs.take(known)

    def derives(self, plan: Plan) -> bool:
        """Whether the file of an adapted plan comes in milliseconds: nothing of it asks for an export of its own."""
        graphs = self._graphs
        return graphs is not None and not without_values(plan).prepare and graphs.covers(plan, self.net.record)

    def _derived(self, plan: Plan, path: Path) -> Artifact | None:
        found = None if self._graphs is None else self._graphs.derived(plan, self.net.record)
        return None if found is None else self.target.write(found[0], path, found[1], plan, self.batch)

    def time_key(self, plans: Sequence[Plan], rounds: int) -> dict[str, Any]:
        """What a time depends on. The plan stands for its file: exporting twice need not give the same bytes."""
        return {
            **self.model_key,
            "calibration": self.calibration_key,
            "seed": self.seed,
            "plans": [self.plan_key(plan) for plan in plans],
            "settings": self.target.settings(),
            "target": hash_source(type(self.target)),
            "torch": torch.__version__,
            "batch": self.batch,
            "rounds": rounds,
        }

    def times(self, plans: Sequence[Plan], rounds: int = 60) -> list[Timing]:
        """Latency of adapted plans, interleaved in one run. Stored as one measurement: they belong together."""

        def measure() -> list[dict[str, Any]]:
            known = [timing for timing in map(self._computed, plans) if timing is not None]
            if len(known) == len(plans):
                timings = known
            else:
                timings = self.target.measure([self.artifact(plan) for plan in plans], rounds)
            return [
                {"samples": list(t.samples), "batch": t.batch, "threads": t.threads, "source": t.source}
                for t in timings
            ]

        found = self.store.get_or("time", self.time_key(plans, rounds), measure)
        return [Timing(tuple(t["samples"]), t["batch"], t["threads"], t["source"]) for t in found]

    def steady_times(self, plans: Sequence[Plan], rounds: int, most: int) -> list[Timing]:
        """:meth:`times` in a few rounds; where other work shows in these, in as many as ``most``."""
        timings = self.times(plans, rounds)
        return timings if rounds >= most or unrest(timings) <= CALM else self.times(plans, most)

    def _computed(self, plan: Plan) -> Timing | None:
        bare = without_values(plan)
        return None if bare.prepare else self.target.computed(bare, self.net.record, self.batch)

    def figures(self, plan: Plan) -> dict[str, float | None]:
        """``mj`` and ``mm2`` of an adapted plan, None where the target has none of it."""
        base = self.artifact(Plan())
        named = {"mj": self.target.energy, "mm2": self.target.area}
        has = {name: of(base) is not None for name, of in named.items()}
        if not any(has.values()):
            return dict.fromkeys(named)
        bare = without_values(plan)
        found = None if bare.prepare else self.target.figures(bare, self.net.record, self.batch)
        if found is not None:
            return {name: found.get(name) for name in named}
        artifact = self.artifact(plan)
        return {name: of(artifact) if has[name] else None for name, of in named.items()}

    def check(self, quantities: Iterable[str]) -> None:
        """Raise ``ValueError`` for a quantity that this target has not."""
        asked = {name: named for name, named in (("mj", "energy"), ("mm2", "area")) if name in quantities}
        figures = self.figures(Plan()) if asked else {}
        for name, named in asked.items():
            if figures[name] is None:
                raise ValueError(f"{self.target.name} gives no {named}: leave {name} out, or take a target that has it")

    def size(self, plan: Plan) -> int:
        """Bytes of an adapted plan's file; where times need none, of the float file with the plan's weights in it."""
        if not plan.sites or self._computed(plan) is None:
            return self.artifact(plan).bytes
        sites = self.net.record.sites
        saved = sum(sites[name].parameter_bytes - t.bits(sites[name]) / 8 for name, t in plan.sites.items())
        return max(round(self.artifact(Plan()).bytes - saved), 0)

    def site_times(self, plan: Plan, rounds: int = 40) -> SiteTimes:
        """Where the time of an adapted plan goes."""
        found = self.store.get_or(
            "site times",
            self.time_key([plan], rounds),
            lambda: asdict(self.target.site_times(self.artifact(plan), rounds)),
        )
        return SiteTimes(**found)


def without_values(plan: Plan) -> Plan:
    """The plan without its steps, if these change values only: another file, of the same operations and size."""
    return plan.replace(prepare=()) if all(step.values_only for step in plan.prepare) else plan


def suffix(target: Target) -> str:
    """The file suffix of a target's artifacts."""
    return {"openvino": ".xml", "coreml": ".mlpackage"}.get(target.name, ".onnx")


@functools.cache
def code_key() -> str:
    """A hash of the package's own arithmetic: a stored figure is stale once that changes."""
    root = Path(__file__).parent
    folders = ("model", "numerics", "export", "prepare")
    return hash_files([root / "operations.py", *(p for name in folders for p in sorted((root / name).glob("*.py")))])
