"""Finding and reading the data folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitsmith.zoo.data import (
    CIFAR_MEAN,
    CIFAR_STD,
    cifar10,
    cora,
    data_root,
    imagenet_calibration,
    imagenet_val,
    mnist,
    normalise_cifar,
    normalise_imagenet,
    speech_commands,
    sst2,
)
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


def test_mnist_arrays(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", 3), ("test", 2)):
        arrays |= {f"x_{split}": np.zeros((n, 28, 28), np.uint8), f"y_{split}": np.arange(n, dtype=np.uint8)}
    (tmp_path / "mnist").mkdir()
    path = tmp_path / "mnist" / "mnist.npz"
    np.savez(path, **arrays)
    data = mnist(tmp_path)
    assert {k: (v.shape, v.dtype.name) for k, v in data.items()} == {
        "x_train": ((3, 28, 28), "uint8"),
        "y_train": ((3,), "int64"),
        "x_test": ((2, 28, 28), "uint8"),
        "y_test": ((2,), "int64"),
    }
    np.savez(path, **{**arrays, "y_test": np.zeros(5, np.uint8)})
    with pytest.raises(ValueError, match="differ in length"):
        mnist(tmp_path)


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


def write_images(root: Path, sizes: dict[str, tuple[int, int]], labels: str) -> dict[str, np.ndarray]:
    """Images without loss under names that the loaders ask for; Pillow goes by content, not by suffix."""
    rng = np.random.default_rng(0)
    made = {}
    for folder in ("imagenet_val", "imagenet_calibration"):
        (root / folder / "images").mkdir(parents=True)
    for name, (height, width) in sizes.items():
        made[name] = rng.integers(0, 256, (height, width, 3), np.uint8)
        for folder in ("imagenet_val", "imagenet_calibration"):
            Image.fromarray(made[name]).save(root / folder / "images" / name, format="PNG")
    (root / "imagenet_val" / "labels.csv").write_text(labels, encoding="utf-8")
    return made


def test_images_are_their_centre_in_the_order_of_the_labels(tmp_path: Path) -> None:
    made = write_images(tmp_path, {"a.jpg": (7, 6), "b.jpg": (5, 5)}, "file,class_index\nb.jpg,3\na.jpg,999\n")
    data = imagenet_val(tmp_path, size=4)
    assert data["y"].tolist() == [3, 999]
    assert data["x"].dtype == np.uint8
    assert np.array_equal(data["x"][0], made["b.jpg"][0:4, 0:4])
    assert np.array_equal(data["x"][1], made["a.jpg"][1:5, 1:5])
    assert np.array_equal(imagenet_calibration(tmp_path, size=4), data["x"][::-1])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("name,label\na.jpg,1\n", ValueError, "file,class_index"),
        ("file,class_index\na.jpg,cat\n", ValueError, "integer class"),
        ("file,class_index\na.jpg\n", ValueError, "integer class"),
        ("file,class_index\nc.jpg,1\n", FileNotFoundError, "c.jpg"),
        ("file,class_index\na.jpg,1\n", ValueError, "a.jpg has 7x6 pixels, 7x7"),
    ],
)
def test_other_labels_and_small_images_are_errors(
    tmp_path: Path, labels: str, error: type[Exception], message: str
) -> None:
    write_images(tmp_path, {"a.jpg": (7, 6)}, labels)
    with pytest.raises(error, match=message):
        imagenet_val(tmp_path, size=7)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    write_images(tmp_path, {}, "")
    with pytest.raises(FileNotFoundError, match=r"no \.jpg"):
        imagenet_calibration(tmp_path)


def test_imagenet_inputs_run_from_minus_one_to_one() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    got = normalise_imagenet(images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, images.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        normalise_imagenet(got)


def write_clips(root: Path, **changes: np.ndarray | None) -> None:
    arrays: dict[str, np.ndarray | None] = {
        "x": np.arange(4 * 490, dtype=np.float16).reshape(4, 49, 10),
        "y": np.array([2, 1, 0, 2]),
        "classes": np.array(["_silence_", "_unknown_", "yes"]),
        "files": np.array(
            ["yes/0a0b0c0d_nohash_0.wav", "_unknown_/bed_0a0b0c0d_nohash_1.wav.wav", "_silence_/7.wav", "yes/ff_x.wav"]
        ),
    }
    (root / "speech_commands").mkdir(exist_ok=True)
    kept = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(root / "speech_commands" / "test_mfcc49x10.npz", **kept)


def test_clips_know_their_speaker_by_the_files_name(tmp_path: Path) -> None:
    write_clips(tmp_path)
    data = speech_commands(tmp_path)
    assert data["x"].shape == (4, 1, 49, 10)
    assert data["x"].dtype == np.float32
    assert data["x"][1, 0, 0, 3] == 493
    assert data["speaker"][0] == data["speaker"][1]
    assert len(set(data["speaker"].tolist())) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros((4, 49, 40), np.float16), "x must be floats of shape"),
        ("files", None, "files must be text .* found nothing"),
        ("y", np.zeros(3, np.int64), "differ in length"),
    ],
)
def test_other_clips_are_errors(tmp_path: Path, name: str, value: np.ndarray | None, message: str) -> None:
    write_clips(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=message):
        speech_commands(tmp_path)


def write_sentences(root: Path, dev: str) -> None:
    (root / "sst2").mkdir(exist_ok=True)
    (root / "sst2" / "train.tsv").write_text("label\ttext_a\n1\tgood film \n0\ta\u2028b \n", encoding="utf-8")
    (root / "sst2" / "dev.tsv").write_text(dev, encoding="utf-8")


def test_sentences_and_classes(tmp_path: Path) -> None:
    write_sentences(tmp_path, "label\ttext_a\n0\tnot good . \n")
    data = sst2(tmp_path)
    assert data["train"][0] == ["good film", "a\u2028b"]
    assert data["train"][1].tolist() == [1, 0]
    assert data["dev"][0] == ["not good ."]
    for line in ("2\tgood", "1", "1\tgood\tfilm"):
        write_sentences(tmp_path, f"label\ttext_a\n0\tbad\n{line}\n")
        with pytest.raises(ValueError, match=r"dev\.tsv:3: expected 0 or 1"):
            sst2(tmp_path)


def write_graph(root: Path, **changes: np.ndarray) -> None:
    arrays = {
        "x": np.eye(3, 1433, dtype=np.uint8) + np.eye(3, 1433, 5, dtype=np.uint8),
        "y": np.array([0, 1, 2]),
        "edge_index": np.array([[0, 1], [1, 0]]),
        "train": np.array([0]),
        "val": np.array([1]),
        "test": np.array([2]),
    }
    (root / "graphs").mkdir(exist_ok=True)
    np.savez(root / "graphs" / "cora.npz", **{**arrays, **changes})


def test_a_papers_words_sum_to_one(tmp_path: Path) -> None:
    write_graph(tmp_path)
    data = cora(tmp_path)
    assert data["x"].dtype == np.float32
    np.testing.assert_allclose(data["x"].sum(1), 1)
    assert data["edge_index"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("edges", [np.array([[0, 1, 3]]), np.array([[0, 3], [1, 0]]), np.array([[0.0], [1.0]])])
def test_edges_that_name_no_node_are_errors(tmp_path: Path, edges: np.ndarray) -> None:
    write_graph(tmp_path, edge_index=edges)
    with pytest.raises(ValueError, match="edge_index must be integers"):
        cora(tmp_path)


@pytest.mark.data
def test_the_real_sets_have_their_published_sizes() -> None:
    root = data_root()
    assert root is not None
    clips = speech_commands(root)
    assert clips["x"].shape == (4890, 1, 49, 10)
    assert clips["classes"].tolist()[:2] == ["_silence_", "_unknown_"]
    sentences = sst2(root)
    assert {name: len(texts) for name, (texts, _) in sentences.items()} == {"train": 67_349, "dev": 872}
    assert sentences["dev"][1].sum() == 444
    graph = cora(root)
    assert graph["edge_index"].shape == (2, 2 * 5278)
    edges = {(int(a), int(b)) for a, b in graph["edge_index"].T}
    assert all((b, a) in edges for a, b in edges)
    assert len(set(graph["train"]) | set(graph["val"]) | set(graph["test"])) == 1640
