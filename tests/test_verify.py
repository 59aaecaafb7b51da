"""Verification: a correct file passes, an altered one is caught and the site named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import bitsmith as bs
from bitsmith.model.network import network
from bitsmith.targets import OnnxRuntime, TargetError
from bitsmith.testing import MockTarget
from bitsmith.verify import SiteCheck, slice_inputs
from smallnet import batches, small

TARGET = OnnxRuntime(threads=1)


@dataclasses.dataclass(frozen=True)
class Shipped:
    net: nn.Module
    artifact: bs.Artifact
    check: bs.Check


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    data = batches(2, seed=2)
    net = bs.quantize(small(), data, TARGET)
    artifact = bs.export(net, TARGET, tmp_path_factory.mktemp("verify") / "model.onnx", data[0][0], batch=4)
    return Shipped(net, artifact, bs.verify(net, artifact, data))


def altered(artifact: bs.Artifact, path: Path, initializer: str, factor: float) -> bs.Artifact:
    """A copy whose named initializer is scaled, with a map that vouches for it."""
    model = onnx.load(str(artifact.path))
    (found,) = [one for one in model.graph.initializer if initializer in one.name]
    values = numpy_helper.to_array(found)
    found.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), found.name))
    onnx.save(model, str(path))
    changed = dataclasses.replace(artifact, path=path)
    changed.save()
    return bs.Artifact.load(path)


def test_a_correct_file_passes(shipped: Shipped) -> None:
    check = shipped.check
    assert check.passed
    assert check.failing == ()
    assert check.samples == 32
    assert check.whole_db >= check.tolerance_db == 40.0
    assert check.worst_agree >= 0.999
    assert check.same_class == 1.0
    assert 10 < check.float_db < 80  # int8 against float


def test_every_site_is_checked_and_read_back(shipped: Shipped) -> None:
    sites = {site.site: site for site in shipped.check.sites}
    assert list(sites) == list(bs.sites(small(), batches(1)[0][0]))
    for name in ("stem", "left", "right", ":add", ":mean", "head"):
        assert sites[name].asked.startswith("Int")
        assert sites[name].realised == "int8", sites[name]
        assert sites[name].why == ""
    for name in ("stem", "left", ":add"):
        agree, sqnr = sites[name].agree, sites[name].sqnr_db
        assert agree is not None
        assert agree >= 0.999
        assert sqnr is not None
        assert 15 < sqnr < 80
    head = sites["head"].gap_db  # its output is float: compared in dB, fed the same input
    assert head is not None
    assert head > 80
    assert shipped.check.unrealised == ()


@pytest.mark.parametrize(
    ("initializer", "site"), [("left.weight_q", "left"), ("stem.weight_q", "stem"), ("head.weight_q", "head")]
)
def test_an_altered_weight_is_caught_and_its_site_named(
    shipped: Shipped, tmp_path: Path, initializer: str, site: str
) -> None:
    artifact = altered(shipped.artifact, tmp_path / "altered.onnx", initializer, 0.7)
    check = bs.verify(shipped.net, artifact, batches(2, seed=2))
    assert not check.passed
    guilty = {site, *bs.sites(small(), batches(1)[0][0])[site].epilogue}
    # what comes behind is fed what ran, so only the altered site differs
    assert site in {one.site for one in check.failing}
    assert {one.site for one in check.failing} <= guilty
    assert site in check.to_json()["failing"]


def test_an_altered_bias_is_caught(shipped: Shipped, tmp_path: Path) -> None:
    artifact = altered(shipped.artifact, tmp_path / "altered.onnx", "right.bias_q", -3.0)
    check = bs.verify(shipped.net, artifact, batches(2, seed=2))
    assert not check.passed
    assert "right" in {one.site for one in check.failing}


def test_a_file_of_another_network_is_caught(shipped: Shipped) -> None:
    other = bs.quantize(small(seed=5), batches(2, seed=2), TARGET)
    assert not bs.verify(other, shipped.artifact, batches(2, seed=2)).passed


def test_what_did_not_run_as_asked_has_its_reason(tmp_path: Path) -> None:
    data = batches(2, seed=2)
    # one convolution between float ones, its output float: ONNX Runtime has no kernel for that
    net = bs.apply(small(), bs.Plan({"left": bs.Int(8, 8)}), data)
    artifact = bs.export(net, TARGET, tmp_path / "model.onnx", data[0][0])
    check = bs.verify(net, artifact, data)
    (left,) = check.unrealised
    assert (left.site, left.realised) == ("left", "size only")
    assert left.why
    assert check.passed  # the numbers are right, only not fast


def test_a_float_network_agrees_with_its_own_file(tmp_path: Path) -> None:
    data = batches(2, seed=2)
    net = bs.apply(small(), bs.Plan(), data)
    check = bs.verify(net, bs.export(net, TARGET, tmp_path / "model.onnx", data[0][0]), data)
    assert check.passed
    assert check.whole_db > 100
    assert check.float_db == float("inf")


def test_the_same_class_counts() -> None:
    sites = (SiteCheck("a", "Int", "int8", agree=1.0),)
    fine = bs.Check(sites, 50.0, 30.0, 0.99, 0.98, 100, 40.0, "onnxruntime")
    assert fine.passed
    assert not dataclasses.replace(fine, same_class=0.97).passed
    assert not dataclasses.replace(fine, whole_db=39.9).passed
    assert not dataclasses.replace(fine, whole_db=float("nan")).passed
    assert not dataclasses.replace(fine, sites=(dataclasses.replace(sites[0], agree=0.9989),)).passed
    assert not dataclasses.replace(fine, sites=(SiteCheck("a", "Int", "int8", gap_db=39.0),)).passed
    assert dataclasses.replace(fine, same_class=None, float_same_class=None).passed


def test_the_verdict_says_what_failed() -> None:
    sites = (SiteCheck("a", "Int", "int8", agree=1.0), SiteCheck("b", "Int", "int8", agree=0.5))
    fine = bs.Check(sites[:1], 50.0, 30.0, 0.99, 0.98, 100, 40.0, "onnxruntime")
    assert fine.verdict == "passed: it runs as simulated"
    assert dataclasses.replace(fine, sites=sites).verdict.endswith("do not compute what is simulated, first b")
    assert "more often" in dataclasses.replace(fine, same_class=0.97).verdict
    low = dataclasses.replace(fine, whole_db=39.0)
    assert low.verdict.startswith(
        "not within the tolerance (39.0 dB, 40 asked for; simulation to float 30.0): every site"
    )
    assert low.to_json()["verdict"] == low.verdict
    for whole in (32.9, float("nan")):
        assert dataclasses.replace(fine, whole_db=whole).verdict.startswith(
            f"FAILED: run against simulation {whole:.1f}"
        )


def test_the_tolerance_can_be_given(shipped: Shipped) -> None:
    found = [
        bs.verify(shipped.net, shipped.artifact, batches(2, seed=2), tolerance_db=asked) for asked in (10.0, 1000.0)
    ]
    assert [check.passed for check in found] == [True, False]
    assert [check.tolerance_db for check in found] == [10.0, 1000.0]
    # less asked of the whole network is not less asked of a site
    site = SiteCheck("a", "Int", "int8", gap_db=39.0)
    assert [row.site for row in dataclasses.replace(found[0], sites=(site,)).failing] == ["a"]
    assert found[1].failing == ()


def test_fewer_samples_than_one_batch_of_the_file(shipped: Shipped) -> None:
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match="at least 4 samples"):
        bs.verify(shipped.net, shipped.artifact, [(x[:3], y[:3])])


def test_a_target_that_is_not_built_in_must_be_given() -> None:
    target, data = MockTarget(), batches(2, seed=2)
    net = bs.quantize(small(), data, target)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        artifact = bs.export(net, target, Path(folder) / "model.safetensors", data[0][0])
        with pytest.raises(TargetError, match="made for 'mock'; give that target"):
            bs.verify(net, artifact, data)
        assert bs.verify(net, artifact, data, target=target).passed


def test_samples_are_cut_along_the_batch_only() -> None:
    x, shared = torch.arange(12).reshape(6, 2), torch.zeros(3)
    assert slice_inputs(x, 1, 3).tolist() == [[2, 3], [4, 5]]
    got = slice_inputs({"x": (x, shared)}, 4, 6)
    assert got["x"][0].tolist() == [[8, 9], [10, 11]]
    assert got["x"][1] is shared
    assert np.shape(slice_inputs((x, [x]), 0, 1)[1][0]) == (1, 2)


class Placed(nn.Module):
    """A sum with positions that are looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.positions, self.outer = nn.Linear(6, 6), nn.Embedding(5, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = self.positions(torch.arange(5).unsqueeze(0))
        return self.outer((self.inner(x) + place).mean(1))


def test_a_tensor_without_the_batch_is_compared_once(tmp_path: Path) -> None:
    data = [(torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64))]
    model = Placed().eval()
    plan = bs.Plan({name: bs.Int(8, 8) for name, site in bs.sites(model, data[0][0]).items() if site.role == "integer"})
    net = bs.apply(model, TARGET.adapt(plan, network(model, data[0][0]).record), data)
    artifact = bs.export(net, TARGET, tmp_path / "model.onnx", data[0][0], batch=1)
    check = bs.verify(net, artifact, data)
    assert check.passed
    assert [site.agree for site in check.sites if site.site == "positions"] == [1.0]
