"""The exported graphs of a few whole plans, from which the files of their parts and mixtures come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.export import ExportedProgram

from ..plan import Plan
from ..site import Record
from .derive import derive, parts
from .names import site_names
from .onnx import clean, default_opset, raw_onnx
from .program import exported_program, shipped, with_batch
from .values import State, changed_values, with_values

if TYPE_CHECKING:
    import onnx


class _Whole(NamedTuple):
    """An exported plan. ``names``: of all sites."""

    program: ExportedProgram
    names: list[str]
    state: State


class Graphs:
    """``plans``: adapted, such as each technique wherever it fits. Each is exported once, when it is first needed.

    ``simulate``: the applied network of an adapted plan; ``example``, ``batch``: of the files.
    """

    def __init__(
        self, plans: Sequence[Plan], simulate: Callable[[Plan], nn.Module], example: Any, batch: int | None
    ) -> None:
        self.plans, self.simulate = list({plan.digest(): plan for plan in plans}.values()), simulate
        self.example = example if batch is None else with_batch(example, batch)
        self._wholes: dict[str, _Whole] = {}
        self._graphs: dict[tuple[str, int], onnx.ModelProto] = {}

    def take(self, other: Graphs) -> None:
        """What another one, of the same network and example, has exported."""
        self._wholes |= other._wholes
        self._graphs |= other._graphs

    def covers(self, plan: Plan, record: Record) -> bool:
        """Whether every site of an adapted plan is computed as in one of these plans, or in float."""
        bare = plan.replace(prepare=())
        return bare.empty or parts(bare, self.plans, record) is not None

    def derived(self, plan: Plan, record: Record) -> tuple[onnx.ModelProto, list[str]] | None:
        """The graph of an adapted plan and the names of all sites; None where it has to be exported.

        The network is simulated once for a plan with steps: where these changed weights' integers and biases only, its
        graph is that of the plan without them, with these values.
        """
        if plan.empty:
            whole = self._whole(Plan())
            return clean(self._graph(Plan(), default_opset(whole.program))), whole.names
        bare = plan.replace(prepare=())
        needed = parts(bare, self.plans, record)
        if needed is None:
            return None
        fulls = [self.plans[k] for k in needed]
        opset = max(default_opset(self._whole(full).program) for full in fulls)
        graphs = [self._graph(full, opset) for full in fulls]
        if plan.prepare:
            mended = self._mended(plan, fulls, graphs, record)
            if mended is None:
                return None
            graphs = mended
        model = derive(list(zip(graphs, fulls, strict=True)), self._graph(Plan(), opset), bare, record)
        return None if model is None else (model, self._whole(fulls[0]).names)

    def _mended(
        self, plan: Plan, fulls: Sequence[Plan], graphs: Sequence[onnx.ModelProto], record: Record
    ) -> list[onnx.ModelProto] | None:
        """The graphs with the values that the plan's steps gave its sites."""
        state = shipped(self.simulate(plan), self.example).state_dict()
        states = [(self._whole(full).state, full) for full in fulls]
        values = changed_values(state, plan, states, self._whole(Plan()).state, record)
        found = [with_values(graph, new) for graph, new in zip(graphs, values or (), strict=False)]
        mended = [graph for graph in found if graph is not None]
        return mended if len(mended) == len(fulls) else None

    def _whole(self, plan: Plan) -> _Whole:
        key = plan.digest()
        if key not in self._wholes:
            net = self.simulate(plan)
            ready = shipped(net, self.example)
            self._wholes[key] = _Whole(exported_program(ready, self.example), site_names(net), ready.state_dict())
        return self._wholes[key]

    def _graph(self, plan: Plan, opset: int) -> onnx.ModelProto:
        key = plan.digest(), opset
        if key not in self._graphs:
            self._graphs[key] = raw_onnx(self._whole(plan).program, opset)
        return self._graphs[key]
