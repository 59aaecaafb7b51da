"""Needs bitsmith-kernels (``pip install ./kernels``), built with this OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

import bitsmith as bs
from bitsmith.accelerate import AccelerateError, accelerate
from bitsmith.cli.main import main
from bitsmith.export.onnx import to_onnx
from bitsmith.export.program import exported_program
from bitsmith.targets import _openvino_kernels
from bitsmith.targets.base import Artifact, SiteTimes, TargetError, Timing
from bitsmith.targets.openvino import OpenVino
from bitsmith.technique import No

pytest.importorskip("openvino")
pytest.importorskip("bitsmith_kernels")

SHAPE = (2, 3, 16, 16)


@dataclass(frozen=True)
class Clock(OpenVino):
    """OpenVINO with times that do not depend on the machine: by name of the convolution and of the file."""

    layers: tuple[tuple[str, float], ...] = ()
    whole: tuple[float, ...] = (2.0, 1.0)
    unrest: float = 0.0

    def site_times(self, artifact: Artifact, rounds: int = 30) -> SiteTimes:
        of = dict(self.layers)
        return SiteTimes({name: of.get(artifact.path.stem, 1.0) for name in artifact.nodes}, {}, 0.0, 1.0, "measured")

    def measure(self, artifacts: Sequence[Artifact], rounds: int = 30) -> list[Timing]:
        pairs = zip(self.whole, artifacts, strict=True)
        return [Timing((ms - self.unrest, ms, ms + self.unrest), 2, 1, "measured") for ms, _ in pairs]


FASTER = Clock(1, kernels=True, layers=(("base", 1.0), ("0", 0.5), ("1", 0.7)))


def images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Any]:
    return list(np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32))


def quantized(net: nn.Module, folder: Path, shape: tuple[int, ...] = SHAPE) -> Path:
    """What ONNX Runtime's own quantizer makes of a network."""
    onnx.save(to_onnx(exported_program(net.eval(), torch.zeros(shape))), str(folder / "float.onnx"))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter([{"input": x} for x in images(4, shape=shape)])

        def get_next(self) -> Any:
            return next(self.items, None)

    quantize_static(
        str(folder / "float.onnx"),
        str(folder / "int8.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return folder / "int8.onnx"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A float network, and what ONNX Runtime's own quantizer makes of it."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 20, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * 36, 10),
    )
    return {"int8": quantized(net, folder), "float": folder / "float.onnx"}


def operations(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_what_another_tool_made_is_accelerated(files: Mapping[str, Path], tmp_path: Path) -> None:
    found = accelerate(files["int8"], tmp_path / "fast.onnx", images(3, 1), target=FASTER)
    assert operations(tmp_path / "fast.onnx").count("WinogradConv") == found.replaced == 2
    assert [layer.chosen for layer in found.layers] == [None, (2, 8), (2, 8)]
    assert "stride 2x2" in found.layers[0].reason
    assert found.layers[1].options == {(2, 8): 0.5, (4, 16): 0.7}
    assert (found.ratio, found.samples, found.given) == (2.0, 6, True)
    assert 20 < found.sqnr_db < 60
    # the file as it lies there, against the original
    ran = FASTER.run(Artifact.load(tmp_path / "fast.onnx"), [images(1, 2)[0]])[0]
    original = FASTER._read(files["int8"])
    import openvino

    expected = openvino.compile_model(original, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images(1, 2)[0])[0]
    assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(ran - expected)) > 20


def test_load_runs_what_was_written(files: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in {"fast": FASTER, "same": SLOWER["whole"]}.items():
        path = accelerate(files["int8"], tmp_path / f"{name}.onnx", target=target).artifact.path
        ran = OpenVino(1).run(Artifact.load(path), images(1, 2))
        path.with_name(f"{name}.onnx.json").unlink()
        assert np.array_equal(bs.load(path)(images(1, 2)[0]).numpy(), ran[0])
    missing = No("the native kernels are not installed; install them with: pip install ./kernels")
    monkeypatch.setattr(_openvino_kernels, "extension", lambda: missing)
    bs.load(tmp_path / "same.onnx")
    with pytest.raises(TargetError, match=r"layers for the native kernels: .*pip install"):
        bs.load(tmp_path / "fast.onnx")


def test_sixteen_bits_are_nearer(files: Mapping[str, Path], tmp_path: Path) -> None:
    near, far = (
        accelerate(files["int8"], tmp_path / f"{k}.onnx", images(3, 1), target=FASTER, options=[option]).sqnr_db
        for k, option in enumerate([(4, 16), (2, 8)])
    )
    assert near > far + 5


SLOWER = {
    "layers": Clock(1, kernels=True, layers=(("base", 0.4), ("0", 0.5), ("1", 0.7))),
    "layers, hardly": Clock(1, kernels=True, layers=(("base", 0.51), ("0", 0.5), ("1", 0.7))),
    "whole": Clock(1, kernels=True, layers=FASTER.layers, whole=(1.0, 1.1)),
    "whole, beyond its spread": Clock(1, kernels=True, layers=FASTER.layers, whole=(1.1, 1.0), unrest=0.06),
}


@pytest.mark.parametrize("what", SLOWER)
def test_where_nothing_is_gained_the_file_stays_as_it_was(files: Mapping[str, Path], tmp_path: Path, what: str) -> None:
    found = accelerate(files["int8"], tmp_path / "same.onnx", target=SLOWER[what])
    assert found.replaced == 0
    assert found.sqnr_db == np.inf
    assert operations(tmp_path / "same.onnx") == operations(files["int8"])
    if what.startswith("whole"):
        assert found.ratio == 1.0


def test_outputs_that_are_lost_are_not_written(
    files: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsmith.accelerate.LEAST_DB", 99.0)
    with pytest.raises(AccelerateError, match=r"agree with the file's to \d\d\.\d dB only, below 99 dB"):
        accelerate(files["int8"], tmp_path / "lost.onnx", images(3, 1), target=FASTER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 2, 1), (1, 3, 3, 5)])
