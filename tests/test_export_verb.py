"""The export verb: the file, the map beside it, and what keeps it from being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.targets import ArtifactError, OnnxRuntime
from smallnet import batches, small

TARGET = OnnxRuntime(threads=1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return bs.quantize(small(), batches(2, seed=2), TARGET)


@pytest.fixture(scope="module")
def artifact(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> bs.Artifact:
    return bs.export(net, TARGET, tmp_path_factory.mktemp("export") / "net.onnx", batches(1)[0][0], batch=2)


def test_the_file_and_its_map(net: nn.Module, artifact: bs.Artifact) -> None:
    assert {path.name for path in artifact.path.parent.iterdir()} == {"net.onnx", "net.onnx.json"}
    assert bs.Artifact.load(artifact.path) == artifact
    assert artifact.batch == 2
    assert artifact.inputs[0][1] == (2, 3, 12, 12)
    assert bs.Plan.from_json(artifact.plan) == bs.plan_of(net)
    assert set(artifact.nodes) == set(bs.sites(small(), batches(1)[0][0]))
    assert artifact.nodes["left"]
    assert "onnxruntime" in artifact.versions
    x = batches(1, seed=7)[0][0][:2]
    (ran,) = TARGET.run(artifact, [x.numpy()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(ran), net(x), atol=0.02, rtol=0.02)


def test_integer_weights_are_smaller_than_float_ones(tmp_path: Path) -> None:
    wide = small(width=32, steps=0)
    data, x = batches(1), batches(1)[0][0]
    plain = bs.export(bs.apply(wide, bs.Plan(), data), TARGET, tmp_path / "float.onnx", x)
    integer = bs.export(bs.quantize(wide, data, TARGET), TARGET, tmp_path / "int.onnx", x)
    assert plain.bytes > 4 * sum(p.numel() for p in wide.parameters())
    assert integer.bytes < 0.6 * plain.bytes


def test_a_plain_model_is_exported_as_float(tmp_path: Path) -> None:
    model, x = small(), batches(1)[0][0]
    artifact = bs.export(model, TARGET, tmp_path / "deep" / "er" / "float.onnx", x, batch=None)
    assert artifact.batch == len(x)
    (ran,) = TARGET.run(artifact, [x.numpy()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(ran), model(x), atol=1e-5, rtol=1e-5)


class Branching(nn.Module):
    """Its way depends on the values: no fixed graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.one(x) if bool(x.sum() > 0) else self.two(x)
        return made


def test_a_network_without_a_fixed_graph_leaves_no_file(tmp_path: Path) -> None:
    net = bs.apply(Branching(), bs.Plan({"one": bs.Int(8, 8)}), [(torch.ones(4, 3), torch.zeros(4))])
    with pytest.raises(bs.ExportError, match="fixed graph"):
        bs.export(net, TARGET, tmp_path / "net.onnx", torch.ones(4, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_writer_leaves_the_old_file(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    path = tmp_path / "net.onnx"
    before = bs.export(net, TARGET, path, batches(1)[0][0])
    content = path.read_bytes()

    def full(model: Any, where: str) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="No space left"):
        bs.export(net, TARGET, path, batches(1)[0][0], batch=3)
    assert path.read_bytes() == content
    assert {item.name for item in tmp_path.iterdir()} == {"net.onnx", "net.onnx.json"}
    assert bs.Artifact.load(path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "pip install -U bitsmith"),
        ({"kind": "bitsmith.plan"}, "does not describe a Bitsmith artifact"),
        ({"nodes": 3}, "lacks or garbles"),
        ({"sha256": "0" * 64}, "is not the file that was exported"),
    ],
)
def test_a_map_that_is_newer_or_garbled(
    artifact: bs.Artifact, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(artifact.path.read_bytes())
    data = json.loads(artifact.sidecar.read_text())
    Path(f"{path}.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(ArtifactError, match=message):
        bs.Artifact.load(path)


def test_a_file_that_was_cut_off_or_is_missing(artifact: bs.Artifact, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ArtifactError, match="is missing"):
        bs.Artifact.load(path)
    Path(f"{path}.json").write_text(artifact.sidecar.read_text())
    with pytest.raises(ArtifactError, match="is missing beside its map"):
        bs.Artifact.load(path)
    path.write_bytes(artifact.path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="corrupted or cut off"):
        bs.Artifact.load(path)
    Path(f"{path}.json").write_text(artifact.sidecar.read_text()[:50])
    with pytest.raises(ArtifactError, match="broken or cut off"):
        bs.Artifact.load(path)
