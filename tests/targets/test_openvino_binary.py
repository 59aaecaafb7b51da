"""Layers of signs in OpenVINO. Needs bitsmith-kernels (``pip install ./kernels``), built with this OpenVINO."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.export.graphs import Graphs
from bitsmith.export.onnx import to_onnx
from bitsmith.export.program import applied_program
from bitsmith.model.network import network
from bitsmith.targets import _openvino_kernels
from bitsmith.targets._openvino_graph import executed
from bitsmith.targets.base import Artifact, ArtifactError, TargetError

pytest.importorskip("openvino")
kernels = pytest.importorskip("bitsmith_kernels")
if not hasattr(kernels, "BinaryConv"):
    pytest.skip("these bitsmith_kernels have no layers of signs", allow_module_level=True)

F = nn.functional
TARGET = bs.targets.OpenVino(threads=1, kernels=True)
INT8 = bs.Int(8, 8)


class Signs(nn.Module):
    """Convolutions of many forms, normalisations behind them, linear layers on two and on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(20, 70, 3, padding=1, bias=False), nn.BatchNorm2d(70)
        self.conv2 = nn.Conv2d(70, 33, (3, 2), stride=(2, 1), padding=(1, 2))
        self.conv3, self.norm3 = nn.Conv2d(33, 40, 3, padding=2, dilation=2), nn.BatchNorm2d(40)
        self.same = nn.Conv2d(40, 12, (1, 3), padding="same", bias=False)
        self.fc, self.wide = nn.Linear(12, 9), nn.Linear(9, 5)
        self.last = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.stem(x)))
        x = self.same(F.relu(self.norm3(self.conv3(self.conv2(x))) - 1))
        x = self.fc(x.mean((2, 3)))
        x = self.wide(x.unsqueeze(1).expand(-1, 3, -1) - 0.5)
        logits: Tensor = self.last(x).flatten(1)
        return logits


LAYERS = ("conv1", "conv2", "conv3", "same", "fc", "wide", "last")


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    torch.manual_seed(0)
    net, data = Signs().train(), [(torch.randn(4, 3, 13, 10), None) for _ in range(2)]
    for x, _ in data:
        net(x)
    with torch.no_grad():  # channels that a normalisation turns, and one that it makes constant
        net.norm1.weight[:20].mul_(-1)
        net.norm3.weight[0] = 0.0
        net.norm1.bias.normal_()
    return net.eval(), data


def signs_at(case: Any, technique: bs.Technique, others: bs.Technique | None = None) -> bs.Plan:
    net, data = case
    sites = dict.fromkeys(LAYERS, technique)
    if others is not None:
        sites |= {"stem": others, "conv2": others, "fc": others}
    return TARGET.adapt(bs.Plan(sites), network(net, data[0][0][:1], names=sites).record)


def exported(case: Any, plan: bs.Plan, folder: Path, target: Any = TARGET) -> tuple[nn.Module, Any]:
    net, data = case
    applied = bs.apply(net, plan, data)
    return applied, bs.export(applied, target, folder / "net.xml", data[0][0][:2], batch=2)


@pytest.mark.parametrize("scaling", ["none", "xnor", "learned"])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_runs_is_what_is_simulated_bit_for_bit(case: Any, scaling: Any, threads: int, tmp_path: Path) -> None:
    target = bs.targets.OpenVino(threads=threads, kernels=True)
    net, artifact = exported(case, signs_at(case, bs.Binary(scaling, activations=True)), tmp_path, target)
    x = case[1][1][0][:2]
    (found,) = target.run(artifact, [x.numpy()])
    with torch.inference_mode():
        np.testing.assert_array_equal(found, net(x).numpy())
    # whoever reads the file needs no setting
    (again,) = bs.targets.OpenVino(threads=1).run(Artifact.load(artifact.path), [x.numpy()])
    np.testing.assert_array_equal(again, found)
    check = bs.verify(net, artifact, case[1], target=target)
    assert check.passed
    assert check.whole_db == np.inf
    ran = {site.site: site for site in check.sites}
    assert {ran[name].realised for name in LAYERS} == {"binary"}
    assert not any(ran[name].why for name in LAYERS)
    assert ran["norm1"].realised == ran["norm3"].realised == "folded"


