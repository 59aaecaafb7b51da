"""What the runtimes on a CPU share: what an integer kernel takes, arrays of an artifact, interleaved timing."""

from __future__ import annotations

import dataclasses
import functools
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plan import Plan
from ..site import Record, Site
from ..technique import No, Technique
from ..techniques.int_ import Int
from ..techniques.winograd import Winograd
from .base import Array, Artifact, ArtifactError, Realised, Target, Timing

if TYPE_CHECKING:
    import onnx

Kernel = Callable[[Technique, Site], Realised]


def integer_refusal(technique: Technique, site: Site, runtime: str) -> No | None:
    """Why no int8 kernel of a CPU runtime takes that technique, whatever the operation; None if it may."""
    if site.weight is not None and weight_bits(technique, site) < 7:  # 7: the reduced range of 8
        return No(f"size only: {runtime} has no kernel for weights below 8 bits, it expands them to float")
    formats = [f for f, o in zip(technique.reads(site), site.operands, strict=True) if o in site.activations]
    if not all(formats):
        return No(f"size only: with float activations {runtime} computes in float")
    if any(f is not None and f.bits != 8 for f in formats):
        return No("integer kernels read 8-bit activations only")
    if isinstance(technique, Int) and technique.granularity == "group":
        return No("size only: integer kernels take one weight scale per channel or per tensor")
    if isinstance(technique, Int) and technique.affine_weights:
        return No("integer kernels take symmetric weights")
    return None


@functools.cache
def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which overflow: x86 without VNNI.

    ``vpmaddubsw`` saturates at 255 * 127 * 2; with weights of 7 bits (255 * 63 * 2 < 2^15) it cannot.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return False  # not Linux: nothing tells, and full range is what runtimes assume as well
    return not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def in_range(technique: Int, reduced: bool | None) -> Int:
    """Weights of 8 bits in the reduced range of 7 if that is asked for (None: if this processor needs it)."""
    narrow = technique.w == 8 and (saturates() if reduced is None else reduced)
    return dataclasses.replace(technique, w=7) if narrow else technique


def direct(technique: Winograd, site: str, refused: No, reduced: bool | None) -> Int:
    """The direct convolution in the place of one that has no kernel here, with a warning that says why. ``reduced``: as
    of :func:`in_range`."""
    found = in_range(Int(8, 8, range=technique.range, weight_range=technique.weight_range), reduced)
    warnings.warn(f"{site} is computed as {found} in the place of {technique}: {refused}", stacklevel=2)
    return found


def shared_groups(groups: Sequence[Sequence[str]], sites: Mapping[str, Technique]) -> tuple[tuple[str, ...], ...]:
    """The groups of an adapted plan: what was put in at some members only is no shared decision.

    Each keeps the members that have its most frequent technique (the first such), and goes if that is one alone.
    """
    kept = []
    for group in groups:
        ((technique, count), *_) = Counter(sites.get(name) for name in group).most_common()
        if count > 1:
            kept.append(tuple(name for name in group if sites.get(name) == technique))
    return tuple(kept)


def weight_bits(technique: Technique, site: Site) -> float:
    """Bits per weight; a stranger's scales cannot be told from its weights, so 7.5 and more counts as 8."""
    if isinstance(technique, Int):
        return technique.w
    return round(technique.bits(site) / (site.parameter_bytes / 4))


def promised(
    plan: Plan, record: Record, target: Target, floating: str, fusing: Collection[str], kernel: Kernel
) -> dict[str, Realised | No]:
    """What becomes of every site (:meth:`Target.realise`). ``floating``: the precision of what stays float;
    ``fusing``: kinds that absorb what is fused behind them in float as well; ``kernel``: what one that is supported
    gets."""
    verdicts: dict[str, Realised | No] = {}
    for name, site in record.sites.items():
        technique = plan.get(name)
        folded = dict.fromkeys(site.epilogue, Realised("folded", f"into {name}"))
        if technique is None or technique.form(site) == "float":
            small = technique is not None and technique.compact()
            verdicts.setdefault(name, Realised(floating, "size only: its weights are stored packed" if small else ""))
            verdicts.update(folded if site.kind in fusing else {})
            continue
        verdict = target.supports(technique, site)
        found = verdict if isinstance(verdict, No) else kernel(technique, site)
        verdicts[name] = found
        if isinstance(found, Realised) and found.precision == "int8":
            verdicts.update(folded)
        elif isinstance(found, Realised) and found.precision == "binary" and site.fold is not None:
            verdicts[site.fold.site] = folded[site.fold.site]  # an activation behind it stands alone
    return verdicts


def timings(
    runs: Sequence[Callable[[], Any]], artifacts: Sequence[Artifact], rounds: int, threads: int
) -> list[Timing]:
    """Of each artifact, from a function that runs it once."""
    timed = interleaved(runs, rounds)
    return [Timing(times, one.batch, threads, "measured") for times, one in zip(timed, artifacts, strict=True)]


def described(model: onnx.ModelProto) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """(name, shape, dtype) of every graph input that is fed: old files list their weights as well. A size that is open
    is 0."""
    import onnx

    weights = {value.name for value in model.graph.initializer}
    found = []
    for value in model.graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        shape = tuple(int(axis.dim_value) for axis in kind.shape.dim)
        found.append((value.name, shape, str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))))
    return tuple(found)


def batch_of(inputs: Sequence[tuple[str, tuple[int, ...], str]]) -> int:
    """The first size of the first input that has one."""
    return next((shape[0] for _, shape, _ in inputs if shape), 1)


def checked(artifact: Artifact, inputs: Sequence[Array]) -> list[Array]:
    """The inputs as the artifact wants them; another number or shape is an error."""
    if len(inputs) != len(artifact.inputs):
        raise ValueError(f"{artifact.path} takes {len(artifact.inputs)} inputs, got {len(inputs)}")
    arrays = []
    for (name, shape, dtype), array in zip(artifact.inputs, inputs, strict=True):
        if tuple(array.shape) != shape:
            raise ValueError(f"input {name!r} of {artifact.path} has shape {shape}, got {tuple(array.shape)}")
        arrays.append(np.ascontiguousarray(array, dtype=np.dtype(dtype)))
    return arrays


def sample_inputs(artifact: Artifact) -> list[Array]:
    """Inputs to time with: normal numbers, zeros for integers (valid as indices)."""
    generator = np.random.default_rng(0)
    return [
        generator.standard_normal(shape).astype(dtype)
        if np.issubdtype(np.dtype(dtype), np.floating)
        else np.zeros(shape, dtype)
        for _, shape, dtype in artifact.inputs
    ]


def values_of(artifact: Artifact, tensors: Sequence[str]) -> tuple[str, ...]:
    """The file's names of the tensors; an unknown one is an error."""
    unknown = [name for name in tensors if name not in artifact.values]
    if unknown:
        raise ArtifactError(f"{artifact.path} has no value for the tensors {', '.join(unknown)}")
    return tuple(artifact.values[name] for name in tensors)


def interleaved(runs: Sequence[Callable[[], Any]], rounds: int) -> list[tuple[float, ...]]:
    """ms of each run in each round. A round calls every run twice in turn and times the second: the first refills its
    caches. Two rounds warm up."""
    if rounds < 1:
        raise ValueError(f"measure(rounds={rounds}): must be 1 or more")
    samples: list[list[float]] = [[] for _ in runs]
    for index in range(rounds + 2):
        for run, times in zip(runs, samples, strict=True):
            run()
            start = time.perf_counter()
            run()
            if index >= 2:
                times.append((time.perf_counter() - start) * 1e3)
    return [tuple(times) for times in samples]
