"""Intel Neural Compressor 2.6: its ONNX file in int8, weight-only quantization and pruning of the torch model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .common import FLOAT, Form, Job, Made, classes, main, stored, weighted

ONNX = "float.onnx"
"""The float network's file in the job's folder."""


class Calibration:
    """Its loader protocol."""

    batch_size = 1

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return ((x.numpy(), 0) for x in self.samples.split(1))


def static(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
    """Weights and activations in int8: a file for ONNX Runtime. Its weights: all its initializers but biases."""
    import onnx
    import onnxruntime
    from neural_compressor import PostTrainingQuantConfig, quantization, set_workspace

    set_workspace(str(folder / "workspace"))
    given = onnx.load(str(folder / ONNX))
    # it transposes weights of Gemm and trips over their old shapes among these
    del given.graph.value_info[:]
    config = PostTrainingQuantConfig(
        approach="static", quant_format="QDQ", calibration_sampling_size=[len(calibration)]
    )
    made = quantization.fit(given, config, calib_dataloader=Calibration(calibration))
    if made is None:
        raise RuntimeError("quantization.fit gave nothing back; it has logged why")
    path = folder / "int8.onnx"
    onnx.save(made.model, str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def predict(x: Tensor) -> Tensor:
        rows = [session.run(None, {name: one.numpy()})[0] for one in x.split(1)]
        return torch.from_numpy(np.concatenate(rows)).argmax(1)

    layers = weighted(model).values()
    inside = sum(onnx.numpy_helper.to_array(one).nbytes for one in made.model.graph.initializer)
    biases = 4 * sum(layer.weight.shape[0] for layer in layers)
    replaced = sum(layer.weight.numel() for layer in layers)
    return Made(predict, replaced, 8.0 * (inside - biases), path.stat().st_size, f"{len(layers)} of {len(layers)}")


def weight_only(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
    """Round to nearest in 4 bits, a scale for 32 weights, of every layer that it takes."""
    from neural_compressor.adaptor.torch_utils.weight_only import rtn_quantize

    before = {name: layer.weight.detach().clone() for name, layer in weighted(model).items()}
    made = rtn_quantize(model, bits=4, group_size=32, scheme="sym").eval()
    after = {name: layer.weight.detach() for name, layer in weighted(made).items()}
    touched = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    bits = sum(before[name].numel() * (4 + FLOAT / 32) for name in touched)
    replaced = sum(before[name].numel() for name in touched)
    return Made(classes(made), replaced, bits, layers=f"{len(touched)} of {len(before)}")


def pruned(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
    """Half of each layer's weights by magnitude, at the first step of a training that makes none."""
    from neural_compressor import WeightPruningConfig
    from neural_compressor.training import prepare_compression

    config = WeightPruningConfig(
        [{"start_step": 0, "end_step": 0}],
        target_sparsity=0.5,
        pruning_type="magnitude",
        pattern="1x1",
        pruning_scope="local",
        pruning_op_types=["Conv", "Linear"],
    )
    manager = prepare_compression(model, config)
    manager.callbacks.on_train_begin()
    manager.callbacks.on_step_begin(0)
    manager.callbacks.on_before_optimizer_step()
    manager.callbacks.on_after_optimizer_step()
    manager.callbacks.on_step_end()
    layers = weighted(model)
    zero = {name: layer.weight.detach() for name, layer in layers.items() if bool((layer.weight == 0).any())}
    bits = sum(stored(weight, FLOAT) for weight in zero.values())
    replaced = sum(weight.numel() for weight in zero.values())
    return Made(classes(model.eval()), replaced, bits, layers=f"{len(zero)} of {len(layers)}")


FORMS: dict[str, Form] = {
    "int8": static,
    "int4 weights by 32": weight_only,
    "half of the weights": pruned,
}

if __name__ == "__main__":
    main(FORMS)
