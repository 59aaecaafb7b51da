from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith import accelerate as module
from bitsmith.export.onnx import to_onnx
from bitsmith.export.program import applied_program
from bitsmith.technique import No

from .conftest import Run


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    """Two 3x3 convolutions in the QDQ form."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    x = torch.randn(2, 3, 12, 12)
    applied = bs.quantize(net.eval(), bs.Unlabelled([x]), bs.targets.OpenVino(1), prepare=(), choose=False)
    path = tmp_path / "int8.onnx"
    onnx.save(to_onnx(applied_program(applied, x, 1)[0]), str(path))
    return path


def test_without_the_kernels_it_says_what_is_missing_before_anything_is_timed(
    int8: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing", lambda: No("the native kernels are not installed"))
    said = run("accelerate", int8, "-o", int8.with_name("fast.onnx"))
    assert said.code == 2
    assert "could be faster, but the native kernels are not installed" in said.err
    assert not int8.with_name("fast.onnx").exists()


def test_a_file_that_is_not_there_and_one_that_is_float(int8: Path, run: Run) -> None:
    said = run("accelerate", "nowhere.onnx", "-o", int8.with_name("fast.onnx"))
    assert (said.code, "nowhere.onnx does not exist" in said.err) == (2, True)
    model = onnx.load(str(int8))
    del model.graph.node[:]
    onnx.save(model, str(int8))
    said = run("accelerate", int8, "-o", int8.with_name("fast.onnx"))
    assert (said.code, "quantize it first" in said.err) == (2, True)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_data_that_are_no_arrays(int8: Path, run: Run, name: str) -> None:
    int8.with_name(name).write_bytes(b"no arrays")
    said = run("accelerate", int8, "-o", int8.with_name("fast.onnx"), "--data", int8.with_name(name))
    assert (said.code, f"{name} is no file of NumPy arrays" in said.err) == (2, True)
    said = run("accelerate", int8, "-o", int8.with_name("fast.onnx"), "--data", int8.with_name(f"not-{name}"))
    assert (said.code, f"not-{name}" in said.err) == (2, True)
