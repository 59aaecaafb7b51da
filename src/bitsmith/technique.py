"""What a technique and its cell owe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .operations import OPERATIONS
from .site import Format, Record, Site

if TYPE_CHECKING:
    from .model.network import Network
    from .plan import Plan


@dataclass(frozen=True)
class No:
    """A refusal with its reason; false in a condition.

    >>> bool(No("no kernel for 3 bits"))
    False
    """

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason


class Statistic(Protocol):
    """What an observer collects, batch by batch. ``count``: what was seen, 0 before the first."""

    count: int

    def update(self, x: Tensor) -> None: ...


class Observer(Protocol):
    """Says what to collect of an activation tensor beside its range: a value, equal where the same is collected."""

    def start(self) -> Statistic:
        """One that has seen nothing."""
        ...


@dataclass(frozen=True)
class Wants:
    """What a technique needs to see before it can be built.

    ``gram``: the Gram matrix of each operand's last (or channel) axis. ``samples``: how many raw inputs to keep.
    ``after_quantized``: all that is collected for the site, ranges included, is seen behind sites that run under their
    own techniques. That takes further passes over the data, one for each link of a chain of such sites.
    ``observers``: by operand, what to collect of the float tensor there, or None; the record that ``build`` gets has it
    in ``statistics[(site name, operand), observer]``.
    Ranges and histograms follow from the formats it reads and writes.
    """

    gram: bool = False
    samples: int = 0
    after_quantized: bool = False
    observers: tuple[Observer | None, ...] = ()


class TensorQuantizer(Protocol):
    """What a cell gets for each operand that it reads in a format: tensor in, simulated tensor out."""

    scale: Tensor
    zero_point: Tensor

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MatrixProducts:
    """What a technique multiplies instead of the site's own product, per call: ``count`` matrix products of
    [``positions``, ``depth``] @ [``depth``, ``outputs``]. ``bits``: of both factors; 32 are floats.
    ``weight_additions``: to make the constant factors of the site's weights, where hardware does that at each call.

    >>> MatrixProducts(16, 256, 32, 64, bits=8).macs
    8388608
    """

    count: int
    positions: int
    outputs: int
    depth: int
    bits: int
    weight_additions: float = 0.0

    @property
    def macs(self) -> int:
        return self.count * self.positions * self.outputs * self.depth


class Technique(ABC):
    """A frozen value that says how a site is computed. Subclasses are final frozen dataclasses, one file each."""

    needs_training: ClassVar[bool] = False
    """Scored after a short fine-tune, or left out with that reason."""

    @abstractmethod
    def fits(self, site: Site) -> bool | No:
        """Whether it can compute that site, or why not."""

    @abstractmethod
    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        """The module that computes the site."""

    def wants(self, site: Site) -> Wants:
        return Wants()

    def reads(self, site: Site) -> tuple[Format | None, ...]:
        """The integer format of each operand, None for float and for weights."""
        return (None,) * len(site.operands)

    def writes(self, site: Site) -> Format | None:
        """The integer format of the output (behind its epilogue), None for float."""
        return None

    def bits(self, site: Site) -> float:
        """Storage of the site's weights, in bits, scales and zero points included."""
        return 8.0 * site.parameter_bytes

    def operations(self, site: Site) -> Mapping[str, float] | None:
        """What it computes with on modelled hardware, per forward pass: how many of ``multiply``, ``add`` (into the
        accumulator), ``subtract`` and ``bitwise`` (both as wide as the operands), and ``scale`` (a product of 16 by 16
        bits and an addition); None: one multiplication and one addition for each multiply-accumulate."""
        return None

    def products(self, site: Site) -> MatrixProducts | None:
        """The matrix products that it computes on modelled hardware, where they are not the site's own; None: those.

        What it computes beside them, on the way in and out, counts in :meth:`operations`."""
        return None

    def form(self, site: Site) -> str:
        """``dialect`` (quantized reference operations), ``float``, or an opaque ``torch.library`` operation's name."""
        return "float"

    def keeps_function(self) -> bool:
        """Whether it computes about what the operation computes before any training: ranges of tensors behind it may
        then be those of the float network. Where it does not, they are collected with it in place."""
        return True

    def compact(self) -> bool:
        """Whether its weights are many zeros or few different values, which files store packed."""
        return False

    def label(self) -> str:
        """A short name for tables; ``repr`` is the whole value."""
        return repr(self)

    def cite(self) -> str:
        """The source: first line of the docstring."""
        return (type(self).__doc__ or type(self).__name__).strip().splitlines()[0]


