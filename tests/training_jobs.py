"""Trainings that tests run in processes of their own: killed, gone on with, several at once.

``python -m training_jobs JOB FOLDER [OPTION=VALUE ...]``; the final values are written to ``FOLDER/NAME.safetensors``.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitsmith as bs
from bitsmith.learn.state import tensors_of
from smallnet import batches, small, task

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Of processes that are compared: sums have another order with more, and rounding makes steps of last bits."""

PLAN = bs.Plan({"left": bs.Int(4, 4), "right": bs.Int(8, 8), "head": bs.Float()})


class Notes:
    """A progress that keeps what is said, and nothing else."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def start(self, task: str, total: int | None = None) -> None:
        return None

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        self.notes.append(text)


class Dropping(nn.Module):
    """The small network behind dropout: it draws random numbers while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = small(steps=20), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.drop(x))
        return logits


class Augmented:
    """A shuffling loader that also draws by item; it kills its process at an item if told to."""

    def __init__(self, kill_at: int = -1) -> None:
        data = batches(6, seed=5)
        dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
        self.loader = DataLoader(dataset, batch_size=16, shuffle=True)
        self.kill_at, self.given = kill_at, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            if self.given == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.given += 1
            yield x + 0.05 * torch.randn_like(x), y


def resumable(folder: Path, kill_at: int = -1, **changes: Any) -> tuple[nn.Module, bs.History]:
    """Everything that must come back after a kill: int and Winograd cells, dropout, an average, a best, a schedule."""
    model = Dropping()
    plan = bs.Plan({"net.left": bs.Int(4, 4), "net.right": bs.Winograd(2), "net.head": bs.Float()})
    net = bs.apply(model, plan, batches(2, seed=2))
    history = bs.History()
    trained = bs.finetune(
        *(net, Augmented(kill_at), F.cross_entropy),
        **{
            "steps": 20,
            "teacher": model,
            "lr": 1e-3,
            "schedule": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps),
            "groups": {"net.head.*": {"weight_decay": 0.01}},
            "accumulate": 2,
            "clip_norm": 1.0,
            "ema": 0.8,
            "freeze_norms": False,
            "reestimate": 3,
            "validation": task(),
            "validate_every": 3,
            "checkpoint": folder / "training.safetensors",
            "every": 4,
            "history": history,
            "seed": 3,
            **changes,
        },
    )
    return trained, history


def shared(folder: Path, world: int, **changes: Any) -> tuple[nn.Module, bs.History]:
    """The small network under a plan, on items that processes share."""
    model = small(steps=20)
    net = bs.apply(model, PLAN, batches(2, seed=2))
    history = bs.History()
    trained = bs.finetune(
        *(net, batches(5, seed=6), F.cross_entropy),
        **{
            "steps": 8,
            "accumulate": 2 // world,
            "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
            "history": history,
            **changes,
        },
    )
    return trained, history


LEARNED = bs.Int(5, 5, learn=bs.Learn("step_range"), weight_learn=bs.Learn("step_range"))


def learned(folder: Path, world: int = 1, kill_at: int = -1, **changes: Any) -> bs.LearnedPrecision:
    """Bits that are learned while the network trains."""
    model = small(steps=20)
    net = bs.apply(model, bs.Plan(dict.fromkeys(("stem", "left", "right", "head"), LEARNED)), batches(2, seed=2))
    return bs.learn_precision(
        *(net, Augmented(kill_at) if world == 1 and "accumulate" not in changes else batches(5, seed=6)),
        **{
            "loss": F.cross_entropy,
            "steps": (4, 6, 4),
            "total": 0.7 * float(bs.learned_sizes(net).total.detach()),
            "lr": 1e-3,
            "grid_lr": 0.05,
            "freeze_norms": False,
            "checkpoint": folder / "learned.safetensors",
            "every": 3,
            "seed": 3,
            **changes,
        },
    )


def write(net: nn.Module, path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors_of(net).items()}, path)


def join(folder: Path, job: str, seconds: float = 60) -> tuple[int, int]:
    """Enter the process group that ``torchrun`` set in the environment; without its port, meet by a file of this job.

    A port that is free when it is chosen may be taken when it is used; a file of this job's folder is nobody else's.
    """
    meeting = "env://"
    if "MASTER_PORT" not in os.environ:
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        meeting = f"{(folder / f'{job}.meeting').absolute().as_uri()}?rank={rank}&world_size={world}"
    torch.distributed.init_process_group("gloo", meeting, timeout=datetime.timedelta(seconds=seconds))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def main() -> None:
    job, folder = sys.argv[1], Path(sys.argv[2])
    options = dict(argument.split("=") for argument in sys.argv[3:])
    if job == "kill":
        net, _ = resumable(folder, int(options["at"]))
        write(net, folder / "killed.safetensors")
        return
    if job == "kill learned":
        changes = {"grid_lr": 0.2, "strength": 1e4} if options["method"] == "penalty" else {"moves": 2}
        learned(folder, 1, int(options["at"]), method=options["method"], **changes)
        return
    rank, world = join(folder, job, float(options.get("timeout", 60)))
    if job == "shared":
        net, history = shared(folder, world, checkpoint=folder / "shared.safetensors", every=3)
        write(net, folder / f"rank{rank}.safetensors")
        (folder / f"rank{rank}.txt").write_text(" ".join(map(repr, history.losses)))
    elif job == "learned":
        found = learned(folder, world, moves=2, freeze_norms=True)
        write(found.net, folder / f"learned{rank}.safetensors")
    elif job == "own":
        own_loop(folder, rank)
    elif job == "unlike":
        shared(folder, world, seed=rank)
    elif job == "lost":
        kept = {"checkpoint": folder / "shared.safetensors", "every": 3}
        shared(folder, world, forward=Stopping(rank, signal.SIGKILL), **kept)
    elif job == "hung":
        shared(folder, world, forward=Stopping(rank, signal.SIGSTOP))
    elif job == "nan":
        shared(folder, world, forward=Stopping(rank, None))
    torch.distributed.barrier()  # none closes its connections while another still uses them
    torch.distributed.destroy_process_group()


class Stopping:
    """A ``forward`` that in the sixth call of process 1 sends it a signal, or gives NaN."""

    def __init__(self, rank: int, stop: signal.Signals | None) -> None:
        self.rank, self.stop, self.calls = rank, stop, 0

    def __call__(self, model: nn.Module, inputs: Any) -> Any:
        self.calls += 1
        if self.rank == 1 and self.calls >= 6:
            if self.stop is None:
                return model(inputs) * torch.nan
            os.kill(os.getpid(), self.stop)
        return model(inputs)


def own_loop(folder: Path, rank: int) -> None:
    """The user's own loop, with torch's DistributedDataParallel around an applied network."""
    net = bs.apply(small(steps=20), PLAN, batches(2, seed=2)).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    parallel = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, momentum=0.9)
    data = batches(5, seed=6)
    for step in range(8):
        for cell in bs_cells(net):
            cell.step(step, 8)
        x, y = data[(2 * step + rank) % 5]
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
    write(net.eval(), folder / f"own{rank}.safetensors")


def bs_cells(net: nn.Module) -> list[bs.Cell]:
    return [module for module in net.modules() if isinstance(module, bs.Cell)]


if __name__ == "__main__":
    main()
