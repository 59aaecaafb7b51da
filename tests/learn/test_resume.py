"""A training that is killed and called again ends with the same bits; and files that it must not go on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.learn.checkpoint import Checkpoint
from bitsmith.learn.state import tensors_of
from smallnet import batches, small
from training_jobs import ONE_THREAD, Notes, learned, resumable

pytestmark = pytest.mark.usefixtures("one_thread")

JOBS = Path(__file__).parents[1] / "training_jobs.py"
ENVIRONMENT = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, bs.History, Path]:
    """The training without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return *resumable(folder), folder


# 40 items are read: in the first pass, before and after the first checkpoint, between passes, near the end
@pytest.mark.parametrize("at", [3, 17, 24, 37])
def test_a_killed_training_ends_with_the_same_bits(
    at: int, whole: tuple[nn.Module, bs.History, Path], tmp_path: Path
) -> None:
    run = subprocess.run([sys.executable, JOBS, "kill", tmp_path, f"at={at}"], env=ENVIRONMENT, capture_output=True)
    assert run.returncode == -9, run.stderr.decode()
    assert (tmp_path / "training.safetensors").exists() == (at >= 8)
    notes: list[str] = []
    again, history = resumable(tmp_path, progress=Notes(notes))
    assert any("going on after step" in note for note in notes) == (at >= 8)
    expected, steps, _ = whole
    for name, value in tensors_of(expected).items():
        assert torch.equal(value, tensors_of(again)[name]), name
    assert list(history) == list(steps)
    assert (history.best, history.stopped) == (steps.best, False)


