"""``apply``: an ordinary module that computes like the model, with the plan's cells at its sites."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import first_inputs
from ..numerics.quantizer import Quantizer
from ..numerics.ranges import limits, qparams
from ..plan import Plan
from ..site import Format, Record, Site
from ..technique import Cell
from .calibrate import CalibrationError, calibrate, check_weights
from .flow import replaced, tensors
from .formats import Placement, place
from .intercept import CHILD, InterceptionError, instrument
from .keys import encode_key, tensor_key
from .network import Forward, Network, duplicate, network
from .replay import Call, Names
from .stages import running, stages


class Additions(nn.Module):
    """Everything that an applied plan adds to a model: its cells and the quantizers of its tensors.

    Called as a layer (an ``nn.Sequential`` root runs every child) it returns what it is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleDict()
        self.tensors = nn.ModuleDict()

    def forward(self, x: Any) -> Any:
        return x


class AsItWas(nn.Module):
    """Holds the place of a site that the plan does not name, so that an exported node can be traced to it."""

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return function(*args, **kwargs)


class _Computer(Names):
    """The handler of an applied plan."""

    immutable = Names.immutable | {"plan", "busy"}

    def __init__(self, net: Network, plan: Plan, additions: Additions, placement: Placement) -> None:
        super().__init__(net)
        self.plan = plan
        self.probe: Callable[[str, Tensor], Tensor] | None = None
        self.written: dict[str, Quantizer] = {}
        self.cells: dict[str, nn.Module] = {}
        self.writes: dict[str, list[tuple[int, Quantizer]]] = {}
        self.folded: dict[str, nn.Module] = {}
        self.bypassed = False
        self.resets: tuple[Any, ...] = ()
        self.observing: tuple[Cell, ...] = ()
        # the site that alone feeds a normalisation or a ReLU
        self.heads = {member: site.name for site in net.record.sites.values() for member in site.epilogue}
        for name in net.record.sites:
            self.cells[name] = additions.cells[encode_key(name)]
        for (name, index), (tensor, fmt) in placement.writes.items():
            found = additions.tensors[tensor_key(tensor, fmt)]
            assert isinstance(found, Quantizer)
            self.written[tensor] = found
            self.writes.setdefault(name, []).append((index, found))
        self.busy = frozenset({*plan.sites, *self.writes})
        self.watch(self.busy)

    @property
    def read(self) -> dict[str, Quantizer]:
        """The quantizers of tensors that only readers quantize, and all in one format."""
        found: dict[str, list[Quantizer]] = {}
        for name, site in self.record_sites.items():
            cell = self.cells[name]
            if not isinstance(cell, Cell):
                continue
            for operand, quantizer, at_read in zip(site.operands, cell.quantizers, cell.at_read, strict=False):
                if at_read and isinstance(quantizer, Quantizer) and operand.tensor not in self.written:
                    found.setdefault(operand.tensor, []).append(quantizer)
        return {tensor: same[0] for tensor, same in found.items() if all(one is same[0] for one in same)}

    def fold(self, name: str, module: nn.Module) -> None:
        """The normalisation at site ``name`` is absorbed by its producer while ``module`` is in eval."""
        self.folded[name] = module
        self.watch({*self.busy, *self.folded})

    def bypass(self) -> None:
        """Compute everything as it was; what would be quantized when written still passes ``probe``."""
        self.bypassed = True

    def name_everything(self) -> None:
        """Send every site through its cell, so that exported nodes carry its name."""
        self.watch({name for name in self.record_sites if name not in self.opened or name in self.busy})

    def begin(self, inputs: Mapping[str, Any]) -> None:
        for part in self.resets:
            part.reset()
        for cell in self.observing:
            cell.observe(inputs)

    def compute(self, name: str, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        operation = call.operation
        norm = self.folded.get(name)
        if not self.bypassed and ((norm is not None and not norm.training) or self._rectified(name)):
            target = operation.target(call.function, args, kwargs)
            return self._written(name, operation.bind(args, kwargs)["input"], target, self._fresh(self.heads[name]))
        cell = self.cells[name]
        computed = isinstance(cell, Cell) and not self.bypassed
        target = operation.target(call.function, args, kwargs)
        if not computed and (target is None or name not in self.writes):
            output = call.run(*args, **kwargs) if self.bypassed else cell(call.run, args, kwargs)
            return self._written(name, output, fresh=self._fresh(name))
        if target is None:
            operands, rest = operation.split(args, kwargs)
            return self._written(name, cell(*operands, **rest), fresh=self._fresh(name))
        return self._in_place(name, call, args, kwargs, target, cell if computed else None)

    def _in_place(
        self,
        name: str,
        call: Call,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Tensor,
        cell: nn.Module | None,
    ) -> Any:
        """``x += y`` and its like: whoever holds the memory of ``target`` sees the result."""
        if cell is None and not torch.is_grad_enabled():
            return self._written(name, call.run(*args, **kwargs), target)
        operands, rest = call.operation.split(args, kwargs)
        rest.pop("inplace", None)
        if torch.is_grad_enabled():
            # backward needs the values that are overwritten below
            operands = tuple(x.clone() if x is target else x for x in operands)
        return self._written(name, (cell or call.operation.compute)(*operands, **rest), target)

    def _fresh(self, name: str) -> bool:
        """Whether the output of a site is a new tensor that nobody else holds."""
        cell = self.cells[name]
        return cell.fresh if isinstance(cell, Cell) else self.record_sites[name].role != "composite"

    def _rectified(self, name: str) -> bool:
        """Whether a ReLU that nothing computes is left to the quantizers behind it: half the passes over memory."""
        site = self.record_sites[name]
        if site.kind != "relu" or name in self.plan.sites or name not in self.writes or name not in self.heads:
            return False
        return _frozen() and all(quantizer.rectifies for _, quantizer in self.writes[name])

    def compute_module(
        self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        cell = self.cells[name]
        if self.bypassed or not isinstance(cell, Cell):
            return self._written(name, inner(*args, **kwargs))
        return self._written(name, cell(*args, inner=inner, **kwargs))

    def _written(self, name: str, output: Any, target: Tensor | None = None, fresh: bool = False) -> Any:
        """The output as it is stored: behind the quantizers of its tensors, and in ``target`` if there is one.

        What is ``fresh`` is quantized in its own memory: new memory costs more than the arithmetic.
        """
        quantizers = self.writes.get(name)
        if quantizers is not None:
            made = list(tensors(output))
            for index, quantizer in quantizers:
                if not self.bypassed:
                    value = made[index]
                    into = value if target is None and fresh and _frozen() and not value._is_view() else target
                    made[index] = quantizer(value) if into is None else quantizer.into(value, into)
                if self.probe is not None:
                    made[index] = self.probe(self.record_sites[name].writes[index], made[index])
            output = made[0] if isinstance(output, Tensor) else replaced(output, iter(made))
        return output if target is None or output is target else target.copy_(output)


def _frozen() -> bool:
    """Whether neither a gradient nor a graph needs the values in between."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def apply(
    model: nn.Module,
    plan: Plan,
    calibration: Any,
    *,
    forward: Forward | None = None,
    seed: int = 0,
) -> nn.Module:
    """An ordinary ``nn.Module`` that computes like ``model`` with the plan's techniques at its sites: a simulation.

    ``calibration``: a loader of ``(inputs, target)``, read to choose ranges. The model is not touched; the result keeps
    its state-dict keys and adds the cells' under ``_bitsmith``. It works under ``.to``, ``train``/``eval``,
    ``deepcopy``, autocast, ``DistributedDataParallel`` and ``torch.compile``.

    Raises ``UnknownSiteError`` (with the closest names), ``ValueError`` for a technique that does not fit,
    ``CalibrationError`` for NaN or infinite weights or activations, ``DataError`` for items of another form.
    """
    net = network(model, first_inputs(calibration), forward=forward, names=plan.sites)
    return build(net, plan, calibration, seed=seed)


def build(
    net: Network,
    plan: Plan,
    calibration: Any,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    ready: Network | None = None,
) -> nn.Module:
    """:func:`apply` for a network that is already recorded (and perhaps calibrated). ``ready``: what :func:`prepared`
    gives for the plan, where that is known."""
    plan.check(net.record)
    check_weights(net.model)
    if plan.prepare:
        net = ready or prepared(net, plan, calibration)
        plan.check(net.record)  # a step may have removed channels
    generator = torch.Generator().manual_seed(seed)
    net, cells = _collected(net, plan, calibration, generator, progress)
    _build_cells(cells, plan, plan.sites, net.record, generator)
    replica, additions = _assembled(net, plan, place(plan, net.record), cells)
    freeze_unread(replica, net.record, {name: [additions.cells[encode_key(name)]] for name in net.record.sites})
    return replica


def calibrated(net: Network, plan: Plan, calibration: Any, *, seed: int = 0) -> Network:
    """The network with the statistics that the plan needs, as :func:`build` collects them; its steps are not run."""
    return _collected(net, plan, calibration, torch.Generator().manual_seed(seed), None)[0]


def _collected(
    net: Network, plan: Plan, data: Any, generator: torch.Generator, progress: Callable[[int], None] | None
) -> tuple[Network, dict[str, Cell]]:
    """The network with all statistics, and the cells that had to be built for it."""
    cells: dict[str, Cell] = {}
    for stage in stages(plan, net.record):
        _build_cells(cells, plan, stage.active, net.record, generator)
        run = functools.partial(_in_part, net, plan, stage.active, cells) if stage.active else None
        net = net.with_statistics(calibrate(net, stage.wanted, data, progress, run))
    return net, cells


def _in_part(net: Network, plan: Plan, active: frozenset[str], cells: Mapping[str, Cell]) -> nn.Module:
    """The network with the plan at some sites: copies of their cells, that nothing is left in those from this pass."""
    part, placement = running(plan, net.record, active, net.record.statistics.keys())
    return _assembled(net, part, placement, {name: copy.deepcopy(cells[name]) for name in active})[0]


def _build_cells(
    cells: dict[str, Cell], plan: Plan, names: Collection[str], record: Record, generator: torch.Generator
) -> None:
    """The cells of these sites that are not built yet, in execution order."""
    for site in record.sites.values():
        if site.name in names and site.name not in cells:
            cells[site.name] = plan[site.name].build(site, record, generator)


def _assembled(
    net: Network, plan: Plan, placement: Placement, cells: Mapping[str, nn.Module]
) -> tuple[nn.Module, Additions]:
    """A copy of the model that computes the plan with these cells, and what was added to it."""
    record, replica, additions = net.record, duplicate(net.model), Additions()
    for tensor, fmt in placement.tensors:
        additions.tensors[tensor_key(tensor, fmt)] = quantizer(record, tensor, fmt)
    for name in record.sites:
        additions.cells[encode_key(name)] = cells[name] if name in plan.sites else AsItWas()
    for name in plan.sites:
        attach(additions.cells[encode_key(name)], record.sites[name], placement, additions, replica)
    instrument(replica, wired(net, plan, additions, placement, replica), net.modules)
    replica.add_module(CHILD, additions.train(replica.training))
    return replica, additions


def wired(net: Network, plan: Plan, additions: Additions, placement: Placement, replica: nn.Module) -> _Computer:
    """What computes the plan with the cells, attached already, and the quantizers that ``additions`` holds."""
    computer = _Computer(net, plan, additions, placement)
    for name in plan.sites:
        site = net.record.sites[name]
        norm = absorbed(additions.cells[encode_key(name)], site, replica)
        if norm is not None and site.fold is not None:
            computer.fold(site.fold.site, norm)
    computer.resets = (*_share(placement, additions), *_forgetful(additions))
    computer.observing = tuple(_overriding(additions, "observe"))
    return computer


def quantizer(record: Record, tensor: str, fmt: Format) -> Quantizer:
    """The quantizer of one tensor from its statistics. Raises ``CalibrationError`` where the format cannot hold it."""
    low, high = limits(record.statistics[tensor], fmt)
    try:
        scale, zero_point = qparams(low, high, fmt)
    except ValueError as error:
        raise CalibrationError(f"the tensor {tensor!r}, seen from {low:.6g} to {high:.6g}: {error}") from None
    sizes = record.tensors[tensor].shape[1:] if tensor in record.tensors else ()
    return Quantizer(fmt, scale, zero_point, elements=math.prod(sizes))


def is_applied(net: nn.Module) -> bool:
    """Whether ``net`` came from :func:`apply`."""
    return isinstance(dict(net.named_children()).get(CHILD), Additions)


def additions_of(net: nn.Module) -> Additions:
    """What ``apply`` added to ``net``; an error if nothing was."""
    found = dict(net.named_children()).get(CHILD)
    if not isinstance(found, Additions):
        raise InterceptionError(
            f"{type(net).__name__} carries no plan: it must come from bitsmith.apply(model, plan, data)"
        )
    return found


def computer_of(net: nn.Module) -> _Computer:
    additions_of(net)
    handler = net.__dict__["_interceptor"].handler
    assert isinstance(handler, _Computer)  # additions_of saw the child that only build adds
    return handler


def plan_of(net: nn.Module) -> Plan:
    """The plan that an applied network computes."""
    return computer_of(net).plan


def materialised(net: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy in eval for export: weights as they ship, every exported node traceable to its site.

    ``run`` sends one example through it, so that every cell sees its weights.
    """
    replica = duplicate(net).eval()
    with torch.no_grad():
        run(replica)
    for cell in additions_of(replica).cells.values():
        if isinstance(cell, Cell):
            cell.materialise()
    computer_of(replica).name_everything()
    return replica


def attach(cell: nn.Module, site: Site, placement: Placement, additions: Additions, replica: nn.Module) -> None:
    """Hand over to a cell the quantizers of what it reads, and the normalisation that it absorbs."""
    if not isinstance(cell, Cell):
        return
    quantizers: list[Quantizer | None] = []
    at_read: list[bool] = []
    for index in range(len(site.operands)):
        tensor, fmt, reader = placement.reads.get((site.name, index), (None, None, False))
        found = additions.tensors[tensor_key(tensor, fmt)] if tensor is not None and fmt is not None else None
        assert found is None or isinstance(found, Quantizer)
        quantizers.append(found)
        at_read.append(reader)
    norm = absorbed(cell, site, replica)
    cell.attach(tuple(quantizers), tuple(at_read), () if norm is None else (norm,))


def absorbed(cell: nn.Module, site: Site, replica: nn.Module) -> nn.Module | None:
    """The normalisation behind the site that the cell computes in eval, None if it leaves it alone."""
    if not isinstance(cell, Cell) or site.fold is None or not cell.folds:
        return None
    return replica.get_submodule(site.fold.module)


def _share(placement: Placement, additions: Additions) -> list[Quantizer]:
    """The quantizers that several operands apply when they read: they keep their last output until the next forward."""
    readers = Counter((tensor, fmt) for tensor, fmt, at_read in placement.reads.values() if at_read)
    shared = []
    for (tensor, fmt), count in readers.items():
        found = additions.tensors[tensor_key(tensor, fmt)]
        if count > 1 and isinstance(found, Quantizer):
            found.shared = True
            shared.append(found)
    return shared


def _forgetful(additions: Additions) -> list[Cell]:
    """The cells that have something to forget between forwards."""
    return _overriding(additions, "reset")


def _overriding(additions: Additions, method: str) -> list[Cell]:
    """The cells that have that method of their own."""
    cells = [cell for cell in additions.cells.values() if isinstance(cell, Cell)]
    return [cell for cell in cells if getattr(type(cell), method) is not getattr(Cell, method)]


def prepared(net: Network, plan: Plan, calibration: Any) -> Network:
    """The network behind the plan's steps, which see the plan without them and what statistics ``net`` has."""
    known, memo = net.record.statistics, net.memo
    net = network(duplicate(net.model), net.example, forward=net.forward, names=plan.sites).with_statistics(known)
    net = dataclasses.replace(net, memo=memo)
    bare = plan.replace(prepare=())
    for step in plan.prepare:
        net = step.prepare(net, bare, calibration)
    return net


def freeze_unread(replica: nn.Module, record: Record, cells: Mapping[str, Sequence[nn.Module]]) -> None:
    """Parameters that no cell reads do not train: weight decay and DistributedDataParallel must not see them.

    ``cells``: by site, those that may compute it.
    """
    read: set[str] = set()
    unread: set[str] = set()
    for site in record.sites.values():
        for cell in cells[site.name]:
            # a cell that does not say otherwise reads all the arguments of its operation
            needs = cell.needs if isinstance(cell, Cell) and cell.needs is not Cell.needs else None
            for argument, keys in (*((o.argument, o.parameters) for o in site.operands), ("bias", site.bias)):
                (read if needs is None or argument in needs else unread).update(keys)
    parameters = dict(replica.named_parameters())
    for key in unread - read:
        if key in parameters:
            parameters[key].requires_grad_(False)
