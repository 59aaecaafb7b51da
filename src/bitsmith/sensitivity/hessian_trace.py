"""Hessian trace: the mean curvature of the loss along a layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import batch_size, call, device_of, first_inputs, to_device
from ..model.network import Network, network
from ..plan import Plan
from ..task import NonFiniteError, Task, TaskError, evaluating
from .base import Meter, Pair, Scores
from .noise import FirstSamples, altered
from .quantization_error import roundings

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class HessianTrace:
    """``Tr(H_ll) / n_l`` of the task's mean loss by a layer's n_l weights, times ``||Q(w_l) - w_l||^2`` if ``weighted``
    (HAWQ-V2, Dong et al. 2020, arXiv:1911.03852; without it the third sensitivity of arXiv:2302.01382).

    Estimated after Hutchinson 1990 (doi:10.1080/03610919008812866): the mean of ``v_l . (H v)_l`` with v of random
    signs for all weights at once, so that one Hessian-vector product serves every layer. Each vector sees the same
    samples: all of the first calibration items that hold at most ``samples`` together (at least one item), its products
    added up over the batches. So the estimates of different vectors are independent draws around the trace on these
    samples, and their spread is an honest standard error of it; with a new vector for every batch, differences between
    batches would be mixed in, and the first batches would count more. How the trace would differ on other samples it
    does not say.

    Vectors are drawn until the standard error of the sum over layers is below ``tolerance`` of that sum, ``least`` to
    ``most`` of them; ``notes`` say which, and that of the worst layer. A sum near 0 never settles. Each vector costs
    one forward and two backwards of the samples. The network is in eval, with composites (attention, LSTM) taken apart:
    their fused operations have no second derivative.

    In the loss's own unit if ``weighted`` (twice the rise that the mean curvature predicts), else in that unit per
    squared weight. Weights only: what a technique does to activations does not count. Sites that read one parameter
    share its trace. The loss of a negative trace is given as 0, and ``notes`` count them. Skipped, with the reason:
    sites without a weight, and where ``Q(w)`` cannot be seen.

    Raises ``TaskError`` without ``Task(loss=...)`` or for a loss without a gradient, ``NonFiniteError`` for NaN in the
    loss, ``ValueError`` for impossible settings.
    """

    tolerance: float = 0.05
    most: int = 64
    least: int = 4
    samples: int = 256
    seed: int = 0
    weighted: bool = True

    def __post_init__(self) -> None:
        if not self.tolerance > 0.0:
            raise ValueError(f"HessianTrace(tolerance={self.tolerance}): must be above 0")
        if not 2 <= self.least <= self.most:
            raise ValueError(
                f"HessianTrace(least={self.least}, most={self.most}): a standard error needs 2 vectors or more, and "
                "least must not exceed most"
            )
        if self.samples < 1:
            raise ValueError(f"HessianTrace(samples={self.samples}): must be at least 1")

    def __call__(
        self, model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]
    ) -> Scores:
        if task.loss is None:
            raise TaskError("HessianTrace needs Task(loss=...), such as torch.nn.functional.cross_entropy")
        meter = Meter()
        names = dict.fromkeys(site for site, _ in pairs)
        net = network(model, first_inputs(task.calibration), forward=task.forward, names=names, inside=True)
        layers = {name: key for name in names if (key := _key(net, name)) is not None}
        skipped = {pair: "it has no weight" for pair in pairs if pair[0] not in layers}
        if not layers:
            return Scores({}, skipped=skipped, spent=meter.spent())
        limited = replace(task, calibration=FirstSamples(task.calibration, self.samples, meter))
        keys = list(dict.fromkeys(layers.values()))
        traces, notes = self._estimate(net, limited, layers, keys, meter)
        curvature = dict(zip(keys, traces / [_weight(net, layers, key).numel() for key in keys], strict=True))
        scored = [pair for pair in pairs if pair[0] in layers]
        found = roundings(task, scored, simulate, meter) if self.weighted else {}
        losses: dict[Pair, float] = {}
        for pair in scored:
            trace = float(curvature[layers[pair[0]]])
            error = found[pair].error if self.weighted else None
            if self.weighted and error is None:
                skipped[pair] = found[pair].reason
            elif not np.isfinite(loss := trace if error is None else trace * error.squared):
                skipped[pair] = "its trace or its quantization error is not finite"
            else:
                losses[pair] = max(loss, 0.0)
        return Scores(losses, skipped=skipped, spent=meter.spent(), notes=notes)

    def _estimate(
        self, net: Network, task: Task, layers: Mapping[str, str], keys: Sequence[str], meter: Meter
    ) -> tuple[Numbers, dict[str, str]]:
        """The trace of every key, NaN where one is not finite, and what a report should say of them."""
        weights = [_weight(net, layers, key) for key in keys]
        # where H is taken: what is added to the weights, so that a weight that is computed from others is one too
        leaves = {key: torch.zeros_like(w, requires_grad=True) for key, w in zip(keys, weights, strict=True)}
        replica, handler = altered(net, lambda name, weight: weight + leaves[layers[name]])
        handler.watch(layers)
        replica.requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed)
        rows: list[list[float]] = []
        while len(rows) < self.most:
            signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
            rows.append(_products(replica, task, list(leaves.values()), signs, meter))
            draws = np.array(rows)
            finite = np.isfinite(draws).all(0)
            error = float(_relative_error(draws[:, finite].sum(1)[:, None])[0])
            if len(rows) >= self.least and error < self.tolerance:
                break
        traces, spread = np.full(len(keys), np.nan), np.full(len(keys), -1.0)
        traces[finite], spread[finite] = draws[:, finite].mean(0), _relative_error(draws[:, finite])
        notes = {
            "vectors": f"{len(rows)} (at most {self.most}); standard error of the sum of traces: {error:.1%} of it, "
            f"{'below' if error < self.tolerance else 'not below'} {self.tolerance:.1%}"
        }
        if finite.any():
            worst = int(spread.argmax())
            notes["worst layer"] = f"{keys[worst]}: standard error of {spread[worst]:.1%} of its trace"
        below = int((traces < 0).sum())
        if below:
            notes["below 0"] = f"{below} of {len(keys)} traces are negative: their loss is given as 0"
        return traces, notes


def _key(net: Network, name: str) -> str | None:
    """What names the weight of a site: its parameter, so that all its readers share it, else the site itself."""
    site = net.record.sites.get(name)
    if site is None or site.weight is None:
        return None
    return site.weight.key or name


def _weight(net: Network, layers: Mapping[str, str], key: str) -> Tensor:
    name = next(name for name, its in layers.items() if its == key)
    site = net.record.sites[name]
    assert site.weight is not None
    return net.record.weights[name, site.operands.index(site.weight)]


def _products(
    net: nn.Module, task: Task, leaves: Sequence[Tensor], signs: Sequence[Tensor], meter: Meter
) -> list[float]:
    """``v_l . (H v)_l`` of every leaf, H of the mean loss over all calibration samples."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert task.loss is not None
    totals, samples = [0.0] * len(leaves), 0
    with evaluating(net), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for index, (inputs, target) in enumerate(task.calibration):
            loss = task.loss(call(net, inputs, task.forward), to_device(target, device_of(net)))
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise TaskError("HessianTrace needs a loss(output, target) that is one number with a gradient")
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"calibration item {index}: the loss is {float(loss.detach())}")
            try:
                slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                along = torch.stack([(slope * v).sum() for slope, v in zip(slopes, signs, strict=True)]).sum()
                # a loss that is linear in the weights has no second derivative to ask for
                products = torch.autograd.grad(along, leaves, materialize_grads=True) if along.requires_grad else ()
            except RuntimeError as error:
                if "derivative" in str(error):
                    error.add_note("HessianTrace needs second derivatives of every operation behind a scored weight")
                raise
            size = len(target) if isinstance(target, Tensor) else batch_size(inputs)
            meter.backwards += 2 * batch_size(inputs)
            samples += size
            for k, (product, v) in enumerate(zip(products, signs, strict=False)):
                totals[k] += size * float((product * v).sum(dtype=torch.float64))
    return [total / samples for total in totals]


def _relative_error(draws: Numbers) -> Numbers:
    """Standard error of the mean over the first axis of [draws, n], as a part of that mean: [n]."""
    if len(draws) < 2:
        return np.full(draws.shape[1], np.inf)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    relative: Numbers = np.where(error > 0, np.inf, 0.0)
    mean = np.abs(draws.mean(0))
    np.divide(error, mean, out=relative, where=mean > 0)
    return relative
