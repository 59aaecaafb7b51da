"""AIMET's automatic mixed precision as a tuner: ``aimet_onnx.mixed_precision.choose_mixed_precision``.

Phase 1 measures each quantizer group in each candidate, alone, on a part of the data; phase 2 searches along that
order for the last point inside the budget. The result is a simulation: its scores, not a file, are handed back.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .common import ROUNDING, Result, Run, main, write_scores
from .scoring import BATCH, Inputs, batches, correct, mean_bits, named, samples

CANDIDATES = {
    "int8": ((8, 8), (16, 16)),
    "int8_tensor": ((8, 8), (16, 16)),
    "w4": ((8, 4), (8, 8), (16, 16)),
    "modelled": ((4, 4), (8, 8), (16, 16)),
}
"""Bits of activations and weights, in AIMET's order. 16 bits are integers, in the place of float."""

PHASE1 = 128
"""Samples that rank a group by its signal-to-noise ratio, as AIMET's own callback has it: hits are too coarse an order,
and put 4 bits before 8 where both cost nothing on a sample of this size."""


MASKED = -100.0


class Loader:
    """What AIMET's callback iterates over."""

    def __init__(self, feeds: Sequence[Inputs], size: int) -> None:
        self.feeds, self.batch_size = feeds, size

    def __iter__(self) -> Iterator[Inputs]:
        return iter(self.feeds)


def tune(run: Run) -> Result:
    job = run.job
    import onnx
    import onnxruntime
    from aimet_onnx.amp.mixed_precision_algo import EvalCallbackFactory
    from aimet_onnx.common.defs import CallbackFunc, QuantizationDataType, QuantScheme
    from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_onnx.cross_layer_equalization import equalize_model
    from aimet_onnx.mixed_precision import choose_mixed_precision
    from aimet_onnx.quantsim import QuantizationSimModel

    logging.getLogger().setLevel(logging.WARNING)
    model = onnx.load(str(job.onnx))
    _soften_mask(model)
    layers = _layers(model)
    names = [value.name for value in model.graph.input]
    size = job.batch or BATCH
    feeds = {
        part: [named(batch, names) for batch in batches(job.inputs(part), size)]
        for part in ("calibration", "validation")
    }
    target = job.target("validation")

    def logits(session: Any) -> Any:
        return lambda batch: session.run(None, dict(batch))[0]

    def evaluate(session: Any, _: Any) -> float:
        return float(correct(logits(session), feeds["validation"], target, count("evaluation")).mean())

    def rank(session: Any, batch: Inputs) -> Any:
        count("sensitivity")(samples(batch))
        return logits(session)(batch)

    def count(kind: str) -> Any:
        return lambda size: run.counts.add(kind, size)

    def calibrate(session: Any, _: Any = None) -> None:
        for batch in feeds["calibration"]:
            count("calibration")(samples(batch))
            session.run(None, batch)

    integers = QuantizationDataType.int
    tensor = job.space == "int8_tensor"
    with run.timed():
        # for weights of one scale a tensor AIMET's guide equalizes the channels first; only chains of convolutions
        if tensor and not job.transformer:
            equalize_model(model)
        sim = QuantizationSimModel(
            model,
            quant_scheme=QuantScheme.min_max,
            config_file=None if tensor else get_path_for_per_channel_config(),
            session_options_kwargs={"intra_op_num_threads": job.threads},
        )
        sim.compute_encodings(calibrate, None)
        chosen = CANDIDATES[job.space]
        if len(chosen) > 2 and job.float_score - evaluate(sim.session, None) <= job.budget + ROUNDING:
            # AIMET starts from the candidate that scores best. Where 8 bits score above 16 by chance it would spend
            # its budget on flips up to 16, so its user leaves out what is not needed
            chosen = chosen[:-1]
        candidates = [((a, integers), (w, integers)) for a, w in chosen]
        choose_mixed_precision(
            sim,
            candidates,
            EvalCallbackFactory(Loader(feeds["calibration"], size), rank).sqnr(sim, PHASE1),
            CallbackFunc(evaluate, None),
            allowed_accuracy_drop=job.budget + ROUNDING,
            results_dir=str(run.folder / "amp"),
            clean_start=True,
            forward_pass_callback=CallbackFunc(calibrate, None),
        )
    shutil.rmtree(run.folder / "amp", ignore_errors=True)
    after = float(correct(logits(sim.session), feeds["validation"], target).mean())

    def simulated(batch: Inputs) -> Any:
        return sim.session.run(None, named(batch, names))[0]

    write_scores(run, simulated, size)
    plan, activations, sizes = _plan(sim, layers)
    return Result(
        settings=f"candidates (activations, weights) {chosen}, allowed_accuracy_drop {job.budget:g}, "
        f"binary search, phase 1 by SQNR on {PHASE1} calibration samples, min/max, "
        f"{'per-tensor weights, channels equalized' if tensor else 'per-channel weights'}; "
        f"onnxruntime {onnxruntime.__version__}",
        met=job.float_score - after <= job.budget + ROUNDING,
        validation_score=after,
        plan=plan,
        plan_activations=activations,
        bits=mean_bits(plan, sizes),
    )


def _soften_mask(model: Any) -> None:
    """Masked scores of attention become -100, as AIMET's guide asks for: -3.4e38 would be the range of their tensor."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.size and array.min() < -1e30:
            tensor.CopyFrom(numpy_helper.from_array(array.clip(min=MASKED), tensor.name))


def _layers(model: Any) -> dict[str, str]:
    """Weights that the exporter transposed and so renamed, by the name of the bias that is added to their product."""
    parameters = {tensor.name for tensor in model.graph.initializer}
    products = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    found = {}
    for node in model.graph.node:
        source = next((products[name] for name in node.input if name in products), None)
        bias = next((name for name in node.input if name in parameters and name.endswith(".bias")), None)
        if node.op_type == "Add" and source is not None and bias is not None:
            found[source] = bias.removesuffix("bias") + "weight"
    return found


def _plan(sim: Any, layers: Mapping[str, str]) -> tuple[dict[str, int | str], dict[str, int | str], dict[str, int]]:
    """Bits of each weight and of each activation whose quantizer is on."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in sim.model.model.graph.initializer}
    plan: dict[str, int | str] = {}
    sizes: dict[str, int] = {}
    activations: dict[str, int | str] = {}
    for name, quantizer in sim.qc_quantize_op_dict.items():
        bits = int(quantizer.bitwidth) if quantizer.enabled else "float"
        if name in sim.activation_names:
            if quantizer.enabled:  # the others lie inside of what runs as one operation
                activations[name] = bits
        elif name in shapes and len(shapes[name]) > 1:
            layer = layers.get(name, name)
            plan[layer] = bits
            sizes[layer] = math.prod(shapes[name])
    return plan, activations, sizes


if __name__ == "__main__":
    main("aimet_amp", "aimet-onnx", tune)
