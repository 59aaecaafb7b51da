"""Core ML: ML Programs whose weights are stored as palettes, as what is left of them, or as integers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from torch import nn
from torch.fx import Node

from .._files import atomic_folder
from ..export.constants import Weight, name_weights, scopes_of, site_of
from ..export.names import site_names
from ..export.program import applied_program, quiet
from ..model.apply import computer_of, is_applied
from ..plan import Plan
from ..site import Record, Site
from ..technique import No, Technique
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from . import _coreml_graph
from ._coreml_weights import needed, smallest
from ._cpu import batch_of
from .base import Array, Artifact, Realised, SiteTimes, Source, Target, TargetError, Timing

System = Literal["iOS16", "iOS17", "iOS18"]
NO_INTEGERS = "activations stay float in files for Core ML; Int(w, None) stores small weights"


@dataclass(frozen=True)
class CoreMl(Target):
    """Core ML's file format (https://apple.github.io/coremltools), written with coremltools 9: on any system, to be run
    on Apple's.

    ``precision``: in which floats the program computes and holds palettes and scales; ``float16`` is what Core ML's
    neural engine takes. ``system``: the first that reads the file (iOS 16 is macOS 13, 17 is 14, 18 is 15); None: the
    lowest that stores every weight in about as few bytes as any does. Palettes by group of channels or of 3 bits,
    weights of 4 bits or in groups, and palettes of pruned weights need iOS 18.

    Activations stay float: a technique that quantizes them is refused. Nothing runs here, and no time comes from here:
    ``run``, ``measure`` and ``site_times`` raise :class:`TargetError`. Needs the extra ``coreml``.

    >>> CoreMl(system="iOS18")
    CoreMl(precision='float32', system='iOS18')
    """

    name: ClassVar[str] = "coreml"
    source: ClassVar[Source] = "measured"
    runs: ClassVar[bool] = False

    precision: Literal["float32", "float16"] = "float32"
    system: System | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "float16"):
            raise ValueError(f"CoreMl(precision={self.precision!r}): must be 'float32' or 'float16'")
        if self.system not in (None, "iOS16", "iOS17", "iOS18"):
            raise ValueError(
                f"CoreMl(system={self.system!r}): must be 'iOS16', 'iOS17', 'iOS18', or None for the lowest"
            )

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        form = technique.form(site)
        if form not in ("float", "dialect"):
            return No(f"Core ML has no operation {form!r}")
        if isinstance(technique, Float) and technique.dtype == "bfloat16":
            return No("Core ML has no bfloat16; CoreMl(precision='float16') computes all in float16")
        if any(technique.reads(site)) or technique.writes(site) is not None:
            return No(NO_INTEGERS)
        if self.system in ("iOS16", "iOS17"):
            what = _needs_18(technique)
            if what:
                return No(f"{what} came with iOS 18: CoreMl(system='iOS18')")
        return True

    def adapt(self, plan: Plan, record: Record) -> Plan:
        """The plan as it is: values are computed as simulated."""
        return plan

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        found: dict[str, Realised | No] = {}
        for name, site in record.sites.items():
            technique = plan.get(name)
            verdict = True if technique is None else self.supports(technique, site)
            small = technique is not None and (technique.compact() or technique.form(site) == "dialect")
            reason = "size only: its weights are stored packed" if small and site.weight is not None else ""
            found[name] = verdict if isinstance(verdict, No) else Realised(self.precision, reason)
        return found

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write ``net`` as an ``.mlpackage`` folder, and its map beside it.

        Weights of planned sites are stored in the smallest form that gives the same numbers bit for bit (in float16:
        the same, rounded; integers times rounded scales). Raises :class:`TargetError` for a plan that this target does
        not support, ``ExportError`` with the operation that coremltools cannot translate.
        """
        _coreml_graph.coremltools()
        path = Path(path)
        if path.suffix != ".mlpackage":
            raise ValueError(f"{path}: Core ML reads a network from a folder whose name ends in .mlpackage")
        plan, sites = self._checked(net)
        program, _ = applied_program(net, example, batch)
        with quiet():
            program = program.run_decompositions({})
        planned = {name: plan[name] for name in plan.sites if not isinstance(plan[name], Float)}
        weights = name_weights(program, {name: sites[name] for name in planned})
        owners = {name: weight.site for name, weight in weights.items()}
        calls = [node for node in program.graph_module.graph.nodes if node.op == "call_function"]
        quantizer = next((node for node in calls if "quantized_decomposed" in str(node.target)), None)
        if quantizer is not None:
            raise TargetError(f"{quantizer.name} quantizes an activation ({scopes_of(quantizer)[-2]}): {NO_INTEGERS}")
        owners |= {node.name: site_of(node) for node in calls}
        normalised = {node.name: _layer_before(node) for node in calls if "batch_norm" in str(node.target)}
        rows = {name: _palettes(weight, planned[weight.site]) for name, weight in weights.items()}
        width = 16 if self.precision == "float16" else 32
        version = int(self.system[3:]) if self.system else needed([(weights[n], rows[n]) for n in weights], width)
        forms = {name: smallest(weight, rows[name], version, width) for name, weight in weights.items()}
        found: list[Any] = []
        atomic_folder(
            path,
            lambda made: found.append(_coreml_graph.write_package(program, forms, version, width == 16, made)),
        )
        (spec,) = found
        nodes, values = _map(spec, owners, normalised, site_names(net))
        inputs = _coreml_graph.described(spec)
        artifact = Artifact(
            path=path,
            format="mlpackage",
            nodes=nodes,
            values=values,
            inputs=inputs,
            outputs=tuple(value.name for value in spec.description.output),
            batch=batch or batch_of(inputs),
            target=self.name,
            plan=plan.to_json(),
            versions=_versions(),
        )
        artifact.save()
        return artifact

    def _checked(self, net: nn.Module) -> tuple[Plan, Mapping[str, Site]]:
        """The network's plan, each site of it supported, and its sites."""
        if not is_applied(net):
            return Plan(), {}
        computer = computer_of(net)
        for name, technique in computer.plan.sites.items():
            refusal = self.supports(technique, computer.record_sites[name])
            if isinstance(refusal, No):
                raise TargetError(
                    f"{technique} at {name!r} cannot be written for Core ML: {refusal}; leave the site out of the "
                    "plan, or give it a technique of weights only"
                )
        return computer.plan, computer.record_sites

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """How the file stores each site, and in which floats it asks for it; what a device makes of it is not told."""
        return _coreml_graph.realised(_coreml_graph.read_spec(artifact.path), artifact.nodes)

    # -- what takes Apple's systems --------------------------------------------------------------------------------

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """Raises :class:`TargetError`, as ``measure`` and ``site_times`` do."""
        _refuse(artifact, "run")

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        _refuse(artifacts[0] if artifacts else None, "timed")

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        _refuse(artifact, "timed")

    def settings(self) -> dict[str, Any]:
        return {
            "target": self.name,
            "precision": self.precision,
            "system": self.system,
            "coremltools": _coreml_graph.coremltools().__version__,
        }

    def assumptions(self) -> tuple[str, ...]:
        return ("the file alone: nothing was run or timed, which takes one of Apple's systems",)

    def references(self) -> tuple[str, ...]:
        return (
            "constant expressions: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html",
        )


