"""The load verb: a network from a file as a module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from .model.onnx_graph.errors import InputError, QuantizedError, UnsupportedError
from .model.read import read
from .targets._cpu import batch_of, described
from .targets.base import Array, Artifact

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .targets.base import Target


def load(path: str | Path, *, trusted: bool = False, target: Target | None = None) -> nn.Module:
    """The network in an ``.onnx`` file, or with ``trusted=True`` in a ``.pt2`` file, in evaluation mode.

    ONNX: float32, opset 13 to 22, weights inside or in files beside them. The network takes the graph's inputs by
    position or name and returns one tensor, or a tuple if the graph has several outputs; its outputs equal ONNX
    Runtime's. Each node that computes is one child, named after its output; ``net.onnx_names`` keeps the names of the
    file. Which operators are read: docs/onnx_operators.md.

    **An ONNX file that is quantized already**, such as ``bitsmith accelerate`` writes, comes as a :class:`Running`
    network: ``target`` computes it, ``OpenVino()`` if nothing is said, with the native kernels that are in it. It is
    called like any other, and has no sites, parameters or gradients. Its shapes must be fixed.

    A ``.pt2`` file (``torch.export.save``) is unpickled by torch, which may run whatever code is in it: say
    ``trusted=True`` only for files that you or somebody you trust wrote.

    Raises ``OnnxError`` or ``ExportedError``, both a ``ValueError``, with what is wrong, where, and what to do; and
    ``TargetError`` where OpenVINO or the kernels are missing or do not fit, with the line that installs them.
    """
    path = Path(path)
    try:
        network = read(path, trusted=trusted)
    except QuantizedError:
        return _running(path, target)
    if target is not None:
        raise ValueError(
            f"{path} is a float network, which torch computes; a target is for files that are quantized already"
        )
    return network


@final
class Running(nn.Module):
    """A network that a runtime computes from its file: tensors or arrays in, tensors out, by position or name.

    One call at a time: others wait. ``artifact``: the file and its inputs and outputs, which the target's
    ``measure`` takes.
    """

    def __init__(self, artifact: Artifact, run: Callable[[Sequence[Array]], list[Array]]) -> None:
        super().__init__()
        self.artifact = artifact
        self._run = _in_turn(run)

    def forward(self, *inputs: ArrayLike | Tensor, **named: ArrayLike | Tensor) -> Tensor | tuple[Tensor, ...]:
        names = [name for name, _, _ in self.artifact.inputs][len(inputs) :]
        if set(named) != set(names):
            raise InputError(
                f"{self.artifact.path} takes {', '.join(name for name, _, _ in self.artifact.inputs)}; given were "
                f"{len(inputs)} by position and {', '.join(named) or 'none'} by name"
            )
        given = [torch.as_tensor(value) for value in (*inputs, *(named[name] for name in names))]
        found = tuple(map(torch.from_numpy, self._run([value.detach().cpu().numpy() for value in given])))
        return found[0] if len(found) == 1 else found

    def extra_repr(self) -> str:
        return str(self.artifact.path)


def _in_turn(run: Callable[[Sequence[Array]], list[Array]]) -> Callable[[Sequence[Array]], list[Array]]:
    lock = threading.Lock()

    def locked(inputs: Sequence[Array]) -> list[Array]:
        with lock:
            return run(inputs)

    return locked


def _running(path: Path, target: Target | None) -> Running:
    import onnx

    if target is None:
        from .targets.openvino import OpenVino

        target = OpenVino()
    graph = onnx.load(path, load_external_data=False)
    inputs = described(graph)
    for name, shape, _ in inputs:
        if not all(shape):
            raise UnsupportedError(
                f"{path}: input {name!r} has no fixed shape ({shape}, 0 is open); give it one, such as with "
                "onnxruntime.tools.make_dynamic_shape_fixed"
            )
    outputs = tuple(value.name for value in graph.graph.output)
    artifact = Artifact(path, "onnx", {}, {}, inputs, outputs, batch_of(inputs), target.name)
    return Running(artifact, target.opened(artifact)).eval()