def test_a_layer_is_the_equation_in_integers(tmp_path: Path) -> None:
    """sum over the taps inside the image of sign(x) sign(w), in int64, then times and plus a float32."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(6, 5, 3, 3, generator=generator))
    x = torch.randn(2, 5, 4, 7, generator=generator)
    x.view(-1)[:9] = 0.0
    plan = bs.Plan({"0": bs.Binary("xnor", activations=True)})
    artifact = bs.export(bs.apply(net, plan, [(x, None)]), TARGET, tmp_path / "net.xml", x, batch=2)
    (found,) = TARGET.run(artifact, [x.numpy()])
    w, given = net[0].weight.detach().numpy(), np.where(x.numpy() >= 0, 1, -1)
    wanted = np.zeros((2, 6, 4, 7), np.int64)
    for row in range(4):
        for column in range(7):
            for i in range(3):
                for j in range(3):
                    a, b = row + i - 1, column + j - 1
                    if 0 <= a < 4 and 0 <= b < 7:
                        wanted[:, :, row, column] += given[:, :, a, b] @ np.where(w[:, :, i, j] >= 0, 1, -1).T
    scale = torch.from_numpy(w).abs().flatten(1).mean(1).numpy()
    bias = net[0].bias.detach().numpy()
    np.testing.assert_array_equal(found, wanted.astype(np.float32) * scale[:, None, None] + bias[:, None, None])


def test_integers_and_signs_stand_side_by_side(case: Any, tmp_path: Path) -> None:
    plan = signs_at(case, bs.Binary("xnor", activations=True), INT8)
    net, artifact = exported(case, plan, tmp_path)
    ran = TARGET.inspect(artifact)
    assert {name: ran[name].precision for name in ("stem", *LAYERS)} == {
        **dict.fromkeys(LAYERS, "binary"),
        **dict.fromkeys(("stem", "conv2", "fc"), "int8"),
    }
    assert ran["conv1"].reason == "xor-popcount, native kernel"
    check = bs.verify(net, artifact, case[1], target=TARGET)
    assert not check.failing
    promised = TARGET.realise(plan, network(case[0], case[1][0][0][:1], names=plan.sites).record)
    assert promised["conv1"] == ran["conv1"]
    assert promised["norm1"].precision == "folded"  # type: ignore[union-attr]


def test_one_operation_a_layer_and_one_bit_a_weight(case: Any, tmp_path: Path) -> None:
    _, artifact = exported(case, signs_at(case, bs.Binary("none", activations=True)), tmp_path)
    nodes = executed(TARGET._open(artifact.path))
    assert sum(node.kind == "Reference" for node in nodes) == len(LAYERS)
    assert not any(node.kind in ("Select", "FullyConnected") for node in nodes)
    times = TARGET.site_times(artifact, rounds=6).sites
    assert times["conv1"] > 0
    assert times["norm1"] == 0
    _, floats = exported(case, bs.Plan({"stem": bs.Float()}), tmp_path / "float")
    weights = sum(case[0].get_submodule(name).weight.numel() for name in LAYERS)
    assert (floats.path.with_suffix(".bin").stat().st_size - artifact.path.with_suffix(".bin").stat().st_size) > (
        0.8 * 4 * weights
    )


def test_files_of_plans_are_derived(case: Any) -> None:
    net, data = case
    signed = bs.Binary("xnor", activations=True)
    whole = [signs_at(case, INT8), signs_at(case, signed)]
    sites = {"conv1": INT8, "conv2": signed, "wide": signed}
    mixed = TARGET.adapt(bs.Plan(sites), network(net, data[0][0][:1], names=sites).record)
    record = network(net, data[0][0][:1], names=mixed.sites).record
    graphs = Graphs(whole, lambda plan: bs.apply(net, plan, data), data[0][0][:1], 1)
    found = graphs.derived(mixed, record)
    assert found is not None
    direct = to_onnx(applied_program(bs.apply(net, mixed, data), data[0][0][:1], 1)[0])
    ours, theirs = (sorted((n.op_type, n.name) for n in one.graph.node) for one in (found[0], direct))
    assert ours == theirs
    behind = TARGET.adapt(bs.Plan({"conv1": signed, "conv2": INT8}), record)  # its range hangs on the signs before it
    assert graphs.derived(behind, record) is None
    drawn = bs.Binary("xnor", activations=True, error_rate=0.1)  # which signs are wrong hangs on the whole plan
    graphs = Graphs([signs_at(case, drawn)], lambda plan: bs.apply(net, plan, data), data[0][0][:1], 1)
    assert graphs.derived(bs.Plan({"conv1": drawn}), record) is None


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.groups = nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2)
        self.plain, self.long = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.long(self.plain(self.groups(self.line(x).unsqueeze(3))).mean((2, 3)))
        return y


REFUSED: dict[str, tuple[str, bs.Binary, dict[str, Any], str]] = {
    "off": (
        "plain",
        bs.Binary(activations=True),
        {"kernels": False},
        "float; ours for signs is used by OpenVino(kernels",
    ),
    "float input": ("plain", bs.Binary(), {}, "with float activations OpenVINO computes in float"),
    "line": ("line", bs.Binary(activations=True), {}, "two dimensions and linear layers, not conv1d"),
    "groups": ("groups", bs.Binary(activations=True), {}, "2 groups"),
    "bfloat16": ("plain", bs.Binary(activations=True), {"bfloat16": True}, "takes float32"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_no_kernel_computes_is_refused_and_runs_in_float(why: str, tmp_path: Path) -> None:
    name, technique, options, says = REFUSED[why]
    target = bs.targets.OpenVino(**{"threads": 1, "kernels": True, **options})
    torch.manual_seed(0)
    net, x = Others().eval(), torch.randn(2, 4, 6)
    verdict = target.supports(technique, bs.sites(net, x)[name])
    assert isinstance(verdict, bs.No)
    assert says in str(verdict)
    if why == "bfloat16":
        return
    applied = bs.apply(net, bs.Plan({name: technique}), [(x, None)])
    artifact = bs.export(applied, target, tmp_path / "net.xml", x, batch=2)
    with torch.no_grad():
        np.testing.assert_allclose(target.run(artifact, [x.numpy()])[0], applied(x).numpy(), atol=1e-4)
    assert target.inspect(artifact)[name].precision in ("size only", "float32")


def test_without_the_kernels_it_is_refused_and_a_file_says_what_it_lacks(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = signs_at(case, bs.Binary("none", activations=True))
    net, artifact = exported(case, plan, tmp_path)
    monkeypatch.setattr(_openvino_kernels, "extension", lambda: bs.No("built for another OpenVINO"))
    site = bs.sites(case[0], case[1][0][0])["conv1"]
    assert str(TARGET.supports(bs.Binary("none", activations=True), site)) == "built for another OpenVINO"
    with pytest.raises(TargetError, match="layers for the native kernels: built for another OpenVINO"):
        TARGET._read(artifact.path)
    _, floating = exported(case, plan, tmp_path / "..")
    x = case[1][0][0][:2]
    with torch.no_grad():
        np.testing.assert_allclose(TARGET.run(floating, [x.numpy()])[0], net(x).numpy(), rtol=1e-3, atol=1e-3)
    assert TARGET.inspect(floating)["conv1"].precision == "size only"


def test_older_kernels_are_told_to_be_installed_again(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(kernels, "BinaryConv")
    signed = bs.Binary("none", activations=True)
    site = bs.sites(case[0], case[1][0][0])["conv1"]
    assert "older than those for signs; install them again with: pip install" in str(TARGET.supports(signed, site))
    _, artifact = exported(case, signs_at(case, signed), tmp_path)
    assert TARGET.inspect(artifact)["conv1"].precision == "size only"


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("channels", "21", "x has 20 channels, the bits are of 21"),
        ("kernel", "3, 2", "must be [70,6,3]"),
        ("strides", "0, 1", "a stride is 0"),
        ("pads", "1, 1", "pads top, left, bottom, right"),
        ("pads", "-9, 1, 1, 1", "a pad is -9"),
        ("dilations", "9, 9", "the padded map is smaller than the kernel"),
    ],
)
def test_an_edited_file_is_refused_when_it_is_read(
    case: Any, tmp_path: Path, attribute: str, value: str, says: str
) -> None:
    _, artifact = exported(case, signs_at(case, bs.Binary("none", activations=True)), tmp_path)
    text = artifact.path.read_text(encoding="utf-8")
    first = next(found for found in re.findall(r'<data channels="20"[^>]*>', text))
    edited = text.replace(first, re.sub(rf'\b{attribute}="[^"]*"', f'{attribute}="{value}"', first), 1)
    assert edited != text
    artifact.path.write_text(edited, encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(says)):
        TARGET.opened(artifact)


class Wide(nn.Module):
    """A layer of many products between small ones, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 96, 3, padding=1), nn.BatchNorm2d(96)
        self.conv, self.behind = nn.Conv2d(96, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96)
        self.head = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind(self.conv(self.norm(self.stem(x))))
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


