"""``bitsmith.load`` of files that are quantized already; what else it reads is tested in ``tests/model``."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.export.onnx import to_onnx
from bitsmith.export.program import applied_program, exported_program
from bitsmith.targets.base import TargetError

pytest.importorskip("openvino")

SHAPE = (2, 3, 8, 8)
TARGETS = {"openvino": None, "onnxruntime": bs.targets.OnnxRuntime(1)}


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.conv(x))
        return self.fc(x.mean((2, 3))), x.amax((2, 3)) + y


@pytest.fixture(scope="module")
def given() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SHAPE), torch.randn(2, 8)


@pytest.fixture(scope="module")
def simulated(given: Any) -> nn.Module:
    return bs.quantize(Two().eval(), [(given, None)], bs.targets.OpenVino(1), prepare=(), choose=False)


@pytest.fixture
def path(simulated: nn.Module, given: Any, tmp_path: Path) -> Path:
    """Integers, in a file without a map beside it."""
    file = tmp_path / "int8.onnx"
    onnx.save(to_onnx(applied_program(simulated, given, 2)[0]), str(file))
    return file


@pytest.mark.parametrize("name", TARGETS)
def test_a_quantized_file_runs(name: str, path: Path, simulated: nn.Module, given: Any) -> None:
    net = bs.load(path, target=TARGETS[name])
    assert not net.training
    with torch.no_grad():
        expected = simulated(*given)
    for found in (net(*given), net(given[0], y=given[1].numpy()), net(x=given[0], y=given[1])):
        assert [type(value) for value in found] == [Tensor, Tensor]
        for run, asked in zip(found, expected, strict=True):
            torch.testing.assert_close(run, asked, rtol=0, atol=0.02)


def test_one_output_is_a_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6)
    net = bs.quantize(nn.Linear(6, 3).eval(), [(x, None)], bs.targets.OpenVino(1), prepare=(), choose=False)
    onnx.save(to_onnx(applied_program(net, x, 2)[0]), str(tmp_path / "one.onnx"))
    torch.testing.assert_close(bs.load(tmp_path / "one.onnx")(x), net(x).detach(), rtol=0, atol=0.02)


def test_a_copy_runs_and_many_threads_may_call_it(path: Path, given: Any) -> None:
    net = bs.load(path)
    again = copy.deepcopy(net)
    expected = net(*given)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: (net, again)[k % 2](given[0] * (1 + k % 3), given[1])[0], range(60)))
    assert all(torch.equal(one, expected) for one in found[::3])
    assert not torch.equal(found[1], expected)


def test_weights_that_an_old_file_lists_as_inputs_are_not_asked_for(path: Path, given: Any) -> None:
    expected = bs.load(path)(*given)[0]
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, str(path))
    assert torch.equal(bs.load(path)(*given)[0], expected)


def test_inputs_that_do_not_fit(path: Path, given: Any) -> None:
    net = bs.load(path)
    with pytest.raises(ValueError, match=r"input 'x' of .* has shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"):
        net(given[0][:1], given[1])
    for args, named in (((given[0],), {}), (given, {"y": given[1]}), ((), {"x": given[0], "z": given[1]})):
        with pytest.raises(ValueError, match=r"int8.onnx takes x, y; given were \d by position and"):
            net(*args, **named)
    with pytest.raises(ValueError, match="takes 2 inputs, got 3"):
        net(*given, given[1])


def test_what_cannot_be_run(path: Path, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(str(path))
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, str(path.with_name("open.onnx")))
    with pytest.raises(ValueError, match=r"input 'y' has no fixed shape \(\(0, 8\), 0 is open\); give it one"):
        bs.load(path.with_name("open.onnx"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TargetError, match=r'needs OpenVINO .*pip install "bitsmith\[openvino\]"'):
        bs.load(path)


def test_it_has_no_sites(path: Path, given: Any) -> None:
    with pytest.raises(bs.InterceptionError, match="not one site was seen in Running"):
        bs.sites(bs.load(path), given)


def test_a_float_file_is_computed_by_torch(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    onnx.save(to_onnx(exported_program(net, torch.zeros(1, 4))), str(tmp_path / "float.onnx"))
    assert [site.kind for site in bs.sites(bs.load(tmp_path / "float.onnx"), torch.zeros(1, 4)).values()] == [
        "linear",
        "relu",
    ]
    with pytest.raises(ValueError, match="is a float network, which torch computes; a target is for files"):
        bs.load(tmp_path / "float.onnx", target=bs.targets.OnnxRuntime(1))


def test_the_command_line_asks_for_the_float_file(path: Path) -> None:
    from bitsmith.model.load import LoadError, load_model

    with pytest.raises(LoadError, match=r"already quantized.*from before its quantization"):
        load_model(str(path))
