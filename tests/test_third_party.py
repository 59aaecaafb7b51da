"""A stranger's technique, defined here and nowhere in the package, goes through everything that a built-in does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.bench import Bench
from bitsmith.metrics import top1
from bitsmith.model.apply import apply
from bitsmith.model.network import network, sites
from bitsmith.plan import Budget, Plan, PlanError
from bitsmith.profile import measure
from bitsmith.search import search
from bitsmith.site import Record, Site
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.targets.roofline import Roofline
from bitsmith.task import Task
from bitsmith.technique import Cell, No, Technique
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int
from bitsmith.testing import MockTarget, check_technique


@dataclass(frozen=True)
class Ternary(Technique):
    """Ternary weight networks (Li et al. 2016, arXiv:1605.04711, eqs. 5 and 6), one scale for the layer."""

    threshold: float = 0.7

    def fits(self, site: Site) -> bool | No:
        return True if site.weight is not None and site.kind in ("conv2d", "linear") else No("needs a weight")

    def bits(self, site: Site) -> float:
        return 2.0 * site.weight.numel + 32 if site.weight is not None else 0.0

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return TernaryCell(site, self.threshold)


class TernaryCell(Cell):
    def __init__(self, site: Site, threshold: float) -> None:
        super().__init__(site)
        self.threshold = threshold

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        size = weight.detach().abs()
        kept = size > self.threshold * size.mean()
        scale = (size * kept).sum() / kept.sum().clamp(min=1)
        ternary = weight.detach().sign() * kept * scale
        return self.op(x, weight + (ternary - weight).detach(), **rest)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 2, 8, 8, generator=generator), torch.arange(8) % 3) for _ in range(3)]


def reference(weight: Tensor) -> Tensor:
    """Equations 5 and 6, weight by weight, in float64."""
    values = weight.double().numpy()
    delta = 0.7 * np.mean(np.abs(values))
    above = [abs(v) for v in values.ravel() if abs(v) > delta]
    scale = sum(above) / len(above)
    return torch.from_numpy(np.where(values > delta, scale, np.where(values < -delta, -scale, 0.0)))


def test_it_conforms() -> None:
    report = check_technique(Ternary())
    assert set(report.kinds) == {"conv2d", "linear"}
    assert report.refused["add"] == "needs a weight"


def test_apply_computes_the_paper(model: nn.Module, data: list[Any]) -> None:
    x = data[0][0]
    net = apply(model, Plan({"conv": Ternary(), "head": Ternary()}), data)
    with torch.no_grad():
        conv = F.conv2d(x.double(), reference(model.conv.weight.detach()))
        norm = model.norm.double()
        pooled = torch.relu(norm(conv)).mean((2, 3))
        wanted = F.linear(pooled, reference(model.head.weight.detach()), model.head.bias.double())
        torch.testing.assert_close(net(x), wanted.float(), rtol=1e-4, atol=1e-5)


def test_plan_file_names_it_and_reads_it_only_where_it_is_given(
    tmp_path: Path, model: nn.Module, data: list[Any]
) -> None:
    plan = Plan({"conv": Ternary(0.5), "head": Int(8, 8)})
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path, techniques=[Ternary]) == plan
    with pytest.raises(PlanError, match=r"Ternary.*techniques="):
        Plan.load(path)
    assert any("1605.04711" in source for source in plan.cite())
    x = data[0][0]
    with torch.no_grad():
        first, second = (apply(model, p, data)(x) for p in (plan, Plan.load(path, techniques=[Ternary])))
    assert torch.equal(first, second)


def test_it_is_profiled_and_searched_beside_the_built_ins(tmp_path: Path, model: nn.Module, data: list[Any]) -> None:
    task = Task(calibration=data, validation=data, metric=top1)
    bench = Bench.open(model, task, MockTarget(), folder=tmp_path)
    table = measure(bench, [Ternary(), Int(8, 8)])
    losses = {(row.site, row.technique): row.loss for row in table.rows if not row.refused}
    assert losses["conv", Ternary()] > losses["conv", Int(8, 8)] > losses["conv", Float()] == 0.0
    stored = {(row.site, row.technique): row.bytes for row in table.rows}
    assert stored["head", Ternary()] == (2 * 24 + 32) / 8
    smallest = table.fixed_bytes + stored["conv", Ternary()] + stored["head", Ternary()]
    found = search(table, Budget(mib=(smallest + 1) / 2**20), minimize="ms")
    changed = {name: technique for name, technique in found.plan.sites.items() if technique != Float()}
    assert changed == {"conv": Ternary(), "head": Ternary()}


def test_modelled_target_knows_its_storage(model: nn.Module, data: list[Any]) -> None:
    head = sites(model, data[0][0])["head"]
    machine = Roofline(float32=1e6, bandwidth_gb_s=1.0)  # bound by memory
    saved = (machine.cost(head, Float()) or 0.0) - (machine.cost(head, Ternary()) or 0.0)
    assert saved == pytest.approx((4 * 24 - (2 * 24 + 32) / 8) / 1e6)


def test_what_is_exported_computes_what_is_simulated(tmp_path: Path, model: nn.Module, data: list[Any]) -> None:
    target = OnnxRuntime(threads=1)
    x = data[0][0]
    record = network(model, x).record
    plan = target.adapt(Plan({"conv": Ternary(), "head": Ternary()}), record)
    assert target.supports(Ternary(), record.sites["conv"])
    net = apply(model, plan, data)
    artifact = target.export(net, tmp_path / "net.onnx", x)
    with torch.no_grad():
        wanted = net(x).numpy()
    (got,) = target.run(artifact, [x.numpy()])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
