"""What profile, evaluation and verification share: one recorded network, one target, one store, one float artifact.

Every figure is asked from the store first; its key is the content that the figure depends on.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ._hash import hash_files, hash_json, hash_state, technique_key
from .compare import Score
from .data import digest, first_inputs
from .export.program import with_batch
from .metrics import source_digest
from .model.apply import build
from .model.calibrate import calibrate
from .model.formats import place
from .model.network import Network, network
from .numerics.statistics import TensorStatistics
from .plan import Plan
from .progress import Progress, Silent
from .site import Format
from .store import Store
from .targets.base import Artifact, SiteTimes, Target, Timing
from .task import Split, Task, score

if TYPE_CHECKING:
    import onnx


@dataclass(eq=False)
class Bench:
    """Measures one model on one target. Internal: the verbs make one, use it and let it go."""

    model: nn.Module
    task: Task
    target: Target
    store: Store
    net: Network
    folder: Path
    batch: int = 1
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    _artifacts: dict[str, Artifact] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _whole: tuple[Plan, onnx.ModelProto, onnx.ModelProto, tuple[str, ...]] | None = None

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
        """Record the model on its first calibration inputs. ``folder``: where artifacts go, a temporary one by default."""
        inputs = first_inputs(task.calibration)
        net = network(model, inputs, forward=task.forward, names=names)
        opened = store if isinstance(store, Store) else Store(store)
        place = Path(tempfile.mkdtemp(prefix="bitsmith-") if folder is None else folder)
        bench = cls(model, task, target, opened, net, place, batch, seed, progress or Silent())
        if folder is None:
            weakref.finalize(bench, shutil.rmtree, place, ignore_errors=True)
        return bench

    # -- keys ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def model_key(self) -> dict[str, str]:
        """The weights, the recorded trace, and the code that computes."""
        trace = [
            (s.name, s.kind, s.calls, s.macs, [(o.tensor, o.shape, o.dtype) for o in s.operands], s.out_shapes, s.epilogue)
            for s in self.net.record.sites.values()
        ]
        return {"state": hash_state(self.model), "trace": hash_json(trace), "code": code_key()}

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

    def ranges(self, formats: Sequence[tuple[str, Format]]) -> None:
        """Have statistics for these tensors: from the store, or collected in one pass over the calibration data."""
        known: dict[str, TensorStatistics] = dict(self.net.record.statistics)
        missing: list[tuple[str, Format]] = []
        for tensor, fmt in formats:
            histogram = fmt.range.needs_histogram
            have = known.get(tensor)
            if have is not None and (have.histogram is not None or not histogram):
                continue
            found = self.store.get("range", self._range_key(tensor, histogram))
            if found is not None:
                known[tensor] = TensorStatistics.from_json(found)
            else:
                missing.append((tensor, fmt))
        self.net = self.net.with_statistics(known)
        if not missing:
            return
        collected = calibrate(self.net, missing, self.task.calibration)
        histograms = {tensor: fmt.range.needs_histogram for tensor, fmt in missing}
        for tensor, histogram in histograms.items():
            self.store.put("range", self._range_key(tensor, histogram), collected[tensor].to_json())
        self.net = self.net.with_statistics(collected)

    def _range_key(self, tensor: str, histogram: bool) -> dict[str, Any]:
        return {**self.model_key, "data": self.calibration_key, "tensor": tensor, "histogram": histogram}

    def simulate(self, plan: Plan) -> nn.Module:
        """The applied network of an adapted plan."""
        if not plan.prepare:
            self.ranges(list(place(plan, self.net.record).tensors))
        return build(self.net, plan, self.task.calibration, seed=self.seed)

    def score(self, plan: Plan | None, split: Split = "validation") -> Score:
        """The metric of an adapted plan, or of the float model (None)."""
        key = {
            **self.model_key,
            "plan": None if plan is None else self.plan_key(plan),
            "calibration": self.calibration_key,
            "data": self.data_key(split),
            "metric": source_digest(self.task.evaluate or self.task.scored_by.function),
            "draws": self.task.draws,
            "seed": self.seed,
        }
        found = self.store.get_or(
            "accuracy", key, lambda: score(self.model if plan is None else self.simulate(plan), self.task, split).to_json()
        )
        return Score.from_json(found)

    # -- the runtime ---------------------------------------------------------------------------------------------

    @property
    def example(self) -> Any:
        """The first calibration inputs, cut to the batch size that is timed."""
        return with_batch(first_inputs(self.task.calibration), self.batch)

    def artifact(self, plan: Plan) -> Artifact:
        """The exported file of an adapted plan, derived from :meth:`everywhere` where it is a part of that."""
        digest = plan.digest()
        if digest not in self._artifacts:
            path = self.folder / "artifacts" / f"{digest[:16]}{suffix(self.target)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self._derived(plan, path)
            self._artifacts[digest] = found or self.target.export(self.simulate(plan), path, self.example, self.batch)
        return self._artifacts[digest]

    def everywhere(self, plan: Plan) -> None:
        """Export an adapted plan once, so that the files of its parts come in milliseconds instead of seconds."""
        from .export.names import site_names
        from .export.onnx import raw_onnx
        from .export.program import applied_program

        def graph(net: nn.Module) -> onnx.ModelProto:
            return raw_onnx(applied_program(net, self.example, self.batch)[0])

        full = self.simulate(plan)
        self._whole = (plan, graph(full), graph(self.simulate(Plan(prepare=plan.prepare))), tuple(site_names(full)))

    def _derived(self, plan: Plan, path: Path) -> Artifact | None:
        if self._whole is None:
            return None
        from .export.derive import derive

        whole, full, base, sites = self._whole
        model = derive(full, base, plan, whole, self.net.record)
        return None if model is None else self.target.write(model, path, sites, plan, self.batch)

    def time_key(self, artifact: Artifact, rounds: int) -> dict[str, Any]:
        return {"artifact": artifact.digest(), "settings": self.target.settings(), "batch": self.batch, "rounds": rounds}

    def times(self, plans: Sequence[Plan], rounds: int = 60) -> list[Timing]:
        """Latency of adapted plans, interleaved in one run. Stored as one measurement: they belong together."""
        artifacts = [self.artifact(plan) for plan in plans]
        key = {"together": [self.time_key(artifact, rounds) for artifact in artifacts]}
        found = self.store.get_or(
            "time",
            key,
            lambda: [
                {"samples": list(t.samples), "batch": t.batch, "threads": t.threads, "source": t.source}
                for t in self.target.measure(artifacts, rounds)
            ],
        )
        return [Timing(tuple(t["samples"]), t["batch"], t["threads"], t["source"]) for t in found]

    def site_times(self, plan: Plan, rounds: int = 40) -> SiteTimes:
        """Where the time of an adapted plan goes."""
        artifact = self.artifact(plan)
        found = self.store.get_or(
            "site times", self.time_key(artifact, rounds), lambda: asdict(self.target.site_times(artifact, rounds))
        )
        return SiteTimes(**found)


def suffix(target: Target) -> str:
    """The file suffix of a target's artifacts."""
    return ".xml" if target.name == "openvino" else ".onnx"


@functools.cache
def code_key() -> str:
    """A hash of the package's own arithmetic: a stored figure is stale once that changes."""
    root = Path(__file__).parent
    folders = ("model", "numerics", "export", "prepare")
    return hash_files([root / "operations.py", *(p for name in folders for p in sorted((root / name).glob("*.py")))])
