from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitsmith.model.apply import apply
from bitsmith.model.network import network
from bitsmith.plan import Plan
from bitsmith.site import Format
from bitsmith.targets.base import Artifact, ArtifactError, Realised, TargetError
from bitsmith.targets.onnxruntime import ALWAYS, NEED_OUTPUT, OnnxRuntime
from bitsmith.technique import No
from bitsmith.techniques.int_ import Int
from bitsmith.techniques.winograd import Winograd

F = nn.functional
TARGET = OnnxRuntime(threads=1)
INT8 = Int(8, 8)


class Residual(nn.Module):
    """conv-norm-relu, conv-norm, add, relu, spatial mean, linear."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(y)) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    torch.manual_seed(0)
    net = Residual().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net, [(torch.randn(4, 3, 12, 12), None) for _ in range(2)]


def everything(net: nn.Module, data: Any, technique: Int = INT8) -> tuple[Plan, Any]:
    record = network(net, data[0][0]).record
    return Plan({name: technique for name, site in record.sites.items() if technique.fits(site)}), record


def exported(net: nn.Module, plan: Plan, data: Any, path: Path) -> tuple[nn.Module, Artifact]:
    applied = apply(net, plan, data)
    return applied, TARGET.export(applied, path, data[0][0], batch=1)


def test_a_network_of_integers_runs_in_integers_and_as_simulated(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan, record = everything(net, data)
    plan = TARGET.adapt(plan, record)
    applied, artifact = exported(net, plan, data, tmp_path / "net.onnx")
    ran, expected = TARGET.inspect(artifact), TARGET.realise(plan, record)
    integer = {name for name, site in record.sites.items() if name in plan.sites}
    assert integer == {"stem", "conv1", "conv2", ":add", ":mean", "fc"}
    assert {name: r.precision for name, r in ran.items()} == {
        name: "int8" if name in integer else "folded" for name in record.sites
    }
    assert {name: r.precision for name, r in expected.items() if isinstance(r, Realised)} == {
        name: r.precision for name, r in ran.items()
    }
    for sample in data[1][0]:
        (got,) = TARGET.run(artifact, [sample[None].numpy()])
        np.testing.assert_allclose(got, applied(sample[None]).detach().numpy(), atol=1e-5)


def test_the_exported_network_is_not_changed(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan, record = everything(net, data)
    applied = apply(net, TARGET.adapt(plan, record), data)
    before = {key: value.clone() for key, value in applied.state_dict().items()}
    applied.train()
    TARGET.export(applied, tmp_path / "net.onnx", data[0][0])
    assert applied.training
    after = applied.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_single_integer_convolution_gets_an_output_format(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    record = network(net, data[0][0]).record
    alone = Plan({"conv1": Int(8, 8)})
    assert str(TARGET.realise(alone, record)["conv1"]).find("output stays float") > 0
    assert TARGET.inspect(exported(net, alone, data, tmp_path / "a.onnx")[1])["conv1"].precision == "size only"
    adapted = TARGET.adapt(alone, record)
    assert adapted["conv1"] == Int(8, 8, out=adapted["conv1"].out)  # type: ignore[attr-defined]
    applied, artifact = exported(net, adapted, data, tmp_path / "b.onnx")
    ran = TARGET.inspect(artifact)
    assert ran["conv1"].precision == "int8"
    assert {ran[name].precision for name in ("stem", "conv2", "fc")} == {"float32"}
    x = data[0][0][:1]
    np.testing.assert_allclose(TARGET.run(artifact, [x.numpy()])[0], applied(x).detach().numpy(), atol=1e-5)


def test_adapt_sets_the_activations_to_unsigned_affine_and_is_idempotent(residual: Any) -> None:
    net, data = residual
    plan, record = everything(net, data, Int(8, 8, symmetric=True, signed=True))
    adapted = TARGET.adapt(plan, record)
    assert all(not t.signed and not t.symmetric for t in adapted.sites.values())  # type: ignore[attr-defined]
    assert TARGET.adapt(adapted, record) == adapted


class Sums(nn.Module):
    """Two additions in a row before a normalisation, as a transformer's embeddings have them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.left(x) + self.right(x) + x)


def test_sums_that_only_floats_read_stay_float_in_chains_too() -> None:
    torch.manual_seed(0)
    net = Sums().eval()
    data = [(torch.randn(4, 8), None)]
    plan, record = everything(net, data)
    sums = [name for name, site in record.sites.items() if site.kind == "add"]
    assert len(sums) == 2
    plan = plan.replace(groups=(("left", "right", sums[0]),))
    adapted = TARGET.adapt(plan, record)
    assert not set(sums) & set(adapted.sites)
    assert adapted.groups == (("left", "right"),)
    assert TARGET.adapt(adapted, record) == adapted


