"""Intel Neural Compressor's accuracy-aware tuning as a tuner: ``quantization.fit`` of its 2.x API on the ONNX file.

Releases from 3.5 on hold torch, TensorFlow and JAX only, and their ``autotune`` walks through a list of configurations
of the whole model. The search that puts single operations back to float is in 2.6, so that is what stands here, with
the ONNX and ONNX Runtime of its time: its environment has pins of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from .common import ROUNDING, Result, Run, main
from .scoring import BATCH, Inputs, Logits, batches, correct, mean_bits, named, samples

SPACES = ("int8", "int8_tensor")
TRIALS = 100
"""Its own default."""
CALIBRATION_BATCH = 1
"""Its calibrator keeps the ranges of each forward; at batch 1 the last one cannot be of another size."""

WEIGHTED = ("Conv", "MatMul", "Gemm")


class Calibration:
    """Its loader protocol: ``(input, label)`` pairs and a ``batch_size``; counts what is drawn."""

    batch_size = CALIBRATION_BATCH

    def __init__(self, run: Run, names: list[str]) -> None:
        self.run, self.names = run, names
        self.inputs = run.job.inputs("calibration")

    def __len__(self) -> int:
        return samples(self.inputs)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for batch in batches(self.inputs, self.batch_size):
            self.run.counts.add("calibration", samples(batch))
            fed = named(batch, self.names)
            # a single input is given as an array, several by name
            yield (next(iter(fed.values())) if len(fed) == 1 else fed), 0


def tune(run: Run) -> Result:
    job = run.job
    if job.space not in SPACES:
        raise ValueError(f"space {job.space!r}: Neural Compressor's ONNX tuning chooses between int8 and float only")
    import onnx
    from neural_compressor import PostTrainingQuantConfig, quantization, set_random_seed, set_workspace
    from neural_compressor.config import AccuracyCriterion, TuningCriterion

    set_random_seed(job.seed)
    set_workspace(str(run.folder / "workspace"))
    model = onnx.load(str(job.onnx))
    # it transposes weights of Gemm and trips over their old shapes among these
    del model.graph.value_info[:]
    names = [value.name for value in model.graph.input]
    data = [named(item, names) for item in batches(job.inputs("validation"), job.batch or BATCH)]
    target = job.target("validation")

    def score(candidate: Any) -> float:
        return float(correct(_logits(candidate, job.threads), data, target, run_count).mean())

    def run_count(size: int) -> None:
        run.counts.add("evaluation", size)

    calibration = Calibration(run, names)
    tensor = job.space == "int8_tensor"
    granularity = "per_tensor" if tensor else "per_channel"
    weights = {kind: {"weight": {"granularity": [granularity]}} for kind in WEIGHTED}
    config = PostTrainingQuantConfig(
        approach="static",
        # its default stops at the first plan of a search that starts from float: one layer in int8 was enough
        quant_level=1,
        quant_format="QDQ",
        calibration_sampling_size=[len(calibration)],
        op_type_dict=weights if tensor else None,
        accuracy_criterion=AccuracyCriterion(criterion="absolute", tolerable_loss=job.budget + ROUNDING),
        tuning_criterion=TuningCriterion(strategy="basic", timeout=0, max_trials=TRIALS),
    )
    with run.timed(), _Failures() as failures:
        tuned = quantization.fit(model, config, calib_dataloader=calibration, eval_func=score)
    if failures.said:
        raise RuntimeError(failures.said[0])
    settings = (
        f"2.x API, static, QDQ, quant_level 1, basic strategy, at most {TRIALS} trials, "
        f"tolerable loss {job.budget:g} absolute, weights {granularity if tensor else 'as it chooses'}"
    )
    if tuned is None:
        # fit() logs that no trial met the goal and gives nothing: its user keeps the float model
        onnx.save(model, str(run.folder / "model.onnx"))
        plan, sizes = _plan(model)
        kept = job.float_score
        note = "no trial met the goal; the float model is kept"
        return Result(settings, False, kept, plan, {}, mean_bits(plan, sizes), "model.onnx", note)
    quantized = tuned.model
    onnx.save(quantized, str(run.folder / "model.onnx"))
    plan, sizes = _plan(quantized)
    after = float(correct(_logits(quantized, job.threads), data, target).mean())
    met = job.float_score - after <= job.budget + ROUNDING
    return Result(settings, met, after, plan, {}, mean_bits(plan, sizes), "model.onnx")


class _Failures(logging.Handler):
    """``fit`` only logs what was raised inside it, and returns what it has."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Unexpected exception" in record.getMessage():
            self.said.append(record.getMessage())

    def __enter__(self) -> _Failures:
        logging.getLogger("neural_compressor").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("neural_compressor").removeHandler(self)


def _logits(model: Any, threads: int) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    proto = getattr(model, "model", model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])

    def logits(batch: Inputs) -> Any:
        return session.run(None, dict(batch))[0]

    return logits


def _plan(model: Any) -> tuple[dict[str, int | str], dict[str, int]]:
    """8 for each weighted operation whose first two inputs come out of DequantizeLinear."""
    made = {name: node for node in model.graph.node for name in node.output}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    plan: dict[str, int | str] = {}
    sizes: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED:
            continue
        sources = [made.get(name) for name in node.input[:2]]
        quantized = all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
        weight = sources[1].input[0] if quantized and sources[1] is not None else node.input[1]
        plan[node.name] = 8 if quantized else "float"
        sizes[node.name] = math.prod(shapes.get(weight, (0,)))
    return plan, sizes


if __name__ == "__main__":
    main("neural_compressor_autotune", "neural-compressor", tune)
