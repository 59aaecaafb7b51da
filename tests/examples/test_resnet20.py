"""The example on the real network, with few images."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "examples" / "resnet20.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resnet20_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
def test_task_keeps_the_splits_apart(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from bitsmith.data import items
    from bitsmith.zoo.data import data_root

    task = example.cifar_task(data_root(), 100, 150, 60)
    seen = [
        {image.numpy().tobytes() for inputs, _ in items(loader, "test") for image in inputs}
        for loader in (task.calibration, task.validation, task.test)
    ]
    assert [len(images) for images in seen] == [100, 150, 60]
    assert len(set().union(*seen)) == 310
    printed = capsys.readouterr().out
    assert "optimistic" in printed
    assert "test: 60 images" in printed


@pytest.mark.data
def test_it_optimizes_the_pretrained_network(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--calibration", "16", "--validation", "50", "--test", "100", "--threads", "1"]
    code = example.main(["--target", "onnxruntime", "--drop", "0.1", "-o", str(tmp_path), *few])
    folder = tmp_path / "onnxruntime"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert code == 0
    assert report["samples"] == 100
    assert report["float_metric"] > 0.8  # the weights are the trained ones
    assert report["plan_metric"] >= report["float_metric"] - 0.1
    assert any(site["realised"] == "int8" for site in report["sites"])
    assert (folder / "model.onnx").stat().st_size == report["plan_bytes"] < report["float_bytes"]
    assert (folder / "report.html").exists()
    assert "standard error" in capsys.readouterr().out


def test_without_data_it_says_what_to_set(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path / "absent"))
    assert example.main(["-o", str(tmp_path)]) == 2
    assert "BITSMITH_DATA" in capsys.readouterr().err
