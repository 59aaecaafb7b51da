"""The peers' quantization-aware training of a torch model, set up as their own documentation does.

Each builder takes a float model, calibration batches and the bits of weights and activations, and returns a module in
training mode whose parameters train as any module's. Peers come from the extra ``peers``.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bitsmith as bs

Build = Callable[[nn.Module, Sequence[Tensor], int, int], nn.Module]


@dataclass(frozen=True)
class Trainer:
    """``package``: its distribution, "" for none. ``settings``: what was chosen, for the table. ``peer``: whether it is
    one that ours are held against."""

    name: str
    package: str
    settings: str
    build: Build
    peer: bool = False

    @property
    def version(self) -> str:
        """Raises ``importlib.metadata.PackageNotFoundError`` where it is not installed."""
        return importlib.metadata.version(self.package) if self.package else ""


def plain(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """The float network itself."""
    return copy.deepcopy(model).train()


def everywhere(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """``Int(w, a)`` at every site that it fits: layers, additions, pooling."""
    sites = bs.sites(model, batches[0])
    plan = bs.Plan({name: bs.Int(w, a) for name, site in sites.items() if bs.Int(w, a).fits(site)})
    return bs.apply(model, plan, [(batch, None) for batch in batches]).train()


def layers(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """``Int(w, a)`` at convolutions and linear layers alone, as Brevitas's layerwise flow has it."""
    sites = bs.sites(model, batches[0])
    plan = bs.Plan({name: bs.Int(w, a) for name, site in sites.items() if site.weight is not None and site.macs})
    return bs.apply(model, plan, [(batch, None) for batch in batches]).train()


def learned(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """:func:`layers` with steps that are learned (LSQ), begun at the ranges of least squared error."""
    sites, learn, least = bs.sites(model, batches[0]), bs.Learn("step"), bs.Range("mse")
    technique = bs.Int(w, a, range=least, weight_range=least, learn=learn, weight_learn=learn)
    plan = bs.Plan({name: technique for name, site in sites.items() if site.weight is not None and site.macs})
    return bs.apply(model, plan, [(batch, None) for batch in batches]).train()


def brevitas(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """``layerwise_quantize``: inputs per tensor with a learned scale, begun by calibration, weights per tensor.

    At 8 bits its default map. Below, weights per channel and unsigned inputs, but for the first layer, whose inputs are
    signed: as ours are.
    """
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    chosen = dict(LAYERWISE_COMPUTE_LAYER_MAP)
    if (w, a) != (8, 8):
        weight = Int8WeightPerChannelFloat.let(bit_width=w)
        given = ShiftedUint8ActPerTensorFloat.let(bit_width=a)
        for kind in (nn.Conv2d, nn.Linear):
            made, options = chosen[kind]
            chosen[kind] = made, {**options, "weight_quant": weight, "input_quant": given, "bias_quant": None}
    quantized: nn.Module = layerwise_quantize(copy.deepcopy(model), compute_layer_map=chosen)
    with torch.no_grad(), calibration_mode(quantized.eval()):
        for batch in batches:
            quantized(batch)
    return quantized.train()


def torchao(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """PT2E: ``torch.export``, ``prepare_qat_pt2e`` with the x86 quantizer; observers stay on, as by default."""
    from torchao.quantization.pt2e import (
        FusedMovingAvgObsFakeQuantize,
        MovingAveragePerChannelMinMaxObserver,
        allow_exported_model_train_eval,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        QuantizationConfig,
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    config = get_default_x86_inductor_quantization_config(is_qat=True)
    if (w, a) != (8, 8):
        fake = FusedMovingAvgObsFakeQuantize
        activation = QuantizationSpec(
            dtype=torch.uint8,
            quant_min=0,
            quant_max=2**a - 1,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=fake.with_args(eps=2**-12),
        )
        weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-(2 ** (w - 1)),
            quant_max=2 ** (w - 1) - 1,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=fake.with_args(eps=2**-12, observer=MovingAveragePerChannelMinMaxObserver),
        )
        config = QuantizationConfig(activation, activation, weight, None, True)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    graph = torch.export.export(copy.deepcopy(model).train(), (batches[0],), dynamic_shapes=dynamic).module()
    prepared: nn.Module = prepare_qat_pt2e(graph, X86InductorQuantizer().set_global(config))
    allow_exported_model_train_eval(prepared)
    prepared.eval()  # statistics of the normalisations stay as they are while ranges are seen
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    prepared.train()  # torchao's own, which gives nothing back
    return prepared


def torchao_frozen(model: nn.Module, batches: Sequence[Tensor], w: int = 8, a: int = 8) -> nn.Module:
    """The same with its observers off after calibration: ranges stay, as ours do."""
    from torchao.quantization.pt2e import disable_observer

    return torchao(model, batches, w, a).apply(disable_observer)


TRAINERS: Mapping[str, Trainer] = {
    trainer.name: trainer
    for trainer in (
        Trainer("float", "", "eager", plain),
        Trainer("bitsmith", "bitsmith", "Int(8, 8) everywhere it fits", everywhere),
        Trainer("bitsmith, layers", "bitsmith", "Int(8, 8) at convolutions and linear layers", layers),
        Trainer("brevitas", "brevitas", "layerwise_quantize defaults, calibrated", brevitas, True),
        Trainer("torchao", "torchao", "prepare_qat_pt2e, X86InductorQuantizer defaults", torchao, True),
        Trainer("torchao frozen", "torchao", "the same with observers off", torchao_frozen, True),
    )
}
