"""For tests of your own: a target that needs no runtime, and conformance suites for techniques and targets."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ._conformance import (
    Case,
    Conformance,
    ConformanceError,
    Failures,
    cases,
    check_files,
    check_ranges,
    expect,
    residual,
    same_snapshot,
    settings_of,
    snapshot,
)
from ._files import atomic_write
from ._hash import hash_state
from .data import call, tensors_in
from .export.program import applied_program, with_batch
from .model.apply import additions_of, apply, computer_of, materialised
from .model.intercept import CHILD
from .model.keys import decode_key, encode_key
from .model.network import input_names, network
from .plan import Plan
from .site import Format, Record, Site
from .targets._formulas import modelled, parts
from .targets.base import (
    Array,
    Artifact,
    ArtifactError,
    Realised,
    SiteTimes,
    Source,
    Target,
    TargetError,
    Timing,
)
from .targets.roofline import Roofline
from .technique import Cell, No, Technique, Wants
from .techniques.float_ import Float
from .techniques.int_ import Int

__all__ = ["Conformance", "ConformanceError", "MockTarget", "check_target", "check_technique"]


def _small_machine() -> Roofline:
    return Roofline(float32=10.0, int8=40.0, int4=80.0, bandwidth_gb_s=10.0, overhead_us=1.0)


@dataclass(frozen=True)
class MockTarget(Target):
    """A target for tests: it runs the simulated network through torch and takes its times from a formula.

    ``machine``: the formula (:class:`~bitsmith.targets.roofline.Roofline`). ``noise``: relative spread of the samples,
    from ``seed`` and the artifact, so equal calls give equal samples. ``refuses``: operation kind -> reason; techniques
    other than ``Float`` are refused there. ``watts``: energy is ms x W, in mJ; None: no energy.

    ``calls`` counts every method that a real runtime would spend time in. The file holds float tensors as they are and
    a planned weight as that many zero bytes as its technique's ``bits`` promise. What runs is kept in memory: in
    another process an artifact can be read and timed, not run. Like a measured target it models no single site
    (``cost`` is None).

    >>> target = MockTarget(refuses={"add": "no adder"})
    >>> target.calls["export"], target.source
    (0, 'simulated')
    """

    name: ClassVar[str] = "mock"
    source: ClassVar[Source] = "simulated"

    machine: Roofline = field(default_factory=_small_machine)
    noise: float = 0.0
    seed: int = 0
    refuses: Mapping[str, str] = field(default_factory=dict, hash=False)
    watts: float | None = None
    calls: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    _nets: dict[str, tuple[nn.Module, Any]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise < math.inf:
            raise ValueError(f"MockTarget(noise={self.noise!r}): must be 0 or more")

    # -- plans -----------------------------------------------------------------------------------------------------

    def supports(self, technique: Technique, site: Site) -> bool | No:
        if site.kind in self.refuses and not isinstance(technique, Float):
            return No(self.refuses[site.kind])
        return self.machine.supports(technique, site)

    def adapt(self, plan: Plan, record: Record) -> Plan:
        return self.machine.adapt(plan, record)

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        verdicts = dict(self.machine.realise(plan, record))
        for name in plan.sites:
            refusal = self.supports(plan[name], record.site(name))
            if isinstance(refusal, No):
                verdicts[name] = refusal
        return verdicts

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        """Keep the network as it ships; write its tensors (safetensors), and the map beside the file."""
        from safetensors.torch import save_file

        self.calls["export"] += 1
        if batch is not None:
            example = with_batch(example, batch)
        computer = computer_of(net)
        plan = computer.plan
        for name in plan.sites:
            refusal = self.supports(plan[name], computer.record_sites[name])
            if isinstance(refusal, No):
                raise TargetError(f"{self.name} cannot compute {name!r} under {plan[name]}: {refusal}")
        replica = materialised(net, lambda module: call(module, example))
        named = input_names(replica, example)
        inputs = tuple((name, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in named.items())
        output, values = _captured(replica, lambda: call(replica, example))
        found = modelled(self.machine, net, inputs)
        tensors = _stored(net, plan)
        notes = {"plan": plan.digest(), "state": hash_state(replica), "shapes": json.dumps(inputs)}
        path = atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=notes))
        artifact = Artifact(
            path=path,
            format="safetensors",
            nodes={site: (site,) for site in computer.record_sites},
            values={**{f"@{name}": f"@{name}" for name in named}, **{name: name for name in values}},
            inputs=inputs,
            outputs=tuple(f"output{i}" for i in range(len(_tensors(output)))),
            batch=next((shape[0] for _, shape, _ in inputs if shape), 1),
            target=self.name,
            plan=plan.to_json(),
            versions={"torch": torch.__version__},
            costs=found.costs,
            precisions=found.precisions,
        )
        artifact.save()
        self._nets[artifact.digest()] = replica, example
        return artifact

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        self.calls["run"] += 1
        kept = self._nets.get(_present(artifact).digest())
        if kept is None:
            raise TargetError(
                f"{artifact.path} was not exported by this MockTarget object: export it again, then run it"
            )
        unknown = [name for name in tensors if name not in artifact.values]
        if unknown:
            raise ArtifactError(f"{artifact.path} has no value for the tensors {', '.join(unknown)}")
        given = [tuple(array.shape) for array in inputs]
        wanted = [shape for _, shape, _ in artifact.inputs]
        if given != wanted:
            raise ValueError(f"{artifact.path} takes inputs of shapes {wanted}, got {given}")
        replica, example = kept
        fed = _like(example, [torch.from_numpy(np.array(array)) for array in inputs])
        with torch.no_grad():
            output, values = _captured(replica, lambda: call(replica, fed))
        values.update({f"@{name}": x for name, x in input_names(replica, fed).items()})
        found = [values[name] for name in tensors] if tensors else _tensors(output)
        return [x.detach().numpy() for x in found]

    # -- times -----------------------------------------------------------------------------------------------------

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        self.calls["measure"] += 1
        timings = []
        for artifact in artifacts:
            whole = parts(artifact, self.source).whole
            generator = np.random.default_rng([self.seed, int(_present(artifact).digest()[:12], 16)])
            factors = np.exp(self.noise * generator.standard_normal(rounds))
            samples = tuple(float(whole * f) for f in factors)
            timings.append(Timing(samples, artifact.batch, self.machine.threads, self.source))
        return timings

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        self.calls["inspect"] += 1
        return {site: Realised(precision, "simulated") for site, precision in _present(artifact).precisions.items()}

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        self.calls["site_times"] += 1
        return parts(_present(artifact), self.source)

    def settings(self) -> dict[str, Any]:
        return {
            "target": self.name,
            "machine": self.machine.settings(),
            "noise": self.noise,
            "seed": self.seed,
            "refuses": dict(self.refuses),
            "watts": self.watts,
        }

    def energy(self, artifact: Artifact) -> float | None:
        return None if self.watts is None else self.watts * parts(_present(artifact), self.source).whole


def _captured(replica: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """The output, and the values of named tensors: behind their quantizer where there is one."""
    additions = additions_of(replica)
    values: dict[str, Tensor] = {}
    quantized: dict[str, Tensor] = {}
    handles = []
    for store, holder, name_of in (
        (values, additions.cells, decode_key),
        (quantized, additions.tensors, lambda key: decode_key(key.rpartition("|")[0])),
    ):
        for key, module in holder.items():

            def note(_: Any, __: Any, made: Any, store: dict[str, Tensor] = store, name: str = name_of(key)) -> None:
                for index, x in enumerate(_tensors(made)):
                    store[f"{name}#{index}" if index else name] = x

            handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    return output, {**values, **quantized}


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tensors_in(value) if isinstance(x, Tensor)]


def _stored(net: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """What the file holds: the model's tensors, each once, and planned weights in as many bytes as was promised."""
    computer = computer_of(net)
    held: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    small = {
        site.weight.key: math.ceil(technique.bits(site) / 8)
        for site, technique in ((computer.record_sites[name], plan[name]) for name in plan.sites)
        if site.weight is not None and site.weight.key
    }
    for key, tensor in net.state_dict().items():
        identity = tensor.data_ptr(), tuple(tensor.shape)
        if key.startswith(f"{CHILD}.") or (tensor.numel() and identity in seen):
            continue
        seen.add(identity)
        held[key] = torch.zeros(small[key], dtype=torch.uint8) if key in small else tensor.detach().clone().contiguous()
    return held


