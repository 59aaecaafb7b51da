"""Noise injection: how much the loss rises when one site is disturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batch_size, first_inputs, items
from ..model.flow import replaced, tensors
from ..model.intercept import instrument
from ..model.network import Network, duplicate, network
from ..model.replay import Call
from ..plan import Plan
from ..prepare._layers import LayerHandler
from ..task import NonFiniteError, Task, mean_loss
from .base import Meter, Pair, Scores


@dataclass(frozen=True)
class NoiseInjection:
    """Rise of the task's mean loss under noise (Schaefer et al. 2023, arXiv:2302.01382, the second of its three
    sensitivities; the normalisation is ours): mean over ``trials`` of ``L(w_l + scale * max|w_l| * n) - L(w)``, n
    standard normal, all other sites as they were. In the loss's own unit; may be negative.

    A site without a weight gets the noise on its output, ``scale * max|y| * n`` with the maximum over the samples. The
    loss is taken over the first calibration items that hold at most ``samples`` samples (at least one item), so it
    costs that many forwards for the float network and for each site and trial. All techniques of a site score the same.

    Raises ``TaskError`` without ``Task(loss=...)`` and ``ValueError`` for impossible settings. Skipped, with the
    reason: sites whose output is not one tensor that can be seen, and those whose loss is not finite under the noise.
    """

    scale: float = 0.05
    trials: int = 1
    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise ValueError(f"NoiseInjection(scale={self.scale}): must be a number above 0")
        if self.trials < 1 or self.samples < 1:
            raise ValueError(f"NoiseInjection(trials={self.trials}, samples={self.samples}): both must be at least 1")

    def __call__(
        self, model: nn.Module, task: Task, pairs: Sequence[Pair], simulate: Callable[[Plan], nn.Module]
    ) -> Scores:
        meter = Meter()
        names = list(dict.fromkeys(site for site, _ in pairs))
        net = network(model, first_inputs(task.calibration), forward=task.forward, names=names)
        task = replace(task, calibration=FirstSamples(task.calibration, self.samples, meter))
        sites = {name: net.record.sites[name] for name in names if name in net.record.sites}
        noise = _Noise(self.scale)
        replica, handler = altered(net, noise.change)
        handler.watch(name for name, site in sites.items() if site.weight is None)
        base = mean_loss(replica, task)
        rises: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for name in names:
            if name not in sites or (sites[name].weight is None and name not in noise.peaks):
                reasons[name] = "it has no weight, and its output is not one tensor that can be seen"
                continue
            handler.watch([name])
            # every site starts from the seed: its score does not depend on which others are asked for
            generator = torch.Generator().manual_seed(self.seed)
            try:
                total = 0.0
                for _ in range(self.trials):
                    noise.draw(generator, sites[name].weight is not None)
                    total += mean_loss(replica, task)
                rises[name] = total / self.trials - base
            except NonFiniteError as error:
                reasons[name] = f"under noise, {error}"
        losses = {pair: rises[pair[0]] for pair in pairs if pair[0] in rises}
        skipped = {pair: reasons[pair[0]] for pair in pairs if pair[0] in reasons}
        below = sum(rise < 0 for rise in rises.values())
        notes = {"below 0": f"noise lowered the loss at {below} of {len(rises)} sites"} if below else {}
        return Scores(losses, skipped=skipped, spent=meter.spent(), notes=notes)


class _Noise:
    """What is put on one site at a time. Until the first :meth:`draw` it only notes the greatest output of each."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.peaks: dict[str, float] = {}
        self.generator: torch.Generator | None = None
        self.on_weight = False
        self._noisy: Tensor | None = None

    def draw(self, generator: torch.Generator, on_weight: bool) -> None:
        """Use new noise from now on: one draw for a weight, one for each sample for an output."""
        self.generator, self.on_weight, self._noisy = generator, on_weight, None

    def change(self, name: str, x: Tensor) -> Tensor:
        if self.generator is None:
            self.peaks[name] = max(self.peaks.get(name, 0.0), float(x.abs().max()) if x.numel() else 0.0)
            return x
        if not self.on_weight:
            # sample by sample, so that the noise does not depend on how they are batched
            drawn = [torch.randn(x.shape[1:], generator=self.generator) for _ in range(len(x) if x.dim() else 1)]
            return x + (self.scale * self.peaks[name]) * torch.stack(drawn).reshape(x.shape).to(x)
        if self._noisy is None:  # a site that is called several times has one weight
            noise = torch.randn(x.shape, generator=self.generator).to(x)
            self._noisy = x + self.scale * x.abs().max() * noise
        return self._noisy


class FirstSamples:
    """The first calibration items that hold at most ``samples`` samples together, whole, at least one; counts what is
    read as forwards. Reads as items ``(inputs, target)``."""

    def __init__(self, loader: Any, samples: int, meter: Meter) -> None:
        self.loader, self.samples, self.meter = loader, samples, meter

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        seen = 0
        for inputs, target in items(self.loader, "calibration"):
            size = batch_size(inputs)
            if seen and seen + size > self.samples:
                return
            seen += size
            self.meter.forwards += size
            yield inputs, target


Change = Callable[[str, Tensor], Tensor]
"""``(site, tensor)`` gives what is computed with in its place."""


class Altering(LayerHandler):
    """The handler that changes the weight of each watched site, or the output of one that has no weight."""

    def __init__(self, net: Network, change: Change) -> None:
        super().__init__(net)
        self.change = change

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        site = self.record_sites[name]
        if site.weight is None:
            target = call.operation.target(call.function, args, kwargs)
            output = call.run(*args, **kwargs)
            if not isinstance(output, Tensor):
                return output
            changed = self.change(name, output)
            # whoever holds the memory that an operation in place has written sees the change
            return changed if target is None or changed is output else target.copy_(changed)
        operands = [x for x in call.operation.split(args, kwargs)[0] if isinstance(x, Tensor)]
        weight = operands[site.operands.index(site.weight)]
        swap = {id(weight): self.change(name, weight)}
        args = replaced(args, iter([swap.get(id(x), x) for x in tensors(args)]))
        kwargs = replaced(dict(kwargs), iter([swap.get(id(x), x) for x in tensors(dict(kwargs))]))
        return call.run(*args, **kwargs)


def altered(net: Network, change: Change) -> tuple[nn.Module, Altering]:
    """A copy of the float network, in eval, and its handler: ``handler.watch(sites)`` says where ``change`` acts."""
    handler = Altering(net, change)
    replica = duplicate(net.model).eval()
    instrument(replica, handler, net.modules)
    return replica, handler
