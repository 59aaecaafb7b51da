"""``bitsmith doctor``: what it finds, and what it says to do."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitsmith.cli import doctor
from bitsmith.targets import _openvino_kernels
from bitsmith.technique import No

from .conftest import Run

ROOT = Path(__file__).parents[2]


def _break(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    real = importlib.import_module

    def broken(module: str, package: str | None = None) -> Any:
        if module == name:
            raise error
        return real(module, package)

    monkeypatch.setattr(importlib, "import_module", broken)


def test_here_all_that_is_needed_works(run: Run) -> None:
    said = run("doctor")
    assert said.code == 0, said.out
    assert f"onnxruntime       {metadata.version('onnxruntime')}" in said.out
    assert said.out.splitlines()[-1] == "All that is needed works."
    for word in ("torch build", "interception", "threads", "processor", "this folder"):
        assert word in said.out


def test_the_findings_as_json(run: Run) -> None:
    found = {item["name"]: item for item in json.loads(run("doctor", "--json").out)}
    assert found["torch"]["core"]
    assert found["torch"]["state"] == "ok"
    assert not found["openvino"]["core"]


def test_an_extra_that_is_not_installed_is_no_fault_and_has_its_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "openvino", ModuleNotFoundError("No module named 'openvino'", name="openvino"))
    said = run("doctor")
    assert said.code == 0
    assert 'pip install "bitsmith[openvino]"' in said.out


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), "missing", 'pip install "onnx>='),
        (ModuleNotFoundError("No module named 'google'", name="google"), "BROKEN", 'pip install "onnx>='),
        (ImportError("undefined symbol: x"), "BROKEN", 'pip install --force-reinstall --no-deps "onnx>='),
    ],
)
def test_a_part_of_the_core_that_is_broken_is_code_1_with_its_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str, line: str
) -> None:
    _break(monkeypatch, "onnx", error)
    said = run("doctor")
    assert said.code == 1
    lines = said.out.splitlines()
    (at,) = [i for i, text in enumerate(lines) if text.split()[:2] == [state, "onnx"]]
    assert line in lines[at + 1]


def test_the_line_names_what_the_package_itself_asks_for() -> None:
    assert doctor._requirement("onnx") in (metadata.requires("bitsmith") or [])
    assert doctor._requirement("onnx").startswith("onnx>=")
    assert doctor._requirement("scikit-learn").startswith("scikit-learn")
    assert doctor._requirement("no-such-thing") == "no-such-thing"


def test_every_package_that_is_required_is_looked_at() -> None:
    wanted = {line.partition(">")[0] for line in metadata.requires("bitsmith") or [] if "extra" not in line}
    assert wanted == set(doctor.CORE.values())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("flags\t\t: fpu avx512_vnni avx512_bf16", "int8: AVX512-VNNI; bfloat16: AVX512-BF16"),
        ("flags\t\t: fpu avx2 amx_int8 avx512_vnni", "int8: AMX, AVX512-VNNI; bfloat16: no instructions"),
        ("flags\t\t: fpu avx2", "no int8 dot products"),
        ("Features\t: fp asimd asimddp i8mm bf16", "int8: Arm I8MM, Arm dot product; bfloat16: Arm BF16"),
        ("nothing", "its features are not told"),
    ],
)
def test_the_processor_is_judged_by_its_flags(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n")
    assert said in doctor.processor(doctor._flags(str(path))).said


def test_without_cpuinfo_nothing_is_claimed(tmp_path: Path) -> None:
    assert doctor._flags(str(tmp_path / "absent")) is None


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    assert doctor.writable("here", tmp_path).state == "ok"
    (tmp_path / "file").write_text("")
    assert doctor.writable("here", tmp_path / "file").state == "BROKEN"


def test_a_missing_data_folder_says_how_to_name_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path / "absent"))
    said = run("doctor")
    assert said.code == 0
    assert "export BITSMITH_DATA=" in said.out


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package of native kernels of which nothing has to be built."""
    package, openvino = ModuleType("bitsmith_kernels"), ModuleType("bitsmith_kernels.openvino")
    built = {"2026.4.1": Path("libx.so")}
    package.__dict__.update(__version__="9.9", isas=lambda: ("avx2", "reference"), openvino=openvino)
    openvino.__dict__.update(versions=lambda: built)
    monkeypatch.setitem(sys.modules, "bitsmith_kernels", package)
    monkeypatch.setitem(sys.modules, "bitsmith_kernels.openvino", openvino)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "bitsmith-kernels" else real(name))
    monkeypatch.setattr(_openvino_kernels, "extension", lambda: built["2026.4.1"])
    monkeypatch.setattr(_openvino_kernels, "missing", lambda: None)
    return package


def test_native_kernels_that_fit(kernels: ModuleType) -> None:
    found = doctor.kernels()
    said = "9.9; avx2, reference; built for OpenVINO 2026.4.1, which is here"
    assert (found.state, found.said, found.mend, found.core) == ("ok", said, "", False)


def test_native_kernels_that_openvino_does_not_take(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_openvino_kernels, "missing", lambda: No("libx.so cannot be loaded"))
    assert (doctor.kernels().state, doctor.kernels().mend) == ("BROKEN", "libx.so cannot be loaded")
    for name in ("extension", "missing"):
        monkeypatch.setattr(_openvino_kernels, name, lambda: No("no extension for OpenVINO 2027.1: pip install x"))
    found = doctor.kernels()
    assert (found.state, found.mend) == ("missing", "no extension for OpenVINO 2027.1: pip install x")
    assert found.said == "9.9; avx2, reference; built for OpenVINO 2026.4.1"
    kernels.openvino.versions = dict
    assert doctor.kernels().said == "9.9; avx2, reference; without OpenVINO"


def test_native_kernels_without_their_library(kernels: ModuleType) -> None:
    def isas() -> None:
        raise ImportError("libbitsmith_kernels.so is not there")

    kernels.isas = isas  # type: ignore[attr-defined]
    found = doctor.kernels()
    assert (found.state, found.said) == ("BROKEN", "libbitsmith_kernels.so is not there")
    assert found.mend.startswith("pip install --force-reinstall --no-deps ./kernels")


def test_no_native_kernels_is_no_fault_and_has_its_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "bitsmith_kernels", ModuleNotFoundError("No module", name="bitsmith_kernels"))
    said = run("doctor")
    assert said.code == 0
    lines = said.out.splitlines()
    (at,) = [i for i, text in enumerate(lines) if "bitsmith-kernels" in text]
    assert lines[at].split() == ["missing", "bitsmith-kernels", "not", "installed;", "optional"]
    assert 'pip install ./kernels ".[kernels]"' in lines[at + 1]


def test_the_extra_asks_for_the_kernels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    kernels = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
    assert kernels["name"] in project["optional-dependencies"]["kernels"]
