"""CIFAR ResNets: published sizes, the published weights' keys, and strict loading."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitsmith.zoo.cifar_resnet import CifarResNet, resnet20, resnet32, resnet56
from bitsmith.zoo.data import cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import WeightsError, load_npz


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {k: v.numpy().copy() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def small(seed: int) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet(8)


@pytest.mark.parametrize(("make", "millions"), [(resnet20, 0.27), (resnet32, 0.46), (resnet56, 0.85)])
def test_parameter_counts_are_those_of_the_paper(make: Callable[[], nn.Module], millions: float) -> None:
    # arXiv:1512.03385, table 6
    assert round(sum(p.numel() for p in make().parameters()) / 1e6, 2) == millions


def test_shapes_and_classes() -> None:
    net = CifarResNet(8, num_classes=7).eval()
    assert net(torch.zeros(3, 3, 32, 32)).shape == (3, 7)
    assert net.layer3(net.layer2(net.layer1(torch.zeros(1, 16, 32, 32)))).shape == (1, 64, 8, 8)


def test_option_a_shortcut_subsamples_and_pads_with_zero_channels() -> None:
    block = resnet20().layer2[0]
    x = torch.randn(2, 16, 6, 6)
    out = block.shortcut(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("depth", [2, 18, 21, 0, -4])
def test_impossible_depth_is_an_error(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(depth)


def test_weights_go_round_through_npz(tmp_path: Path) -> None:
    source, model = small(0), small(1)
    np.savez(tmp_path / "w.npz", **state_arrays(source))
    assert load_npz(model, tmp_path / "w.npz") is model
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source.eval()(x), model.eval()(x))


def test_big_endian_arrays_load(tmp_path: Path) -> None:
    source, model = small(0), small(1)
    np.savez(tmp_path / "w.npz", **{k: v.astype(">f4") for k, v in state_arrays(source).items()})
    load_npz(model, tmp_path / "w.npz")
    assert torch.equal(model.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("linear.bias"), "1 missing: linear.bias"),
        (lambda a: a.update({"fc.weight": np.zeros(3, np.float32)}), "1 unexpected: fc.weight"),
        (lambda a: a.update({"linear.bias": np.zeros(11, np.float32)}), "linear.bias has shape \\(11,\\)"),
        (lambda a: a.update({"linear.bias": np.zeros(10, np.int64)}), "linear.bias is int64"),
        (lambda a: a.update({"linear.bias": np.array(["x"] * 10)}), "linear.bias is <U1"),
    ],
)
def test_a_file_that_does_not_fit_loads_nothing(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    arrays, model = state_arrays(small(0)), small(1)
    change(arrays)
    np.savez(tmp_path / "w.npz", **arrays)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_npz(model, tmp_path / "w.npz")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_pickles_and_damage_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "w.npz", small(0)
    np.savez(path, **{**state_arrays(model), "linear.bias": np.array([print] * 10, dtype=object)})
    with pytest.raises(WeightsError, match="pickle"):
        load_npz(model, path)

    np.savez_compressed(path, **state_arrays(model))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="write it again"):
        load_npz(model, path)
    path.write_bytes(whole[:200] + bytes(byte ^ 0xFF for byte in whole[200:400]) + whole[400:])
    with pytest.raises(WeightsError, match="write it again"):
        load_npz(model, path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="write it again"):
        load_npz(model, path)
    np.save(tmp_path / "bare.npy", np.zeros(3))
    with pytest.raises(WeightsError, match="bare array"):
        load_npz(model, tmp_path / "bare.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1.weight.npy", io.BytesIO(b"\x93NUMPY\x01\x00").getvalue())
    with pytest.raises(WeightsError, match="write it again"):
        load_npz(model, path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_npz(model, tmp_path / "absent.npz")


@pytest.mark.data
def test_published_resnet20_reaches_its_accuracy() -> None:
    root = data_root()
    assert root is not None
    net = load_npz(resnet20(), root / "cifar10_models" / "resnet20.npz").eval()
    data = cifar10(root)
    images, classes = torch.from_numpy(normalise_cifar(data["x_test"])), data["y_test"]
    assert len(classes) == 1000
    with torch.no_grad():
        predicted = torch.cat([net(images[i : i + 125]).argmax(1) for i in range(0, 1000, 125)]).numpy()
    assert (predicted == classes).mean() == pytest.approx(0.915, abs=0.0015)
