"""``bitsmith demo``: the training is done once, and resumed runs repeat nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bitsmith.cli import demo
from bitsmith.cli.progress import TerminalProgress
from bitsmith.zoo import digits

from .conftest import Run


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A few images, and a count of how often a network is trained on them."""
    monkeypatch.setattr(demo, "EPOCHS", 1)
    inputs, classes = digits.digits_task_arrays()["train"]
    return inputs[:64], classes[:64]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seeds: list[int] = []
    real = digits.train

    def train(model: Any, inputs: Any, classes: Any, *, seed: int = 0, **rest: Any) -> Any:
        seeds.append(seed)
        return real(model, inputs, classes, seed=seed, **rest)

    monkeypatch.setattr(digits, "train", train)
    return seeds


def _trained(path: Path, data: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    with TerminalProgress(Console(quiet=True)) as progress:
        model = demo.trained(path, data, seed, progress)
    assert not model.training
    return model.state_dict()


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_network_is_trained_once_and_read_back_bit_by_bit(tmp_path: Path, data: Any, trainings: list[int]) -> None:
    path = tmp_path / "digits.safetensors"
    first = _trained(path, data)
    assert _same(first, _trained(path, data))
    assert trainings == [0]


def test_another_seed_is_another_training(tmp_path: Path, data: Any, trainings: list[int]) -> None:
    path = tmp_path / "digits.safetensors"
    first = _trained(path, data, 0)
    assert not _same(first, _trained(path, data, 1))
    assert trainings == [0, 1]


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", None])
def test_a_damaged_file_is_trained_again(tmp_path: Path, data: Any, trainings: list[int], damage: bytes | None) -> None:
    path = tmp_path / "digits.safetensors"
    first = _trained(path, data)
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert _same(first, _trained(path, data))
    assert trainings == [0, 0]


def test_the_task_is_made_of_disjoint_parts() -> None:
    task, parts = demo.digits_task(0)
    assert [sum(len(y) for _, y in loader) for loader in (task.calibration, task.validation, task.test or ())] == [
        *(len(parts[name][1]) for name in ("calibration", "validation", "test")),
    ]
    train = {image.tobytes() for image in parts["train"][0]}
    shared = [x for loader in (task.validation, task.test or ()) for batch, _ in loader for x in batch.numpy()]
    # a handful of the digits were scanned twice
    assert sum(image.tobytes() in train for image in shared) <= 5


@pytest.mark.slow
def test_the_demo_does_the_main_job_and_a_second_run_repeats_nothing(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "demo"
    first = run("demo", "-o", folder)
    assert first.code == 0, first.err
    for name in ("digits.safetensors", "runs.db", "plan.json", "model.onnx", "report.html", "report.json"):
        assert (folder / name).stat().st_size > 0
    plan = (folder / "plan.json").read_bytes()
    second = run("demo", "-o", folder)
    assert second.code == 0, second.err
    assert "is taken from" in second.err
    assert (folder / "plan.json").read_bytes() == plan
