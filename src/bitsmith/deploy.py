"""The export verb: an applied network as the file that a target runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._files import check_writable
from .export.program import with_batch
from .export.pt2 import write_program
from .model.apply import is_applied, plan_of
from .plan import Plan
from .targets.base import Artifact, Target, example_arrays


def export(net: nn.Module, target: Target, path: str | Path, example: Any, batch: int | None = 1) -> Artifact:
    """Write an applied network (or a plain model, as float) as the file that ``target`` runs, and its map beside it.

    ``example``: inputs as in a loader's item. ``batch``: the batch size of the file; None keeps the example's. The
    file appears under its name only when it is whole. A path that ends in ``.pt2`` gets the exported program itself, in
    the quantized reference dialect, whatever the target: other compilers read it. Raises ``ExportError`` with the
    operation that stops it.
    """
    path = Path(path)
    check_writable(path.parent)
    if path.suffix == ".pt2":
        return _program(net, target, path, example, batch)
    return target.export(net, path, example, batch)


def _program(net: nn.Module, target: Target, path: Path, example: Any, batch: int | None) -> Artifact:
    program, nodes = write_program(net, path, example, batch)
    inputs = tuple(
        (name, tuple(array.shape), str(array.dtype))
        for name, array in zip(
            program.graph_signature.user_inputs,
            example_arrays(with_batch(example, batch) if batch is not None else example),
            strict=True,
        )
    )
    artifact = Artifact(
        path=path,
        format="pt2",
        nodes=nodes,
        values={site: names[-1] for site, names in nodes.items()},
        inputs=tuple((str(name), shape, dtype) for name, shape, dtype in inputs),
        outputs=tuple(map(str, program.graph_signature.user_outputs)),
        batch=inputs[0][1][0] if inputs and inputs[0][1] else 1,
        target=target.name,
        plan=plan_of(net).to_json() if is_applied(net) else Plan().to_json(),
        versions={"torch": torch.__version__},
    )
    artifact.save()
    return artifact
