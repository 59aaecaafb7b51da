"""A network that holds the cells of several techniques at each site, and computes one plan of them after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import device_of
from ..numerics.quantizer import Quantizer
from ..plan import Plan
from ..site import Site
from ..technique import Cell, Technique
from .apply import Additions, AsItWas, absorbed, attach, freeze_unread, quantizer, wired
from .calibrate import calibrate, check_weights
from .flow import replaced, tensors
from .formats import Placement, at_reads, place
from .intercept import CHILD, instrument
from .keys import encode_key, tensor_key
from .network import Network, duplicate


class SuperNetwork:
    """The paths of a super-net: one cell for each technique of a site, all of which read the site's own parameters.

    ``options``: the techniques by site, of at least one site. ``module`` is the network; it computes what :meth:`put`
    was told last, exactly as ``apply`` with that plan would. What a cell learns (transforms, ranges of taps) is its
    own; a quantizer belongs to a tensor and a format, and is shared by the cells that read both. The model of ``net``
    is not changed.
    """

    def __init__(
        self, net: Network, options: Mapping[str, Sequence[Technique]], calibration: Any, *, seed: int = 0
    ) -> None:
        check_weights(net.model)
        for name, choices in options.items():
            for technique in choices:
                Plan({name: technique}).check(net.record)
        longest = max(map(len, options.values()))
        plans = [
            Plan({name: choices[k] for name, choices in options.items() if k < len(choices)}) for k in range(longest)
        ]
        placements = [at_reads(plan, net.record) for plan in plans]
        wanted = dict.fromkeys(what for placement in placements for what in placement.wanted)
        known = calibrate(net, wanted, calibration) if wanted else {}
        self.net = net.with_statistics(known)
        record = self.record = self.net.record
        self.module = duplicate(net.model)
        self.additions = Additions()
        for tensor, fmt in {pair: None for placement in placements for pair in placement.tensors}:
            self.additions.tensors[tensor_key(tensor, fmt)] = quantizer(record, tensor, fmt)
        generator = torch.Generator().manual_seed(seed)
        self.cells: dict[tuple[str, Technique], Cell] = {}
        for plan, placement in zip(plans, placements, strict=True):
            for name, technique in plan.sites.items():
                cell = self.cells[name, technique] = technique.build(record.sites[name], record, generator)
                attach(cell, record.sites[name], placement, self.additions, self.module)
        device = device_of(self.module)
        for part in (*self.cells.values(), self.additions):
            part.to(device)
        for name in record.sites:
            self.additions.cells[encode_key(name)] = AsItWas()
        freeze_unread(self.module, record, {name: [*self._held(name)] for name in record.sites})
        self._install(plans[0], {})
        instrument(self.module, wired(self.net, plans[0], self.additions, placements[0], self.module), net.modules)
        self.module.add_module(CHILD, self.additions)

    def parameters(self) -> list[nn.Parameter]:
        """What trains: the parameters of the network and of every cell, each once."""
        every = [*self.module.parameters(), *(p for cell in self.cells.values() for p in cell.parameters())]
        return [parameter for parameter in dict.fromkeys(every) if parameter.requires_grad]

    def set_mode(self, change: Callable[[nn.Module], Any]) -> None:
        """``change`` the mode (train or eval) of the network, and of all cells with it."""
        change(self.module)
        for cell in self.cells.values():
            cell.train(self.module.training)

    def put(self, plan: Plan, others: Mapping[str, tuple[Technique, Tensor]] | None = None) -> None:
        """Compute ``plan`` from now on, which has one of its options at every site.

        ``others``: by site, another option of it and a gate, of value 0, shape (). The output y of the site becomes
        ``y + gate * (y - z)``, where z is what the other option computes on the same operands; it is no function of
        them for the gradient, so that nothing is kept but its difference from y.
        """
        self._install(plan, others or {})
        self._wire(plan, at_reads(plan, self.record))

    def finish(self, plan: Plan) -> nn.Module:
        """The network under ``plan`` as ``apply`` makes it, with what was trained; the other cells are let go."""
        placement = place(plan, self.record)
        self._install(plan, {})
        for name in plan.sites:
            attach(
                self.additions.cells[encode_key(name)],
                self.record.sites[name],
                placement,
                self.additions,
                self.module,
            )
        kept = {tensor_key(tensor, fmt) for tensor, fmt in placement.tensors}
        for key in set(self.additions.tensors) - kept:
            del self.additions.tensors[key]
        self._wire(plan, placement)
        chosen = {name: [self.additions.cells[encode_key(name)]] for name in self.record.sites}
        freeze_unread(self.module, self.record, chosen)
        return self.module

    def _held(self, name: str) -> Iterator[nn.Module]:
        found: list[nn.Module] = [cell for (site, _), cell in self.cells.items() if site == name]
        yield from found or [self.additions.cells[encode_key(name)]]

    def _install(self, plan: Plan, others: Mapping[str, tuple[Technique, Tensor]]) -> None:
        for name, technique in plan.sites.items():
            site, cell = self.record.sites[name], self.cells[name, technique]
            if name in others:
                other, gate = others[name]
                cell = _Pair(site, cell, self.cells[name, other], gate, self.module)
            self.additions.cells[encode_key(name)] = cell

    def _wire(self, plan: Plan, placement: Placement) -> None:
        for found in self.additions.tensors.values():
            assert isinstance(found, Quantizer)
            found.shared = False  # those with several readers under this plan are told again
        self.module.__dict__["_interceptor"].handler = wired(self.net, plan, self.additions, placement, self.module)


class _Pair(Cell):
    """What one cell computes, and how the loss would change towards what another does."""

    def __init__(self, site: Site, active: Cell, other: Cell, gate: Tensor, replica: nn.Module) -> None:
        super().__init__(site)
        self.active, self.other, self.gate = active, other, gate
        norms = [absorbed(cell, site, replica) for cell in (active, other)]
        self.folds = any(norm is not None for norm in norms)
        # tuples: the normalisation belongs to the network
        self.norm = tuple(norm for norm in norms if norm is not None)[:1]
        self.left = tuple(self.folds and norm is None for norm in norms)

    def forward(self, *operands: Any, **rest: Any) -> Any:
        output = self._behind(self.active, self.left[0], operands, rest)
        with torch.no_grad():
            other = self._behind(self.other, self.left[1], operands, rest)
        made = [
            y + self.gate.to(y) * (y.detach() - z) if y.is_floating_point() else y
            for y, z in zip(tensors(output), tensors(other), strict=True)
        ]
        return replaced(output, iter(made))

    def reset(self) -> None:
        self.active.reset()
        self.other.reset()

    def _behind(self, cell: Cell, left: bool, operands: tuple[Any, ...], rest: Mapping[str, Any]) -> Any:
        """What a cell gives behind the normalisation, if one of the two absorbs it and this one leaves it."""
        output = cell(*operands, **rest)
        module: Any = self.norm[0] if left else None
        if module is None or module.training:
            return output
        return F.batch_norm(
            *(output, module.running_mean, module.running_var, module.weight, module.bias), False, 0.0, module.eps
        )
