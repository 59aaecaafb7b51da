"""SparseGpt: weights that are left out, the others making up for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data import batch_size
from ..model.network import Network
from ..numerics.masks import largest, left
from ..plan import Plan
from ..prepare._layers import layers, tensor_at
from ..prepare._sequential import Lanes, first_samples, patches, paused, positions
from ..prepare.gptq import inverse_factor
from ..technique import PrepareError, Step, Technique
from .sparse import Sparse


@dataclass(frozen=True)
class SparseGpt(Step):
    """One-shot pruning with reconstruction (Frantar and Alistarh 2023, SparseGPT, arXiv:2301.00774, algorithm 1).

    For sites under :class:`Sparse`, by itself or inside ``Palette(of=...)`` and ``Int(of=...)``. Layer by layer in
    execution order, column by column as in :class:`Gptq`: what leaving a weight out costs in the layer's output is
    taken back by the columns behind it. With the Hessian ``H = 2 X X' + damp mean(diag) I`` of the rows X that the
    pruned layers before give and U the upper Cholesky factor of its inverse, those of least ``w^2 / U_jj^2`` go: of
    single weights in each ``block`` of columns the same part, with ``n:m`` the least of each ``m``, of kernels and
    blocks those of least sum, chosen before the first column. Columns are ordered by kernel position, then channel.

    At most ``samples`` samples and ``rows`` of their output positions make up X. Layers that are called once and share
    their weight with nobody; others are pruned by magnitude. Raises ``PrepareError`` where there is none.
    """

    values_only: ClassVar[bool] = True

    damp: float = 0.01
    block: int = 128
    samples: int = 256
    rows: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "samples", "rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"SparseGpt({name}={getattr(self, name)!r}): must be a whole number, 1 or more")
        if not self.damp > 0:
            raise ValueError(f"SparseGpt(damp={self.damp}): must be above 0, or H may have no inverse")

    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        own = layers(net.record)
        found = {
            name: (own[name], sparse)
            for name, technique in plan.sites.items()
            if name in own and (sparse := sparse_of(technique)) is not None
        }
        if not found:
            raise PrepareError(
                "SparseGpt: the plan puts Sparse(...) at no convolution or linear layer that is called once and shares "
                "its weight with nobody; give such sites one, or leave the step out"
            )
        inputs = list(first_samples(data, self.samples))
        sizes = [batch_size(item) for item in inputs]
        share = [max(1, round(self.rows * size / sum(sizes))) for size in sizes]
        order = [name for name in net.record.sites if name in found]
        seen = set()
        with Lanes() as lanes:
            pruned = paused(net, found, lanes)
            for index, item in enumerate(inputs):
                lanes.add(("pruned", index), pruned, item, net.forward)
            for name, waiting in lanes.run(order):
                layer, sparse = found[name]
                generator = torch.Generator().manual_seed(self.seed)
                rows = [
                    patches(layer.site, x, positions(layer.site, x, share[index], generator))
                    for (_, index), x in sorted(waiting.items())
                ]
                weight = self.pruned(tensor_at(net.model, layer.key).detach(), torch.cat(rows, 1), sparse)
                with torch.no_grad():
                    for model in (net.model, pruned):
                        tensor_at(model, layer.key).copy_(weight)
                seen.add(name)
        if len(seen) < len(found):
            raise PrepareError(
                f"SparseGpt: the calibration data never reached {', '.join(sorted(set(found) - seen)[:5])}; give data "
                "like the example"
            )
        return net.with_model(net.model)

    def pruned(self, weight: Tensor, x: Tensor, sparse: Sparse) -> Tensor:
        """The weight with zeros where ``sparse`` will leave it out. ``x``: (groups, rows, inputs x kernel)."""
        groups, outputs, inputs = len(x), weight.shape[0], weight.shape[1]
        kernel = math.prod(weight.shape[2:])
        # by kernel position, then input channel
        free = weight.float().reshape(groups, outputs // groups, inputs, kernel).transpose(2, 3).flatten(2).clone()
        x = x.reshape(groups, -1, inputs, kernel).transpose(2, 3).flatten(2)
        factor = inverse_factor(torch.bmm(x.mT, x).mul_(2).double(), self.damp)
        felt = factor.diagonal(dim1=1, dim2=2)[:, None]
        whole = self._structure(free / felt, weight, sparse)
        width, m = free.shape[-1], sparse.m if sparse.granularity == "n:m" else 1
        # parts of n:m never reach beyond a block
        step = -(-self.block // m) * m
        done = 0
        for start in range(0, width, step):
            here = slice(start, min(start + step, width))
            part, inner = free[:, :, here].clone(), factor[:, here, here]
            mask = whole[:, :, here].clone()
            if sparse.granularity == "weight":
                stays = left(free[:, :, : here.stop].numel(), sparse.density) - done
                mask = _top(part / felt[:, :, here], stays)
                done += stays
            errors = torch.empty_like(part)
            for j in range(part.shape[-1]):
                if m > 1 and j % m == 0:
                    size = (part[:, :, j : j + m] / felt[:, :, start + j : start + j + m]).abs()
                    chosen = size.topk(round(sparse.density * m), dim=2).indices
                    mask[:, :, j : j + m] = torch.zeros_like(size).scatter_(2, chosen, 1.0)
                kept = part[:, :, j] * mask[:, :, j]
                errors[:, :, j] = (part[:, :, j] - kept) / inner[:, j, j, None]
                part[:, :, j + 1 :].baddbmm_(errors[:, :, j, None], inner[:, None, j, j + 1 :], alpha=-1)
                part[:, :, j] = kept
            free[:, :, here] = part
            free[:, :, here.stop :].baddbmm_(errors, factor[:, here, here.stop :], alpha=-1)
        return free.reshape(groups, -1, kernel, inputs).transpose(2, 3).reshape(weight.shape).to(weight.dtype)

    def _structure(self, size: Tensor, weight: Tensor, sparse: Sparse) -> Tensor:
        """Ones, or which kernels and blocks stay by the size that leaving them out has, columns in their order."""
        if sparse.granularity not in ("kernel", "block"):
            return torch.ones_like(size)
        kernel = math.prod(weight.shape[2:])
        straight = size.reshape(len(size), -1, kernel, weight.shape[1]).transpose(2, 3).reshape(weight.shape)
        mask = largest(straight, sparse.density, sparse.granularity, sparse.block, sparse.m).to(size.dtype)
        along = mask.expand(weight.shape).reshape(len(size), -1, weight.shape[1], kernel)
        return along.transpose(2, 3).flatten(2)


def sparse_of(technique: Technique | None) -> Sparse | None:
    """The pruning that stands in a technique, or is it."""
    while technique is not None and not isinstance(technique, Sparse):
        technique = getattr(technique, "of", None)
    return technique


def _top(size: Tensor, count: int) -> Tensor:
    kept = torch.zeros(size.numel(), dtype=size.dtype)
    if count > 0:
        kept[size.abs().flatten().topk(min(count, size.numel())).indices] = 1
    return kept.reshape(size.shape)
