"""The exported graphs of a few whole plans, from which the files of their parts and mixtures come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from ..plan import Plan
from ..site import Record
from .derive import derive, parts
from .names import site_names
from .onnx import default_opset, raw_onnx
from .program import applied_program

if TYPE_CHECKING:
    import onnx


class Graphs:
    """``plans``: adapted, such as each technique wherever it fits. Each is exported once, when it is first needed.

    ``simulate``: the applied network of an adapted plan; ``example``, ``batch``: of the files.
    """

    def __init__(
        self, plans: Sequence[Plan], simulate: Callable[[Plan], nn.Module], example: Any, batch: int | None
    ) -> None:
        self.plans, self.simulate = list({plan.digest(): plan for plan in plans}.values()), simulate
        self.example, self.batch = example, batch
        self._programs: dict[str, tuple[ExportedProgram, list[str]]] = {}
        self._graphs: dict[tuple[str, int], onnx.ModelProto] = {}

    def derived(self, plan: Plan, record: Record) -> tuple[onnx.ModelProto, list[str]] | None:
        """The graph of an adapted plan and the names of all sites; None where it has to be exported."""
        needed = parts(plan, self.plans, record)
        if needed is None:
            return None
        fulls = [self.plans[k] for k in needed]
        opset = max(default_opset(self._program(full)[0]) for full in fulls)
        base = self._graph(Plan(), opset)
        model = derive([(self._graph(full, opset), full) for full in fulls], base, plan, record)
        return None if model is None else (model, self._program(fulls[0])[1])

    def _program(self, plan: Plan) -> tuple[ExportedProgram, list[str]]:
        key = plan.digest()
        if key not in self._programs:
            net = self.simulate(plan)
            self._programs[key] = applied_program(net, self.example, self.batch)[0], site_names(net)
        return self._programs[key]

    def _graph(self, plan: Plan, opset: int) -> onnx.ModelProto:
        key = plan.digest(), opset
        if key not in self._graphs:
            self._graphs[key] = raw_onnx(self._program(plan)[0], opset)
        return self._graphs[key]