def _like(example: Any, tensors: list[Tensor]) -> Any:
    """The example's structure with other tensors, in order."""
    left = iter(tensors)

    def other(value: Any) -> Any:
        return next(left) if isinstance(value, Tensor) else value

    if isinstance(example, Mapping):
        return {name: other(value) for name, value in example.items()}
    return tuple(map(other, example)) if isinstance(example, (tuple, list)) else other(example)


def _present(artifact: Artifact) -> Artifact:
    if not artifact.path.exists():
        raise ArtifactError(f"{artifact.path} is missing; export again")
    return artifact


# -- techniques --------------------------------------------------------------------------------------------------------


def check_technique(technique: Technique, *, kinds: Iterable[str] | None = None, settings: int = 12) -> Conformance:
    """Run the conformance suite on a technique: every operation that it fits, and ``settings`` other field values.

    On tiny one-site models it checks that the user's model stays bitwise the same, shapes, dtypes and finite values,
    equal seeds, ``deepcopy``, state dict and plan file round trips, gradients, devices, that an exported program
    computes the same, and that ``fits``, ``reads``, ``bits`` and ``cite`` keep their contracts; and with linear layers
    before and behind it that ranges are collected on the network that it asks for. ``kinds``: only these
    operations. Another setting may refuse the data (``ValueError`` with a reason). Raises :class:`ConformanceError`,
    which lists all that failed.

    >>> from bitsmith.techniques.float_ import Float
    >>> check_technique(Float(), kinds=["linear"], settings=1).kinds
    ('linear',)
    """
    failures = Failures()
    _check_value(failures, technique)
    variants = [technique, *settings_of(technique, settings)]
    refused: dict[str, str] = {}
    covered: dict[str, None] = {}
    fitting: dict[int, list[tuple[Case, Site]]] = {index: [] for index in range(len(variants))}
    for case in cases(tuple(kinds) if kinds is not None else None):
        site = _site_of(case)
        for index, variant in enumerate(variants):
            with failures.check(f"{variant!r} at {case.name}: fits"):
                verdict = variant.fits(site)
                if verdict:
                    fitting[index].append((case, site))
                else:
                    expect(isinstance(verdict, No) and str(verdict).strip(), f"gave {verdict!r}; write No(reason)")
                    # a profile lists what was refused, with its size
                    expect(variant.bits(site) >= 0, f"bits is {variant.bits(site)!r} where it does not fit")
                    if index == 0:
                        refused[case.name] = str(verdict)
    with failures.check(f"{technique!r}: fits"):
        expect(any(fitting.values()), f"it fits no operation at all: {'; '.join(dict.fromkeys(refused.values()))}")
    for index, variant in enumerate(variants):
        # a setting that is tried beside the given one takes three models, other ones than its neighbours take
        chosen = fitting[index]
        spread = chosen if index == 0 else [chosen[(3 * index + i) % len(chosen)] for i in range(min(3, len(chosen)))]
        for case, site in spread:
            covered[case.kind] = None
            reason = _check_at(failures, variant, case, site, given=index == 0)
            if reason:
                refused[f"{variant!r} at {case.name}"] = reason
    failures.settle(f"{type(technique).__name__}")
    return Conformance(failures.checks, tuple(covered), len(variants), refused)


