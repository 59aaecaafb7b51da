"""Peers as functions from inputs to logits, for accuracy: files in ONNX Runtime, the others as they simulate in torch.

Every peer gets the same float network and the same calibration samples. ``weight_bits`` 4 means W4A8.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitsmith.data import call

from . import peers
from .int8_peers import FILE_PEERS, FilePeer, Made, Source, each, silent
from .runtimes import opened

Array = NDArray[Any]
Predict = Callable[[Any], Array]
"""Inputs of a batch, as a loader's item has them -> logits [n, classes]."""


@dataclass(frozen=True)
class Problem:
    """A float network in eval, as torch module and as ONNX file (batch 1), and its calibration batches' inputs."""

    name: str
    model: nn.Module
    source: Source
    batches: Sequence[Any]
    threads: int

    @property
    def transformer(self) -> bool:
        return self.source.transformer

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a mapping's tensors, in order; none where the input is one tensor."""
        return tuple(self.batches[0]) if isinstance(self.batches[0], Mapping) else ()


@dataclass(frozen=True)
class LogitPeer:
    """``tool``: whose best variant counts. ``activations``: what its activations are, where not 8 bits."""

    name: str
    tool: str
    package: str
    settings: str
    build: Callable[[Problem, Path], Predict]
    activations: str = "8 bits"

    @property
    def version(self) -> str:
        """Raises ``importlib.metadata.PackageNotFoundError`` where it is not installed."""
        return importlib.metadata.version(self.package)


def built(problem: Problem, folder: Path, chosen: Sequence[LogitPeer]) -> Iterator[Made[LogitPeer, Predict]]:
    """Their functions, each tried on two samples."""

    def make(peer: LogitPeer, work: Path) -> Predict:
        predict = peer.build(problem, work)
        predict(_first(problem.batches[0]))
        return predict

    return each(chosen, folder, make)


def arrays(inputs: Any) -> list[Array]:
    """A batch's tensors in order."""
    return [x.numpy() for x in (inputs.values() if isinstance(inputs, Mapping) else (inputs,))]


def by_sample(run: Callable[[Sequence[Array]], Sequence[Array]]) -> Predict:
    """A function of one sample's arrays as one of a batch."""

    def predict(inputs: Any) -> Array:
        given = arrays(inputs)
        return np.concatenate([np.asarray(run([x[i : i + 1] for x in given])[0]) for i in range(len(given[0]))])

    return predict


def in_torch(run: Callable[[Tensor], Any]) -> Predict:
    """A torch function of one (stacked) tensor."""

    def predict(inputs: Any) -> Array:
        with torch.no_grad(), silent():
            output = run(_stack(inputs))
        output = getattr(output, "value", output)  # Brevitas may return its own kind of tensor
        found: Array = output.numpy()
        return found

    return predict


class Stacked(nn.Module):
    """A model with several inputs of one shape as a function of one tensor [n, inputs, ...]."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, x: Tensor) -> Any:
        return self.model(**{name: x[:, index] for index, name in enumerate(self.names)})


def _stack(inputs: Any) -> Tensor:
    return torch.stack(tuple(inputs.values()), 1) if isinstance(inputs, Mapping) else inputs


def _first(inputs: Any) -> Any:
    return {k: v[:2] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[:2]


def _alone(problem: Problem) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the model as a function of one tensor, and its calibration batches."""
    model = copy.deepcopy(problem.model)
    return (Stacked(model, problem.names) if problem.names else model), [_stack(batch) for batch in problem.batches]


# -- files -----------------------------------------------------------------------------------------------------------


def from_file(peer: FilePeer) -> LogitPeer:
    """The file in the runtime that it was made for."""

    def build(problem: Problem, folder: Path) -> Predict:
        path = peer.make(problem.source, folder)
        return by_sample(opened("openvino" if path.suffix == ".xml" else "onnxruntime", path, problem.threads))

    return LogitPeer(peer.name, peer.tool, peer.package, peer.settings, build)


def aimet(bits: int = 8, *, group: int = 0, adaround: int = 0) -> Callable[[Problem, Path], Predict]:
    """``QuantizationSimModel``, weights per channel (``group``: per so many inputs), TF-enhanced ranges.

    ``adaround``: its iterations per layer, 0 for none.
    """

    def build(problem: Problem, folder: Path) -> Predict:
        import aimet_onnx
        import onnx
        from aimet_onnx.common.defs import QuantScheme

        config = Path(aimet_onnx.__file__).parent / "common" / "quantsim_config" / "default_config_per_channel.json"
        sim = aimet_onnx.QuantizationSimModel(
            onnx.load(str(problem.source.model)),
            param_type=f"int{bits}",
            activation_type="int8",
            quant_scheme=QuantScheme.min_max if problem.transformer else QuantScheme.post_training_tf_enhanced,
            config_file=str(config),
            providers=["CPUExecutionProvider"],
        )
        if group:
            from aimet_onnx.quantsim import set_blockwise_quantization_for_weights as blockwise

            blockwise(sim, ("MatMul", "Gemm"), bits, True, group)
        if adaround:
            from aimet_onnx import apply_adaround

            apply_adaround(sim, list(problem.source.feeds), num_iterations=adaround)
        sim.compute_encodings(list(problem.source.feeds))
        names = [entry.name for entry in sim.session.get_inputs()]
        return by_sample(lambda given: sim.session.run(None, dict(zip(names, given, strict=True))))

    return build


