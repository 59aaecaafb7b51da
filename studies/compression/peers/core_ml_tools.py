"""coremltools.optimize.torch: weights of the torch model; what it will store is in buffers beside each weight."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.zoo.cifar_resnet import CifarResNet

from .common import FLOAT, Form, Job, Made, classes, float_model, main, stored, weighted

SAMPLES = 64
"""That sensitivities are measured on, as many as ours."""


def weighed(model: nn.Module) -> Made:
    """Sizes by what it registered: tables, scales and bits of each weight, and the zeros in it. Where a table is
    shared by channels without a scale, the normalisation behind is a factor by channel, stored as well."""
    replaced, bits, touched = 0, 0.0, 0
    layers = weighted(model)
    for layer in layers.values():
        weight: Any = layer.weight
        about = {
            key.rsplit("/", 1)[-1]: value
            for key, value in layer.named_buffers(recurse=False)
            if key.startswith("_COREML_/weight/")
        }
        if not about:
            continue
        touched += 1
        replaced += weight.numel()
        value = float(FLOAT)
        if "lut" in about:
            # (groups..., entries, length of an entry)
            value = math.log2(about["lut"].shape[-2])
            bits += FLOAT * about["lut"].numel()
            if "palettization_scale" not in about and isinstance(layer, nn.Conv2d):
                bits += FLOAT * layer.out_channels
        if "quantization_n_bits" in about:
            value = float(about["quantization_n_bits"])
        scales = [about[name] for name in ("palettization_scale", "quantization_scale") if name in about]
        bits += FLOAT * sum(scale.numel() for scale in scales)
        bits += value * about["zero_point"].numel() if "zero_point" in about else 0.0
        bits += stored(weight.detach(), value)
    return Made(classes(model), replaced, bits, layers=f"{touched} of {len(layers)}")


def palettes(**how: Any) -> Form:
    def form(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        config = PostTrainingPalettizerConfig.from_dict({"global_config": how})
        return weighed(PostTrainingPalettizer(model, config).compress())

    return form


def sensitive(**how: Any) -> Form:
    """What stands for a class is what the network says."""

    def form(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
        from coremltools.optimize.torch.palettization import SKMPalettizer, SKMPalettizerConfig

        said = {"global_config": how, "calibration_nsamples": SAMPLES}
        predict = classes(model)
        data = [(x, predict(x)) for x in calibration[:SAMPLES].split(1)]

        def loss(network: nn.Module, item: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(network(item[0]), item[1])

        return weighed(SKMPalettizer(model, SKMPalettizerConfig.from_dict(said)).compress(data, loss))

    return form


def integers(**how: Any) -> Form:
    def form(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
        from coremltools.optimize.torch.quantization import PostTrainingQuantizer, PostTrainingQuantizerConfig

        config = PostTrainingQuantizerConfig.from_dict({"global_config": how})
        return weighed(PostTrainingQuantizer(model, config).compress())

    return form


def pruned(then: Form | None = None) -> Form:
    """Half of the weights of each layer, by magnitude; ``then`` another technique on what is left."""

    def form(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
        from coremltools.optimize.torch.pruning import MagnitudePruner, MagnitudePrunerConfig

        config = MagnitudePrunerConfig.from_dict(
            {"global_config": {"target_sparsity": 0.5, "scheduler": {"update_steps": [1]}}}
        )
        pruner = MagnitudePruner(model, config)
        prepared = pruner.prepare()
        pruner.step()
        left = pruner.finalize(prepared).eval()
        if then is None:
            return weighed(left)
        # its pruned weights cannot be copied, which every other technique of its does first
        fresh = float_model(job)
        fresh.load_state_dict({name: value for name, value in left.state_dict().items() if "_COREML_" not in name})
        return then(fresh, calibration, job, folder)

    return form


def sequential(model: nn.Module) -> nn.Module:
    """The ResNet as the chain of its stages, which is all that this compressor takes; others begin with theirs."""
    if not isinstance(model, CifarResNet):
        return model
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU())
    stages = {"stem": stem, "layer1": model.layer1, "layer2": model.layer2, "layer3": model.layer3}
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict({**stages, "pool": pooled, "linear": model.linear}))


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(one, nn.Conv2d) for one in module.modules())


def layerwise(**how: Any) -> Form:
    def form(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
        from coremltools.optimize.torch.layerwise_compression import LayerwiseCompressor, LayerwiseCompressorConfig

        model = sequential(model)
        # what it calls layers follow one another from the input on: whole stages
        layers = [name for name, child in model.named_children() if _convolves(child)]
        said = {"global_config": how, "calibration_nsamples": len(calibration), "layers": layers}
        config = LayerwiseCompressorConfig.from_dict(said)
        for name, layer in weighted(model).items():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # it stops at these
                config.set_module_name(name, None)
        return weighed(LayerwiseCompressor(model, config).compress(calibration.split(1), torch.device("cpu")))

    return form


BY_16 = {"granularity": "per_grouped_channel", "group_size": 16}
FORMS = {
    "int8 weights": integers(weight_dtype="int8"),
    "int4 weights": integers(weight_dtype="int4"),
    "int4 weights by 32": integers(weight_dtype="int4", granularity="per_block", block_size=32),
    "palette of 6 bits": palettes(n_bits=6),
    "palette of 4 bits": palettes(n_bits=4),
    "palette of 4 bits, scales by channel": palettes(n_bits=4, enable_per_channel_scale=True),
    "palettes of 4 bits by 16 channels": palettes(n_bits=4, **BY_16),
    "palette of 4 bits, sensitivity": sensitive(n_bits=4),
    "palette of 3 bits": palettes(n_bits=3),
    "half of the weights": pruned(),
    "half of the weights, palette of 4": pruned(palettes(n_bits=4)),
    "half, SparseGPT": layerwise(algorithm="sparse_gpt", target_sparsity=0.5, weight_dtype="float32"),
}

if __name__ == "__main__":
    main(FORMS)