class Cell(nn.Module):
    """Computes one site. ``forward`` gets the operation's own arguments: operands by position, the rest by name.

    ``self.op`` is the operation itself, with the same arguments. ``self.read(i, x)`` simulates the format of operand
    ``i``. ``self.norm`` holds the normalisation module that the cell absorbs in eval, or nothing.
    """

    needs: ClassVar[tuple[str, ...]] = ("weight", "bias", "input", "other")
    """Names of the operation's arguments that the cell reads; parameters that no cell reads are not trained."""

    folds: bool = False
    """Whether it absorbs a batch normalisation behind it in eval (it then computes with ``self.norm``)."""

    fresh: ClassVar[bool] = False
    """Whether what it returns is always a new tensor that nothing else holds: it may then be quantized in place."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site.name
        self.kind = site.kind
        operation = OPERATIONS.get(site.kind)
        self.op: Callable[..., Any] = operation.compute if operation is not None else _no_operation
        # tuples keep modules that belong elsewhere out of this module's state
        self.quantizers: tuple[TensorQuantizer | None, ...] = (None,) * len(site.operands)
        self.at_read: tuple[bool, ...] = (False,) * len(site.operands)
        self.norm: tuple[nn.Module, ...] = ()

    def attach(
        self,
        quantizers: tuple[TensorQuantizer | None, ...],
        at_read: tuple[bool, ...],
        norm: tuple[nn.Module, ...] = (),
    ) -> None:
        """Hand over the quantizers of the operands' tensors, and which of them this cell must apply itself.

        Where ``at_read`` is false the tensor was quantized when it was written.
        """
        self.quantizers, self.at_read, self.norm = quantizers, at_read, norm

    def read(self, index: int, x: Tensor) -> Tensor:
        """Operand ``index`` as it is seen through the format that the plan gave its tensor."""
        quantizer = self.quantizers[index] if index < len(self.at_read) and self.at_read[index] else None
        return x if quantizer is None else quantizer(x)

    def penalty(self) -> Tensor | None:
        """A term for the loss."""
        return None

    def step(self, done: int, total: int) -> None:
        """Called before each training step: schedules."""

    def reset(self) -> None:
        """Called at the start of every top-level forward: recurrent state, counters."""

    def observe(self, inputs: Mapping[str, Any]) -> None:
        """Called after ``reset`` with the arguments of the top-level forward by name: of its parameters, then
        ``input<k>`` for the k-th, where it takes any number."""

    def settle(self) -> Technique | None:
        """What was learned, as a fixed technique; None: the technique it was built from."""
        return None

    def weight_bits(self) -> Tensor | None:
        """Storage of the site's weights as trained so far, in bits, shape (), with a gradient by what decides it; None:
        what the technique says (:meth:`Technique.bits`)."""
        return None

    def materialise(self) -> None:
        """Called once on the copy that is exported: store weights in the form that ships."""


def _no_operation(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("a module-level cell has no torch operation: it receives the module's own forward as `inner`")


class PrepareError(ValueError):
    """A prepare step that finds nothing to do in this network, or that its data do not suffice for."""


class Step(ABC):
    """A prepare step: reaches over several sites before the cells are built. Subclasses are frozen dataclasses."""

    keeps_function: ClassVar[bool] = False
    """Whether the float network computes the same afterwards, up to rounding, whatever the plan is."""

    values_only: ClassVar[bool] = False
    """Whether it changes values of weights and biases (a missing bias may come in) and no operation: searches then
    take time and size of a plan from its file without the step."""

    @abstractmethod
    def prepare(self, net: Network, plan: Plan, data: Any) -> Network:
        """A network with the same function, or a better quantizable one: ``net.with_model(model)``.

        ``net.model`` is a copy that may be changed in place. ``plan``: what will be applied, without its steps.
        ``data``: the calibration loader. Raises ``PrepareError`` where there is nothing it could do.
        """

    def cite(self) -> str:
        return (type(self).__doc__ or type(self).__name__).strip().splitlines()[0]


def check_fits(technique: Technique, site: Site) -> None:
    """Raise if the technique cannot compute the site, saying why."""
    verdict = technique.fits(site)
    if not verdict:
        reason = verdict.reason if isinstance(verdict, No) else "it does not fit"
        raise ValueError(f"{technique} cannot be put at {site.name!r} ({site.kind}): {reason}")