def _site_of(case: Case) -> Site:
    inputs = case.inputs(torch.Generator().manual_seed(0))
    names = ("0",) if case.kind == "module" else ()
    sites = network(case.model(), inputs, names=names).record.sites.values()
    return next(site for site in sites if site.kind == case.kind)


def _check_value(failures: Failures, technique: Technique) -> None:
    kind = type(technique)
    with failures.check("frozen dataclass"):
        expect(dataclasses.is_dataclass(technique), f"{kind.__name__} must be a dataclass")
        expect(kind.__dataclass_params__.frozen, f"{kind.__name__} must be frozen: @dataclass(frozen=True)")  # type: ignore[attr-defined]
    with failures.check("equal values are equal and hash alike"):
        other = dataclasses.replace(technique)  # type: ignore[type-var]
        expect(other == technique and hash(other) == hash(technique), "a copy by dataclasses.replace differs")
    with failures.check("cite"):
        text = technique.cite()
        expect(isinstance(text, str) and text.strip(), "must name the source")
        expect(not text.startswith(f"{kind.__name__}("), "the class has no docstring; its first line names the paper")
    with failures.check("ranges behind it and before it"):
        expect(isinstance(technique.keeps_function(), bool), "keeps_function: must be True or False")
        check_ranges(technique)
    with failures.check("plan file round trip"), tempfile.TemporaryDirectory() as folder:
        plan = Plan({"site": technique})
        path = plan.save(Path(folder) / "plan.json")
        again = Plan.load(path, techniques=[kind])
        expect(again == plan and again.digest() == plan.digest(), f"{again['site']!r} came back for {technique!r}")