@pytest.fixture(scope="module", params=["allocation", "penalty"])
def whole_learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The method, its options, and what it learns without a stop."""
    changes: dict[str, Any] = {"grid_lr": 0.2, "strength": 1e4} if request.param == "penalty" else {"moves": 2}
    changes["method"] = request.param
    return changes, learned(tmp_path_factory.mktemp("learned"), **changes)


@pytest.mark.parametrize("at", [5, 8, 13])  # in the first phase, in the mixed one, in the last; files after 3, 6, ...
def test_bits_that_are_learned_go_on_after_a_kill(at: int, whole_learned: Any, tmp_path: Path) -> None:
    changes, whole = whole_learned
    command = [sys.executable, JOBS, "kill learned", tmp_path, f"at={at}", f"method={changes['method']}"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
    assert run.returncode == -9, run.stderr.decode()
    assert (tmp_path / "learned.safetensors").exists()
    notes: list[str] = []
    again = learned(tmp_path, progress=Notes(notes), **changes)
    assert any("going on after step" in note for note in notes)
    for name, value in tensors_of(whole.net).items():
        assert torch.equal(value, tensors_of(again.net)[name]), name
    assert again.history == whole.history
    assert again.plan == whole.plan
    with pytest.raises(bs.TrainingError, match="guide was"):
        learned(tmp_path, **{**changes, "total": 2000.0})


def test_a_training_that_is_done_comes_back_from_its_file(whole: tuple[nn.Module, bs.History, Path]) -> None:
    expected, steps, folder = whole
    before = (folder / "training.safetensors").read_bytes()
    again, history = resumable(folder)
    for name, value in tensors_of(expected).items():
        assert torch.equal(value, tensors_of(again)[name]), name
    assert list(history) == list(steps)
    assert (folder / "training.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 21}, "steps was 20, now 21"),
        ({"seed": 4}, "seed was 3, now 4"),
        (
            {"schedule": None},
            r"optimizer was Adam\(.*lr=0\.0004.*; schedule was OneCycleLR .*, now CosineAnnealingLR none",
        ),
        ({"optimizer": lambda p: torch.optim.SGD(p, 0.1), "schedule": None}, r"optimizer was Adam.*, now SGD\(lr=0\.1"),
        ({"accumulate": 1}, "accumulate was 2, now 1"),
        ({"ema": None}, r"ema was 0\.8, now None"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_call_is_refused(
    changes: dict[str, Any], said: str, whole: tuple[nn.Module, bs.History, Path]
) -> None:
    with pytest.raises(bs.TrainingError, match=f"the checkpoint of another training: .*{said}"):
        resumable(whole[2], **changes)


def trained(net: nn.Module, path: Path, **changes: Any) -> nn.Module:
    given: dict[str, Any] = {"steps": 4, "checkpoint": path, "every": 2, **changes}
    return bs.finetune(net, batches(3), F.cross_entropy, **given)


def test_another_loss_and_another_plan_are_refused_the_plan_by_its_site(tmp_path: Path) -> None:
    data, model, path = batches(2), small(steps=5), tmp_path / "a.safetensors"
    trained(model, path)
    with pytest.raises(bs.TrainingError, match=r"loss was cross_entropy \(\w+\), now nll_loss \(\w+\)\. Give the same"):
        bs.finetune(model, data, F.nll_loss, steps=4, checkpoint=path)
    path.unlink()
    trained(bs.apply(model, bs.Plan({"left": bs.Int(4, 8)}), data), path)
    with pytest.raises(bs.TrainingError, match=r"at left was Int\(w=4, a=8\), now Int\(w=3, a=8\)"):
        trained(bs.apply(model, bs.Plan({"left": bs.Int(3, 8)}), data), path)
    with pytest.raises(bs.TrainingError, match=r"at right was not given, now Int\(w=4, a=8\)"):
        trained(bs.apply(model, bs.Plan(dict.fromkeys(("left", "right"), bs.Int(4, 8))), data), path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _other(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


def _newer(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["bitsmith"])
    about["schema"] = 99
    save_file(load_file(path), path, metadata={"bitsmith": json.dumps(about)})


def _reworded(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"done\\": 4', b'"done\\": 3'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, r"cut off or damaged .*delete .*a\.safetensors to begin again"),
        (_flip, r"is damaged: .* is not what was written; delete"),
        (_reworded, r"is damaged: its header is not what was written"),
        (lambda path: path.write_bytes(b""), "cut off or damaged"),
        (lambda path: path.write_text("not at all such a file"), "cut off or damaged"),
        (_other, "no checkpoint of a training: give another path"),
        (_newer, "schema 99, this version reads 1"),
    ],
    ids=["cut", "flipped", "reworded", "empty", "text", "another", "newer"],
)
def test_a_file_that_cannot_be_gone_on_from_says_what_to_do(
    damage: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    model, path = small(steps=5), tmp_path / "a.safetensors"
    trained(model, path)
    damage(path)
    with pytest.raises(bs.TrainingError, match=said):
        trained(model, path)


def test_nothing_is_left_beside_the_file_and_none_of_it_is_a_pickle(tmp_path: Path) -> None:
    trained(small(steps=5), tmp_path / "new" / "a.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]
    tensors = load_file(tmp_path / "new" / "a.safetensors")
    assert {"net/stem.weight", "optimizer/state/0/exp_avg", "noise cpu/0", "loader/start", "history"} <= set(tensors)


def test_a_file_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        trained(small(steps=1), tmp_path / "file" / "a.safetensors")


SCHEDULES: dict[str, Any] = {
    "step": lambda o, n: torch.optim.lr_scheduler.StepLR(o, 2),
    "lambda": lambda o, n: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "restarts": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequence": lambda o, n: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, n - 2),
        ],
        [2],
    ),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_go_on(schedule: str, tmp_path: Path) -> None:
    gone_on(tmp_path, SCHEDULES[schedule], OPTIMIZERS["adamw"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_go_on(optimizer: str, tmp_path: Path) -> None:
    gone_on(tmp_path, None, OPTIMIZERS[optimizer])


def gone_on(folder: Path, schedule: Any, optimizer: Any) -> None:
    """Interrupted in the fifth of seven steps, and not."""

    def once(path: Path | None, at: int) -> dict[str, Tensor]:
        calls = 0

        def forward(model: nn.Module, inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return model(inputs)

        net = bs.finetune(
            *(small(steps=5), batches(3), F.cross_entropy),
            **{"steps": 7, "schedule": schedule, "optimizer": optimizer, "forward": forward},
            **({} if path is None else {"checkpoint": path, "every": 2}),
        )
        return tensors_of(net)

    path = folder / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        once(path, 5)
    again, straight = once(path, -1), once(None, -1)
    assert all(torch.equal(value, again[name]) for name, value in straight.items())


def test_an_early_stop_is_kept_too(tmp_path: Path) -> None:
    data = batches(3)
    given: dict[str, Any] = {
        **{"steps": 30, "lr": 0.0, "patience": 2, "validate_every": 3},
        "validation": bs.Task(data, data, evaluate=lambda net: 0.5),
    }
    found = []
    for path in (tmp_path / "a.safetensors", tmp_path / "a.safetensors"):
        history = bs.History()
        bs.finetune(small(steps=5), data, F.cross_entropy, checkpoint=path, every=4, history=history, **given)
        found.append((len(history), history.stopped, history.best))
    assert found == [(9, True, 3)] * 2


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=plain)
def test_values_come_back_as_they_were(value: Any) -> None:
    file = Checkpoint({})
    file.hold("x", {"value": value, "tensor": torch.arange(3)})
    file.values = json.loads(json.dumps(file.values, allow_nan=False))
    again = file.held("x")
    assert again["value"] == value
    assert repr(again["value"]) == repr(value)  # 1, 1.0 and True are equal
    assert torch.equal(again["tensor"], torch.arange(3))


def test_what_no_file_can_hold_is_named() -> None:
    with pytest.raises(bs.TrainingError, match=r"optimizer/state/0/x is a set, which a file without pickle"):
        Checkpoint({}).hold("optimizer", {"state": {0: {"x": {1}}}})


@dataclass(frozen=True)
class Noisy(bs.Technique):
    """Its cell draws from a generator of its own, which it gives out as its extra state (a test)."""

    def fits(self, site: bs.Site) -> bool:
        return True

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return NoisyCell(site)


class NoisyCell(bs.Cell):
    def __init__(self, site: bs.Site) -> None:
        super().__init__(site)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        output = self.op(*operands, **rest)
        return output + 0.1 * torch.randn(output.shape, generator=self.generator) if self.training else output

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)


def test_a_generator_of_a_cell_goes_on(tmp_path: Path) -> None:
    net = bs.apply(small(steps=5), bs.Plan({"left": Noisy()}), batches(1))
    path, straight = tmp_path / "a.safetensors", bs.finetune(net, batches(3), F.cross_entropy, steps=4)
    calls = 0

    def forward(model: nn.Module, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return model(inputs)

    with pytest.raises(KeyboardInterrupt):
        trained(net, path, forward=forward)
    again = trained(net, path, forward=forward)
    assert all(torch.equal(value, tensors_of(again)[name]) for name, value in tensors_of(straight).items())
