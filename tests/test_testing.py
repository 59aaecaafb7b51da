"""The suites must fail what breaks the contract: one plug-in for each duty that it neglects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitsmith._conformance import alternatives_of, cases, same_snapshot, settings_of, snapshot
from bitsmith.model.apply import apply
from bitsmith.model.network import network
from bitsmith.operations import OPERATIONS
from bitsmith.plan import Plan
from bitsmith.site import Format, Range, Record, Site
from bitsmith.targets.base import (
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
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.targets.roofline import Roofline
from bitsmith.technique import Cell, No, Technique
from bitsmith.techniques.int_ import Int
from bitsmith.testing import ConformanceError, MockTarget, check_target, check_technique

Fault = Literal["none", "nan", "shape", "gradient", "global noise", "no reason", "bits", "forgets", "reads", "branches"]


@dataclass(frozen=True)
class Faulty(Technique):
    """Computes linear as it was, with one fault (no paper)."""

    fault: Fault = "none"

    def fits(self, site: Site) -> bool | No:
        if site.kind == "linear":
            return True
        return No("") if self.fault == "no reason" else No("only linear")

    def bits(self, site: Site) -> float:
        return 0.0 if self.fault == "bits" else 32.0

    def reads(self, site: Site) -> tuple[Format | None, ...]:
        return () if self.fault == "reads" else (None,) * len(site.operands)

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _FaultyCell(site, self.fault, record)


class _FaultyCell(Cell):
    def __init__(self, site: Site, fault: str, record: Record) -> None:
        super().__init__(site)
        self.fault = fault
        self.kept = record.weights[site.name, 1].clone()

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        output = self.op(x, self.kept if self.fault == "forgets" else weight, **rest)
        if self.fault == "nan":
            return output * torch.nan
        if self.fault == "shape":
            return output[..., :-1]
        if self.fault == "gradient":
            return output.detach() + 0 * x.sum()
        if self.fault == "global noise":
            return output + torch.randn_like(output)
        if self.fault == "branches" and output.sum().item() > 1e9:
            return -output
        return output


def test_faultless_passes_and_says_what_it_did() -> None:
    report = check_technique(Faulty(), settings=0)
    assert report.kinds == ("linear",)
    assert report.refused["conv2d"] == "only linear"
    assert report.checks > 20


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("nan", "NaN"),
        ("shape", "shape"),
        ("gradient", "no gradient reaches"),
        ("global noise", "random state"),
        ("no reason", r"write No\(reason\)"),
        ("bits", "bits: 0"),
        ("forgets", "state dict"),
        ("reads", "at linear: "),
        ("branches", "export"),
    ],
)
def test_each_fault_is_found(fault: Fault, said: str) -> None:
    with pytest.raises(ConformanceError, match=said):
        check_technique(Faulty(fault), kinds=["linear", "add"], settings=0)


@pytest.mark.parametrize("change", ["weight", "mode", "attribute", "frozen", "gradient", "key"])
def test_a_changed_model_is_seen(change: str) -> None:
    model = nn.Linear(2, 2)
    before = snapshot(model)
    assert same_snapshot(before, snapshot(model))
    if change == "weight":
        model.weight.data[0, 0] = torch.nextafter(model.weight.data[0, 0], torch.tensor(9.0))
    elif change == "mode":
        model.eval()
    elif change == "attribute":
        model.note = 1
    elif change == "frozen":
        model.bias.requires_grad_(False)
    elif change == "gradient":
        model(torch.ones(1, 2)).sum().backward()
    else:
        model.register_buffer("extra", torch.zeros(1))
    assert not same_snapshot(before, snapshot(model))


def test_options_are_tried_and_what_the_constructor_refuses_is_not() -> None:
    with pytest.raises(ConformanceError, match="fault='nan'"):  # found from the faultless one
        check_technique(Faulty(), kinds=["linear"], settings=20)
    tried = settings_of(Int(8, 8), 12)
    assert len(tried) == 12
    assert {t.granularity for t in tried} == {"tensor", "channel", "group"}
    assert {t.a for t in tried} >= {None, 8}
    assert all((t.granularity == "group") == (t.group > 0) for t in tried)
    assert tried == settings_of(Int(8, 8), 12)


def test_alternatives_follow_the_type_of_the_field() -> None:
    assert alternatives_of(Int(8, 8), "symmetric") == [True]
    assert None in alternatives_of(Int(8, 8), "a")
    assert alternatives_of(Int(8, 8), "granularity") == ["tensor", "group"]
    assert Range("mse") in alternatives_of(Int(8, 8), "range")
    assert alternatives_of(Int(8, 8), "out")[0] == Format(8)


def test_every_operation_that_techniques_may_change_has_a_case() -> None:
    covered = {case.kind for case in cases()}
    assert covered >= {kind for kind, operation in OPERATIONS.items() if operation.role != "composite"}
    with pytest.raises(ValueError, match="conv9d"):
        cases(("conv9d",))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_cases_hold_their_site_once(case: Any) -> None:
    names = ("0",) if case.kind == "module" else ()
    sites = network(case.model(), case.inputs(torch.Generator().manual_seed(0)), names=names).record.sites
    assert [site.kind for site in sites.values()].count(case.kind) == 1


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [MockTarget(), MockTarget(noise=0.1, watts=2.0), Roofline(10.0, 5.0, int8=40.0), OnnxRuntime(threads=1)],
    ids=lambda target: target.name,
)
def test_targets_keep_their_contract(target: Target) -> None:
    report = check_target(target)
    assert report.settings == 2
    assert "conv2d" in report.kinds


@dataclass(frozen=True)
class Breaking(Target):
    """MockTarget with one duty neglected."""

    name: ClassVar[str] = "mock"
    source: ClassVar[Source] = "simulated"
    fault: str
    inner: MockTarget = dataclasses.field(default_factory=MockTarget)

    def supports(self, technique: Technique, site: Site) -> bool | No:
        return False if self.fault == "supports" else self.inner.supports(technique, site)

    def adapt(self, plan: Plan, record: Record) -> Plan:
        if self.fault == "adapt":
            return Plan({name: Int(t.w - 1, t.a) for name, t in plan.sites.items() if isinstance(t, Int)})
        return self.inner.adapt(plan, record)

    def realise(self, plan: Plan, record: Record) -> Mapping[str, Realised | No]:
        verdicts = self.inner.realise(plan, record)
        return dict(list(verdicts.items())[1:]) if self.fault == "realise" else verdicts

    def export(self, net: nn.Module, path: str | Path, example: Any, batch: int | None = None) -> Artifact:
        return self.inner.export(net, path, example, None if self.fault == "batch" else batch)

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        timings = self.inner.measure(artifacts, 1 if self.fault == "rounds" else rounds)
        if self.fault == "source":
            return [dataclasses.replace(timing, source="measured") for timing in timings]
        return timings

    def run(self, artifact: Artifact, inputs: Sequence[Array], tensors: Sequence[str] = ()) -> list[Array]:
        values = self.inner.run(artifact, inputs, tensors)
        return [value * np.float32(1.1) for value in values] if self.fault == "run" else values

    def inspect(self, artifact: Artifact) -> Mapping[str, Realised]:
        if self.fault == "inspect":
            return dict.fromkeys(artifact.nodes, Realised("float32"))
        return self.inner.inspect(artifact)

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        times = self.inner.site_times(artifact, rounds)
        return dataclasses.replace(times, other=-1.0) if self.fault == "site_times" else times

    def settings(self) -> dict[str, Any]:
        return {"target": object()} if self.fault == "settings" else self.inner.settings()

    def energy(self, artifact: Artifact) -> float | None:
        return 0.0 if self.fault == "energy" else None


def test_the_breaking_target_passes_without_a_fault() -> None:
    check_target(Breaking("none"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("supports", "supports"),
        ("adapt", "adapting twice"),
        ("realise", "realise: misses"),
        ("batch", "export: inputs"),
        ("rounds", "1 samples"),
        ("source", "measure: says"),
        ("run", "not what is simulated"),
        ("inspect", "not one site of the int8 network"),
        ("site_times", "site_times"),
        ("settings", "identity"),
        ("energy", "0.0 mJ"),
    ],
)
def test_each_neglected_duty_is_found(fault: str, said: str) -> None:
    with pytest.raises(ConformanceError, match=said):
        check_target(Breaking(fault))


def test_run_can_be_left_out() -> None:
    check_target(Breaking("run"), run=False)


# -- the mock ----------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) + self.a(y))


def made(plan: Plan, target: MockTarget, path: Path, example: Any) -> tuple[nn.Module, Artifact]:
    torch.manual_seed(0)
    net = apply(Two().eval(), plan, [(example, None)])
    return net, target.export(net, path, example)


@pytest.mark.parametrize("mapping", [False, True])
def test_mock_runs_what_is_simulated_and_gives_named_values(tmp_path: Path, mapping: bool) -> None:
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    example: Any = {"x": x, "y": y} if mapping else (x, y)
    target = MockTarget()
    net, artifact = made(Plan({"a": Int(8, 8), "b": Int(8, 8)}), target, tmp_path / "n.st", example)
    new = [torch.randn(3, 8), torch.randn(3, 8)]
    with torch.no_grad():
        wanted = net(*new).numpy()
    arrays = [value.numpy() for value in new]
    (got,) = target.run(Artifact.load(artifact.path), arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    outer, given = target.run(artifact, arrays, ["b", "@y"])
    np.testing.assert_allclose(outer, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(given, arrays[1])
    with pytest.raises(ArtifactError, match="nothing_here"):
        target.run(artifact, arrays, ["nothing_here"])


def test_mock_file_shrinks_by_what_bits_promise(tmp_path: Path) -> None:
    example = (torch.randn(3, 8), torch.randn(3, 8))
    target = MockTarget()
    _, whole = made(Plan(), target, tmp_path / "f.st", example)
    _, small = made(Plan({"a": Int(8, 8), "b": Int(8, 8)}), target, tmp_path / "i.st", example)
    float_bytes = 4 * (8 * 16 + 16 * 4)
    int_bytes = (8 * 16 + 4 * 16) + (16 * 4 + 4 * 4)
    assert whole.bytes - small.bytes == pytest.approx(float_bytes - int_bytes, abs=64)  # the header's numbers differ
    assert target.calls["export"] == 2


def test_mock_times_are_deterministic_and_follow_the_formula(tmp_path: Path) -> None:
    example = (torch.randn(3, 8), torch.randn(3, 8))
    quiet, noisy = MockTarget(), MockTarget(noise=0.2, seed=1)
    _, artifact = made(Plan(), quiet, tmp_path / "n.st", example)
    (steady,) = quiet.measure([artifact], 5)
    assert steady.samples == (pytest.approx(sum(artifact.costs.values())),) * 5
    (one,), (two,) = noisy.measure([artifact], 50), noisy.measure([artifact], 50)
    assert one == two
    assert one.spread > 0
    assert one.ms == pytest.approx(steady.ms, rel=0.2)
    assert quiet.calls["measure"] == 1
    assert noisy.calls["measure"] == 2
    assert MockTarget(watts=3.0).energy(artifact) == pytest.approx(3.0 * steady.ms)


def test_mock_refuses_what_it_is_told_to(tmp_path: Path) -> None:
    target = MockTarget(refuses={"linear": "no multiplier"})
    example = (torch.randn(3, 8), torch.randn(3, 8))
    sites = network(Two().eval(), example).record.sites
    assert str(target.supports(Int(8, 8), sites["a"])) == "no multiplier"
    with pytest.raises(TargetError, match="no multiplier"):
        made(Plan({"a": Int(8, 8)}), target, tmp_path / "n.st", example)
    made(Plan({":add": Int(8, 8)}), target, tmp_path / "n.st", example)


def test_mock_does_not_pretend_to_run_a_file_that_it_never_made(tmp_path: Path) -> None:
    example = (torch.randn(3, 8), torch.randn(3, 8))
    _, artifact = made(Plan(), MockTarget(), tmp_path / "n.st", example)
    with pytest.raises(TargetError, match="export it again"):
        MockTarget().run(artifact, [x.numpy() for x in example])
