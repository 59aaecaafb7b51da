"""What the conformance suites are made of: one-site models, settings to try, checks, and a list of what failed."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench import suffix
from .model.apply import additions_of, apply, computer_of
from .model.keys import encode_key
from .model.network import network
from .numerics.ranges import qparams
from .operations import ACTIVATIONS, OPERATIONS
from .plan import Plan
from .site import Format, Learn, Range
from .targets.base import Artifact, ArtifactError, Realised, Target, example_arrays
from .technique import Cell, Technique
from .techniques.int_ import Int


class ConformanceError(AssertionError):
    """A plug-in breaks its contract. The message lists every check that failed, and where."""


@dataclass(frozen=True)
class Conformance:
    """What a suite did: ``checks`` made, ``kinds`` of operations (or parts of a target) covered, ``settings`` tried,
    and by name what was left out and why (``refused``)."""

    checks: int
    kinds: tuple[str, ...]
    settings: int = 1
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        covered = f"{len(self.kinds)} kinds and {self.settings} settings"
        return f"{self.checks} checks over {covered}; {len(self.refused)} refused"


class _Check:
    def __init__(self, name: str, found: list[str]) -> None:
        self.name, self.found = name, found

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        text = next(iter(str(error).strip().splitlines()), "")
        self.found.append(
            f"{self.name}: {error if isinstance(error, AssertionError) else f'raised {type(error).__name__}: {text}'}"
        )
        return True


class Failures:
    """Collects failed checks, so that one run shows them all."""

    def __init__(self) -> None:
        self.checks = 0
        self.found: list[str] = []

    def check(self, name: str) -> _Check:
        """A context for one check: an assertion or any other exception inside is noted, and the suite goes on."""
        self.checks += 1
        return _Check(name, self.found)

    def settle(self, subject: str) -> None:
        if self.found:
            lines = "".join(f"\n  - {line}" for line in self.found)
            raise ConformanceError(f"{subject} fails {len(self.found)} of {self.checks} checks:{lines}")


def expect(condition: Any, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


class OneSite(nn.Module):
    """Computes one operation on its inputs and its own parameters."""

    def __init__(self, compute: Callable[..., Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.compute = compute
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Tensor:
        # what a plan adds below may have parameters too
        return self.compute(*inputs, **dict(self.named_parameters(recurse=False)))


@dataclass(frozen=True)
class Case:
    """A tiny model in which one operation is the site under test. ``inputs``: as in a loader's item, batch 4."""

    name: str
    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]


_SMOOTH = ("leaky_relu", "elu", "silu", "gelu", "hardswish", "hardsigmoid", "softplus", "mish")


def cases(kinds: tuple[str, ...] | None = None) -> list[Case]:
    """A case or several for every operation that can be a site; ``kinds``: only these."""
    if kinds is not None:
        unknown = sorted(set(kinds) - {*OPERATIONS, "module"})
        if unknown:
            raise ValueError(f"no operation is called {', '.join(unknown)}; known: {', '.join(OPERATIONS)}, module")
    return [case for case in _cases() if kinds is None or case.kind in kinds]


def _case(
    kind: str, compute: Callable[..., Tensor], *shapes: tuple[int, ...], name: str = "", **own: tuple[int, ...]
) -> Case:
    def model() -> nn.Module:
        generator = torch.Generator().manual_seed(11)
        return OneSite(compute, {n: torch.randn(shape, generator=generator) / 3 for n, shape in own.items()})

    return Case(name or kind, kind, model, lambda g: tuple(torch.randn(shape, generator=g) for shape in shapes))


def _layer(kind: str, name: str, make: Callable[[], nn.Module], *shape: int) -> Case:
    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return make().eval()

    return Case(name, kind, model, lambda g: (torch.randn(shape, generator=g),))


