"""Statistics of the tensors that a plan quantizes, streamed over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import call, items
from ..numerics.statistics import NonFiniteError, TensorStatistics
from ..site import Format
from ..technique import Observer, Statistic
from .flow import tensors
from .formats import Read
from .intercept import instrument
from .network import Network, duplicate
from .replay import Call, Names


class CalibrationError(ValueError):
    """Calibration data or a network that gives no usable ranges."""


class _Observer(Names):
    """The handler that feeds statistics while the float network runs, or what ``inner`` makes of it."""

    def __init__(
        self,
        net: Network,
        wanted: Mapping[str, TensorStatistics],
        observed: Mapping[tuple[Read, Observer], Statistic],
        inner: Names | None = None,
    ) -> None:
        super().__init__(net)
        record, self.inner = net.record, inner
        self.observed: dict[str, list[tuple[int, Statistic]]] = {}
        for ((site_name, index), _), statistic in observed.items():
            self.observed.setdefault(site_name, []).append((index, statistic))
        self.reads: dict[str, list[tuple[int, str]]] = {}
        self.writes: dict[str, list[tuple[int, str]]] = {}
        self.statistics = wanted
        for tensor in wanted:
            info = record.tensors[tensor]
            if info.producer:
                at = record.sites[info.producer].writes.index(tensor)
                self.writes.setdefault(info.producer, []).append((at, tensor))
            else:
                # read by several sites, it is watched at each: extremes are the same, a histogram is only scaled
                for site in record.sites.values():
                    for index, operand in enumerate(site.operands):
                        if operand.tensor == tensor:
                            self.reads.setdefault(site.name, []).append((index, tensor))
                            break
                    else:
                        continue
                    break
        self.busy = frozenset() if inner is None else inner.watched
        self.watch({*self.reads, *self.writes, *self.observed, *self.busy})

    def begin(self, inputs: Mapping[str, Any]) -> None:
        if self.inner is not None:
            self.inner.begin(inputs)

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if name in self.reads or name in self.observed:
            operands, _ = call.operation.split(args, kwargs)
            self._read(name, [t for t in operands if isinstance(t, Tensor)])
        inner = self.inner if name in self.busy else None
        output = call.run(*args, **kwargs) if inner is None else inner.compute(name, call, args, kwargs)
        self._made(name, output)
        return output

    def compute_module(
        self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        self._read(name, [*tensors(args), *tensors(dict(kwargs))])
        within = self.inner if name in self.busy else None
        output = inner(*args, **kwargs) if within is None else within.compute_module(name, inner, args, kwargs)
        self._made(name, output)
        return output

    def _read(self, name: str, given: Sequence[Tensor]) -> None:
        for index, tensor in self.reads.get(name, ()):
            self._see(tensor, self.statistics[tensor], given[index])
        for index, statistic in self.observed.get(name, ()):
            self._see(f"{name}<{index}", statistic, given[index])

    def _made(self, name: str, output: Any) -> None:
        wanted = self.writes.get(name)
        if wanted:
            made = list(tensors(output))
            for index, tensor in wanted:
                self._see(tensor, self.statistics[tensor], made[index])

    def _see(self, tensor: str, statistic: Statistic, value: Tensor) -> None:
        try:
            statistic.update(value)
        except NonFiniteError as error:
            raise CalibrationError(
                f"the tensor {tensor!r} holds {error} on the calibration data; the model must be finite in float "
                "before it can be quantized (check its weights and the scaling of its inputs)"
            ) from None


def calibrate(
    net: Network,
    wanted: Iterable[tuple[str, Format] | tuple[Read, Observer]],
    data: Any,
    progress: Callable[[int], None] | None = None,
    running: Callable[[], nn.Module] | None = None,
) -> dict[Any, Any]:
    """Statistics of each wanted tensor over ``data`` (items ``(inputs, target)``), in eval mode, without gradients.

    ``running``: gives an instrumented network to watch in place of the float one; asked only if anything is missing.

    By tensor name for (tensor, format); by ((site, operand), observer) for what a technique's observer collects there.
    Memory does not grow with the number of samples. Statistics that the record already holds are kept and only the
    missing ones collected. Raises ``CalibrationError`` for NaN or infinite activations.
    """
    known: dict[Any, Any] = dict(net.record.statistics)
    needed: dict[str, bool] = {}
    observed: dict[tuple[Read, Observer], Statistic] = {}
    for where, what in wanted:
        if isinstance(what, Format):
            tensor, histogram = str(where), what.range.needs_histogram
            have = known.get(tensor)
            if have is None or (histogram and have.histogram is None):
                needed[tensor] = needed.get(tensor, False) or histogram
        elif not isinstance(where, str) and (where, what) not in known:
            observed[where, what] = what.start()
    if not needed and not observed:
        return known
    fresh = {tensor: TensorStatistics(histogram=histogram) for tensor, histogram in needed.items()}
    if running is None:
        replica = duplicate(net.model).eval()
        instrument(replica, _Observer(net, fresh, observed), net.modules)
    else:
        replica = running().eval()
        interceptor = replica.__dict__["_interceptor"]
        interceptor.handler = _Observer(net, fresh, observed, interceptor.handler)
    with torch.no_grad():
        for done, (inputs, _) in enumerate(items(data, "calibration"), start=1):
            call(replica, inputs, net.forward)
            if progress is not None:
                progress(done)
    unseen = [tensor for tensor, statistics in fresh.items() if not statistics.count]
    unseen += [f"{site}<{index}" for ((site, index), _), statistic in observed.items() if not statistic.count]
    if unseen:
        raise CalibrationError(
            f"the calibration data never reached {', '.join(unseen[:5])}: the model took another branch than on the "
            "example; give calibration data like the example"
        )
    return {**known, **fresh, **observed}


def check_weights(model: nn.Module) -> None:
    """Raise if a parameter or buffer is NaN or infinite, naming it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(f"the weight {name!r} holds NaN or infinity; mend the checkpoint first")
