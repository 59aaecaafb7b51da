"""NNCF's ``quantize_with_accuracy_control`` as a tuner, on OpenVINO or, as ``nncf_accuracy_control_onnx``, on ONNX.

It quantizes everything to int8, ranks groups of quantizers on a part of the validation data and puts operations back
to float, one group after the other, until the drop is inside the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .common import ROUNDING, Job, Result, Run, main
from .nncf_plan import plan_of
from .scoring import BATCH, Inputs, Logits, batches, correct, mean_bits, named

SPACES = ("int8", "int8_tensor")


def tune(run: Run, onnx: bool = False) -> Result:
    job = run.job
    if job.space not in SPACES:
        raise ValueError(f"space {job.space!r}: NNCF's accuracy control chooses between int8 and float only")
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    model, names = _read(job, onnx)
    counts = run.counts

    class Counted(nncf.Dataset):  # type: ignore[misc]
        """NNCF asks for chosen items to rank and for all of them to evaluate."""

        def get_data(self, indices: list[int] | None = None) -> Iterable[Any]:
            kind = "evaluation" if indices is None else "sensitivity"
            return _counted(super().get_data(indices), lambda: counts.add(kind, 1))

    def calibrate(item: Inputs) -> Inputs:
        counts.add("calibration", 1)
        return item

    calibration = [named(item, names) for item in batches(job.inputs("calibration"), 1)]
    target = job.target("validation")
    items = [
        (named(item, names), target[index : index + 1])
        for index, item in enumerate(batches(job.inputs("validation"), 1))
    ]

    def validate(compiled: Any, data: Iterable[Any]) -> tuple[float, list[float]]:
        # with a value for each item NNCF needs no second pass of single samples
        logits = _logits(compiled, job, onnx)
        hits = [float(correct(logits, [item], label)[0]) for item, label in data]
        return sum(hits) / len(hits), hits

    tensor = job.space == "int8_tensor"
    # the accurate one keeps points where the default loses some, but cannot cut MiniLM's ONNX graph into parts
    fast = onnx and job.transformer
    advanced = AdvancedQuantizationParameters()
    if tensor:
        advanced.weights_quantization_params = QuantizationParameters(per_channel=False)
    with run.timed():
        tuned = nncf.quantize_with_accuracy_control(
            model,
            calibration_dataset=nncf.Dataset(calibration, calibrate),
            validation_dataset=Counted(items, lambda item: item[0]),
            validation_fn=validate,
            max_drop=job.budget + ROUNDING,
            drop_type=nncf.DropType.ABSOLUTE,
            fast_bias_correction=fast,
            model_type=nncf.ModelType.TRANSFORMER if job.transformer else None,
            target_device=nncf.TargetDevice.CPU,
            advanced_quantization_parameters=advanced,
        )
    before = _score(model, job, names, onnx)
    after = _score(tuned, job, names, onnx)
    artifact = _save(tuned, run, onnx)
    plan, sizes = plan_of(tuned, model)
    return Result(
        settings=f"max_drop {job.budget:g} absolute, fast_bias_correction={fast}, CPU, "
        f"{'transformer model type, ' if job.transformer else ''}{'per-tensor' if tensor else 'default'} weights, "
        "subsets of 300; metric per item returned",
        met=before - after <= job.budget + ROUNDING,
        validation_score=after,
        plan=plan,
        bits=mean_bits(plan, sizes),
        artifact=artifact,
        notes="calibration_forwards counts items drawn; the parts of the network that bias correction runs are inside "
        "the seconds only",
    )


def _counted(data: Iterable[Any], count: Any) -> Iterator[Any]:
    for item in data:
        count()
        yield item


def _read(job: Job, onnx: bool) -> tuple[Any, list[str]]:
    if onnx:
        import onnx as library

        model = library.load(str(job.onnx))
        return model, [value.name for value in model.graph.input]
    import openvino

    model = openvino.Core().read_model(str(job.onnx))
    return model, [value.get_any_name() for value in model.inputs]


def _logits(compiled: Any, job: Job, onnx: bool) -> Logits:
    """``compiled``: what NNCF hands to a validation function, a compiled model or an ONNX model."""
    if not onnx:
        return lambda batch: compiled(dict(batch))[compiled.output(0)]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(compiled.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda batch: session.run(None, dict(batch))[0]


def _score(model: Any, job: Job, names: list[str], onnx: bool) -> float:
    if not onnx:
        import openvino

        # else OpenVINO runs float layers in bf16 on processors that have it
        model = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    data = (named(item, names) for item in batches(job.inputs("validation"), job.batch or BATCH))
    return float(correct(_logits(model, job, onnx), data, job.target("validation")).mean())


def _save(tuned: Any, run: Run, onnx: bool) -> str:
    if onnx:
        import onnx as library

        library.save(tuned, str(run.folder / "model.onnx"))
        return "model.onnx"
    import openvino

    openvino.save_model(tuned, str(run.folder / "model.xml"), compress_to_fp16=False)
    return "model.xml"


if __name__ == "__main__":
    main("nncf_accuracy_control", "nncf", tune)