def _cases() -> Iterator[Case]:
    space = (6, 6, 6)
    convs: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
    transposed: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    pools: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    adaptive: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    for n in (1, 2, 3):
        size, kernel = space[:n], (3, 3, 3)[:n]
        conv, back, pool, mean = convs[n - 1], transposed[n - 1], pools[n - 1], adaptive[n - 1]
        yield _case(
            f"conv{n}d",
            lambda x, weight, bias, f=conv: f(x, weight, bias, padding=1),
            (4, 4, *size),
            weight=(8, 4, *kernel),
            bias=(8,),
        )
        yield _case(
            f"conv_transpose{n}d",
            lambda x, weight, bias, f=back: f(x, weight, bias, stride=2),
            (4, 4, *size),
            weight=(4, 8, *kernel),
            bias=(8,),
        )
        yield _case(f"avg_pool{n}d", lambda x, f=pool: f(x, 2), (4, 4, *size))
        yield _case(f"adaptive_avg_pool{n}d", lambda x, f=mean: f(x, 1), (4, 4, *size))
    yield _case(
        "conv2d",
        lambda x, weight: F.conv2d(x, weight, stride=2),
        (4, 4, 6, 6),
        name="conv2d stride 2, no bias",
        weight=(8, 4, 3, 3),
    )
    yield _case(
        "conv2d",
        lambda x, weight: F.conv2d(x, weight, padding=1, groups=4),
        (4, 4, 6, 6),
        name="conv2d depthwise",
        weight=(4, 1, 3, 3),
    )
    yield _layer("conv2d", "conv2d + batch_norm + relu", _normalised, 4, 4, 6, 6)
    yield _case("linear", F.linear, (4, 8), weight=(6, 8), bias=(6,))
    yield _case("linear", F.linear, (4, 5, 8), name="linear on three axes, no bias", weight=(6, 8))
    yield _case("matmul", torch.matmul, (4, 5, 8), (4, 8, 6), name="matmul of activations")
    yield _case("matmul", lambda x, factor: x @ factor, (4, 5, 8), name="matmul with a weight", factor=(8, 6))
    yield _case("baddbmm", torch.baddbmm, (4, 5, 6), (4, 5, 8), (4, 8, 6))
    yield _case("einsum", lambda x, y: torch.einsum("bij,bjk->bik", x, y), (4, 5, 8), (4, 8, 6))
    for kind, function in (("add", torch.add), ("sub", torch.sub), ("mul", torch.mul)):
        yield _case(kind, lambda x, y, f=function: f(x, y), (4, 3, 5), (4, 3, 5))
    yield _case("cat", lambda x, y: torch.cat((x, y), 1), (4, 3, 5), (4, 2, 5))
    yield Case(
        "embedding",
        "embedding",
        _case("embedding", lambda index, weight: F.embedding(index, weight), weight=(10, 8)).model,
        lambda g: (torch.randint(0, 10, (4, 5), generator=g),),
    )
    yield _case("mean", lambda x: torch.mean(x, (2, 3)), (4, 4, 6, 6))
    rows = torch.tensor([0, 2])
    yield _case("index_add", lambda x, y: torch.index_add(x, 1, rows.to(x.device), y), (4, 3, 5), (4, 2, 5))
    index = torch.tensor([[0], [2], [1], [1]]).unsqueeze(2).expand(4, 1, 5).contiguous()
    yield _case("scatter_add", lambda x, y: torch.scatter_add(x, 1, index.to(x.device), y), (4, 3, 5), (4, 1, 5))
    yield _case(
        "scatter_reduce", lambda x, y: torch.scatter_reduce(x, 1, index.to(x.device), y, "sum"), (4, 3, 5), (4, 1, 5)
    )
    yield _case("spmm", lambda x, y: torch.sparse.mm(x.to_sparse_coo(), y), (4, 5), (5, 3))
    yield _layer("batch_norm", "batch_norm", lambda: nn.BatchNorm2d(4), 4, 4, 5, 5)
    yield _layer("layer_norm", "layer_norm", lambda: nn.LayerNorm(8), 4, 5, 8)
    yield _layer("group_norm", "group_norm", lambda: nn.GroupNorm(2, 4), 4, 4, 5, 5)
    yield _case("softmax", lambda x: torch.softmax(x, -1), (4, 8))
    yield _case("log_softmax", lambda x: torch.log_softmax(x, -1), (4, 8))
    for kind in (*sorted(ACTIVATIONS - {"clamp"}), *_SMOOTH):
        yield _case(kind, getattr(F, kind), (4, 8))
    yield _case("clamp", lambda x: torch.clamp(x, -1.0, 1.0), (4, 8))
    yield _case("sigmoid", torch.sigmoid, (4, 8))
    yield _case("tanh", torch.tanh, (4, 8))
    attention: Any = F.scaled_dot_product_attention
    yield _case("scaled_dot_product_attention", lambda q, k, v: attention(q, k, v), *((4, 2, 5, 8),) * 3)
    yield _layer("module", "a whole module", lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Tanh())), 4, 8)


def _normalised() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.3)
    nn.init.normal_(norm.running_mean, std=0.3)  # type: ignore[arg-type]  # a new BatchNorm2d has statistics
    nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), norm, nn.ReLU())


# -- settings ----------------------------------------------------------------------------------------------------------