def _check_at(failures: Failures, technique: Technique, case: Case, site: Site, given: bool) -> str:
    """Every check at one site; or the reason why the data are refused there, open only to what was not ``given``."""
    where = f"{technique!r} at {case.name}"
    data = [(case.inputs(torch.Generator().manual_seed(seed)), None) for seed in (0, 1)]
    inputs = data[0][0]
    plan = Plan({site.name: technique})
    model = case.model()
    with torch.no_grad():
        wanted = model(*inputs)
    before, noise = snapshot(model), torch.get_rng_state()
    nets: list[nn.Module] = []
    with failures.check(f"{where}: apply"):
        try:
            nets += [apply(model, plan, data, seed=3) for _ in range(2)]
        except ValueError as error:
            if given or not str(error):
                raise
            return str(error)
    if len(nets) < 2:
        return ""
    net, twin = nets
    with failures.check(f"{where}: forward"), torch.no_grad():
        copied = copy.deepcopy(net)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        got = net(*inputs)
        expect(got.shape == wanted.shape, f"shape {tuple(got.shape)}, the operation gives {tuple(wanted.shape)}")
        expect(got.dtype == wanted.dtype, f"dtype {got.dtype}, the operation gives {wanted.dtype}")
        expect(got.isfinite().all(), "NaN or infinity on finite inputs")
        expect(_close(twin(*inputs), got), "the same seed gave another result")
        expect(_close(copied(*inputs), got), "a deepcopy gave another result")
        _check_state(case, plan, state, net.state_dict().keys() >= model.state_dict().keys(), got, inputs)
    with failures.check(f"{where}: purity"):
        expect(same_snapshot(before, snapshot(model)), "the user's model was changed")
        expect(
            torch.equal(noise, torch.get_rng_state()), "torch's global random state was used; take the generator given"
        )
    with failures.check(f"{where}: contract"):
        _check_answers(technique, site)
    with failures.check(f"{where}: training"):
        _check_training(net, technique, site, inputs)
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        with failures.check(f"{where}: on {device}"), torch.no_grad():
            moved = copy.deepcopy(twin).to(device)
            there = tuple(x.to(device) for x in inputs)
            expect(moved(*there).isfinite().all(), "NaN or infinity")
            with torch.autocast(device, dtype=torch.bfloat16):
                expect(moved(*there).isfinite().all(), "NaN or infinity under autocast")
    with failures.check(f"{where}: export"):
        _check_export(twin, technique, site, inputs)
    return ""