def test_values_of_tensors_are_what_the_sites_computed(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    _, artifact = exported(net, Plan(), data, tmp_path / "net.onnx")
    x = data[0][0][:1]
    stem = net.stem(x)
    got = TARGET.run(artifact, [x.numpy()], ["stem", ":relu6", "@x"])
    for found, expected in zip(got, (stem, F.relu6(stem), x), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    with pytest.raises(ArtifactError, match="no value for the tensors nowhere"):
        TARGET.run(artifact, [x.numpy()], ["nowhere"])


def test_inputs_of_another_shape_are_an_error_that_says_both(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    _, artifact = exported(net, Plan(), data, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"'x'.*\(1, 3, 12, 12\), got \(2, 3, 12, 12\)"):
        TARGET.run(artifact, [np.zeros((2, 3, 12, 12), np.float32)])
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        TARGET.run(artifact, [np.zeros((1, 3, 12, 12), np.float32)] * 2)


def test_a_float_network_is_mapped_through_fusions(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    _, artifact = exported(net, Plan(), data, tmp_path / "net.onnx")
    ran = TARGET.inspect(artifact)
    expected = TARGET.realise(Plan(), network(net, data[0][0]).record)
    differing = {name for name, r in ran.items() if r.precision != getattr(expected[name], "precision", "")}
    assert differing == {":add", ":relu.1"}  # the runtime adds and rectifies inside conv2, which neighbours decide
    assert {name for name, r in ran.items() if r.precision == "float32"} >= {"stem", "conv1", "conv2", "fc", ":mean"}
    assert {ran[name].precision for name in ("norm1", "norm2", ":relu6", ":relu")} == {"folded"}
    times = TARGET.site_times(artifact, rounds=5)
    assert all(times.sites[name] > 0 for name in ("stem", "conv1", "conv2", "fc"))
    assert times.conversions == {}


def test_times_add_up_and_conversions_have_their_tensor(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    record = network(net, data[0][0]).record
    plan = TARGET.adapt(Plan({"conv1": Int(8, 8), "conv2": Int(8, 8)}), record)
    _, artifact = exported(net, plan, data, tmp_path / "net.onnx")
    times = TARGET.site_times(artifact, rounds=10)
    assert set(times.sites) == set(record.sites)
    assert times.sites["conv1"] > 0
    assert set(times.conversions) == {":relu6", "norm2"}  # into conv1, out of conv2; between them none
    assert times.source == "measured"
    # each part is timed to a microsecond, and the profiler itself takes some
    assert times.whole > 0.2 * times.total


def test_measure_times_what_takes_longer_as_longer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(1, 3, 24, 24), None)]
    small, large = (exported(Residual(w).eval(), Plan(), data, tmp_path / f"{w}.onnx")[1] for w in (8, 64))
    slow, fast = TARGET.measure([large, small], rounds=7)
    assert len(slow.samples) == len(fast.samples) == 7
    assert slow.ms > 2 * fast.ms > 0
    assert (slow.batch, slow.threads, slow.source) == (1, 1, "measured")


def test_batch_replaces_the_first_size(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    applied = apply(net, Plan(), data)
    artifact = TARGET.export(applied, tmp_path / "net.onnx", data[0][0], batch=6)
    assert artifact.batch == 6
    assert artifact.inputs == (("x", (6, 3, 12, 12), "float32"),)
    assert Artifact.load(artifact.path) == artifact


def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"no model")
    artifact = Artifact(path, "onnx", {}, {}, (), (), 1, "onnxruntime")
    with pytest.raises(ArtifactError, match=r"cannot load .*net\.onnx"):
        TARGET.measure([artifact])


def test_settings_are_what_a_stored_time_depends_on() -> None:
    settings = OnnxRuntime(threads=3).settings()
    assert {"target", "cpu", "architecture", "threads", "onnxruntime"} <= set(settings)
    assert settings["threads"] == 3
    json.dumps(settings)
    with pytest.raises(ValueError, match="threads=0"):
        OnnxRuntime(threads=0)


@pytest.mark.parametrize(
    ("technique", "reason"),
    [
        (Int(4, 8), "size only"),
        (Int(8, None), "size only"),
        (Int(4, None, granularity="group", group=8), "size only"),
        (Int(8, 8, granularity="group", group=8), "size only"),
        (Int(8, 16), "8-bit activations"),
        (Int(8, 4), "8-bit activations"),
        (Int(8, 8, affine_weights=True), "symmetric weights"),
    ],
    ids=repr,
)
def test_what_has_no_kernel_is_refused_with_the_reason(residual: Any, technique: Int, reason: str) -> None:
    net, data = residual
    site = network(net, data[0][0]).record.sites["fc"]
    verdict = TARGET.supports(technique, site)
    assert isinstance(verdict, No)
    assert reason in verdict.reason


class Single(nn.Module):
    """One operation as the whole network."""

    def __init__(self, function: Callable[..., Tensor], weight: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(weight) / 4) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x) if self.weight is None else self.function(x, self.weight)
        return result


BIAS = torch.linspace(-1, 1, 8)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": (lambda x, w: F.conv1d(x, w, BIAS), (1, 8, 16), (8, 8, 3)),
    "conv2d": (lambda x, w: F.conv2d(x, w, BIAS), (1, 8, 9, 9), (8, 8, 3, 3)),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, BIAS, groups=8), (1, 8, 9, 9), (8, 1, 3, 3)),
    "conv2d no bias": (lambda x, w: F.conv2d(x, w), (1, 8, 9, 9), (8, 8, 3, 3)),
    "conv3d": (lambda x, w: F.conv3d(x, w, BIAS), (1, 8, 5, 5, 5), (8, 8, 3, 3, 3)),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, BIAS), (1, 8, 5, 5), (8, 8, 3, 3)),
    "linear": (lambda x, w: F.linear(x, w, BIAS), (3, 16), (8, 16)),
    "linear 3 axes": (lambda x, w: F.linear(x, w, BIAS), (2, 3, 16), (8, 16)),
    "linear no bias": (lambda x, w: F.linear(x, w), (2, 3, 16), (8, 16)),
    "matmul": (lambda x: x @ x.transpose(-1, -2), (2, 3, 16), ()),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), (2, 3, 16), ()),
    "add": (lambda x: x + x.flip(0), (2, 3, 16), ()),
    "sub": (lambda x: x - x.flip(0), (2, 3, 16), ()),
    "mul": (lambda x: x * x.flip(0), (2, 3, 16), ()),
    "cat": (lambda x: torch.cat([x, x.flip(0)], 1), (2, 3, 16), ()),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (2, 8, 8), ()),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (2, 8, 8, 8), ()),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (2, 8, 4, 4, 4), ()),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 1), (2, 8, 8), ()),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 8, 8, 8), ()),
    "adaptive_avg_pool2d 2": (lambda x: F.adaptive_avg_pool2d(x, 2), (2, 8, 8, 8), ()),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 1), (2, 8, 4, 4, 4), ()),
    "mean spatial": (lambda x: x.mean((2, 3)), (2, 8, 8, 8), ()),
    "mean axis": (lambda x: x.mean(1), (2, 8, 8), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_table_says_what_runs(case: str, tmp_path: Path) -> None:
    """Each operation alone, quantized in and out, and between float: realise must foretell what inspect reads back."""
    torch.manual_seed(0)
    function, shape, weight = CASES[case]
    net, data = Single(function, weight).eval(), [(torch.randn(shape), None)]
    record = network(net, data[0][0]).record
    (site,) = [site for site in record.sites.values() if site.role == "integer"]
    assert site.kind == case.split()[0]
    verdict = TARGET.supports(Int(8, 8), site)
    # elementwise operations are left in float where nobody reads integers, unless they are asked for
    technique = Int(8, 8, out=Format(8)) if site.kind in ("add", "mul") else Int(8, 8)
    adapted = TARGET.adapt(Plan({site.name: technique}), record)
    applied = apply(net, adapted, data)
    artifact = TARGET.export(applied, tmp_path / "q.onnx", data[0][0])
    ran = TARGET.inspect(artifact)[site.name]
    assert (ran.precision == "int8") == bool(verdict), (verdict, ran)
    # one step of the output, where it has a format: the kernels' requantization may round the other way
    got, want = TARGET.run(artifact, [data[0][0].numpy()])[0], applied(data[0][0]).detach().numpy()
    step = (want.max() - want.min()) / 255 if adapted[site.name].writes(site) else 1e-5
    assert np.abs(got - want).max() <= step * 1.1
    if site.kind in NEED_OUTPUT | ALWAYS and verdict:
        plain = TARGET.export(apply(net, Plan({site.name: Int(8, 8)}), data), tmp_path / "p.onnx", data[0][0])
        assert (TARGET.inspect(plain)[site.name].precision == "int8") == (site.kind in ALWAYS)


def test_winograd_is_refused_with_what_is_lacking_and_what_to_do() -> None:
    record = network(Residual().eval(), torch.randn(1, 3, 8, 8)).record
    for technique in (Winograd(2), Winograd(4), Winograd(4, 16)):
        verdict = TARGET.supports(technique, record.site("conv1"))
        assert isinstance(verdict, No)
        assert str(verdict) == (
            "ONNX Runtime has no Winograd kernel, and its packages lack the C header that ours would need to be built "
            "for it; OpenVino(kernels=True) runs ours"
        )


def test_a_plan_with_winograd_runs_direct_and_says_so(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    x = data[0][0]
    record = network(net, x).record
    sites = {name: Winograd(4) if name.startswith("conv") else INT8 for name in record.sites if "relu" not in name}
    with pytest.warns(UserWarning, match=r"is computed as Int\(.*place of Winograd\(.*no Winograd kernel") as told:
        plan = TARGET.adapt(Plan(sites), record)
    assert [str(one.message).partition(" ")[0] for one in told] == ["conv1", "conv2"]
    assert plan == TARGET.adapt(Plan(dict.fromkeys(sites, INT8)), record)
    assert isinstance(plan.get("add") or plan.get(":add"), Int)  # what they feed is in integers as before
    applied = apply(net, Plan({"conv1": Winograd(2)}), data)
    with pytest.raises(TargetError, match=r"no Winograd kernel.*adapt the plan first"):
        TARGET.export(applied, tmp_path / "net.onnx", x)
    assert not (tmp_path / "net.onnx").exists()