def settings_of(technique: Technique, limit: int) -> list[Technique]:
    """Other values of the same class, at most ``limit``, that together show most pairs of its options.

    Fields with a bool, Literal, int, Format or Range type get alternative values; what the constructor refuses is
    not tried. Deterministic.
    """
    alternatives = {f.name: alternatives_of(technique, f.name) for f in dataclasses.fields(technique) if f.init}  # type: ignore[arg-type]
    alternatives = {name: values for name, values in alternatives.items() if values}
    generator = random.Random(0)
    candidates: dict[tuple[tuple[str, Any], ...], Technique] = {}
    for changed in _tries(alternatives, generator):
        try:
            candidates[changed] = dataclasses.replace(technique, **dict(changed))  # type: ignore[type-var]
        except (TypeError, ValueError):
            continue
    pairs = {changed: {*changed, *combinations(changed, 2)} for changed in candidates}
    seen: set[Any] = set()
    chosen: list[Technique] = []
    while len(chosen) < limit and pairs:
        best = max(pairs, key=lambda changed: len(pairs[changed] - seen))
        if not pairs[best] - seen:
            break
        seen |= pairs.pop(best)
        chosen.append(candidates[best])
    return chosen


def _tries(alternatives: Mapping[str, list[Any]], generator: random.Random) -> Iterator[tuple[tuple[str, Any], ...]]:
    for name, values in alternatives.items():
        for value in values:
            yield ((name, value),)
    for first, second in combinations(alternatives, 2):
        for one in alternatives[first]:
            for other in alternatives[second]:
                yield (first, one), (second, other)
    for _ in range(200):
        yield tuple(
            (name, generator.choice(values)) for name, values in alternatives.items() if generator.random() < 0.5
        )


