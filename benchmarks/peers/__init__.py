"""The peers' post-training quantization of a torch model, set up as their own documentation does, and a check of it.

Each builder takes a float model in eval and calibration batches and returns a model that simulates int8 in float. The
peers come from the ``peers`` extra: ``pip install -c constraints.txt -e ".[peers]"``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Build = Callable[[nn.Module, Sequence[Tensor]], Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Peer:
    """``package``: its distribution. ``settings``: what was chosen, for the table."""

    name: str
    package: str
    settings: str
    build: Build

    @property
    def version(self) -> str:
        """Raises ``importlib.metadata.PackageNotFoundError`` where it is not installed."""
        return importlib.metadata.version(self.package)


def nncf(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """``nncf.quantize`` on the torch model: fake quantizers in front of the operations."""
    import nncf as library

    logging.getLogger("nncf").setLevel(logging.ERROR)
    data = library.Dataset(list(batches))
    quantized: nn.Module = library.quantize(
        copy.deepcopy(model), data, subset_size=len(batches), target_device=library.TargetDevice.CPU
    )
    return quantized.eval()


def nncf_stripped(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """The same after ``nncf.strip``: its quantizers become torch's own ``FakeQuantize``, weights are quantized once."""
    import nncf as library

    quantized: Any = nncf(model, batches)
    stripped: nn.Module = library.strip(
        quantized, strip_format=library.StripFormat.NATIVE, example_input=batches[0], do_copy=True
    )
    return stripped.eval()


def torchao(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """PT2E: ``torch.export``, ``prepare_pt2e`` with the x86 quantizer, ``convert_pt2e``; run in eager."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    # the batch size stays free, so that one graph serves calibration, the check and the timing
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(copy.deepcopy(model), (batches[0],), dynamic_shapes=dynamic).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted: Callable[[Tensor], Any] = convert_pt2e(prepared)
    return converted


def brevitas(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """``preprocess_for_quantize`` (folds the normalisation), ``quantize``, calibration."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    quantized: nn.Module = quantize(preprocess_for_quantize(copy.deepcopy(model)))
    with torch.no_grad(), calibration_mode(quantized):
        for batch in batches:
            quantized(batch)
    return quantized.eval()


def brevitas_inference(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[Tensor], Any]:
    """The same in ``quant_inference_mode``, its fast path for frozen models, weights cached."""
    from brevitas.export.inference.manager import quant_inference_mode

    quantized: Any = brevitas(model, batches)
    quant_inference_mode(quantized, cache_quant_weight=True).__enter__()  # for good: this copy does nothing else
    with torch.no_grad():
        quantized(batches[0])  # the first forward fills the caches
    fast: nn.Module = quantized
    return fast


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("nncf", "nncf", "quantize(), CPU preset, its C++ extension", nncf),
        Peer("nncf stripped", "nncf", "the same after strip(NATIVE)", nncf_stripped),
        Peer("torchao", "torchao", "PT2E, X86InductorQuantizer defaults, eager", torchao),
        Peer("brevitas", "brevitas", "preprocess_for_quantize + quantize defaults", brevitas),
        Peer("brevitas inference", "brevitas", "the same in quant_inference_mode, weights cached", brevitas_inference),
    )
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' own warnings (deprecations inside them)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every convolution and matrix product with the very tensors that it multiplies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.quantized = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.convolution.default:
            self._product(args[0], args[1], output.numel() * args[1][0].numel())
        elif func is aten.addmm.default:
            self._product(args[1], args[2].t(), output.numel() * args[1].shape[1])
        elif func in (aten.mm.default, aten.linear.default):
            weight = args[1].t() if func is aten.mm.default else args[1]
            self._product(args[0], weight, output.numel() * args[0].shape[-1])
        return output

    def _product(self, x: Tensor, weight: Tensor, macs: int) -> None:
        self.macs += macs
        rows = weight.reshape(weight.shape[0], -1)
        if _steps(x.reshape(1, -1)) <= 255.5 and _steps(rows) <= 255.5:
            self.quantized += macs


def _steps(rows: Tensor) -> float:
    """The span of each row in units of its smallest gap between different values; the greatest over the rows.

    At most 255 for values on a grid of 8 bits; thousands for a row of floats.
    """
    ordered = rows.double().sort(dim=1).values
    gaps = ordered.diff(dim=1)
    smallest = torch.where(gaps > 0, gaps, math.inf).amin(dim=1)
    return float(((ordered[:, -1] - ordered[:, 0]) / smallest).max())


def quantized_share(model: Callable[[Tensor], Any], x: Tensor) -> float:
    """The part of the multiply-accumulates whose both operands really lie on a grid of at most 8 bits."""
    with torch.no_grad(), _Products() as seen:
        model(x)
    share: float = seen.quantized / seen.macs
    return share