def nncf_weights(group: int, gptq: bool = False) -> Callable[[Problem, Path], Predict]:
    """``nncf.compress_weights`` to 4 bits in groups, every layer, on request by GPTQ; activations stay float."""

    def build(problem: Problem, folder: Path) -> Predict:
        import nncf
        import openvino

        model = nncf.compress_weights(
            openvino.Core().read_model(str(problem.source.model)),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=group,
            ratio=1.0,
            all_layers=True,
            gptq=gptq,
            dataset=nncf.Dataset([dict(feed) for feed in problem.source.feeds]) if gptq else None,
            subset_size=len(problem.source.feeds),
        )
        path = folder / "model.xml"
        openvino.save_model(model, str(path), compress_to_fp16=False)
        return by_sample(opened("openvino", path, problem.threads))

    return build


# -- torch -----------------------------------------------------------------------------------------------------------


def torchao(problem: Problem, folder: Path) -> Predict:
    model, batches = _alone(problem)
    return in_torch(peers.torchao(model, batches))


def neural_compressor(problem: Problem, folder: Path) -> Predict:
    """Its PT2E path: ``export``, ``prepare`` with the default static configuration, ``convert``."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    model, batches = _alone(problem)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = export(model, example_inputs=(batches[0],), dynamic_shapes=dynamic)
    prepared = prepare(exported, quant_config=get_default_static_config(), example_inputs=(batches[0],))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return in_torch(convert(prepared))


def brevitas(bits: int = 8) -> Callable[[Problem, Path], Predict]:
    """``quantize`` with weights per channel, calibration, bias correction.

    ``layerwise_quantize`` for transformers, whose graph it cannot trace, and where its tensors do not pass.
    """

    def build(problem: Problem, folder: Path) -> Predict:
        from brevitas.graph import quantize as q
        from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
        from brevitas.quant import Int8WeightPerChannelFloat

        def per_channel(layers: Mapping[Any, Any]) -> dict[Any, Any]:
            own = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits}
            return {
                kind: (value[0], {**value[1], **own}) if value and kind in (nn.Conv2d, nn.Linear) else value
                for kind, value in layers.items()
            }

        model, batches = _alone(problem)

        def layerwise() -> Any:
            folded = copy.deepcopy(model) if problem.transformer else q.preprocess_for_quantize(copy.deepcopy(model))
            return q.layerwise_quantize(folded, compute_layer_map=per_channel(q.LAYERWISE_COMPUTE_LAYER_MAP))

        if problem.transformer:
            quantized = layerwise()
        else:
            prepared = q.preprocess_for_quantize(copy.deepcopy(model))
            quantized = q.quantize(prepared, compute_layer_map=per_channel(q.COMPUTE_LAYER_MAP))
            try:
                with torch.no_grad():
                    quantized(batches[0][:1])
            except TypeError:  # its tensors cannot be sliced, as option A shortcuts do
                quantized = layerwise()
        quantized.eval()
        with torch.no_grad():
            with calibration_mode(quantized):
                for batch in batches:
                    quantized(batch)
            with bias_correction_mode(quantized):
                for batch in batches:
                    quantized(batch)
        return in_torch(quantized.eval())

    return build


def brevitas_gptq(problem: Problem, folder: Path) -> Predict:
    """``gptq_mode`` over 4-bit weights in groups, with zero points; activations stay float."""
    from brevitas import nn as qnn
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.shifted_scaled_int import ShiftedUint8WeightGroupQuantFloat

    model, batches = _alone(problem)
    weights = {
        "weight_quant": ShiftedUint8WeightGroupQuantFloat,
        "weight_bit_width": 4,
        "weight_group_size": GROUP,
        "return_quant_tensor": False,
    }
    quantized = layerwise_quantize(model, compute_layer_map={nn.Linear: (qnn.QuantLinear, weights)})
    quantized.eval()
    with torch.no_grad(), gptq_mode(quantized, use_quant_activations=False) as gptq:
        for _ in range(gptq.num_layers):
            for batch in batches:
                gptq.model(batch)
            gptq.update()
    return in_torch(quantized)


def float_logits(model: nn.Module) -> Predict:
    def predict(inputs: Any) -> Array:
        with torch.no_grad():
            found: Array = call(model, inputs).numpy()
        return found

    return predict


INT8: Sequence[LogitPeer] = (
    *map(from_file, FILE_PEERS),
    LogitPeer("Neural Compressor", "Neural Compressor", "neural_compressor", "PT2E, defaults", neural_compressor),
    LogitPeer("Brevitas", "Brevitas", "brevitas", "weights per channel, bias correction", brevitas()),
    LogitPeer("torchao", "torchao", "torchao", "PT2E, X86InductorQuantizer", torchao),
    LogitPeer("AIMET", "AIMET", "aimet-onnx", "QuantizationSimModel, per channel", aimet()),
)

W4A8: Sequence[LogitPeer] = (
    LogitPeer("Brevitas", "Brevitas", "brevitas", "weights per channel, bias correction", brevitas(4)),
    LogitPeer("AIMET", "AIMET", "aimet-onnx", "weights per channel", aimet(4)),
    LogitPeer(
        "AIMET, AdaRound", "AIMET", "aimet-onnx", "weights per channel, 1000 iterations", aimet(4, adaround=1000)
    ),
)

GROUP = 32
W4A8_GROUPED: Sequence[LogitPeer] = (
    LogitPeer("AIMET, groups", "AIMET", "aimet-onnx", f"blocks of {GROUP} inputs", aimet(4, group=GROUP)),
    LogitPeer("NNCF, groups", "NNCF", "nncf", f"compress_weights, groups of {GROUP}", nncf_weights(GROUP), "float"),
)

GPTQ: Sequence[LogitPeer] = (
    LogitPeer(
        "NNCF, GPTQ", "NNCF", "nncf", f"compress_weights, gptq, groups of {GROUP}", nncf_weights(GROUP, True), "float"
    ),
    LogitPeer("Brevitas, GPTQ", "Brevitas", "brevitas", f"gptq_mode, groups of {GROUP}", brevitas_gptq, "float"),
)
