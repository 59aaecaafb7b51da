"""One ReLU module that serves at several places of its block, as torchvision's residual blocks have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block()).eval()


def test_each_place_is_a_site(model: nn.Module) -> None:
    sites = bs.sites(model, torch.randn(2, 3, 8, 8))
    assert sites["1.conv1"].epilogue == ("1.bn1", "1.relu:relu")
    assert sites["1:add"].epilogue == ("1.relu:relu.1",)
    assert sites["1.relu:relu"].calls == sites["1.relu:relu.1"].calls == 1


def test_both_keep_their_own_range_when_compiled_and_run(model: nn.Module, tmp_path) -> None:
    x = torch.randn(4, 3, 8, 8)
    net = bs.quantize(model, [(x, None)], bs.targets.OnnxRuntime(threads=1))
    with torch.no_grad():
        expected = net(x)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
    artifact = bs.export(net, bs.targets.OnnxRuntime(threads=1), tmp_path / "net.onnx", x)
    check = bs.verify(net, artifact, [(x, None)], target=bs.targets.OnnxRuntime(threads=1))
    assert check.passed
    assert not check.unrealised


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.relu(self.linear(x))
        return x


def test_a_loop_is_one_place() -> None:
    sites = bs.sites(Loop(), torch.randn(2, 4))
    assert sites["relu"].calls == 3
