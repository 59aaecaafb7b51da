"""The float network with a gate before what each technique would change: at 0 it computes as it was.

At every site ``y = op(x) + sum over techniques of gate * (cell(x) - op(x))``: the derivative by a gate is the first-
order effect of computing that site as the technique would, whatever the site is; all of them come from one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batch_size, call, items, tensors_in
from ..model.apply import computer_of
from ..model.flow import replaced, tensors
from ..numerics.quantizer import Quantizer
from ..plan import Plan
from ..site import Site
from ..task import Task, evaluating
from ..technique import Cell
from .base import Pair


class Gates:
    """``value``: one gate for each sample and pair, [samples, pairs], or one for each pair, [pairs]."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.value = torch.zeros(count)
        self.uneven: set[str] = set()

    def open(self, samples: int | None) -> Tensor:
        """New gates at 0 for a forward of so many samples (None: one gate for all of them)."""
        shape = (self.count,) if samples is None else (samples, self.count)
        self.value = torch.zeros(shape, requires_grad=True)
        return self.value

    def of(self, index: int, like: Tensor, site: str) -> Tensor:
        """The gates of one pair, shaped to multiply ``like``, whose first axis should be the samples."""
        if self.value.ndim == 1:
            return self.value[index]
        gate = self.value[:, index]
        if like.ndim and len(like) == len(gate):
            return gate.reshape(-1, *(1,) * (like.ndim - 1))
        if len(gate) > 1:
            self.uneven.add(site)
        return gate.mean()


class _Gated(Cell):
    """A site behind its gates. ``cells``: (index of the gate, the technique's cell)."""

    def __init__(self, site: Site, cells: Sequence[tuple[int, Cell]], gates: Gates, host: nn.Module) -> None:
        super().__init__(site)
        self.inner = tuple(cells)  # a tuple keeps them out of this module's state
        self.gates = gates
        # a normalisation that one cell absorbs is absorbed for all: what is compared is behind it
        if site.fold is not None and any(cell.norm for _, cell in cells):
            self.norm = (host.get_submodule(site.fold.module),)

    def forward(self, *operands: Any, **rest: Any) -> Any:
        module = rest.get("inner")
        output = self.op(*operands, **rest) if module is None else module(*operands, **_without(rest))
        if self.norm:
            output = self.norm[0](output)
        made = list(tensors(output))
        for index, cell in self.inner:
            with torch.no_grad():
                other = cell(*(x.detach() if isinstance(x, Tensor) else x for x in operands), **rest)
                if self.norm and not cell.norm:
                    other = self.norm[0](other)
            for k, (exact, changed) in enumerate(zip(list(made), tensors(other), strict=True)):
                if exact.is_floating_point():
                    gate = self.gates.of(index, exact, self.site)
                    made[k] = exact + gate * (changed - exact).detach()
        return made[0] if isinstance(output, Tensor) else replaced(output, iter(made))


def _without(rest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rest.items() if name != "inner"}


@dataclass(frozen=True)
class GatedNetwork:
    """``net``: computes like the float model while the gates are 0. ``techniques``: how many a site has at most."""

    net: nn.Module
    gates: Gates
    techniques: int


def gated(pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]) -> GatedNetwork:
    """The network behind gates, one for each pair in order."""
    by_technique: dict[Any, dict[str, int]] = {}
    for index, (site, technique) in enumerate(pairs):
        by_technique.setdefault(technique, {})[site] = index
    gates = Gates(len(pairs))
    host: nn.Module | None = None
    cells: dict[str, list[tuple[int, Cell]]] = {}
    for technique, sites in by_technique.items():
        net = simulate(Plan(dict.fromkeys(sites, technique)))
        computer = computer_of(net)
        for site, index in sites.items():
            cell = computer.cells[site]
            assert isinstance(cell, Cell)
            # alone behind its gate, a cell gets tensors that nobody has quantized for it
            cell.attach(cell.quantizers, tuple(q is not None for q in cell.quantizers), cell.norm)
            cells.setdefault(site, []).append((index, cell))
        host = host or net
    if host is None:
        raise ValueError("gated(pairs=[]): there is nothing to score")
    computer = computer_of(host)
    for site, inner in cells.items():
        found = _Gated(computer.record_sites[site], inner, gates, host)
        computer.cells[site] = found
        fold = computer.record_sites[site].fold
        if found.norm and fold is not None:
            computer.fold(fold.site, found.norm[0])
    computer.writes.clear()
    computer.written.clear()
    computer.watch({*cells, *computer.folded})
    for parameter in host.parameters():
        parameter.requires_grad_(False)
    for module in host.modules():
        if isinstance(module, Quantizer):
            module.reset()
    return GatedNetwork(host, gates, len(by_technique))


@dataclass(frozen=True)
class Batch:
    """What one forward behind open gates gave: ``output`` of the model, ``logits`` (its first tensor), ``target``."""

    output: Any
    logits: Tensor
    target: Any
    size: int


@contextmanager
def differentiable(net: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients, through operations that have second derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with evaluating(net), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def batches(network: GatedNetwork, task: Task, samples: int, per_sample: bool) -> Iterator[tuple[Batch, Tensor]]:
    """Forwards of the first ``samples`` calibration samples, each with its open gates.

    Sample by sample from where a gated site's output turns out not to have the samples along its first axis.
    """
    left = samples
    for inputs, target in items(task.calibration, "calibration"):
        size = batch_size(inputs)
        taken = min(size, left)
        inputs, target = _cut(inputs, size, 0, taken), _cut(target, size, 0, taken)
        if per_sample and network.gates.uneven:
            parts = [(_cut(inputs, taken, k, k + 1), _cut(target, taken, k, k + 1)) for k in range(taken)]
        else:
            parts = [(inputs, target)]
        while parts:
            part_inputs, part_target = parts.pop(0)
            count = batch_size(part_inputs)
            gate = network.gates.open(count if per_sample else None)
            output = call(network.net, part_inputs, task.forward)
            if per_sample and network.gates.uneven and count > 1:
                parts = [(_cut(inputs, taken, k, k + 1), _cut(target, taken, k, k + 1)) for k in range(taken)]
                continue
            logits = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
            if logits is None:
                raise ValueError("the model's output has no floating-point tensor: there is nothing to differentiate")
            yield Batch(output, logits, part_target, count), gate
        left -= taken
        if left <= 0:
            return


def _cut(value: Any, size: int, first: int, last: int) -> Any:
    """Samples ``first`` to ``last`` of every tensor that has ``size`` of them."""
    if isinstance(value, Tensor):
        return value[first:last] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {key: _cut(item, size, first, last) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, size, first, last) for item in value)
    return value