def _close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def _check_state(
    case: Case, plan: Plan, state: Mapping[str, Tensor], keeps_keys: bool, wanted: Tensor, inputs: tuple[Tensor, ...]
) -> None:
    """A network made from other weights and other data computes the same once it has loaded the state."""
    expect(keeps_keys, "the model's own state-dict keys are gone")
    model = case.model()
    for parameter in model.parameters():
        parameter.mul_(1.7)
    data = [(case.inputs(torch.Generator().manual_seed(5)), None)]
    other = apply(model, plan, data, seed=4)
    other(*inputs)
    other.load_state_dict(dict(state))
    expect(_close(other(*inputs), wanted), "another network with this state dict gave another result")


def _check_answers(technique: Technique, site: Site) -> None:
    formats = technique.reads(site)
    expect(len(formats) == len(site.operands), f"reads: {len(formats)} formats for {len(site.operands)} operands")
    for operand, fmt in zip(site.operands, formats, strict=True):
        expect(fmt is None or isinstance(fmt, Format), f"reads: {fmt!r} is not a Format or None")
        expect(fmt is None or (operand.floating and not operand.constant), f"reads: a format for {operand.argument!r}")
    written = technique.writes(site)
    expect(written is None or isinstance(written, Format), f"writes: {written!r} is not a Format or None")
    wants = technique.wants(site)
    expect(isinstance(wants, Wants), "wants: must be a Wants")
    expect(len(wants.observers) <= len(site.operands), f"wants: {len(wants.observers)} observers of {site.kind!r}")
    bits = technique.bits(site)
    expect(isinstance(bits, (int, float)) and math.isfinite(bits) and bits >= 0, f"bits: {bits!r}")
    expect(site.weight is None or bits > 0, "bits: 0 for a site with a weight")
    form = technique.form(site)
    if form not in ("float", "dialect"):
        namespace, _, name = form.replace("::", ".").partition(".")
        expect(
            name and hasattr(getattr(torch.ops, namespace), name.partition(".")[0]),
            f"form: {form!r} is neither 'float' nor 'dialect' nor an operation of torch.ops",
        )


def _check_training(net: nn.Module, technique: Technique, site: Site, inputs: tuple[Tensor, ...]) -> None:
    cell = additions_of(net).cells[encode_key(site.name)]
    expect(isinstance(cell, Cell), f"build gave a {type(cell).__name__}, not a Cell")
    assert isinstance(cell, Cell)
    net.train()
    cell.step(0, 10)
    given = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    output = net(*given)
    expect(output.isfinite().all(), "NaN or infinity in training mode")
    penalty = cell.penalty()
    expect(
        penalty is None or (penalty.dim() == 0 and penalty.isfinite()), f"penalty: {penalty!r} is not a finite scalar"
    )
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    ((output * weights).sum() + (0.0 if penalty is None else penalty)).backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    trained.update({f"input {i}": x.grad for i, x in enumerate(given) if x.requires_grad})
    for name, grad in trained.items():
        expect(grad is not None, f"no gradient reaches {name}")
        expect(grad is None or grad.isfinite().all(), f"the gradient of {name} is NaN or infinite")
    _check_needs(net, cell, site, inputs)
    settled = cell.settle()
    expect(settled is None or (isinstance(settled, Technique) and settled.fits(site)), f"settle: {settled!r}")
    net.eval()
    with torch.no_grad():
        expect(net(*inputs).isfinite().all(), "NaN or infinity in eval after training")


def _check_needs(net: nn.Module, cell: Cell, site: Site, inputs: tuple[Tensor, ...]) -> None:
    """A weight that stopped training because no cell names it in ``needs`` must not matter to the output."""
    own = dict(net.named_parameters())
    for operand in site.operands:
        for key in operand.parameters if operand.constant else ():
            parameter = own.get(key)
            if parameter is None or parameter.requires_grad:
                continue
            parameter.requires_grad_(True)
            output = net(*inputs)
            grads = torch.autograd.grad(output.sum(), parameter, allow_unused=True) if output.requires_grad else (None,)
            parameter.requires_grad_(False)
            expect(grads[0] is None, f"the cell reads {operand.argument!r}, which is not in its needs {cell.needs}")


