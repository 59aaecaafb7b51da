"""The proof that a file runs as simulated, held against its bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.data import call, items
from bitsmith.numerics.quantizer import Quantizer
from bitsmith.verify import MARGIN_DB

from .harness import Benchmark, table
from .runtimes import Array, sqnr

ROUNDING = 2.0**-24
"""Greatest relative error of one rounding to float32, here the deviation of normal noise: 0 or 1 unit in the last place
for most values, a few for the others."""


@dataclass(frozen=True)
class Proof:
    """A file against its simulation; the control: the simulation against itself, one rounding apart, in dB."""

    what: str
    check: bs.Check
    control_db: float


def prove(what: str, net: nn.Module, artifact: bs.Artifact, data: Any, target: Any) -> Proof:
    return Proof(what, bs.verify(net, artifact, data, target=target), one_rounding_apart(net, data))


def one_rounding_apart(net: nn.Module, data: Any, samples: int = 256, seed: int = 0) -> float:
    """The simulation against itself with whatever is quantized moved by a rounding error of float32, in dB.

    Two programs that compute the same float operations in another order differ by as much before each quantizer, so
    this is as near as a file can be asked to come, unless its arithmetic is the simulation's bit for bit.
    """
    plain: list[Array] = []
    apart: list[Array] = []
    generator = torch.Generator().manual_seed(seed)
    for inputs, _ in items(data, "verification"):
        if sum(map(len, plain)) >= samples:
            break
        with torch.no_grad():
            plain.append(call(net, inputs)[:samples].numpy())
            with _moved(net, generator):
                apart.append(call(net, inputs)[:samples].numpy())
    return sqnr(plain, apart)


@contextmanager
def _moved(net: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Every quantizer reads what it is given times 1 + noise; who reads one tensor reads it moved alike."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def moved(x: Tensor) -> Tensor:
        if id(x) not in known or known[id(x)][0] is not x:
            noise = torch.randn(x.shape, generator=generator).mul_(ROUNDING).add_(1.0)
            known[id(x)] = x, x * noise
        return known[id(x)][1]

    def into(x: Tensor, target: Tensor, *, quantizer: Quantizer) -> Tensor:
        return target.copy_(quantizer(x))

    with ExitStack() as stack:
        for module in net.modules():
            if isinstance(module, Quantizer):
                stack.callback(module.register_forward_pre_hook(lambda _, given: (moved(given[0]),)).remove)
                # in place it computes without the hook
                stack.enter_context(patch.object(module, "into", partial(into, quantizer=module)))
        yield


def judge_checks(bench: Benchmark, part: str, title: str, proofs: Sequence[Proof]) -> None:
    """One line for each: run against simulation, simulation against float, precisions read back."""
    rows = []
    for what, check, control in ((proof.what, proof.check, proof.control_db) for proof in proofs):
        margin = check.whole_db - check.float_db
        asked = sum(row.asked != str(bs.Float()) for row in check.sites)
        classes = [f"{share:.1%}" if share is not None else "" for share in (check.same_class, check.float_same_class)]
        read_back = f"{asked - len(check.unrealised)} of {asked}"
        decibels = [f"{db:.1f}" for db in (check.whole_db, control, check.float_db)]
        rows.append((what, *decibels, *classes, f"{check.worst_agree:.4f}", read_back))
        bench.row(part, name=what, check=check.to_json(), one_rounding_apart_db=control, sites_asked=asked)
        bench.judge(f"{part}: {what}, run to simulation over simulation to float", margin, MARGIN_DB, " dB", True)
        if check.same_class is not None and check.float_same_class is not None:
            behind = 100 * (check.float_same_class - check.same_class)
            bench.judge(f"{part}: {what}, classes: run as simulation behind simulation as float", behind, 0, " points")
        bench.judge(f"{part}: {what}, sites not read back as asked", len(check.unrealised), 0)
    samples = {proof.check.samples for proof in proofs}
    columns = (
        "",
        "run to simulation, dB",
        "simulation to itself one rounding apart, dB",
        "simulation to float, dB",
        "same class",
        "the same",
        "least within one step",
    )
    table(f"{title}, {min(samples, default=0)} samples", (*columns, "sites read back"), rows)
