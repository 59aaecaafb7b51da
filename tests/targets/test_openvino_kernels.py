"""Needs bitsmith-kernels (``pip install ./kernels``), built with this OpenVINO."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from bitsmith.export.derive import INTEGER
from bitsmith.export.graphs import Graphs
from bitsmith.export.onnx import to_onnx
from bitsmith.export.program import applied_program
from bitsmith.model.apply import apply
from bitsmith.model.network import network
from bitsmith.plan import Plan
from bitsmith.prepare.correct_bias import CorrectBias
from bitsmith.site import Format
from bitsmith.targets import _openvino_kernels
from bitsmith.targets.base import Artifact, ArtifactError, TargetError
from bitsmith.targets.openvino import OpenVino
from bitsmith.technique import No, Technique
from bitsmith.techniques.int_ import Int
from bitsmith.techniques.winograd import Winograd
from bitsmith.verify import verify

pytest.importorskip("openvino")
pytest.importorskip("bitsmith_kernels")

F = nn.functional
TARGET = OpenVino(threads=1, kernels=True)
INT8 = Int(8, 8)


class Residual(nn.Module):
    """conv-relu6, pooling, conv-norm-relu, conv-norm, a sum with what a 1x1 made, relu, conv, spatial mean, linear."""

    def __init__(self, width: int = 18) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 40, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(40)
        self.short = nn.Conv2d(width, 40, 1)
        self.last = nn.Conv2d(40, 8, 3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(self.stem(x)), 2)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)) + self.short(x))
        return self.fc(F.silu(self.last(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    torch.manual_seed(0)
    net, data = Residual().train(), [(torch.randn(4, 3, 21, 18), None) for _ in range(2)]
    for x, _ in data:
        net(x)
    return net.eval(), data


def plan_of(case: Any, technique: Technique, target: OpenVino = TARGET, only: str = "") -> Plan:
    """The technique wherever it fits (at ``only``), int8 elsewhere."""
    net, data = case
    record = network(net, data[0][0][:1], inside=True).record
    sites = {
        name: technique if technique.fits(site) and only in name else INT8
        for name, site in record.sites.items()
        if site.role == "integer"
    }
    return target.adapt(Plan(sites), network(net, data[0][0][:1], names=sites).record)


def exported(case: Any, plan: Plan, folder: Path, target: OpenVino = TARGET) -> tuple[nn.Module, Artifact]:
    net, data = case
    applied = apply(net, plan, data)
    return applied, target.export(applied, folder / "net.xml", data[0][0][:2], batch=2)


@pytest.mark.parametrize("technique", [Winograd(2), Winograd(4, 8), Winograd(4, 16), Winograd(2, 16)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_runs_is_what_was_simulated_bit_for_bit(case: Any, technique: Any, threads: int, tmp_path: Path) -> None:
    target = OpenVino(threads=threads, kernels=True)
    plan = plan_of(case, technique, target)
    assert sum(isinstance(chosen, Winograd) for chosen in plan.sites.values()) == 4
    net, artifact = exported(case, plan, tmp_path, target)
    x = case[1][1][0][:2]
    # behind the last integers there is float arithmetic, in another order of additions
    (found,) = target.run(artifact, [x.numpy()])
    with torch.inference_mode():
        assert np.abs(found - net(x).numpy()).max() <= 1e-6
    check = verify(net, artifact, case[1])
    assert check.passed
    exact = {site.site for site in check.sites if site.gap_db == np.inf}
    assert {"stem", "conv1", "last", ":silu"} <= exact
    assert check.whole_db > 110


def test_every_neighbour_stays_in_integers(case: Any, tmp_path: Path) -> None:
    _, artifact = exported(case, plan_of(case, Winograd(2), only="conv"), tmp_path)
    ran = TARGET.inspect(artifact)
    assert {name: ran[name].precision for name in ("stem", "conv1", "conv2", "short", "last", "fc")} == dict.fromkeys(
        ("stem", "conv1", "conv2", "short", "last", "fc"), "int8"
    )
    assert "Reference" in ran["conv2"].reason
    assert ran["add"].precision == "folded" if "add" in ran else ran[":add"].precision == "folded"


def test_layouts_cost_nothing(case: Any, tmp_path: Path) -> None:
    from bitsmith.targets._openvino_graph import executed

    _, artifact = exported(case, plan_of(case, Winograd(2), only="conv"), tmp_path)
    assert [node.name for node in executed(TARGET._open(artifact.path)) if node.kind == "Transpose"] == []


class Bottleneck(nn.Module):
    """1x1, then 3x3 and 1x1 beside what the first gave, their sum, 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 1)
        self.conv, self.widen = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(self.widen(F.relu(self.conv(x))) + x))