def test_a_search_chooses_it_where_the_weights_were_trained_under_it() -> None:
    from smallnet import batches, task

    torch.manual_seed(0)
    signed = bs.Binary("xnor", activations=True)
    model, data = Wide(), batches(60, seed=5)
    net = bs.apply(model, bs.Plan({"conv": signed}), data[:2])
    net = bs.finetune(net, data, F.cross_entropy, steps=60, lr=3e-3, freeze_norms=False)
    model.load_state_dict({key: value for key, value in net.state_dict().items() if not key.startswith("_bitsmith.")})
    model.eval()
    given = {"sensitivity": bs.sensitivities.loss_rise, "patterns": ["conv"]}
    found = bs.profile(model, task(), [INT8], TARGET, trained=[signed], **given)  # type: ignore[arg-type]
    rows = {row.technique: row for row in found.rows}
    assert not rows[signed].refused
    assert rows[signed].ms < rows[INT8].ms < rows[bs.Float()].ms
    assert "scored with the weights as they were given" in found.notes["trained"]
    evaluate = bs.evaluator(model, task(), TARGET)
    result = bs.search(found, bs.Budget(drop=0.05), minimize="ms", evaluate=evaluate)
    assert result.plan["conv"] == signed
    assert result.best.evaluation is not None
    assert result.best.evaluation.drop is not None
    assert result.best.evaluation.drop <= 0.05