def _refuse(artifact: Artifact | None, what: str) -> NoReturn:
    path = "the file" if artifact is None else artifact.path
    raise TargetError(
        f"{path} cannot be {what} here: Core ML runs on Apple's systems, and this target writes files for it. On a "
        "Mac: coremltools.models.MLModel(path).predict({input: array}), or Xcode's performance report; for a time on "
        "this machine give OnnxRuntime() or OpenVino()"
    )


def _needs_18(technique: Technique) -> str:
    """What of a technique has no form before iOS 18; "" where nothing is lacking."""
    if getattr(technique, "group", 0):
        return "scales by group" if isinstance(technique, Int) else "palettes by group of channels"
    if isinstance(technique, Int) and technique.w <= 4:
        return "weights of 4 bits"
    return ""


def _palettes(weight: Weight, technique: Technique) -> int:
    """How many palettes the technique gave a weight."""
    inner = technique.of if isinstance(technique, Int) and technique.of is not None else technique
    group, channels = int(getattr(inner, "group", 0)), weight.values.shape[0]
    return channels // group if group and channels % group == 0 and not isinstance(inner, Int) else 1


_ADDED = re.compile(r"(_cast_fp16|_to_fp16|_cast|_\d+)$")
"""What coremltools' passes put behind a name."""


def _layer_before(norm: Node) -> str:
    """The site of the layer whose output a normalisation reads."""
    source = norm.args[0]
    return site_of(source) if isinstance(source, Node) else ""


def _map(
    spec: Any, owners: Mapping[str, str], normalised: Mapping[str, str], sites: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Site -> the values that its operations give in the file; tensor -> its value there.

    ``owners``: site by name of a node of the program. ``normalised``: by name of a normalisation, the layer that it is
    folded into where the file has no operation for it; the folded layer bears its name.
    """
    nodes: dict[str, list[str]] = {site: [] for site in sites}
    values = {f"@{value.name}": value.name for value in spec.description.input}
    for op in _coreml_graph.operations(spec):
        if op.type == "const":
            continue
        for value in op.outputs:
            name = value.name
            while name not in owners and _ADDED.search(name):
                name = _ADDED.sub("", name)
            site = owners.get(name, "")
            if site and not op.type.startswith("constexpr_"):
                values[site] = value.name
            if op.type in ("conv", "conv_transpose", "linear"):
                site = normalised.get(name) or site
            if site:
                nodes.setdefault(site, []).append(value.name)
    return {site: tuple(names) for site, names in nodes.items()}, values


def _versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__, "coremltools": _coreml_graph.coremltools().__version__}