def test_a_sum_goes_into_a_convolution_that_reads_what_a_kernel_wrote(tmp_path: Path) -> None:
    from bitsmith.model.apply import computer_of
    from bitsmith.quantize import quantize
    from bitsmith.targets._openvino_graph import executed

    torch.manual_seed(0)
    data = [(torch.randn(2, 3, 20, 20), None) for _ in range(2)]
    net = Bottleneck().eval()
    plan = computer_of(quantize(net, data, TARGET, prepare=(), choose=False)).plan
    found = {}
    for name, technique in (("direct", INT8), ("native", Winograd(2))):
        sites = {**plan.sites, "conv": technique}
        _, artifact = exported((net, data), plan.replace(sites=sites), tmp_path / name)
        kinds = [node.kind for node in executed(TARGET._open(artifact.path))]
        found[name] = (kinds.count("Convolution"), kinds.count("Reference"), kinds.count("Subgraph"))
    assert found["direct"][:2] == (4, 0)
    assert found["native"] == (3, 1, found["direct"][2])


def test_the_file_names_what_reads_it(case: Any, tmp_path: Path) -> None:
    _, artifact = exported(case, plan_of(case, Winograd(2)), tmp_path)
    x = case[1][0][0][:2]
    again = OpenVino(threads=1).run(Artifact.load(artifact.path), [x.numpy()])
    assert np.array_equal(again[0], TARGET.run(artifact, [x.numpy()])[0])


def test_times_are_of_sites(case: Any, tmp_path: Path) -> None:
    _, artifact = exported(case, plan_of(case, Winograd(2)), tmp_path)
    assert all(TARGET.site_times(artifact, rounds=6).sites[name] > 0 for name in ("conv1", "conv2"))


def test_files_of_plans_are_derived(case: Any) -> None:
    net, data = case
    whole = [plan_of(case, INT8), plan_of(case, Winograd(2))]
    mixed = plan_of(case, Winograd(2), only="conv1")
    record = network(net, data[0][0][:1], names=mixed.sites).record
    graphs = Graphs(whole, lambda plan: apply(net, plan, data), data[0][0][:1], 1)
    found = graphs.derived(mixed, record)
    assert found is not None
    direct = to_onnx(applied_program(apply(net, mixed, data), data[0][0][:1], 1)[0])
    ours, theirs = (sorted((n.op_type, n.name) for n in one.graph.node) for one in (found[0], direct))
    assert ours == theirs
    assert sum(node.op_type == "Winograd" for node in direct.graph.node) == 1
    assert Winograd in INTEGER


