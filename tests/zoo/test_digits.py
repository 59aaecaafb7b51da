"""The demo's data and network."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bitsmith.zoo.digits import SPLIT, accuracy, digits_net, digits_task_arrays, normalise, train


def test_every_digit_is_in_exactly_one_part() -> None:
    parts = digits_task_arrays(seed=3)
    assert {name: len(x) for name, (x, _) in parts.items()} == {**SPLIT, "train": 1797 - sum(SPLIT.values())}
    assert len(parts["test"][0]) >= 300

    # equal images with equal labels may be two people's: compare as multisets
    def rows(x: np.ndarray, y: np.ndarray) -> list[bytes]:
        return [np.float32(image).tobytes() + bytes([label]) for image, label in zip(x, y, strict=True)]

    digits = load_digits()
    together = [row for x, y in parts.values() for row in rows(x[:, 0, ::4, ::4] * 8 + 8, y)]
    assert sorted(together) == sorted(rows(digits.images, digits.target))


def test_parts_are_balanced_and_follow_the_seed() -> None:
    first, again, other = digits_task_arrays(1), digits_task_arrays(1), digits_task_arrays(2)
    for name, (x, y) in first.items():
        assert np.array_equal(x, again[name][0])
        assert not np.array_equal(x, other[name][0])
        assert x.dtype == np.float32
        assert x.shape[1:] == (1, 32, 32)
        assert np.ptp(np.bincount(y, minlength=10)) <= 12


def test_normalise() -> None:
    images = np.random.default_rng(0).integers(0, 17, (4, 8, 8))
    out = normalise(images)
    assert out.dtype == np.float32
    want = np.kron(images, np.ones((1, 4, 4))) / 8 - 1
    np.testing.assert_array_equal(out[:, 0], want.astype(np.float32))
    with pytest.raises(ValueError, match="\\(n, 8, 8\\)"):
        normalise(np.zeros((8, 8)))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bitsmith\[demo\]"'):
        digits_task_arrays()


def test_same_seed_same_network_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = digits_net(5), digits_net(5), digits_net(6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.head.weight, c.head.weight)


def test_training_learns_on_a_copy_and_reports_progress() -> None:
    x, y = digits_task_arrays()["train"]
    x, y = x[:192], y[:192]
    model = digits_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen: list[tuple[int, int, float]] = []
    trained = train(model, x, y, epochs=4, batch=16, progress=lambda *args: seen.append(args))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not trained.training
    assert [epoch for epoch, _, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][2] < seen[0][2] / 2
    assert accuracy(trained, x, y) > 0.8


def test_accuracy_counts_over_incomplete_batches() -> None:
    x, y = digits_task_arrays()["test"]
    x, y = x[:130], y[:130]
    always_zero = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))
    with torch.no_grad():
        always_zero[1].weight.zero_()
        always_zero[1].bias.copy_(torch.eye(10)[0])
    assert accuracy(always_zero, x, y) == pytest.approx((y == 0).mean())


@pytest.mark.parametrize(("epochs", "batch"), [(0, 32), (1, 1), (1, 1000)])
def test_arguments_that_cannot_train_are_errors(epochs: int, batch: int) -> None:
    x, y = np.zeros((8, 1, 32, 32), np.float32), np.zeros(8, np.int64)
    with pytest.raises(ValueError, match="at least 1 epoch"):
        train(digits_net(), x, y, epochs=epochs, batch=batch)
    with pytest.raises(ValueError, match="8 inputs but 7 classes"):
        train(digits_net(), x, y[:7])


@pytest.mark.slow
def test_the_demo_network_reaches_its_accuracy() -> None:
    parts = digits_task_arrays()
    trained = train(digits_net(), *parts["train"])
    # 360 images: one standard error is 0.7 points here
    assert accuracy(trained, *parts["test"]) >= 0.975
