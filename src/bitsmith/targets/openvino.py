"""OpenVINO on CPU: 8-bit kernels, residual additions and activations fused behind them."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from .._files import check_writable
from ..export.forms import openvino_form
from ..export.names import site_names
from ..export.onnx import site_map, to_onnx
from ..export.program import applied_program
from ..export.storage import OPENVINO_NODE, packed
from ..model.apply import is_applied, plan_of
from ..model.formats import place
from ..numerics.winograd_operation import FORM
from ..plan import Plan
from ..site import Format, Record, Site
from ..store import machine_key
from ..technique import No, Technique
from ..techniques.binary import Binary
from ..techniques.float_ import Float
from ..techniques.int_ import Int
from ..techniques.winograd import Winograd
from . import _openvino_kernels
from ._cpu import (
    batch_of,
    checked,
    described,
    in_range,
    integer_refusal,
    promised,
    sample_inputs,
    shared_groups,
    timings,
    values_of,
)
from ._openvino_graph import (
    XOR_POPCOUNT,
    Owners,
    check_precision,
    compressed_sites,
    executed,
    products,
    realised,
    unfuse,
)
from ._openvino_kernels import ONE_BIT
from .base import Array, Artifact, ArtifactError, Realised, SiteTimes, Source, Target, TargetError, Timing

if TYPE_CHECKING:
    import onnx
    import openvino as ov

AFFINE = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear", "cat", "mean", "embedding"}
    | {f"{pool}avg_pool{n}d" for pool in ("", "adaptive_") for n in (1, 2, 3)}
)
"""Run in int8 on unsigned affine activations, whatever their neighbours are. All others compute in float."""

SYMMETRIC = frozenset({"matmul", "baddbmm", "einsum", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
"""Run in int8 only where no activation has a zero point: signed symmetric. A matrix product with a weight on the right
is a linear layer and takes affine ones."""

NEVER_NEGATIVE = frozenset({"softmax", "relu", "relu6", "sigmoid"})
"""What they make is stored unsigned: the left operand of a product may be so even where zero points are not taken."""

FUSING = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
"""Absorb the normalisation and the activation behind them in float as well."""

ELEMENTWISE = frozenset({"sub", "mul"})
"""Computed in float whatever is asked, in one elementwise kernel."""


@dataclass(frozen=True)
class OpenVino(Target):
    """OpenVINO's CPU plugin (https://docs.openvino.ai), read back on 2026.4.

    ``threads``: of one stream, which runs one request at a time. ``bfloat16``: compute all that is not int8 in
    bfloat16, the plugin's own default where the processor has it. Off here: a float network then runs in float32, and
    a network that the plugin compiles to bfloat16 all the same is refused with :class:`TargetError`.

    ``reduced_range``: as of :class:`~bitsmith.targets.OnnxRuntime`. ``kernels``: compute what
    :class:`~bitsmith.Winograd` and :class:`~bitsmith.Binary` with ``activations`` ask for with the operations of
    ``bitsmith-kernels`` (extra ``kernels``).

    Activations become unsigned 8-bit affine (signed symmetric for :data:`SYMMETRIC`), weights signed 8-bit symmetric.
    Times are ``measured``, in ms per batch. Needs the extra ``openvino``.
    """

    name: ClassVar[str] = "openvino"
    source: ClassVar[Source] = "measured"

    threads: int = 2
    bfloat16: bool = False
    reduced_range: bool | None = None
    kernels: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"OpenVino(threads={self.threads}): must be 1 or more")

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        form = technique.form(site)
        if form == FORM:
            refusal = _openvino_kernels.refusal(technique, site, self.kernels)
            return True if refusal is None else refusal
        if form == "float":
            if isinstance(technique, Float) and technique.dtype == "bfloat16" and not self.bfloat16:
                return No("bfloat16 is off: OpenVino(bfloat16=True) computes all that is not int8 in bfloat16")
            return True
        if form != "dialect":
            return No(f"OpenVINO has no operation {form!r}")
        if isinstance(technique, Binary):
            refusal = _openvino_kernels.binary_refusal(technique, site, self)
            return True if refusal is None else refusal
        if site.kind in ELEMENTWISE or (site.kind == "add" and len(site.activations) < 2):
            return No(
                f"OpenVINO computes {site.kind} in float, fused into its neighbours: quantizing its operands saves no "
                "time and makes the run differ from the simulation"
            )
        if site.kind not in AFFINE | SYMMETRIC | {"add"}:
            return No(f"OpenVINO has no integer kernel for {site.kind}")
        refusal = integer_refusal(technique, site, "OpenVINO")
        refusal = _shape_refusal(site) if refusal is None else refusal
        return True if refusal is None else refusal

    def adapt(self, plan: Plan, record: Record) -> Plan:
        """Activations unsigned affine, or signed symmetric where no zero point is taken; additions fused.

        Readers alone decide: an integer kernel whose output stays float is one here. A residual addition is computed
        inside the convolution before it, from float, and is as fast as that convolution where its other operand and
        its result are stored in 8 bits: it becomes ``Float(out=...)``, and stays float where no integer site reads it.
        """
        sites: dict[str, Technique] = {}
        additions = []
        for name, technique in plan.sites.items():
            site = record.site(name)
            if isinstance(technique, Int) and technique.a is not None:
                if site.kind == "add":
                    additions.append(site)
                if site.kind in ELEMENTWISE | {"add"}:
                    continue
                symmetric = _needs_symmetric(site)
                unsigned = (0,) if symmetric and _never_negative(site.operands[0].tensor, record) else ()
                technique = dataclasses.replace(
                    in_range(technique, self.reduced_range), signed=symmetric, symmetric=symmetric, unsigned=unsigned
                )
            elif isinstance(technique, Winograd):
                technique = _openvino_kernels.adapted(technique, record.site(name), self.kernels, self.reduced_range)
            sites[name] = technique
        _fuse_additions(additions, sites, record)
        sites = _openvino_kernels.stored({name: sites[name] for name in plan.sites if name in sites}, record)
        return plan.replace(sites=sites, groups=shared_groups(plan.groups, sites))

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        floating = "bfloat16" if self.bfloat16 else "float32"

        def kernel(technique: Technique, site: Site) -> Realised:
            if _needs_symmetric(site) and any(f is not None and not f.symmetric for f in technique.reads(site)):
                return Realised(floating, f"{site.kind} in int8 takes no zero points; see adapt")
            return Realised("binary", XOR_POPCOUNT) if isinstance(technique, Binary) else Realised("int8")

        return promised(plan, record, self, floating, FUSING, kernel)

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Write ``net`` as OpenVINO's ``.xml`` and, beside it, its weights (``.bin``) and its map."""
        program, _ = applied_program(net, example, batch)
        return self.write(to_onnx(program), path, site_names(net), plan_of(net) if is_applied(net) else Plan())

    def write(
        self, model: onnx.ModelProto, path: str | Path, sites: Sequence[str], plan: Plan, batch: int | None = None
    ) -> Artifact:
        """Read a graph into OpenVINO and save it, its weights and its map."""
        one_bit = self.kernels and _openvino_kernels.missing_signs() is None
        exported = packed(openvino_form(model, one_bit=one_bit), plan, OPENVINO_NODE, integers=False)
        return self.save(exported, path, *site_map(exported, sites), plan, batch)

    def save(
        self,
        exported: onnx.ModelProto,
        path: str | Path,
        nodes: Mapping[str, Sequence[str]],
        values: Mapping[str, str],
        plan: Plan,
        batch: int | None = None,
    ) -> Artifact:
        """The artifact of a graph as it is; ``nodes``, ``values``: its map, by names in the graph."""
        openvino, path = _openvino(), Path(path)
        if path.suffix != ".xml":
            raise ValueError(
                f"{path}: OpenVINO reads a network from an .xml file and its weights from the .bin beside it"
            )
        core = _openvino_kernels.core(openvino, _openvino_kernels.needed_by(exported))
        network = core.read_model(exported.SerializeToString())
        _name_operations(network, exported)
        check_writable(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            openvino.save_model(network, str(Path(folder) / path.name), compress_to_fp16=False)
            for suffix in (".bin", ".xml"):
                (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))
        inputs = described(exported)
        artifact = Artifact(
            path=path,
            format="openvino",
            nodes=_layers(network, nodes),
            values=values,
            inputs=inputs,
            outputs=tuple(value.name for value in exported.graph.output),
            batch=batch or batch_of(inputs),
            target=self.name,
            plan=plan.to_json(),
            versions=_versions(),
        )
        artifact.save()
        return artifact

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        """The outputs for one batch of the artifact's shape, or the named tensors' float values.

        A value that is asked for becomes a result, which keeps the runtime from fusing across it: values behind a
        quantizer leave the integer kernels as they are, others (``conv`` before its ReLU) can turn them to float.
        """
        values = values_of(artifact, tensors)
        fed = [name for name, _, _ in artifact.inputs]
        compiled = _compiled(artifact.path, artifact.digest(), self, values)
        arrays = checked(artifact, inputs)
        found = compiled.create_infer_request().infer(arrays)
        return [
            np.array(arrays[fed.index(name)] if name in fed else found[compiled.output(name)])
            for name in values or artifact.outputs
        ]

    def opened(self, artifact: Artifact) -> Callable[[Sequence[Array]], list[Array]]:
        compiled = _compiled(artifact.path, artifact.digest(), self, ())
        request = compiled.create_infer_request()

        def run(inputs: Sequence[Array]) -> list[Array]:
            found = request.infer(checked(artifact, inputs))
            return [np.array(found[compiled.output(name)]) for name in artifact.outputs]

        return run

    # -- times -----------------------------------------------------------------------------------------------------

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        requests = [_request(_compiled(one.path, one.digest(), self, ()), one) for one in artifacts]
        runs = [functools.partial(request.infer, share_outputs=True) for request in requests]
        return timings(runs, artifacts, rounds, self.threads)

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        """From the graph that the plugin compiled."""
        owners = Owners.of(artifact.nodes, artifact.values)
        model = self._read(artifact.path)
        one_bit = {op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() in ONE_BIT}
        compressed = compressed_sites(model, owners.by_layer)
        return realised(owners, artifact.nodes, executed(self._open(artifact.path)), compressed, one_bit)

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        """From the plugin's counters, summed per site: median over three fresh compilations, each the mean of a third
        of the rounds. ``whole`` without counters.

        The plugin counts whole microseconds, as the mean of all runs since compilation; the first two, in which
        kernels are prepared, are taken out of that mean.
        """
        (whole,) = self.measure([artifact], rounds)
        owners = Owners.of(artifact.nodes, artifact.values)
        parts = [self._profile(artifact, owners, max(4, -(-rounds // 3))) for _ in range(3)]
        keys = dict.fromkeys(key for part in parts for key in part)
        times = {key: statistics.median(part.get(key, 0.0) for part in parts) for key in keys}
        return SiteTimes(
            {site: times.get(("site", site), 0.0) for site in artifact.nodes},
            {name: ms for (kind, name), ms in times.items() if kind == "conversion"},
            times.get(("other", ""), 0.0),
            whole.ms,
            self.source,
        )

    def _profile(self, artifact: Artifact, owners: Owners, rounds: int) -> dict[tuple[str, str], float]:
        """ms per run of each ("site", name), ("conversion", tensor) and ("other", "")."""
        compiled = self._open(artifact.path, counters=True)
        graph = {node.name: node for node in executed(compiled)}
        multiplied = products(graph.values())
        request = _request(compiled, artifact)
        totals: list[dict[str, float]] = []
        for runs in (2, rounds):
            for _ in range(runs):
                request.infer(share_outputs=True)
            done = 2 if not totals else 2 + rounds
            totals.append(
                {
                    # the mean is cut to whole microseconds: half of one is what that loses in the mean
                    entry.node_name: (entry.real_time.total_seconds() * 1e3 + 0.0005) * done
                    for entry in request.profiling_info
                    if entry.status == entry.Status.EXECUTED
                }
            )
        times: dict[tuple[str, str], float] = {}
        for name, total in totals[1].items():
            node = graph.get(name)
            owner = owners.sites(node, multiplied.get(name, ())) if node is not None else []
            tensor = owners.tensor(node, graph) if node is not None and not owner else ""
            key = ("site", owner[0]) if owner else ("conversion", tensor) if tensor else ("other", "")
            times[key] = times.get(key, 0.0) + max(0.0, total - totals[0].get(name, 0.0)) / rounds
        return times

    def settings(self) -> dict[str, Any]:
        return {
            "target": self.name,
            **machine_key(),
            "threads": self.threads,
            "bfloat16": self.bfloat16,
            "openvino": _openvino().get_version(),
            **({"kernels": _openvino_kernels.version()} if self.kernels else {}),
        }

    def _read(self, path: Path) -> ov.Model:
        try:
            core = _openvino_kernels.core(_openvino(), _openvino_kernels.needed_by(path))
        except OSError as error:
            raise ArtifactError(f"OpenVINO cannot read {path}: {error}; export again") from error
        try:
            return core.read_model(str(path))
        except Exception as error:
            raise ArtifactError(f"OpenVINO cannot read {path}: {error}; export again") from error

    def _open(self, path: Path, values: Sequence[str] = (), counters: bool = False) -> ov.CompiledModel:
        model = self._read(path)
        known = {name for value in (*model.outputs, *model.inputs) for name in value.get_names()}
        extra = [name for name in dict.fromkeys(values) if name not in known]
        if extra:
            unfuse(model)
            model.add_outputs([name for name in extra if name not in _openvino_kernels.add_results(model, extra)])
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # the plugin's default is bfloat16 wherever the processor has it
            "INFERENCE_PRECISION_HINT": "bf16" if self.bfloat16 else "f32",
            "PERF_COUNT": counters,
        }
        try:
            compiled = _openvino().Core().compile_model(model, "CPU", settings)
        except Exception as error:
            raise ArtifactError(f"OpenVINO cannot load {path}: {error}; export again") from error
        check_precision(executed(compiled), self.bfloat16)
        return compiled


@functools.lru_cache(maxsize=2)
def _compiled(path: Path, digest: str, target: OpenVino, values: tuple[str, ...]) -> ov.CompiledModel:
    """A compiled model whose results include ``values``. Kept, because a set is run batch by batch, and the float
    network is timed beside every other."""
    return target._open(path, values)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise TargetError(
            f'the target "openvino" needs OpenVINO ({error}); install it with: pip install "bitsmith[openvino]"'
        ) from None
    return openvino


def _request(compiled: ov.CompiledModel, artifact: Artifact) -> ov.InferRequest:
    request = compiled.create_infer_request()
    for index, array in enumerate(sample_inputs(artifact)):
        request.set_input_tensor(index, _openvino().Tensor(array))
    return request


def _fuse_additions(additions: Sequence[Site], sites: dict[str, Technique], record: Record) -> None:
    """Have sums stored in the format of their integer readers, and one operand of each as well."""
    heads = {member: site.name for site in record.sites.values() for member in site.epilogue}
    formats: dict[str, set[Format]] = {}
    for tensor, fmt, _ in place(Plan(sites), record).reads.values():
        if not fmt.symmetric and not record.tensors[tensor].is_output:
            formats.setdefault(tensor, set()).add(fmt)
    for addition in additions:
        if len(formats.get(addition.tail, ())) != 1:
            continue
        (fmt,) = formats[addition.tail]
        sites[addition.name] = Float(out=fmt)
        branches = []
        for operand in addition.activations:
            info = record.tensors[operand.tensor]
            head = heads.get(info.producer, info.producer)
            technique = sites.get(head)
            if not isinstance(technique, Winograd) and (not isinstance(technique, Int) or technique.a is None):
                continue
            if info.readers == (addition.name,):
                branches.append((head, technique, dataclasses.replace(fmt, range=technique.range)))
            elif len(formats.get(operand.tensor, ())) == 1:  # others read it as integers: so does the sum
                sites[head] = dataclasses.replace(technique, out=next(iter(formats[operand.tensor])))
        if len(branches) == 2:  # only one of them can take the other in: ours, which gives nothing but integers
            ours = [isinstance(branch[1], Winograd) for branch in branches]
            head, technique, stored = branches[0 if ours == [False, True] else 1]
            sites[head] = dataclasses.replace(technique, out=stored)


def _never_negative(tensor: str, record: Record) -> bool:
    info = record.tensors.get(tensor)
    producer = record.sites.get(info.producer) if info is not None else None
    return producer is not None and producer.kind in NEVER_NEGATIVE


def _needs_symmetric(site: Site) -> bool:
    if site.kind in ("matmul", "baddbmm") and site.operands[-1].constant:
        return False
    return site.kind in SYMMETRIC


def _shape_refusal(site: Site) -> No | None:
    """Operations whose arguments leave the form that has a (correct) kernel."""
    shape = site.operands[0].shape
    if site.kind in ("matmul", "baddbmm") and site.operands[0].constant:
        return No("a product with its weight on the left has no integer kernel that takes a scale per channel")
    if site.kind == "einsum" and (site.weight is not None or any(len(o.shape) < 3 for o in site.operands)):
        return No("only products of activations over a batch axis are integer matrix products in einsum")
    if site.kind.startswith("conv_transpose") and site.arguments.get("groups", 1) != 1:
        return No("grouped transposed convolutions have no integer kernel")
    if site.kind == "mean":
        axes = site.arguments.get("dim")
        rank = len(shape)
        given = (axes,) if isinstance(axes, int) else tuple(axes or range(rank))
        kept = sorted(axis % rank for axis in given)
        # read back on 2026.4: a mean over axis 1 of 3, batch above 1, float output, is wrong by 80 % of its range
        if kept != list(range(kept[0], rank)):
            return No("only means over the last axes: OpenVINO's integer kernel gives wrong numbers for others")
    padded = site.kind.startswith("avg_pool") and _nonzero(site.arguments.get("padding", 0))
    if padded and site.arguments.get("count_include_pad", True):
        return No("OpenVINO pads integers with 0 where the plan means the zero point; use count_include_pad=False")
    if site.kind.startswith("adaptive_avg_pool"):
        sizes = site.out_shapes[0]
        if any(size % made for size, made in zip(shape[2:], sizes[2:], strict=False)):
            return No("bins of unequal size are gathered in float")
    return None


def _nonzero(padding: Any) -> bool:
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _name_operations(model: ov.Model, exported: onnx.ModelProto) -> None:
    """Name every operation after the ONNX node that it was made of, the rest by position.

    OpenVINO names what computes an output after that output, and its own additions by a count that runs on through the
    process: equal networks must become equal files.
    """
    makers = {value: node.name for node in exported.graph.node for value in node.output}
    counts: dict[str, int] = {}
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        made = next((makers[v] for output in op.outputs() for v in sorted(output.get_names()) if v in makers), "")
        if kind != "Result" and made:
            op.set_friendly_name(made)
        elif re.fullmatch(rf"{kind}_\d+", op.get_friendly_name()):
            counts[kind] = counts.get(kind, 0) + 1
            op.set_friendly_name(f"{kind}.{counts[kind]}")


def _layers(model: ov.Model, nodes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Site -> its operations in the file; those made of one ONNX node bear its name, with more behind a slash."""
    owner = {name: site for site, names in nodes.items() for name in names}
    found: dict[str, list[str]] = {site: [] for site in nodes}
    for op in model.get_ordered_ops():
        name = op.get_friendly_name()
        known = next((known for known in (name, name.rpartition("/")[0]) if known in owner), "")
        if known:
            found[owner[known]].append(name)
    return {site: tuple(names) for site, names in found.items()}


def _versions() -> dict[str, str]:
    import onnx
    import torch

    return {"torch": torch.__version__, "onnx": onnx.__version__, "openvino": _openvino().__version__}
