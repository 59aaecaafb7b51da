"""Two real processes: the result of one, and an error instead of a hang where one is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bitsmith as bs
from bitsmith.learn.distributed import Processes
from bitsmith.learn.loader import Stream
from bitsmith.learn.state import tensors_of
from training_jobs import ONE_THREAD, learned, shared

pytestmark = pytest.mark.usefixtures("one_thread")

JOBS = Path(__file__).parents[1] / "training_jobs.py"


def environment() -> dict[str, str]:
    """Of the processes; what aborts one says where it was."""
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"}


def together(job: str, folder: Path, *options: str) -> list[subprocess.Popen[str]]:
    """The job in two processes, without ``torchrun``."""
    common = {**environment(), "WORLD_SIZE": "2"}
    common.pop("MASTER_PORT", None)
    return [
        subprocess.Popen(
            [sys.executable, str(JOBS), job, str(folder), *options],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str]]:
    """Exit code and what was written, by rank; nothing is left running."""
    try:
        written = [process.communicate(timeout=seconds)[0] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, written, strict=True)]
    finally:
        end(processes)


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job ``shared``, started by ``torchrun`` itself."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(JOBS), "shared", str(folder)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_two_processes_learn_the_bits_that_one_learns(tmp_path: Path) -> None:
    for code, text in ended(together("learned", tmp_path)):
        assert code == 0, text
    first, second = (load_file(tmp_path / f"learned{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    (tmp_path / "alone").mkdir()
    alone = learned(tmp_path / "alone", moves=2, accumulate=2, freeze_norms=True)
    for name, value in tensors_of(alone.net).items():
        if name.endswith("_level"):
            assert torch.equal(first[name], value), name
    sites = [technique for technique in alone.plan.sites.values() if isinstance(technique, bs.Int)]
    assert len({technique.w for technique in sites}) > 1


def test_two_processes_give_what_one_gives_with_two_batches_a_step(two: Path) -> None:
    alone, history = shared(two, 1)
    first, second = (load_file(two / f"rank{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items() if value.is_floating_point())
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-4, atol=1e-6)
    start = dict(shared(two, 1, steps=1, optimizer=lambda p: torch.optim.SGD(p, 0.0))[0].named_parameters())
    assert max(float((first[name] - start[name]).detach().abs().max()) for name in start) > 0.01
    losses = [list(map(float, (two / f"rank{rank}.txt").read_text().split())) for rank in range(2)]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(history.losses, rel=1e-4)


@pytest.mark.slow
def test_torchs_own_wrapper_around_an_applied_network_gives_the_same(two: Path, tmp_path: Path) -> None:
    for code, text in ended(together("own", tmp_path)):
        assert code == 0, text
    ours, theirs = load_file(two / "rank0.safetensors"), load_file(tmp_path / "own0.safetensors")
    names = [name for name, _ in shared(two, 1, steps=1)[0].named_parameters()]
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_processes_that_are_called_unlike_say_so(tmp_path: Path) -> None:
    for code, text in ended(together("unlike", tmp_path)):
        assert code != 0
        assert "the processes were not called alike: seed (processes" in text


def test_a_process_that_dies_ends_the_other_with_an_error_and_they_go_on_from_the_checkpoint(
    two: Path, tmp_path: Path
) -> None:
    (code, text), (lost, _) = ended(together("lost", tmp_path))
    assert lost == -signal.SIGKILL
    assert code not in (0, -signal.SIGKILL)
    assert "process 0 of 2 waited for the mean of the gradients and lost another process" in text
    for again, said in ended(together("shared", tmp_path)):
        assert again == 0, said
    whole, resumed = load_file(two / "rank1.safetensors"), load_file(tmp_path / "rank1.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_stops_all(tmp_path: Path) -> None:
    (first, text), (second, cause) = ended(together("nan", tmp_path))
    assert first != 0
    assert second != 0
    assert "nan at step 6 of 8" in text
    assert "it came from another process" in text
    assert "nan at step 6 of 8" in cause
    assert "the output of every site is finite, so the loss itself makes it" in cause


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_other_after_the_timeout(tmp_path: Path) -> None:
    processes = together("hung", tmp_path, "timeout=5")
    try:
        text, _ = processes[0].communicate(timeout=200)
        assert processes[0].returncode != 0
        assert "did not answer within the timeout" in text
        assert processes[1].poll() is None  # it hangs still
    finally:
        end(processes)


def test_alone_nothing_is_exchanged() -> None:
    alone = Processes()
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.number(lambda: 2.5, "a number") == 2.5
    assert [x.tolist() for x in alone.all_of(torch.ones(2), "ones")] == [[1.0, 1.0]]
    alone.check_same({"a": "b"})


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_items_of_one_order(world: int) -> None:
    data = [(torch.full((1,), float(i)), torch.zeros(1)) for i in range(7)]
    dataset = torch.utils.data.TensorDataset(torch.arange(7.0)[:, None], torch.zeros(7, 1))
    for loader in (data, torch.utils.data.DataLoader(dataset, shuffle=True)):
        whole = Stream(loader, 5)
        order = [float(next(whole)[0]) for _ in range(5 * world)]
        seen: list[list[float]] = []
        for rank in range(world):
            stream, mine = Stream(loader, 5, share=(rank, world)), []
            torch.rand(rank)  # what the process draws besides changes nothing
            for _ in range(5):
                mine.append(float(next(stream)[0]))
                stream.finish_round()
                assert stream.position.read % world == 0
            seen.append(mine)
        assert [seen[i % world][i // world] for i in range(5 * world)] == order


def test_a_distributed_sampler_would_divide_twice() -> None:
    dataset = torch.utils.data.TensorDataset(torch.zeros(4, 1), torch.zeros(4))
    sampler: torch.utils.data.DistributedSampler[tuple[Tensor, ...]] = torch.utils.data.DistributedSampler(
        dataset, num_replicas=2, rank=0
    )
    loader = torch.utils.data.DataLoader(dataset, sampler=sampler)
    with pytest.raises(bs.DataError, match="every 2th of its items"):
        Stream(loader, 0, share=(0, 2))
    Stream(loader, 0)
