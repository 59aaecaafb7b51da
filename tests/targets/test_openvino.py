from __future__ import annotations

import builtins
import json
import sys
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
from bitsmith.targets._openvino_graph import Node, check_precision, executed
from bitsmith.targets.base import Artifact, ArtifactError, Realised, TargetError
from bitsmith.targets.openvino import AFFINE, SYMMETRIC, OpenVino
from bitsmith.technique import No
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int
from bitsmith.verify import verify

openvino = pytest.importorskip("openvino")

F = nn.functional
TARGET = OpenVino(threads=1)
INT8 = Int(8, 8)


class Residual(nn.Module):
    """conv-relu6, conv-norm-relu, conv-norm, add, relu, spatial mean, linear."""

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


def exported(
    net: nn.Module, plan: Plan, data: Any, path: Path, target: OpenVino = TARGET
) -> tuple[nn.Module, Artifact]:
    applied = apply(net, plan, data)
    return applied, target.export(applied, path, data[0][0], batch=1)


def test_a_network_of_integers_runs_in_integers_and_as_simulated(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan, record = everything(net, data)
    plan = TARGET.adapt(plan, record)
    applied, artifact = exported(net, plan, data, tmp_path / "net.xml")
    ran, expected = TARGET.inspect(artifact), TARGET.realise(plan, record)
    integer = {"stem", "conv1", "conv2", ":mean", "fc"}
    assert set(plan.sites) == {*integer, ":add"}
    assert plan[":add"] == Float(out=Format(8))
    assert {name for name, r in ran.items() if r.precision == "int8"} == integer
    assert {name for name, r in expected.items() if getattr(r, "precision", "") == "int8"} == integer
    assert set(ran) == set(record.sites)
    assert {ran[name].precision for name in ("norm1", "norm2", ":relu6", ":relu", ":add")} == {"folded"}
    for sample in data[1][0]:
        (got,) = TARGET.run(artifact, [sample[None].numpy()])
        np.testing.assert_allclose(got, applied(sample[None]).detach().numpy(), atol=2e-5)


def test_integer_kernels_need_no_integer_neighbours(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    record = network(net, data[0][0]).record
    plan = TARGET.adapt(Plan({"conv1": INT8}), record)
    assert plan == Plan({"conv1": INT8})  # no output format is put in
    applied, artifact = exported(net, plan, data, tmp_path / "net.xml")
    ran = TARGET.inspect(artifact)
    assert ran["conv1"].precision == "int8"
    assert {ran[name].precision for name in ("stem", "conv2", "fc")} == {"float32"}
    x = data[0][0][:1]
    np.testing.assert_allclose(TARGET.run(artifact, [x.numpy()])[0], applied(x).detach().numpy(), atol=1e-5)


def test_adapt_stores_sums_for_their_integer_readers_and_is_idempotent(residual: Any) -> None:
    net, data = residual
    plan, record = everything(net, data, Int(8, 8, symmetric=True, signed=True))
    plan = plan.replace(groups=(("fc", ":add"), ("conv2", "conv1")))
    adapted = TARGET.adapt(plan, record)
    assert list(adapted.sites) == list(plan.sites)
    assert adapted[":add"] == Float(out=Format(8))
    assert adapted.groups == (("conv2", "conv1"),)
    assert all(not t.signed and not t.symmetric for t in adapted.sites.values() if isinstance(t, Int))
    assert TARGET.adapt(adapted, record) == adapted
    alone = TARGET.adapt(Plan({":add": INT8, "conv1": INT8}), record)  # nothing reads the sum as integers
    assert set(alone.sites) == {"conv1"}


@pytest.mark.parametrize("floating", [(), ("conv2",), ("stem",)])
def test_a_sum_with_a_float_layer_runs_as_simulated(residual: Any, floating: tuple[str, ...], tmp_path: Path) -> None:
    """The wide quantizer that fuses sums stays away from convolutions in float, behind which it would round."""
    net, data = residual
    plan, record = everything(net, data)
    plan = TARGET.adapt(Plan({name: t for name, t in plan.sites.items() if name not in floating}), record)
    applied, artifact = exported(net, plan, data, tmp_path / "net.xml")
    for sample in data[1][0]:
        (got,) = TARGET.run(artifact, [sample[None].numpy()])
        np.testing.assert_allclose(got, applied(sample[None]).detach().numpy(), atol=1e-3)


def test_a_sum_with_a_thinned_and_padded_map_runs_inside_its_convolution(tmp_path: Path) -> None:
    """The shortcut of He et al. without weights (their option A) only moves stored integers."""

    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.conv1 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
            self.last = nn.Conv2d(32, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            y = self.conv2(F.relu(self.conv1(x)))
            return self.last(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))))

    torch.manual_seed(0)
    net, data = Halving().eval(), [(torch.randn(4, 3, 12, 12), None)]
    plan, record = everything(net, data)
    applied, artifact = exported(net, TARGET.adapt(plan, record), data, tmp_path / "net.xml")
    assert TARGET.inspect(artifact)[":add"].precision == "folded"
    for sample in data[0][0]:
        (got,) = TARGET.run(artifact, [sample[None].numpy()])
        np.testing.assert_allclose(got, applied(sample[None]).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("relu", [True, False])
def test_sums_are_read_back_as_they_run(relu: bool, tmp_path: Path) -> None:
    """Asking for a value between keeps the plugin from fusing, and the quantizer put in for that would round."""

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1)
            self.right, self.head = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.right(F.relu6(self.left(x)))
            return self.head(F.relu(x) if relu else x)

    torch.manual_seed(0)
    net = Bottleneck().eval()
    data = [(torch.randn(8, 3, 14, 14), None)]
    plan, record = everything(net, data)
    applied, artifact = exported(net, TARGET.adapt(plan, record), data, tmp_path / "net.xml")
    check = verify(applied, artifact, data, target=TARGET)
    assert check.passed, check
    assert check.worst_agree >= 0.999
    assert check.unrealised == ()


