"""``bitsmith.load`` on a real network: the ONNX file of the trained ResNet-20, quantized and run on both runtimes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitsmith as bs
from bitsmith.export.program import quiet
from bitsmith.zoo.cifar_resnet import resnet20
from bitsmith.zoo.data import data_root, normalise_cifar
from bitsmith.zoo.weights import load_npz


def images(start: int, count: int) -> torch.Tensor:
    root = data_root()
    assert root is not None
    with np.load(root / "cifar10" / "cifar10_lossless.npz") as arrays:
        return torch.from_numpy(normalise_cifar(arrays["x_train"][start : start + count]))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    root = data_root()
    assert root is not None
    return load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()


@pytest.mark.data
@pytest.mark.parametrize("exporter", ["dynamo", pytest.param("torchscript", marks=pytest.mark.slow)])
def test_the_file_is_the_network(trained: nn.Module, exporter: str, tmp_path: Path) -> None:
    path, x = tmp_path / "resnet20.onnx", images(0, 16)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            batch = torch.export.Dim("batch", min=1)
            torch.onnx.export(trained, (x,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        else:
            torch.onnx.export(
                trained, (x,), path, dynamo=False, opset_version=13, input_names=["x"], output_names=["y"],
                dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
            )  # fmt: skip
    net = bs.load(path)
    with torch.no_grad():
        exact = trained(x)
        torch.testing.assert_close(net(x), exact, rtol=1e-4, atol=1e-4)
    calibration = [(images(16, 64), torch.zeros(64))]
    for target in (bs.targets.OnnxRuntime(), bs.targets.OpenVino()):
        ours, theirs = bs.quantize(net, calibration, target), bs.quantize(trained, calibration, target)
        assert len(bs.plan_of(ours).sites) == len(bs.plan_of(theirs).sites)
        suffix = ".onnx" if target.name == "onnxruntime" else ".xml"
        artifact = bs.export(ours, target, tmp_path / f"int8{suffix}", x, batch=16)
        read = target.inspect(artifact)
        # OpenVINO computes some additions within a convolution, some in float
        sites = bs.sites(net, x)
        chosen = [s for s in bs.plan_of(ours).sites if target.name == "onnxruntime" or sites[s].weight is not None]
        assert len(chosen) == (30 if target.name == "onnxruntime" else 20)
        assert {read[site].precision for site in chosen} == {"int8"}
        run = torch.from_numpy(np.asarray(target.run(artifact, [x.numpy()])[0]))
        with torch.no_grad():
            simulated = ours(x)
        assert bool((run.argmax(1) == simulated.argmax(1)).all())
        assert 20 * float(torch.log10(simulated.norm() / (run - simulated).norm())) > 30
        assert 20 * float(torch.log10(exact.norm() / (simulated - exact).norm())) > 20


def test_the_ending_says_what_a_file_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"net\.pt: give a file that ends in \.onnx or \.pt2. Weights alone"):
        bs.load(tmp_path / "net.pt")
