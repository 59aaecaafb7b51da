"""The processes that train one network together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .loop import TrainingError


class Processes:
    """Those of ``torch.distributed``'s default group, or this one alone where none was made.

    Each has a copy of the network, sees items of its own, and takes the mean of all gradients: data parallelism as in
    ``DistributedDataParallel`` (Li et al. 2020, arXiv:2006.15704), by one all-reduce after the backward pass. It knows
    which call talked to the others, so that a process that is lost can be named, and a loss that is not finite in one
    of them stops all. ``rank`` from 0; ``world``: how many.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.world: int = dist.get_world_size() if together else 1
        # NCCL moves memory of its device only
        nccl = together and dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """The mean loss; gradients become their means. A gradient that no process has stays away."""
        if self.world == 1:
            return loss.detach()
        widest = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        grads = [p.grad for p in parameters]
        here = torch.tensor([grad is not None for grad in grads])
        flat = torch.cat(
            [
                loss.detach().reshape(1).to(self._for(parameters), widest),
                here.to(self._for(parameters), widest),
                *((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(widest) for p in parameters),
            ]
        )
        self._told("the mean of the gradients", lambda: dist.all_reduce(flat))
        anywhere = (flat[1 : 1 + len(grads)] > 0).tolist()
        flat = flat.div_(self.world)
        at = 1 + len(grads)
        for parameter, known in zip(parameters, anywhere, strict=True):
            mean = flat[at : at + parameter.numel()].view_as(parameter).to(parameter.dtype)
            at += parameter.numel()
            if known:
                parameter.grad = mean.clone()
        return flat[0].to(loss.dtype)

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        """Buffers in floating point (statistics, ranges) become those of process 0."""
        buffers = [tensor for _, tensor in net.named_buffers() if tensor.is_floating_point()]
        if self.world == 1 or not buffers:
            return
        flat = torch.cat([buffer.detach().reshape(-1).double() for buffer in buffers])
        self._told("the buffers of process 0", lambda: dist.broadcast(flat, 0))
        at = 0
        for buffer in buffers:
            buffer.copy_(flat[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    def number(self, compute: Callable[[], float], what: str) -> float:
        """What process 0 computes, in all of them."""
        if self.world == 1:
            return compute()
        value = torch.tensor([compute() if self.rank == 0 else 0.0], dtype=torch.float64, device=self.device)
        self._told(what, lambda: dist.broadcast(value, 0))
        return float(value)

    def all_of(self, tensor: Tensor, what: str) -> list[Tensor]:
        """The tensors of all processes, which have one shape and type, on the CPU."""
        if self.world == 1:
            return [tensor]
        found = [torch.empty_like(tensor, device=self.device) for _ in range(self.world)]
        self._told(what, lambda: dist.all_gather(found, tensor.to(self.device)))
        return [one.cpu() for one in found]

    def check_same(self, said: Mapping[str, str]) -> None:
        """Raise :class:`TrainingError` where the processes were not called alike, naming what differs."""
        if self.world == 1:
            return
        digests = [hashlib.sha256(value.encode()).digest() for value in said.values()]
        ours = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
        different = set()
        for rank, theirs in enumerate(self.all_of(ours, "the settings of all processes")):
            for name, a, b in zip(said, ours, theirs, strict=True):
                if not torch.equal(a, b):
                    different.add(f"{name} (processes {self.rank} and {rank})")
        if different:
            raise TrainingError(
                f"finetune: the processes were not called alike: {', '.join(sorted(different))} differ. Give each the "
                "same network, plan and settings, seeds included; a checkpoint must lie where all of them see it"
            )

    def _for(self, parameters: Sequence[nn.Parameter]) -> torch.device:
        return parameters[0].device

    def _told(self, what: str, talk: Callable[[], Any]) -> None:
        try:
            talk()
        except RuntimeError as error:
            raise TrainingError(
                f"finetune: process {self.rank} of {self.world} waited for {what} and lost another process, which "
                "ended or did not answer within the timeout that init_process_group(timeout=...) was given. Look at "
                f"what the others wrote; with checkpoint= the same call goes on from the last one. ({error})"
            ) from error