def test_a_sum_that_is_asked_for_in_float_and_runs_so_is_no_complaint(tmp_path: Path) -> None:
    """Behind a shortcut that pads with ones the plugin adds by itself, in float, and stores what was asked for."""

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.head = nn.Conv2d(32, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.head(F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8), value=1.0)))

    torch.manual_seed(0)
    net = Shortcut().eval()
    data = [(torch.randn(4, 3, 12, 12), None)]
    plan, record = everything(net, data)
    plan = TARGET.adapt(plan, record)
    assert isinstance(plan[":add"], Float)
    applied, artifact = exported(net, plan, data, tmp_path / "net.xml")
    check = verify(applied, artifact, data, target=TARGET)
    assert {site.site: site.realised for site in check.sites}[":add"] == "float32"
    assert check.unrealised == ()
    assert check.passed


def test_of_two_layers_before_a_sum_one_stores_its_output(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.right, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.head(self.left(x) + self.right(x))

    torch.manual_seed(1)
    net = Branches().eval()
    data = [(torch.randn(8, 3, 12, 12), None) for _ in range(2)]
    plan, record = everything(net, data)
    plan = TARGET.adapt(plan, record)
    assert [name for name in ("left", "right") if plan[name].out is not None] == ["right"]  # type: ignore[attr-defined]
    applied, artifact = exported(net, plan, data, tmp_path / "net.xml")
    ran = TARGET.inspect(artifact)
    assert ran[":add"].precision == "folded"
    assert all(ran[name].precision == "int8" for name in ("stem", "left", "right", "head"))
    x = data[1][0]
    want = applied(x).detach().numpy()
    got = np.concatenate([TARGET.run(artifact, [sample[None].numpy()])[0] for sample in x])
    # where the unrounded sum lies between two levels the kernel may take the other one
    assert (np.abs(got - want) < 2e-5).mean() > 0.995
    assert 10 * np.log10((want**2).mean() / ((got - want) ** 2).mean()) > 45


def test_values_of_tensors_are_what_the_sites_computed(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    _, artifact = exported(net, Plan(), data, tmp_path / "net.xml")
    x = data[0][0][:1]
    stem = net.stem(x)
    got = TARGET.run(artifact, [x.numpy()], ["stem", ":relu6", "@x", "fc"])
    for found, expected in zip(got, (stem, F.relu6(stem), x, net(x)), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    with pytest.raises(ArtifactError, match="no value for the tensors nowhere"):
        TARGET.run(artifact, [x.numpy()], ["nowhere"])


def test_values_of_quantized_tensors_lie_on_their_grid(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan, record = everything(net, data)
    _, artifact = exported(net, TARGET.adapt(plan, record), data, tmp_path / "net.xml")
    (relu,) = TARGET.run(artifact, [data[0][0][:1].numpy()], [":relu"])
    levels = np.unique(relu)
    steps = levels / np.diff(levels).min()
    assert 20 < len(levels) <= 256
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-2)


def test_inputs_of_another_shape_are_an_error_that_says_both(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    _, artifact = exported(net, Plan(), data, tmp_path / "net.xml")
    with pytest.raises(ValueError, match=r"'x'.*\(1, 3, 12, 12\), got \(2, 3, 12, 12\)"):
        TARGET.run(artifact, [np.zeros((2, 3, 12, 12), np.float32)])
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        TARGET.run(artifact, [np.zeros((1, 3, 12, 12), np.float32)] * 2)


def test_a_float_network_runs_in_float32_and_is_mapped_through_fusions(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    _, artifact = exported(net, Plan(), data, tmp_path / "net.xml")
    ran = TARGET.inspect(artifact)
    assert {r.precision for r in ran.values()} == {"float32", "folded"}
    assert {name for name, r in ran.items() if r.precision == "float32"} >= {"stem", "conv1", "conv2", "fc", ":mean"}
    assert {ran[name].precision for name in ("norm1", "norm2", ":relu6", ":relu", ":add")} == {"folded"}
    times = TARGET.site_times(artifact, rounds=5)
    assert all(times.sites[name] > 0 for name in ("stem", "conv1", "conv2"))
    assert times.conversions == {}


def test_bfloat16_runs_only_where_it_is_asked_for(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    target = OpenVino(threads=1, bfloat16=True)
    _, artifact = exported(net, Plan(), data, tmp_path / "net.xml", target)
    assert target.inspect(artifact)["conv1"].precision == "bfloat16"
    assert TARGET.inspect(artifact)["conv1"].precision == "float32"
    x = data[0][0][:1]
    want = net(x).detach().numpy()
    error = [np.abs(t.run(artifact, [x.numpy()])[0] - want).max() for t in (target, TARGET)]
    assert error[0] > 100 * error[1]
    record = network(net, data[0][0]).record
    assert isinstance(TARGET.supports(Float("bfloat16"), record.sites["conv1"]), No)
    assert target.supports(Float("bfloat16"), record.sites["conv1"]) is True


def test_half_precision_behind_the_plans_back_is_refused() -> None:
    nodes = [Node("conv/Conv", "Convolution", ("conv/Conv",), "bf16", "brgconv_avx512_bf16", ("bf16",), ())]
    with pytest.raises(TargetError, match=r"in bf16 \(conv/Conv.*bfloat16=True"):
        check_precision(nodes, bfloat16=False)
    check_precision(nodes, bfloat16=True)


def test_times_add_up_and_conversions_have_their_tensor(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan = TARGET.adapt(Plan({"conv2": INT8}), network(net, data[0][0]).record)
    _, artifact = exported(net, plan, data, tmp_path / "net.xml")
    times = TARGET.site_times(artifact, rounds=10)
    assert set(times.sites) == set(artifact.nodes)
    assert times.sites["conv2"] > 0
    assert set(times.conversions) <= {"@x", ":relu", ":relu6"}
    assert times.source == "measured"


def test_the_first_runs_are_not_in_the_times_of_sites(tmp_path: Path) -> None:
    """The plugin's counters are means since compilation, where preparing a kernel takes a hundred times its run."""
    torch.manual_seed(0)
    data = [(torch.randn(1, 3, 24, 24), None)]
    _, artifact = exported(Residual(64).eval(), Plan(), data, tmp_path / "net.xml")
    times = TARGET.site_times(artifact, rounds=30)
    (whole,) = TARGET.measure([artifact], rounds=50)
    least = min(whole.samples)  # most runs wait for a core where other work has them
    assert 0.2 * least < times.total < 5 * least
    assert max(times.sites, key=times.sites.__getitem__) in ("conv1", "conv2")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_a_chain_of_linear_layers_is_one_kernel_of_integers(count: int, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(16, 16, bias=bias) for _ in range(count))).eval()
    data = [(torch.randn(4, 16), None)]
    plan, record = everything(chain, data)
    _, artifact = exported(chain, TARGET.adapt(plan, record), data, tmp_path / "net.xml")
    found = TARGET.inspect(artifact)
    assert {site: verdict.precision for site, verdict in found.items()} == dict.fromkeys(record.sites, "int8")
    nodes = executed(TARGET._open(artifact.path))
    if not any(node.kind == "FullyConnected" for node in nodes):  # else an OpenVINO that does not join them
        assert all("one kernel with" in verdict.reason for verdict in found.values())
        assert all("f32" in verdict.reason for verdict in found.values())  # its name, as the runtime gives it


def test_measure_times_what_takes_longer_as_longer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(1, 3, 24, 24), None)]
    small, large = (exported(Residual(w).eval(), Plan(), data, tmp_path / f"{w}.xml")[1] for w in (8, 128))
    slow, fast = TARGET.measure([large, small], rounds=9)
    assert len(slow.samples) == len(fast.samples) == 9
    assert slow.ms > 2 * fast.ms > 0
    assert (slow.batch, slow.threads, slow.source) == (1, 1, "measured")
    with pytest.raises(ValueError, match="rounds=0"):
        TARGET.measure([small], rounds=0)


def test_files_are_equal_for_equal_networks_and_read_back(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan = Plan({"conv1": INT8})
    one, two = (exported(net, plan, data, tmp_path / name)[1] for name in ("one.xml", "two.xml"))
    assert one.digest() == two.digest()
    assert Artifact.load(one.path) == one
    assert [path.name for path in one.files] == ["one.xml", "one.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{end}" for name in ("one", "two") for end in ("xml", "bin", "xml.json")
    )
    with pytest.raises(ValueError, match=r"\.xml"):
        TARGET.export(apply(net, plan, data), tmp_path / "net.onnx", data[0][0])


def test_integer_weights_are_stored_as_integers(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    plan, record = everything(net, data)
    _, small = exported(net, TARGET.adapt(plan, record), data, tmp_path / "small.xml")
    _, large = exported(net, Plan(), data, tmp_path / "large.xml")
    weights = [path.stat().st_size for path in (small.files[1], large.files[1])]
    parameters = sum(site.parameter_bytes for site in record.sites.values())
    assert parameters / 4 < weights[0] < parameters / 4 + 3000
    assert weights[1] >= parameters


def test_batch_replaces_the_first_size(residual: Any, tmp_path: Path) -> None:
    net, data = residual
    artifact = TARGET.export(apply(net, Plan(), data), tmp_path / "net.xml", data[0][0], batch=6)
    assert artifact.batch == 6
    assert artifact.inputs == (("x", (6, 3, 12, 12), "float32"),)
    x = torch.randn(6, 3, 12, 12)
    np.testing.assert_allclose(TARGET.run(artifact, [x.numpy()])[0], net(x).detach().numpy(), atol=1e-5)


def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "net.xml"
    path.write_bytes(b"no model")
    artifact = Artifact(path, "openvino", {}, {}, (), (), 1, "openvino")
    with pytest.raises(ArtifactError, match=r"cannot read .*net\.xml"):
        TARGET.measure([artifact])


def test_without_openvino_the_error_says_what_to_install(
    residual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "openvino":
            raise ImportError("No module named 'openvino'")
        return real(name, *args, **kwargs)

    net, data = residual
    applied = apply(net, Plan(), data)
    monkeypatch.setattr(builtins, "__import__", without)
    for use in (lambda: TARGET.export(applied, tmp_path / "n.xml", data[0][0]), TARGET.settings):
        with pytest.raises(TargetError, match=r'pip install "bitsmith\[openvino\]"'):
            use()


def test_settings_without_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile asks for them first: it was a traceback where plans still run."""
    monkeypatch.setitem(sys.modules, "bitsmith_kernels", None)
    assert OpenVino(kernels=True).settings()["kernels"] is None
    assert "kernels" not in OpenVino().settings()


def test_settings_are_what_a_stored_time_depends_on() -> None:
    settings = OpenVino(threads=3).settings()
    assert {"target", "cpu", "architecture", "threads", "openvino", "bfloat16"} <= set(settings)
    assert settings["threads"] == 3
    json.dumps(settings)
    with pytest.raises(ValueError, match="threads=0"):
        OpenVino(threads=0)


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
    verdict = TARGET.supports(technique, network(net, data[0][0]).record.sites["fc"])
    assert isinstance(verdict, No)
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "technique", [Int(8, None), Int(4, None), Int(4, None, granularity="group", group=8)], ids=repr
)
def test_weight_only_techniques_are_read_back_as_size_only(residual: Any, technique: Int, tmp_path: Path) -> None:
    net, data = residual
    applied, artifact = exported(net, Plan({"fc": technique, "conv1": Int(8, None)}), data, tmp_path / "net.xml")
    ran = TARGET.inspect(artifact)
    assert (ran["fc"].precision, ran["conv1"].precision, ran["conv2"].precision) == (
        "size only",
        "size only",
        "float32",
    )
    x = data[0][0][:1]
    np.testing.assert_allclose(TARGET.run(artifact, [x.numpy()])[0], applied(x).detach().numpy(), atol=1e-5)


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
    "conv2d": (lambda x, w: F.conv2d(x, w, BIAS, padding=1), (1, 8, 9, 9), (8, 8, 3, 3)),
    "conv2d groups": (lambda x, w: F.conv2d(x, w, BIAS, groups=2), (1, 8, 9, 9), (8, 4, 3, 3)),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, BIAS, groups=8), (1, 8, 9, 9), (8, 1, 3, 3)),
    "conv2d no bias": (lambda x, w: F.conv2d(x, w), (1, 8, 9, 9), (8, 8, 3, 3)),
    "conv3d": (lambda x, w: F.conv3d(x, w, BIAS), (1, 8, 5, 5, 5), (8, 8, 3, 3, 3)),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, BIAS), (1, 8, 5), (8, 8, 3)),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, BIAS), (1, 8, 5, 5), (8, 8, 3, 3)),
    "conv_transpose2d groups": (lambda x, w: F.conv_transpose2d(x, w, groups=2), (1, 8, 5, 5), (8, 4, 3, 3)),
    "conv_transpose3d": (lambda x, w: F.conv_transpose3d(x, w, BIAS), (1, 8, 5, 5, 5), (8, 8, 3, 3, 3)),
    "linear": (lambda x, w: F.linear(x, w, BIAS), (3, 16), (8, 16)),
    "linear 3 axes": (lambda x, w: F.linear(x, w, BIAS), (2, 3, 16), (8, 16)),
    "linear no bias": (lambda x, w: F.linear(x, w), (2, 3, 16), (8, 16)),
    "matmul": (lambda x: x.sigmoid() @ x.tanh().transpose(-1, -2), (2, 3, 16), ()),
    "matmul 4 axes": (lambda x: x.sigmoid() @ x.tanh().transpose(-1, -2), (2, 4, 13, 16), ()),
    "matmul weight": (lambda x, w: x @ w, (2, 3, 16), (16, 8)),
    "baddbmm": (lambda x: torch.baddbmm(x[..., :3], x.sigmoid(), x.tanh().transpose(-1, -2)), (2, 3, 16), ()),
    "baddbmm weight": (lambda x, w: torch.addmm(x[0, :8], x, w), (2, 16), (16, 8)),
    "einsum": (lambda x: torch.einsum("bhqd,bhkd->bhqk", x.sigmoid(), x.tanh()), (2, 4, 3, 16), ()),
    "add": (lambda x: x + x.flip(0), (2, 3, 16), ()),
    "sub": (lambda x: x - x.flip(0), (2, 3, 16), ()),
    "mul": (lambda x: x * x.flip(0), (2, 3, 16), ()),
    "cat": (lambda x: torch.cat([x, x.tanh()], 1), (2, 8, 8, 8), ()),
    "embedding": (lambda x, w: F.embedding(x.long().abs() % 8, w), (2, 3), (8, 16)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (2, 8, 8), ()),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (2, 8, 8, 8), ()),
    "avg_pool2d unpadded": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (2, 8, 8, 8), ()),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (2, 8, 4, 4, 4), ()),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 1), (2, 8, 8), ()),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), (2, 8, 8, 8), ()),
    "adaptive_avg_pool2d 2": (lambda x: F.adaptive_avg_pool2d(x, 2), (2, 8, 8, 8), ()),
    "adaptive_avg_pool2d 3": (lambda x: F.adaptive_avg_pool2d(x, 3), (2, 8, 8, 8), ()),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 1), (2, 8, 4, 4, 4), ()),
    "mean spatial": (lambda x: x.mean((2, 3)), (2, 8, 8, 8), ()),
    "mean last": (lambda x: x.mean(-1, keepdim=True), (2, 8, 8), ()),
    "mean all": (lambda x: x.mean(), (2, 8, 8), ()),
    "index_add": (lambda x: x.index_add(1, torch.tensor([0, 1]), x[:, :2]), (2, 3, 16), ()),
}
WRONG: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "mean axis": (lambda x: x.mean(1), (2, 8, 8)),
    "avg_pool2d padded": (lambda x: F.avg_pool2d(x, 3, 1, 1), (2, 8, 8, 8)),
}


def alone(case: str, function: Callable[..., Tensor], shape: tuple[int, ...], weight: tuple[int, ...] = ()) -> Any:
    torch.manual_seed(0)
    net, data = Single(function, weight).eval(), [(torch.randn(shape), None)]
    record = network(net, data[0][0]).record
    (site,) = [site for site in record.sites.values() if site.kind == case.split()[0]]
    return net, data, record, site


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_table_says_what_runs(case: str, tmp_path: Path) -> None:
    """Each operation between float ones: supports and realise must foretell what inspect reads back."""
    net, data, record, site = alone(case, *CASES[case])
    verdict = TARGET.supports(INT8, site)
    plan = TARGET.adapt(Plan({site.name: INT8}), record)
    if site.kind == "add":  # sums are stored as integers for those that read them so, and here nobody does
        assert verdict
        assert not plan.sites
        verdict = False
    assert not verdict or site.kind in AFFINE | SYMMETRIC
    applied = apply(net, plan, data)
    artifact = TARGET.export(applied, tmp_path / "q.xml", data[0][0])
    ran, expected = TARGET.inspect(artifact)[site.name], TARGET.realise(plan, record)[site.name]
    assert (ran.precision == "int8") == bool(verdict), (verdict, ran)
    if plan.sites:
        assert (ran.precision == "int8") == (isinstance(expected, Realised) and expected.precision == "int8")
    got, want = TARGET.run(artifact, [data[0][0].numpy()])[0], applied(data[0][0]).detach().numpy()
    np.testing.assert_allclose(got, want, atol=3e-6 * max(1.0, float(np.abs(want).max())))


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name.split()[0] in SYMMETRIC and "weight" not in name])
def test_what_takes_no_zero_point_is_float_with_one(case: str, tmp_path: Path) -> None:
    net, data, record, site = alone(case, *CASES[case])
    plan = Plan({site.name: INT8})
    artifact = TARGET.export(apply(net, plan, data), tmp_path / "q.xml", data[0][0])
    assert TARGET.inspect(artifact)[site.name].precision in ("float32", "size only")
    assert getattr(TARGET.realise(plan, record)[site.name], "precision", "") != "int8"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["conv2d", "linear", "linear no bias", "matmul weight", "baddbmm weight", "mean spatial"]
)
def test_an_output_format_changes_no_kernel(case: str, tmp_path: Path) -> None:
    net, data, _, site = alone(case, *CASES[case])
    applied = apply(net, Plan({site.name: Int(8, 8, out=Format(8))}), data)
    artifact = TARGET.export(applied, tmp_path / "q.xml", data[0][0])
    assert TARGET.inspect(artifact)[site.name].precision == "int8"
    got, want = TARGET.run(artifact, [data[0][0].numpy()])[0], applied(data[0][0]).detach().numpy()
    assert np.abs(got - want).max() <= (want.max() - want.min()) / 255 * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_what_the_runtime_computes_wrongly_is_refused(case: str, tmp_path: Path) -> None:
    """If this fails because the numbers are right, OpenVINO was mended and the refusal can go."""
    net, data, _, site = alone(case, *WRONG[case])
    applied = apply(net, Plan({site.name: INT8}), data)
    artifact = TARGET.export(applied, tmp_path / "q.xml", data[0][0])
    got, want = TARGET.run(artifact, [data[0][0].numpy()])[0], applied(data[0][0]).detach().numpy()
    assert np.abs(got - want).max() > 0.1 * (want.max() - want.min())
    assert not TARGET.supports(INT8, site)
