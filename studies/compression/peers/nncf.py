"""NNCF on the torch model: ``compress_weights`` and ``prune``; sizes are those of the tensors that it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common import FLOAT, Form, Job, Made, classes, main, stored, weighted

NARROW = (torch.int8, torch.uint8, torch.float16)


def compressed(mode: str, **how: Any) -> Form:
    def form(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
        import nncf

        given = {name: layer.weight.numel() for name, layer in weighted(model).items()}
        example = calibration[:1]
        made = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode[mode], dataset=nncf.Dataset([example]), **how
        ).eval()
        state = made.state_dict()
        # its hooks hold scales and zero points, the modules the packed weights
        kept = {name: state[f"{name}.weight"] for name in given}
        touched = [name for name, weight in kept.items() if weight.dtype in NARROW]
        bits = 8.0 * sum(value.numel() * value.element_size() for value in state.values() if value.dtype in NARROW)
        packed = sum(kept[name].numel() < given[name] for name in touched)
        replaced = sum(given[name] for name in touched)
        return Made(classes(made), replaced, bits, layers=f"{len(touched)} of {len(given)}, {packed} of them in 4 bits")

    return form


def pruned(model: nn.Module, calibration: Tensor, job: Job, folder: Path) -> Made:
    """Half of each layer's weights by magnitude."""
    import nncf

    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    made = nncf.prune(model, mode=mode, ratio=0.5, examples_inputs=calibration[:1]).eval()
    masks = [value for name, value in made.state_dict().items() if name.endswith("binary_mask")]
    bits = sum(stored(mask, FLOAT) for mask in masks)
    replaced = sum(mask.numel() for mask in masks)
    return Made(classes(made), replaced, bits, layers=f"{len(masks)} of {len(weighted(model))}")


FORMS: dict[str, Form] = {
    "int8 weights": compressed("INT8_SYM"),
    "int4 weights": compressed("INT4_SYM", all_layers=True, group_size=-1, ratio=1.0),
    "half of the weights": pruned,
}

if __name__ == "__main__":
    main(FORMS)