def alternatives_of(technique: Technique, name: str) -> list[Any]:
    """Other values that the type of a field allows."""
    value = getattr(technique, name)
    found: list[Any] = []
    for hint in _leaves(typing.get_type_hints(type(technique))[name]):
        if hint is type(None):
            found.append(None)
        elif hint is bool:
            found += [True, False]
        elif hint is int:
            base = value if isinstance(value, int) else 4
            found += [max(1, base // 2), base + 1, 2, 4, *([2 * base] if 0 < base <= 64 else [])]
        elif typing.get_origin(hint) is Literal:
            found += typing.get_args(hint)
        elif hint is Format:
            found += [Format(8), Format(8, signed=True, symmetric=True)]
        elif hint is Learn:
            found += [Learn(), Learn("step_range", "ewgs")]
        elif hint is Range:
            found += [Range("percentile", 99.0), Range("mse")]
    kept: list[Any] = []
    for item in found:
        if (type(item), item) != (type(value), value) and not any(type(item) is type(k) and item == k for k in kept):
            kept.append(item)
    return kept


def _leaves(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _leaves(part)
    else:
        yield hint


# -- comparison --------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must not change: state, gradients, modes, attributes' names."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    modes = {name: (module.training, tuple(sorted(vars(module)))) for name, module in model.named_modules()}
    trained = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return copy.copy({"state": state, "modes": modes, "trained": trained})


def same_snapshot(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    states = before["state"], after["state"]
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        and before["modes"] == after["modes"]
        and before["trained"] == after["trained"]
    )


# -- ranges ------------------------------------------------------------------------------------------------------------


def check_ranges(technique: Technique) -> None:
    """Of two linear layers: ranges behind the technique are those of the network that it says, the float one or its
    own; and what it reads itself has the range that it asks for, behind a float layer or a quantized one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(16, 8)
    first, second = network(model, x).record.sites.values()
    data = [(x, None)]

    def expect_range(before: Technique, at: Technique, runs: bool, fmt: Format) -> None:
        with torch.no_grad():
            seen = _first_of(apply(model, Plan({"0": before}), data) if runs else model, x)
        found = additions_of(apply(model, Plan({"0": before, "1": at}), data)).cells[encode_key("1")]
        assert isinstance(found, Cell)
        quantizer = found.quantizers[0]
        wanted = qparams(float(seen.min()), float(seen.max()), fmt)[0]
        got = None if quantizer is None else float(quantizer.scale)
        which = "planned" if runs else "float"
        expect(
            got is not None and abs(got - wanted) <= 0.01 * wanted,
            f"{at!r} behind {before!r} has the step {got}; of the {which} network it is {wanted}",
        )

    if technique.fits(first):
        expect_range(technique, Int(8, 8), not technique.keeps_function(), Format(8))
    fmt = technique.reads(second)[0] if technique.fits(second) else None
    if fmt is not None and fmt.range == Range() and fmt.learn is None:
        expect_range(Int(4, 4), technique, technique.wants(second).after_quantized, fmt)


def _first_of(net: nn.Module, x: Tensor) -> Tensor:
    """What the first of the layers gives."""
    made: list[Tensor] = []
    handle = net.get_submodule("0").register_forward_hook(lambda _, __, output: made.append(output.detach().clone()))
    net(x)
    handle.remove()
    return made[0]


# -- targets -----------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def residual() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return _Residual().eval()


def check_files(
    failures: Failures, target: Target, name: str, net: nn.Module, example: Tensor, folder: Path, run: bool
) -> None:
    before = snapshot(net)
    artifact = None
    with failures.check(f"{name}: export"):
        artifact = target.export(net, folder / f"{name}{suffix(target)}", example, 2)
        expect(artifact.path.exists() and artifact.bytes > 0, f"no file at {artifact.path}")
        expect(
            artifact.batch == 2 and [s for _, s, _ in artifact.inputs] == [(2, 3, 8, 8)], f"inputs {artifact.inputs}"
        )
        expect(set(artifact.nodes) <= set(computer_of(net).record_sites), "nodes of sites that the network has not")
        expect(Artifact.load(artifact.path) == artifact, "the artifact that was saved is not the one that is loaded")
        expect(artifact.target == target.name, f"artifact.target is {artifact.target!r}")
        expect(same_snapshot(before, snapshot(net)), "the network was changed")
    if artifact is None:
        return
    x = example[:2]
    if run and target.source != "modelled":
        with failures.check(f"{name}: run"):
            _check_run(target, artifact, net, x)
    with failures.check(f"{name}: measure"):
        timings = target.measure([artifact, artifact], rounds=3)
        expect(len(timings) == 2, f"{len(timings)} timings for two artifacts")
        for timing in timings:
            expect(len(timing.samples) == (1 if target.source == "modelled" else 3), f"{len(timing.samples)} samples")
            expect(all(0 < ms < math.inf for ms in timing.samples), f"samples {timing.samples}")
            expect((timing.source, timing.batch) == (target.source, 2), f"says {timing}")
    with failures.check(f"{name}: inspect"):
        seen = target.inspect(artifact)
        expect(set(seen) >= set(artifact.nodes), f"misses {sorted(set(artifact.nodes) - set(seen))}")
        expect(all(isinstance(value, Realised) for value in seen.values()), "must give Realised for every site")
        integer = sorted(site for site, value in seen.items() if value.precision.startswith("int"))
        expect(name == "int8" or not integer, f"the float network ran integers at {integer}")
        expect(name != "int8" or integer, "not one site of the int8 network ran in integers")
    with failures.check(f"{name}: site_times"):
        times = target.site_times(artifact, rounds=3)
        shares = (*times.sites.values(), *times.conversions.values(), times.other)
        expect(all(0 <= ms < math.inf for ms in shares) and times.whole > 0, f"gave {times}")
        expect(times.source == target.source, f"source is {times.source}")
    with failures.check(f"{name}: energy"):
        energy = target.energy(artifact)
        expect(energy is None or 0 < energy < math.inf, f"gave {energy} mJ")
    with failures.check(f"{name}: a file that was cut off"):
        _check_broken(artifact)


def _check_run(target: Target, artifact: Artifact, net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted = net(x).numpy()
    (got,) = target.run(artifact, example_arrays(x))
    expect(got.shape == wanted.shape, f"shape {got.shape}, simulated {wanted.shape}")
    error = float(np.square(got - wanted).sum() / np.square(wanted).sum())
    expect(error < 1e-3, f"what runs is not what is simulated: relative squared error {error:.2g}")
    names = [tensor for tensor in artifact.values if not tensor.startswith("@")][:2]
    values = target.run(artifact, example_arrays(x), names)
    expect(len(values) == len(names) and all(np.isfinite(value).all() for value in values), f"values of {names}")
    try:
        target.run(artifact, example_arrays(x[:, :2]))
    except (ValueError, RuntimeError):
        return
    raise AssertionError("inputs of a wrong shape ran without an error")


def _check_broken(artifact: Artifact) -> None:
    whole = artifact.path.read_bytes()
    for content in (whole[: len(whole) // 2], None):
        try:
            if content is None:
                artifact.path.unlink()
            else:
                artifact.path.write_bytes(content)
            Artifact.load(artifact.path)
        except ArtifactError:
            continue
        finally:
            artifact.path.write_bytes(whole)
        raise AssertionError("a missing or cut-off file was loaded without an ArtifactError")