def _check_export(net: nn.Module, technique: Technique, site: Site, inputs: tuple[Tensor, ...]) -> None:
    """An exported program computes what is simulated (to 40 dB: a value on the edge of a level may fall either way)."""
    if technique.form(site) not in ("float", "dialect"):
        return
    with torch.no_grad():
        wanted = net(*inputs)
        steady = _close(net(*inputs), wanted)
        program, _ = applied_program(net, inputs)
        got = program.module()(*inputs)
    expect(got.shape == wanted.shape, f"the exported program gives shape {tuple(got.shape)}")
    error = float((got - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12))
    expect(not steady or error < 1e-4, f"the exported program differs: relative squared error {error:.2g}")


# -- targets -----------------------------------------------------------------------------------------------------------


def check_target(target: Target, *, run: bool = True) -> Conformance:
    """Run the conformance suite on a target, with a small residual network in float and in int8.

    It checks ``supports``, ``adapt``, ``realise``, files and their round trip, outputs against the simulation (skipped
    where the target is modelled, or with ``run=False``), times, read-back precisions and settings. Raises
    :class:`ConformanceError`, which lists all that failed.

    >>> check_target(MockTarget()).settings
    2
    """
    failures = Failures()
    model, data = (
        residual(),
        [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)), None) for i in (0, 1)],
    )
    record = network(model, data[0][0]).record
    refused: dict[str, str] = {}
    with failures.check("identity"):
        expect(dataclasses.is_dataclass(target), "a target is a frozen dataclass")
        expect(target.name and target.source in ("measured", "simulated", "modelled"), f"source {target.source!r}")
        expect(isinstance(hash(target), int), "a target must be hashable")
        expect(json.loads(json.dumps(target.settings())), "settings must be JSON and not empty")
    chosen: dict[str, Technique] = {}
    for site in record.sites.values():
        for technique in (Float(), Int(8, 8), Int(4, 8), Int(3, None), Int(8, 16)):
            if not technique.fits(site):
                continue
            with failures.check(f"supports({technique!r}, {site.name})"):
                verdict = target.supports(technique, site)
                expect(verdict is True or (isinstance(verdict, No) and str(verdict).strip()), f"gave {verdict!r}")
                if isinstance(verdict, No):
                    refused[f"{technique!r} at {site.name}"] = str(verdict)
                elif technique == Int(8, 8):
                    chosen[site.name] = technique
    with failures.check("supports float"):
        expect(all(target.supports(Float(), site) for site in record.sites.values()), "float must run everywhere")
    plans = {"float": Plan(), "int8": Plan(chosen)} if chosen else {"float": Plan()}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans.items():
            adapted = None
            with failures.check(f"{name}: adapt"):
                adapted = target.adapt(plan, record)
                expect(target.adapt(adapted, record) == adapted, "adapting twice changes the plan again")
                expect(set(adapted.sites) >= set(plan.sites), "sites were dropped from the plan")
                adapted.check(record)
                expect(Plan.from_json(adapted.to_json()) == adapted, "the adapted plan does not survive a file")
            if adapted is None:
                continue
            with failures.check(f"{name}: realise"):
                verdicts = target.realise(adapted, record)
                expect(set(verdicts) == set(record.sites), f"misses {sorted(set(record.sites) - set(verdicts))}")
                expect(
                    all(isinstance(v, Realised) or str(v).strip() for v in verdicts.values()), "a No without a reason"
                )
            check_files(failures, target, name, apply(model, adapted, data), data[0][0], Path(folder), run)
    failures.settle(f"{type(target).__name__}")
    return Conformance(
        failures.checks, tuple(dict.fromkeys(s.kind for s in record.sites.values())), len(plans), refused
    )