@pytest.mark.parametrize("channels", [(13, 7), (1, 33)])
def test_maps_smaller_than_a_tile_and_odd_channels(
    channels: tuple[int, int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, channels[0], 1),
        nn.Sigmoid(),
        nn.Conv2d(*channels, 3, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(channels[1], 5, 3, padding=(1, 2)),
    )
    path = quantized(net, tmp_path, shape)
    found = accelerate(path, tmp_path / "fast.onnx", images(3, 1, shape), target=FASTER, options=[(4, 16)])
    assert [layer.chosen for layer in found.layers] == [None, (4, 16), (4, 16)]
    assert found.sqnr_db > 35


BESIDE = {
    "stride": ({"stride": 2}, "stride"),
    "dilation": ({"dilation": 2}, "dilation"),
    "groups": ({"groups": 4}, "4 groups"),
    "kernel": ({"kernel_size": 5}, "5x5, not 3x3"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_cannot_be_replaced_stays_direct(case: str, tmp_path: Path) -> None:
    given, reason = BESIDE[case]
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3)
    net = nn.Sequential(plain, nn.ReLU(), nn.Conv2d(8, 8, **{"kernel_size": 3, **given}), nn.ReLU())
    shape = (1, 8, 12, 12)
    path = quantized(net, tmp_path, shape)
    found = accelerate(path, tmp_path / "fast.onnx", images(3, 1, shape), target=FASTER, options=[(4, 16)])
    assert [layer.chosen for layer in found.layers] == [(4, 16), None]
    assert reason in found.layers[1].reason
    assert operations(tmp_path / "fast.onnx").count("Conv") == 1
    assert found.sqnr_db > 30


def test_random_numbers_where_no_data_are_given(files: Mapping[str, Path], tmp_path: Path) -> None:
    found = accelerate(files["int8"], tmp_path / "fast.onnx", target=FASTER)
    assert (found.samples, found.given) == (8, False)


def test_real_times_decide(files: Mapping[str, Path], tmp_path: Path) -> None:
    found = accelerate(files["int8"], tmp_path / "fast.onnx", target=OpenVino(1, kernels=True), rounds=5)
    assert found.before.source == found.after.source == "measured"
    for layer in found.layers:
        if layer.chosen is not None:
            assert layer.options[layer.chosen] == min(layer.options.values()) < layer.ms


def test_the_command_line(files: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.concatenate(images(2, 3)))
    np.savez(tmp_path / "x.npz", input=np.concatenate(images(2, 3)))
    for data in ([], ["--data", str(tmp_path / "x.npy")], ["--data", str(tmp_path / "x.npz")]):
        out = tmp_path / "fast.onnx"
        argv = ["accelerate", str(files["int8"]), "-o", str(out), "--threads", "1", "--rounds", "3", *data]
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert "of 3 convolutions replaced" in said
        assert ("given samples" in said) == bool(data)
        assert out.exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"source": "float"}, "has no DequantizeLinear"),
    "missing": ({"source": "missing"}, "does not exist"),
    "text": ({"source": "text"}, "is no ONNX file"),
    "out": ({"out": "fast.xml"}, "is written as .onnx"),
    "empty": ({"data": []}, "the data are empty"),
    "shape": ({"data": [np.zeros((1, 3, 16, 16), np.float32)]}, "item 0 of the data has shapes"),
    "open": ({"source": "open"}, "has no fixed shape"),
    "name": ({"data": {"y": np.zeros(SHAPE, np.float32)}}, "item 0 of the data lacks .*; it has y"),
    "few": ({"data": np.zeros((1, 3, 16, 16), np.float32)}, "the data are empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(files: Mapping[str, Path], tmp_path: Path, case: str) -> None:
    given, says = BAD[case]
    (tmp_path / "text.onnx").write_text("no graph")
    model = onnx.load(str(files["int8"]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, str(tmp_path / "open.onnx"))
    source = files.get(given.get("source", "int8"), tmp_path / f"{given.get('source')}.onnx")
    out = tmp_path / given.get("out", "fast.onnx")
    with pytest.raises(AccelerateError, match=says):
        accelerate(source, out, given.get("data"), target=FASTER)
    assert not out.exists()
