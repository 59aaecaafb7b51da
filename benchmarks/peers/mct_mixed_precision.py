"""Sony's Model Compression Toolkit, post-training mixed precision, as a tuner of the torch model, simulated.

Its constraint is the memory of the weights, not an accuracy, so the benchmark does what its user has to do: bisects it.
The target platform is a description of our own, of the form that its guide asks for: candidates of the bits of weights
beside one width of activations.
"""

from __future__ import annotations

import copy
import copyreg
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .common import ROUNDING, Result, Run, main, write_scores
from .mct_platform import ACTIVATIONS, platform
from .scoring import batches, mean_bits
from .torch_models import Choices, evaluate, float_model, logits, tuned

WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "int8": (16, 8),
    "int8_tensor": (16, 8),
    "w4": (16, 8, 4),
    "modelled": (16, 8, 4),
}
"""Bits of weights that it chooses from, beside 8 of activations: a layer cannot stay float."""

TRIALS = 4
BATCH = 16
IMAGES = 32
"""Samples that rank a candidate: its default."""


def tune(run: Run) -> Result:
    job = run.job
    model = float_model(job)
    _stand_in_for_torchvision()
    import model_compression_toolkit as mct

    # it copies graphs that hold torch.Tensor.shape, which Python's copy takes for something with a state
    descriptor: Any = vars(torch._C.TensorBase)["shape"]
    copyreg.pickle(type(descriptor), lambda value: str(value.__name__))
    _count(run)
    tensor = job.space == "int8_tensor"
    calibration = list(batches(job.inputs("calibration"), BATCH))

    def data() -> Iterator[list[Any]]:
        for batch in calibration:
            yield list(batch.values())

    config = mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=IMAGES))

    widths = WEIGHTS[job.space]
    offered = {"eight": (8,), "narrow": tuple(bits for bits in widths if bits <= 8), "wide": widths}

    def search(choices: Choices, bits: float) -> nn.Module:
        wanted = mct.core.ResourceUtilization(weights_memory=eight * bits / 8)
        found: nn.Module
        found, _ = mct.ptq.pytorch_post_training_quantization(
            copy.deepcopy(model),
            data,
            target_resource_utilization=wanted if len(offered[choices]) > 1 else None,
            core_config=config,
            target_platform_capabilities=platform(offered[choices], not tensor),
        )
        return found.eval()

    with run.timed():
        try:
            # of the network with all weights in 8 bits
            eight = mct.core.pytorch_resource_utilization_data(
                copy.deepcopy(model), data, config, target_platform_capabilities=platform((8,), not tensor)
            ).weights_memory
        except TypeError as error:
            raise RuntimeError(
                f"torch.fx, through which MCT reads networks, cannot trace {job.network}: {error}"
            ) from error
        kept = tuned(run, min(widths), max(widths), TRIALS, search)
        if kept is None:
            whole = search("wide", max(widths))
            kept = max(widths), whole, evaluate(run, whole)
    bits, found, score = kept
    write_scores(run, logits(found), BATCH)
    plan, activations, sizes = _plan(found, {name.replace(".", "_"): name for name, _ in model.named_modules()})
    return Result(
        settings=f"weights of {widths} bits {'per tensor' if tensor else 'per channel'}, symmetric; activations of "
        f"{ACTIVATIONS}, uniform; {IMAGES} samples rank a candidate; weights_memory bisected, at "
        f"most {TRIALS} values, the first with all in 8",
        met=job.float_score - score <= job.budget + ROUNDING,
        validation_score=score,
        plan=plan,
        plan_activations=activations,
        bits=mean_bits(plan, sizes) | {"weights_memory_bits": bits, "activations": ACTIVATIONS},
    )


def _stand_in_for_torchvision() -> None:
    """MCT imports these for its data generation, which is not used here; the CPU torchvision of this torch does not
    import. Only after the model, since transformers would take it for the real one."""
    absent = {"Normalize": object, "RandomCrop": object, "RandomHorizontalFlip": object, "CenterCrop": object}
    modules: Mapping[str, Mapping[str, Any]] = {
        "torchvision": {"__version__": "0.28.0"},
        "torchvision.transforms": absent,
        "torchvision.transforms.transforms": {"_setup_size": None},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(module).update(content)
        sys.modules[name] = module


def _count(run: Run) -> None:
    """Counts inside of what MCT runs its networks with: statistics of calibration, and its ranking."""
    implementation = importlib.import_module("model_compression_toolkit.core.pytorch.pytorch_implementation")
    kinds = {"run_model_inference": "calibration", "sensitivity_eval_inference": "sensitivity"}
    for name, kind in kinds.items():
        whole = getattr(implementation.PytorchImplementation, name)
        setattr(implementation.PytorchImplementation, name, _counting(whole, partial(run.counts.add, kind)))


def _counting(whole: Callable[..., Any], count: Callable[[int], None]) -> Callable[..., Any]:
    def counted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count(len(inputs[0]))
        return whole(self, model, inputs, *args, **kwargs)

    return counted


def _plan(
    model: nn.Module, paths: Mapping[str, str]
) -> tuple[dict[str, int | str], dict[str, int | str], dict[str, int]]:
    """``paths``: of the float model's modules by the names that MCT makes of them, plus what it folds into them."""
    plan: dict[str, int | str] = {}
    activations: dict[str, int | str] = {}
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        for quantizer in getattr(module, "weights_quantizers", {}).values():
            path = paths.get(name.removesuffix("_bn"), name)
            plan[path] = int(quantizer.num_bits)
            sizes[path] = max(value.numel() for value in module.parameters())
        if (holder := getattr(module, "activation_holder_quantizer", None)) is not None:
            activations[name] = int(holder.num_bits)
    return plan, activations, sizes


if __name__ == "__main__":
    main("mct_mixed_precision", "model-compression-toolkit", tune)
