"""Finding and reading the data folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitsmith.zoo.data import CIFAR_MEAN, CIFAR_STD, cifar10, data_root, normalise_cifar
from bitsmith.zoo.weights import WeightsError


def write(root: Path, **changes: np.ndarray | None) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray | None] = {}
    for split, n in (("train", 3), ("test", 2)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        arrays[f"y_{split}"] = rng.integers(0, 10, n).astype(np.uint8)
    (root / "cifar10").mkdir(exist_ok=True)
    kept = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(root / "cifar10" / "cifar10_lossless.npz", **kept)


def test_the_variable_decides_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("BITSMITH_DATA", raising=False)
    assert data_root() == tmp_path / "shared" / "data"
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path / "work"))
    assert data_root() == tmp_path / "work"
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path / "absent"))
    assert data_root() is None


def test_cifar_arrays(tmp_path: Path) -> None:
    write(tmp_path)
    data = cifar10(tmp_path)
    assert {k: (v.shape, v.dtype.name) for k, v in data.items()} == {
        "x_train": ((3, 32, 32, 3), "uint8"),
        "y_train": ((3,), "int64"),
        "x_test": ((2, 32, 32, 3), "uint8"),
        "y_test": ((2,), "int64"),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y_test", None, "y_test must be integers .* found nothing"),
        ("x_test", np.zeros((2, 3, 32, 32), np.uint8), "x_test must be integers"),
        ("x_train", np.zeros((3, 32, 32, 3), np.float32), "found float32"),
        ("y_train", np.zeros(4, np.int64), "differ in length"),
    ],
)
def test_other_content_is_an_error(tmp_path: Path, name: str, value: np.ndarray | None, message: str) -> None:
    write(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=message):
        cifar10(tmp_path)


def test_absent_and_damaged_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="BITSMITH_DATA"):
        cifar10(tmp_path)
    write(tmp_path)
    (tmp_path / "cifar10" / "cifar10_lossless.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(WeightsError, match="write it again"):
        cifar10(tmp_path)


def test_normalise_is_the_stated_formula_in_channel_first_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    got = normalise_cifar(images)
    assert got.dtype == np.float32
    for channel in range(3):
        want = (images[..., channel].astype(np.float64) / 255 - CIFAR_MEAN[channel]) / CIFAR_STD[channel]
        np.testing.assert_allclose(got[:, channel], want, atol=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, 32, 32, 3), np.float32)])
def test_normalise_refuses_what_it_cannot_mean(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        normalise_cifar(bad)


@pytest.mark.data
def test_the_real_images_have_balanced_classes() -> None:
    root = data_root()
    assert root is not None
    data = cifar10(root)
    assert data["x_test"].shape == (1000, 32, 32, 3)
    assert np.bincount(data["y_test"], minlength=10).min() > 70
    assert torch.from_numpy(normalise_cifar(data["x_test"])).mean().abs() < 0.3
