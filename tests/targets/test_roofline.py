"""The roofline's figures against its equation worked by hand, and its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.model.apply import apply
from bitsmith.model.network import network
from bitsmith.plan import Plan
from bitsmith.site import Format, Operand, Record, Site
from bitsmith.targets._formulas import modelled, moved_bytes, scaled
from bitsmith.targets.base import Artifact, Realised, TargetError
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.targets.roofline import Roofline
from bitsmith.technique import No
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int

MACHINE = Roofline(float32=10.0, int8=40.0, bandwidth_gb_s=5.0, overhead_us=2.0)


def linear(batch: int, inputs: int, outputs: int, calls: int = 1) -> Site:
    operands = (
        Operand("input", "@x", (batch, inputs), "float32"),
        Operand("weight", "fc<1", (outputs, inputs), "float32", constant=True, key="fc.weight"),
    )
    macs = batch * inputs * outputs * calls
    return Site("fc", "linear", "fc", "integer", operands, ("fc",), ((batch, outputs),), calls=calls, macs=macs)


def test_compute_bound_site_takes_macs_over_peak() -> None:
    site = linear(512, 512, 512)
    assert MACHINE.cost(site, Float()) == pytest.approx(512**3 / 10e9 * 1e3 + 0.002)
    assert MACHINE.cost(site, Int(8, 8)) == pytest.approx(512**3 / 40e9 * 1e3 + 0.002)


def test_memory_bound_site_takes_bytes_over_bandwidth() -> None:
    site = linear(1, 1024, 1024)
    in_float = 4 * (1024 + 1024**2 + 1024)
    assert MACHINE.cost(site, Float()) == pytest.approx(in_float / 5e9 * 1e3 + 0.002)
    in_int8 = 1024 + (1024**2 + 4 * 1024) + 1024  # one float32 scale per output channel
    assert moved_bytes(site, Int(8, 8)) == in_int8
    assert MACHINE.cost(site, Int(8, 8)) == pytest.approx(in_int8 / 5e9 * 1e3 + 0.002)


def test_every_call_moves_and_costs_overhead() -> None:
    once, thrice = (MACHINE.cost(linear(1, 1024, 1024, calls), Float()) for calls in (1, 3))
    assert once is not None
    assert thrice == pytest.approx(3 * once)


def test_weights_only_compute_in_float_but_move_less() -> None:
    wide = linear(512, 512, 512)
    assert MACHINE.cost(wide, Int(4, None)) == MACHINE.cost(wide, Float())
    thin = linear(1, 1024, 1024)
    packed = 4 * 1024 + (1024**2 // 2 + 4 * 1024) + 4 * 1024
    assert MACHINE.cost(thin, Int(4, None)) == pytest.approx(packed / 5e9 * 1e3 + 0.002)


def test_narrow_integers_use_the_next_wider_peak() -> None:
    site = linear(512, 512, 512)
    assert MACHINE.cost(site, Int(4, 4)) == MACHINE.cost(site, Int(8, 8))
    wider = dataclasses.replace(MACHINE, int4=80.0)
    assert wider.cost(site, Int(4, 4)) == pytest.approx(512**3 / 80e9 * 1e3 + 0.002)
    assert wider.cost(site, Int(4, 8)) == MACHINE.cost(site, Int(8, 8))  # its activations need 8 bits


def test_missing_peak_is_a_refusal_with_the_line_that_mends_it() -> None:
    floating = Roofline(float32=10.0, bandwidth_gb_s=5.0)
    verdict = floating.supports(Int(8, 8), linear(1, 8, 8))
    assert isinstance(verdict, No)
    assert "int8" in verdict.reason
    with pytest.raises(TargetError, match=r"Roofline\(int8="):
        floating.cost(linear(1, 8, 8), Int(8, 8))


@pytest.mark.parametrize(
    "wrong", [{"float32": 0.0}, {"bandwidth_gb_s": float("nan")}, {"overhead_us": -1.0}, {"int8": 0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(MACHINE, **wrong)


def test_conversion_reads_one_format_and_writes_the_other() -> None:
    assert MACHINE.conversion_cost(10**6, "float", "u8") == pytest.approx(5e6 / 5e9 * 1e3 + 0.002)
    assert MACHINE.conversion_cost(10**6, "u8", "i4s") == pytest.approx(1.5e6 / 5e9 * 1e3 + 0.002)
    assert MACHINE.conversion_cost(10**6, "u8", "u8") == 0.0


def test_scaled_multiplies_the_batch_and_leaves_weights() -> None:
    site = scaled(linear(4, 8, 6), 0.25)
    assert (site.macs, site.out_shapes, site.operands[0].shape, site.operands[1].shape) == (
        48,
        ((1, 6),),
        (1, 8),
        (6, 8),
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def record() -> Record:
    torch.manual_seed(0)
    return network(Net().eval(), torch.randn(4, 3, 8, 8)).record


def exported(plan: Plan, path: Path, batch: int | None = None) -> Artifact:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    return MACHINE.export(apply(model, plan, [(x, None)]), path, x, batch)


def test_whole_is_the_sum_of_sites_and_conversions(tmp_path: Path, record: Record) -> None:
    artifact = exported(Plan({"a": Int(8, 8), "b": Int(8, 8)}), tmp_path / "n.onnx")
    times = MACHINE.site_times(artifact)
    sites = {"a": Int(8, 8), "b": Int(8, 8), "c": Float()}
    for name, technique in sites.items():
        assert times.sites[name] == pytest.approx(MACHINE.cost(record.sites[name], technique))
    # the image becomes u8, a hands u8 to b, b's u8 becomes float for the mean
    assert times.conversions == {
        "@x": pytest.approx(MACHINE.conversion_cost(4 * 3 * 8 * 8, "float", "u8")),
        record.sites["b"].tail: pytest.approx(MACHINE.conversion_cost(4 * 8 * 4 * 4, "u8", "float")),
    }
    (timing,) = MACHINE.measure([artifact])
    assert timing.samples == (pytest.approx(times.total),)
    assert (timing.source, timing.batch) == ("modelled", 4)
    assert "modelled" in str(timing)


def test_batch_scales_what_was_recorded(tmp_path: Path) -> None:
    four, eight = exported(Plan(), tmp_path / "4.onnx"), exported(Plan(), tmp_path / "8.onnx", batch=8)
    assert eight.batch == 8
    for artifact, batch in ((four, 4), (eight, 8)):
        moved = 4 * (batch * 8 + 4 * 8 + batch * 4)  # the weight does not grow with the batch
        assert MACHINE.site_times(artifact).sites["c"] == pytest.approx(moved / 5e9 * 1e3 + 0.002)
        macs = batch * 8 * 6 * 6 * 3 * 9
        assert MACHINE.site_times(artifact).sites["a"] == pytest.approx(macs / 10e9 * 1e3 + 0.002)


@pytest.mark.parametrize("batch", [1, 4, 9])
@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan({"a": Int(8, 8), "b": Int(8, 8)}), Plan({"b": Int(8, 8), "c": Int(8, None)})],
    ids=["float", "two", "last"],
)
def test_the_time_of_a_plan_is_that_of_its_file(tmp_path: Path, record: Record, plan: Plan, batch: int) -> None:
    timing = MACHINE.computed(plan, record, batch)
    assert timing is not None
    (expected,) = MACHINE.measure([exported(plan, tmp_path / "n.onnx", batch)])
    assert timing.ms == pytest.approx(expected.ms, rel=1e-12)
    assert (timing.batch, timing.threads, timing.source) == (batch, expected.threads, "modelled")


def test_a_plan_that_it_cannot_compute_has_no_time(record: Record) -> None:
    with pytest.raises(TargetError, match=r"'a' under Int.*int8"):
        Roofline(float32=1.0, bandwidth_gb_s=1.0).computed(Plan({"a": Int(8, 8)}), record, 1)


def test_file_is_the_one_that_onnx_runtime_gets(tmp_path: Path) -> None:
    import onnx

    artifact = exported(Plan({"b": Int(8, 8)}), tmp_path / "n.onnx")
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    other = OnnxRuntime().export(apply(model, Plan({"b": Int(8, 8)}), [(x, None)]), tmp_path / "o.onnx", x)
    assert artifact.bytes == other.bytes
    onnx.checker.check_model(onnx.load(str(artifact.path)))
    assert Artifact.load(artifact.path) == artifact
    data = json.loads(artifact.sidecar.read_text())
    assert data["costs"]["a"] == artifact.costs["a"] > 0


def test_precisions_are_by_rule_and_the_file_runs_elsewhere(tmp_path: Path) -> None:
    artifact = exported(Plan({"a": Int(8, 8), "c": Int(4, None)}), tmp_path / "n.onnx")
    seen = MACHINE.inspect(artifact)
    assert (seen["a"].precision, seen["b"].precision, seen["c"].precision) == ("int8", "float32", "size only")
    assert all(value.reason == "modelled" for value in seen.values())
    x = torch.randn(4, 3, 8, 8)
    (got,) = MACHINE.run(artifact, [x.numpy()])
    (expected,) = OnnxRuntime().run(artifact, [x.numpy()])
    assert (got == expected).all()


def test_times_of_another_machine_are_not_given(tmp_path: Path) -> None:
    artifact = exported(Plan(), tmp_path / "n.onnx")
    with pytest.raises(TargetError, match="another roofline"):
        dataclasses.replace(MACHINE, float32=20.0).measure([artifact])


def test_a_plan_that_it_cannot_compute_is_not_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    net = apply(model, Plan({"a": Int(8, 8)}), [(x, None)])
    with pytest.raises(TargetError, match=r"'a' under Int.*int8"):
        modelled(Roofline(float32=1.0, bandwidth_gb_s=1.0), net, [])


def test_realise_says_what_is_fused(record: Record) -> None:
    verdicts = MACHINE.realise(Plan({"a": Int(8, 8, out=Format(8))}), record)
    assert set(verdicts) == set(record.sites)
    assert verdicts["a"] == Realised("int8", "modelled")
    assert [v.precision for name, v in verdicts.items() if name in record.sites["a"].epilogue] == ["folded"]


def test_calibrated_reads_this_machine_and_restores_its_threads() -> None:
    before = torch.get_num_threads()
    machine = Roofline.calibrated(threads=1)
    assert torch.get_num_threads() == before
    assert machine.threads == 1
    # far outside of what any machine reaches would be a unit error
    assert 0.1 < machine.float32 < 1e4
    assert 0.1 < machine.bandwidth_gb_s < 1e4
    assert 0 < machine.overhead_us < 1e4
    assert hash(machine) == hash(dataclasses.replace(machine))
