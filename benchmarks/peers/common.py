"""What every peer tuner of the mixed-precision benchmark shares: its job, its data, its counts and its result.

A tuner is a module that the benchmark runs in an environment of its own, ``python -m benchmarks.peers.<tuner> JOB.json
OUT_FOLDER``. Nothing here needs Bitsmith or a peer, so that it runs in each of these environments.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scoring import BATCH, Logits, batches, correct

BESIDE = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "transformers")
"""Packages whose versions a result names beside its tuner's."""
ROUNDING = 1e-9
"""Added to the budget: 0.92 - 0.91 is more than 0.01 in floating point, which would cost a tuner that sample."""


@dataclass(frozen=True)
class Job:
    """What to tune: the fields of JOB.json. ``budget`` and ``float_score`` are fractions; ``batch``: fixed, or None."""

    network: str
    space: str
    budget: float
    data: Path
    onnx: Path
    float_score: float
    threads: int = 1
    seed: int = 0
    batch: int | None = None

    @classmethod
    def read(cls, path: Path) -> Job:
        said = json.loads(path.read_text())
        known = {key: said[key] for key in cls.__dataclass_fields__ if key in said}
        known |= {key: Path(said[key]) for key in ("data", "onnx")}
        # "dynamic" and 0 both mean that the file takes any batch size
        known["batch"] = said.get("batch") if isinstance(said.get("batch"), int) and said["batch"] > 0 else None
        return cls(**known)

    @property
    def transformer(self) -> bool:
        return self.network == "minilm"

    def inputs(self, part: str) -> dict[str, NDArray[Any]]:
        """The arrays of ``calibration``, ``validation`` or ``test`` by input name; empty where there are none.

        A single unnamed input is called ``x``.
        """
        with np.load(self.data) as found:
            named = {key.split(".", 1)[1]: found[key] for key in found if key.startswith(f"{part}.")}
            single = next((key for key in (f"{part}_x", part) if key in found), None)
            return named or ({} if single is None else {"x": found[single]})

    def target(self, part: str) -> NDArray[Any]:
        with np.load(self.data) as found:
            target: NDArray[Any] = found[f"{part}_y"]
            return target


@dataclass
class Counts:
    """Samples forwarded so far. ``sensitivity``: by ranking passes; ``backwards``: through which gradients went."""

    evaluation: int = 0
    sensitivity: int = 0
    backwards: int = 0
    calibration: int = 0

    def add(self, kind: str, samples: int) -> None:
        setattr(self, kind, getattr(self, kind) + samples)


@dataclass
class Result:
    """What ``result.json`` holds of a tuning that ended. ``plan``: weight bits of a layer, or "float"."""

    settings: str
    met: bool
    validation_score: float
    plan: Mapping[str, int | str] = field(default_factory=dict)
    plan_activations: Mapping[str, int | str] = field(default_factory=dict)
    bits: Mapping[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    notes: str = ""


@dataclass
class Run:
    """A tuner's surroundings: its job and folder, what it forwarded and the seconds it took."""

    job: Job
    folder: Path
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around the tuning: imports and the loading of data stay outside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def spent(self) -> dict[str, float]:
        return {
            "forwards": self.counts.evaluation + self.counts.sensitivity,
            "evaluation_forwards": self.counts.evaluation,
            "sensitivity_forwards": self.counts.sensitivity,
            "sensitivity_backwards": self.counts.backwards,
            "calibration_forwards": self.counts.calibration,
            "seconds": self.seconds,
        }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def write_scores(run: Run, logits: Logits, size: int = BATCH) -> None:
    """``scores.npz``: a simulated model's hits on the validation and, where the job has it, the test data."""
    scores: dict[str, Any] = {
        part: correct(logits, batches(inputs, size), run.job.target(part))
        for part in ("validation", "test")
        if (inputs := run.job.inputs(part))
    }
    partial = run.folder / ".scores.part.npz"
    np.savez(partial, **scores)
    partial.replace(run.folder / "scores.npz")


def main(tuner: str, package: str, tune: Callable[[Run], Result]) -> None:
    """Runs a tuner as a command. ``result.json`` is always there at the end and says what failed."""
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    said: dict[str, Any] = {"tuner": tuner, "package": package, "version": version(package)}
    said["beside"] = {name: version(name) for name in BESIDE}
    # so that a crash in native code or a time limit leaves a result as well
    write_json(path, {**said, "met": False, "error": "the process ended before the tuner did"})
    try:
        run = Run(Job.read(Path(sys.argv[1])), folder)
        try:
            # some peers make sessions of their own, whose threads follow the process' mask and nothing else
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: run.job.threads])
            said |= asdict(tune(run)) | {"error": None}
        finally:
            said |= run.spent()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        said |= {"met": False, "error": f"{type(error).__name__}: {str(error).strip()[:2000]}"}
    write_json(path, said)