def test_a_corrected_bias_goes_into_the_derived_file(case: Any) -> None:
    net, data = case
    plan = plan_of(case, Winograd(2)).replace(prepare=(CorrectBias(),))
    record = network(net, data[0][0][:1], names=plan.sites).record
    graphs = Graphs([plan.replace(prepare=())], lambda plan: apply(net, plan, data), data[0][0][:1], 1)
    found = graphs.derived(plan, record)
    assert found is not None
    direct = to_onnx(applied_program(apply(net, plan, data), data[0][0][:1], 1)[0])
    biases = [
        {one.name.rpartition("prepared.")[2]: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
        for model in (found[0], direct)
    ]
    name = "_bitsmith.cells.conv2.bias_f"
    assert np.array_equal(biases[0][name], biases[1][name])
    plain = to_onnx(applied_program(apply(net, plan.replace(prepare=()), data), data[0][0][:1], 1)[0])
    before = next(one for one in plain.graph.initializer if one.name == name)
    assert not np.array_equal(biases[0][name], onnx.numpy_helper.to_array(before))


def test_outputs_are_stored_where_no_reader_says_how(case: Any) -> None:
    plan = plan_of(case, Winograd(2))
    assert isinstance(plan.sites["last"], Winograd)
    assert plan.sites["last"].out == Format(8)
    assert plan.sites["conv1"].writes(None) is None  # type: ignore[arg-type]


def test_the_sum_goes_into_the_kernel_whatever_the_order(case: Any) -> None:
    plan = plan_of(case, Winograd(2))
    assert plan.sites["short"].writes(None) is not None  # type: ignore[arg-type]
    assert plan.sites["conv2"].writes(None) is None  # type: ignore[arg-type]


REFUSED = {
    "tile": (Winograd(6), True, "tiles of 2 and 4"),
    "flex": (Winograd(2, transforms="flex"), True, "static transforms"),
    "float": (Winograd(2, 32), True, "8 or 16 bits"),
    "off": (Winograd(2), False, "OpenVino(kernels=True)"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_does_not_compute_is_refused_and_computed_directly(case: Any, why: str) -> None:
    technique, kernels, reason = REFUSED[why]
    target = OpenVino(threads=1, kernels=kernels)
    site = network(case[0], case[1][0][0][:1]).record.site("conv1")
    verdict = target.supports(technique, site)
    assert isinstance(verdict, No)
    assert reason in str(verdict)
    with pytest.warns(UserWarning, match="is computed as Int"):
        plan = plan_of(case, technique, target)
    assert not any(isinstance(chosen, Winograd) for chosen in plan.sites.values())


def test_without_the_kernels_the_plan_still_runs_and_the_file_says_what_it_lacks(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, artifact = exported(case, plan_of(case, Winograd(2)), tmp_path)
    monkeypatch.setattr(_openvino_kernels, "extension", lambda: No("built for another OpenVINO"))
    with pytest.warns(UserWarning, match="is computed as Int.*built for another OpenVINO") as told:
        plan = plan_of(case, Winograd(2))
    assert [str(one.message).partition(" ")[0] for one in told] == ["stem", "conv1", "conv2", "last"]
    x = case[1][0][0][:2].numpy()
    _, direct = exported(case, plan, tmp_path / "..")
    assert np.isfinite(TARGET.run(direct, [x])[0]).all()
    with pytest.raises(TargetError, match="for the native kernels: built for another OpenVINO"):
        TARGET._read(artifact.path)


@pytest.mark.parametrize(
    ("place", "found", "says"),
    [
        (
            "openvino.__version__",
            "2027.1.0-1",
            r"for OpenVINO 2027.1.0 \(built for .*pip install --no-build",
        ),
        ("bitsmith_kernels.isas", lambda: ("reference",), "none of the instruction sets"),
        ("bitsmith_kernels.isas", lambda: _raise(ImportError("its library is not there")), "library is not there"),
        ("sys.modules.bitsmith_kernels", None, r"are not installed .*pip install ./kernels"),
        ("sys.modules.openvino", None, r"OpenVINO is missing .*pip install"),
    ],
)
def test_what_may_be_lacking_is_named(place: str, found: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place.startswith("sys.modules."):
        monkeypatch.setitem(sys.modules, place.rpartition(".")[2], found)
    else:
        monkeypatch.setattr(place, found)
    _openvino_kernels.extension.cache_clear()
    try:
        assert re.search(says, str(_openvino_kernels.missing()))
    finally:
        _openvino_kernels.extension.cache_clear()


def _raise(error: Exception) -> None:
    raise error


def test_an_extension_that_cannot_be_loaded(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_openvino_kernels, "extension", lambda: broken)
    with pytest.raises(TargetError, match=r"libbroken.so cannot be loaded .*pip install"):
        _openvino_kernels.core(openvino, True)
    with pytest.warns(UserWarning, match=r"is computed as Int.*libbroken.so cannot be loaded"):
        plan = plan_of(case, Winograd(2))
    assert not any(isinstance(chosen, Winograd) for chosen in plan.sites.values())


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("y_scale", "0", "output scale is 0; must be positive"),
        ("residual_scale", "-1", "residual scale is -1; must be positive"),
        ("tile", "3", "tile is 3; must be 2 or 4"),
        ("tile", "4", "must be [36,"),  # more taps than the weights have
        ("bits", "16", "u must be i8 for 8 bits and i16 for 16"),
        ("x_zero", "300", "a level is 300"),
        ("y_zero", "-7", "output zero point is -7; must be in 0 .. 255"),
        ("low", "200", "low is 200 and high is 100; must be ordered"),
        ("pads", "3, 1, 1, 1", "a pad is 3; each must be 0, 1 or 2"),
        ("pads", "1, 1", "pads must be top, left, bottom, right"),
    ],
)
def test_an_edited_file_is_refused_when_it_is_read(
    case: Any, tmp_path: Path, attribute: str, value: str, says: str
) -> None:
    """OpenVINO is silent about what an operation throws when it runs, and leaves the output as it was."""
    _, artifact = exported(case, plan_of(case, Winograd(2)), tmp_path)
    text = artifact.path.read_text(encoding="utf-8")

    def edit(found: re.Match[str]) -> str:
        changed = re.sub(rf'\b{attribute}="[^"]*"', f'{attribute}="{value}"', found[0])
        return changed if attribute != "low" else re.sub(r'\bhigh="[^"]*"', 'high="100"', changed)

    edited = re.sub(r"<data tile=[^>]*>", edit, text)
    assert edited != text
    artifact.path.write_text(edited, encoding="utf-8")
    with pytest.raises(ArtifactError, match=re.escape(says)):
        TARGET.opened(artifact)
