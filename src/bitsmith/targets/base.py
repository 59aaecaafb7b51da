"""What a target owes: support as data, adaptation, export, timing, running, and reading back what really ran."""

from __future__ import annotations

import hashlib
import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .._files import atomic_write
from ..plan import Plan
from ..site import Record, Site
from ..technique import No, Technique

if TYPE_CHECKING:
    import onnx

Source = Literal["measured", "simulated", "modelled"]
Array = NDArray[Any]

ARTIFACT_SCHEMA = 1


class TargetError(RuntimeError):
    """A target cannot do what was asked: what, where, and the line that mends it."""


class ArtifactError(ValueError):
    """An artifact's file or its map is missing, corrupted or from a newer version."""


@dataclass(frozen=True)
class Realised:
    """The precision a site really ran in: ``int8``, ``binary`` (signs times signs), ``float32``, ``bfloat16``,
    ``folded`` (absorbed by a neighbour), ``removed`` (the runtime needed no computation), ``size only`` (stored small,
    computed in float)."""

    precision: str
    reason: str = ""


@dataclass(frozen=True)
class Timing:
    """Latency samples in ms per batch, of one artifact, interleaved with the others of the same call."""

    samples: tuple[float, ...]
    batch: int
    threads: int
    source: Source

    @property
    def ms(self) -> float:
        """Median."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """Lower quartile: other work on the machine only ever adds time, and moves it least."""
        return statistics.quantiles(self.samples, n=4, method="inclusive")[0] if len(self.samples) > 1 else self.ms

    @property
    def spread(self) -> float:
        """Half the interquartile range, in ms."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2

    def __str__(self) -> str:
        return (
            f"{self.ms:.3f} +- {self.spread:.3f} ms ({self.source}, "
            f"batch {self.batch}, {self.threads} threads, n={len(self.samples)})"
        )


CALM = 1.05
"""On a quiet machine :func:`unrest` is less than that."""


def unrest(timings: Sequence[Timing]) -> float:
    """How far the medians of one run lie above the lower quartiles: the median of the ratios."""
    return statistics.median(timing.ms / timing.low if timing.low > 0 else 1.0 for timing in timings)


@dataclass(frozen=True)
class SiteTimes:
    """Where the time of one artifact goes, in ms per batch: per site, per tensor whose format is changed, the rest.

    ``sites``: kernel time of each site. ``conversions``: by tensor name, time of quantizing or dequantizing it.
    ``other``: time of nodes that belong to no site. ``whole``: median of the whole run without a profiler.
    The sum of the parts and ``whole`` are printed together: they do not add up exactly.
    """

    sites: Mapping[str, float]
    conversions: Mapping[str, float]
    other: float
    whole: float
    source: Source

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(self.sites.values()) + sum(self.conversions.values()) + self.other


