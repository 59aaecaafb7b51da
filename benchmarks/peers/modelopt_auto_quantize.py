"""NVIDIA ModelOpt's ``auto_quantize`` as a tuner of the torch model, simulated.

Its constraint is ``effective_bits``, not an accuracy: a linear program gives each layer the format of the least
gradient-based score within that many bits a weight. So the benchmark does what its user has to do, and bisects.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, from_numpy, nn

from .common import Result, Run, main, write_scores
from .scoring import Inputs, batches, mean_bits, samples
from .torch_models import Choices, float_model, forward, logits, tensors, tuned

FORMATS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "int8": ((8, 8),),
    "int8_tensor": ((8, 8),),
    "w4": ((4, 8), (8, 8)),
    "modelled": ((4, 4), (8, 8)),
}
"""Bits of weights and activations; ModelOpt always adds "not quantized", which it counts as 16 bits."""

NOT_QUANTIZED = 16.0
TRIALS = 5
BATCH = 16


class Data:
    """Calibration batches to iterate over, and the step that scores: on labelled validation batches instead."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.calibration = list(batches(run.job.inputs("calibration"), BATCH))
        inputs = {**run.job.inputs("validation"), "": run.job.target("validation")}
        self.labelled = itertools.cycle(list(batches(inputs, BATCH)))

    def __len__(self) -> int:
        return len(self.calibration)

    def __iter__(self) -> Iterator[Inputs]:
        return iter(self.calibration)

    def calibrate(self, model: nn.Module, batch: Inputs) -> Tensor:
        self.run.counts.add("calibration", samples(batch))
        return forward(model, tensors(batch))

    def score(self, model: nn.Module, _: Inputs) -> None:
        batch = dict(next(self.labelled))
        target = from_numpy(batch.pop(""))
        self.run.counts.add("sensitivity", len(target))
        self.run.counts.add("backwards", len(target))
        loss: Any = F.cross_entropy(forward(model, tensors(batch)), target)
        loss.backward()


def tune(run: Run) -> Result:
    job = run.job
    import modelopt.torch.quantization as mtq

    model = float_model(job)
    axis = None if job.space == "int8_tensor" else 0
    formats = [_format(weights, activations, axis) for weights, activations in FORMATS[job.space]]
    offered = {"eight": [_format(8, 8, axis)], "narrow": formats, "wide": formats}
    data = Data(run)

    def search(choices: Choices, bits: float) -> nn.Module:
        # the scores are kept, so that a further value of effective_bits costs its linear program only
        found, _ = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": bits},
            quantization_formats=offered[choices],
            module_search_spaces=[
                {
                    "module_name_patterns": "*",
                    "quantization_formats": offered[choices],
                    "allow_no_quant": choices == "wide",
                }
            ],
            data_loader=data,
            forward_step=data.calibrate,
            forward_backward_step=data.score,
            num_calib_steps=len(data),
            num_score_steps=len(data),
            checkpoint=str(run.folder / f"{choices}.pth"),
        )
        quantized: nn.Module = found
        return quantized

    with run.timed():
        kept = tuned(run, min(w for w, _ in FORMATS[job.space]), NOT_QUANTIZED, TRIALS, search)
    for choices in offered:
        (run.folder / f"{choices}.pth").unlink(missing_ok=True)
    bits, chosen, score = kept or (NOT_QUANTIZED, model, job.float_score)
    write_scores(run, logits(chosen), BATCH)
    plan, activations, sizes = _plan(chosen)
    return Result(
        settings=f"formats (weights, activations) {FORMATS[job.space]} and not quantized, weights "
        f"{'per tensor' if axis is None else 'per channel'}, max calibration, method gradient, {len(data)} batches of "
        f"{BATCH} labelled validation samples; effective_bits bisected, at most {TRIALS} values, the first all W8A8",
        met=bits < NOT_QUANTIZED,
        validation_score=score,
        plan=plan,
        plan_activations=activations,
        bits=mean_bits(plan, sizes) | {"effective_bits": bits},
        notes="" if bits < NOT_QUANTIZED else "no value that was tried held the budget: nothing is quantized",
    )


def _format(weights: int, activations: int, axis: int | None) -> dict[str, Any]:
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": weights, "axis": axis}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": activations, "axis": None}},
        ],
        "algorithm": "max",
    }


def _plan(model: nn.Module) -> tuple[dict[str, int | str], dict[str, int | str], dict[str, int]]:
    plan: dict[str, int | str] = {}
    activations: dict[str, int | str] = {}
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or not isinstance(weight, Tensor):
            continue
        plan[name] = _bits(getattr(module, "weight_quantizer", None))
        activations[name] = _bits(getattr(module, "input_quantizer", None))
        sizes[name] = weight.numel()
    return plan, activations, sizes


def _bits(quantizer: Any) -> int | str:
    return int(quantizer.num_bits) if quantizer is not None and quantizer.is_enabled else "float"


if __name__ == "__main__":
    main("modelopt_auto_quantize", "nvidia-modelopt", tune)