@dataclass(frozen=True)
class Artifact:
    """An exported file, the map from sites to its nodes and tensors, and what made it.

    ``nodes``: site -> names of its nodes in the file. ``values``: tensor name -> name of the value in the file (the
    float value, behind its DequantizeLinear if it is quantized). ``inputs``: (name, shape, dtype) as the file has them.
    Only of a target that computes its times: ``costs``, ms per batch by site, and by ``tensor|format`` for a
    conversion; ``energies``, mJ per batch, likewise; ``areas``, mm2 that each site adds; ``precisions``, by site.
    """

    path: Path
    format: Literal["onnx", "openvino", "pt2", "safetensors", "mlpackage"]
    nodes: Mapping[str, tuple[str, ...]]
    values: Mapping[str, str]
    inputs: tuple[tuple[str, tuple[int, ...], str], ...]
    outputs: tuple[str, ...]
    batch: int
    target: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)
    energies: Mapping[str, float] = field(default_factory=dict)
    areas: Mapping[str, float] = field(default_factory=dict)

    @property
    def sidecar(self) -> Path:
        """The JSON file beside the artifact that holds its map."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def files(self) -> tuple[Path, ...]:
        if self.format == "mlpackage":  # a folder
            return tuple(sorted(path for path in self.path.rglob("*") if path.is_file()))
        weights = self.path.with_suffix(".bin")
        return (self.path, weights) if self.format == "openvino" and weights.exists() else (self.path,)

    @property
    def bytes(self) -> int:
        """Size of the exported file (with its weights file where the format has two)."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def mib(self) -> float:
        return self.bytes / 2**20

    def digest(self) -> str:
        """SHA-256 of the files' content."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def save(self) -> Path:
        """Write the map beside the file."""
        data = {
            **asdict(self),
            "path": self.path.name,
            "schema": ARTIFACT_SCHEMA,
            "kind": "bitsmith.artifact",
            "sha256": self.digest(),
        }
        text = json.dumps(data, indent=1) + "\n"
        return atomic_write(self.sidecar, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read an artifact back; a changed, cut-off or newer file is an error that says so."""
        path = Path(path)
        sidecar = path.with_name(path.name + ".json")
        try:
            data = json.loads(sidecar.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"{sidecar} is missing: it holds the map from sites to nodes; export again") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ArtifactError(f"{sidecar} is broken or cut off ({error}); export again") from None
        if not isinstance(data, dict) or data.get("kind") != "bitsmith.artifact":
            raise ArtifactError(f"{sidecar} does not describe a Bitsmith artifact")
        if data.get("schema") != ARTIFACT_SCHEMA:
            raise ArtifactError(
                f"{sidecar}: schema {data.get('schema')!r}, this version reads {ARTIFACT_SCHEMA}; "
                "a newer Bitsmith wrote it: pip install -U bitsmith"
            )
        try:
            artifact = cls(
                path=path,
                format=data["format"],
                nodes={site: tuple(names) for site, names in data["nodes"].items()},
                values=dict(data["values"]),
                inputs=tuple((name, tuple(shape), dtype) for name, shape, dtype in data["inputs"]),
                outputs=tuple(data["outputs"]),
                batch=int(data["batch"]),
                target=str(data["target"]),
                plan=dict(data["plan"]),
                versions=dict(data["versions"]),
                precisions=dict(data.get("precisions", {})),
                **{
                    table: {name: float(value) for name, value in data.get(table, {}).items()}
                    for table in ("costs", "energies", "areas")
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{sidecar} lacks or garbles {error}; export again") from None
        if not path.exists():
            raise ArtifactError(f"{path} is missing beside its map; export again")
        if artifact.digest() != data.get("sha256"):
            raise ArtifactError(
                f"{path} is not the file that was exported (its content differs: corrupted or cut off); export again"
            )
        return artifact


class Target(ABC):
    """Where a plan runs. A target is a frozen dataclass whose fields are its settings; one file each.

    Every number it gives carries ``source``. Numbers from a ``modelled`` target are never called measured.
    """

    name: ClassVar[str]
    source: ClassVar[Source]

    runs: ClassVar[bool] = True
    """Whether it runs and times artifacts; where not, ``run``, ``measure`` and ``site_times`` raise TargetError."""

    @abstractmethod
    def supports(self, technique: Technique, site: Site) -> bool | No:
        """Whether it has a kernel for that technique at such a site (neighbours aside), or why not."""

    @abstractmethod
    def adapt(self, plan: Plan, record: Record) -> Plan:
        """The plan with what this runtime needs put in: formats, output formats, which additions are quantized."""

    @abstractmethod
    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        """What will become of every site of the (adapted) plan, judged with its neighbours."""

    @abstractmethod
    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write the applied network as a file of this runtime's form; ``batch`` replaces the example's first size."""

    @abstractmethod
    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        """Time the artifacts interleaved: ``rounds`` samples each, in turn."""

    @abstractmethod
    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """The outputs for one batch; with ``tensors`` (names as in ``artifact.values``) those values instead."""

    def opened(self, artifact: Artifact) -> Callable[[Sequence[Array]], list[Array]]:
        """:meth:`run` of an artifact's outputs for many batches: its file is read once."""
        return lambda inputs: self.run(artifact, inputs)

    @abstractmethod
    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """Read back from the runtime in which precision each site really ran."""

    @abstractmethod
    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        """Where the time goes, from the runtime's own profile."""

    def write(
        self, model: onnx.ModelProto, path: str | Path, sites: Sequence[str], plan: Plan, batch: int | None = None
    ) -> Artifact | None:
        """The artifact of a graph from ``to_onnx`` or ``derive``, in this runtime's form; None: it takes no ONNX.

        ``sites``: names of all sites, those without a node included. ``batch``: None, the graph input's first size.
        """
        return None

    def cost(self, site: Site, technique: Technique) -> float | None:
        """Modelled ms per batch of that site alone, conversions left out; None: it must be measured."""
        return None

    def conversion_cost(self, numel: int, produced: str, consumed: str) -> float | None:
        """Modelled ms to bring ``numel`` values from one format to another ("float", "u8"); None: measure it."""
        return None

    def site_energy(self, site: Site, technique: Technique) -> float | None:
        """Modelled mJ per batch of that site alone, conversions left out; None: :meth:`energy` shared out by time."""
        return None

    def conversion_energy(self, numel: int, produced: str, consumed: str) -> float | None:
        """Modelled mJ to bring ``numel`` values from one format to another; None: by its time."""
        return None

    def site_area(self, site: Site, technique: Technique) -> float | None:
        """Modelled mm2 that the site adds to the chip; None: this target has no area."""
        return None

    def computed(self, plan: Plan, record: Record, batch: int) -> Timing | None:
        """The time of an adapted plan without ``prepare`` steps, had it been exported; None: that takes its file."""
        return None

    def settings(self) -> dict[str, Any]:
        """What a stored time depends on besides the artifact: machine, versions, threads."""
        return {"target": self.name}

    def figures(self, plan: Plan, record: Record, batch: int) -> Mapping[str, float] | None:
        """``mj`` and ``mm2``, as far as it has them, of a plan as :meth:`computed` takes it; None: by its file."""
        return None

    def assumptions(self) -> tuple[str, ...]:
        """What its numbers rest on, a sentence each: every report of a modelled target prints them."""
        return ()

    def references(self) -> tuple[str, ...]:
        """Where its equations and tables come from."""
        return ()

    def area(self, artifact: Artifact) -> float | None:
        """mm2 of the chip that computes it, or None: this target has no area."""
        return None

    def energy(self, artifact: Artifact) -> float | None:
        """mJ per batch, or None: this target has no energy."""
        return None


def example_arrays(example: Any) -> list[Array]:
    """Tensors of an example (tensor, tuple, mapping) as arrays, in order.

    >>> import torch
    >>> [a.shape for a in example_arrays((torch.zeros(2, 3), torch.ones(1)))]
    [(2, 3), (1,)]
    """
    if isinstance(example, Mapping):
        example = tuple(example.values())
    items = example if isinstance(example, (tuple, list)) else (example,)
    return [np.asarray(item.detach().cpu().numpy() if hasattr(item, "detach") else item) for item in items]
