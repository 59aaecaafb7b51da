"""Data about one network as it runs: sites, the tensors between them, formats and ranges. Data only.

Names follow one grammar. A *site* is ``path`` (a layer's own single operation, or a whole module), ``path:op`` (an
operation in a module's own forward) or ``path:op.k`` (its k-th further position). What a composite site is made of
lives under ``path.op``: the attention of ``encoder`` (``encoder:scaled_dot_product_attention``) holds
``encoder.scaled_dot_product_attention:matmul``, and the ``nn.LSTM`` called ``rnn`` holds ``rnn.lstm:linear``.
A *tensor* has the name of the site that writes it (``site`` for the first output, ``site#1`` for the second), ``@x``
for the model's input ``x``, or ``site<k`` where a site's k-th operand comes from something that is not a site.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]
Shape = tuple[int, ...]
Backward = Literal["ste", "psgd", "ewgs", "tanh", "inverse_tanh", "noise"]
"""What the derivative of rounding is taken to be: see :func:`bitsmith.numerics.rounding.slope`."""


@dataclass(frozen=True)
class Range:
    """How the limits of a quantizer are chosen from what was seen.

    ``minmax``: the extremes. ``percentile``: two-sided, ``percentile`` in (50, 100]. ``mse``: least squared error.
    ``entropy``: least Kullback-Leibler divergence (Migacz, GTC 2017).
    """

    method: RangeMethod = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.method not in ("minmax", "percentile", "mse", "entropy"):
            raise ValueError(f"Range(method={self.method!r}): must be 'minmax', 'percentile', 'mse' or 'entropy'")
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"Range(percentile={self.percentile}): must be above 50 and at most 100")

    @property
    def needs_histogram(self) -> bool:
        return self.method != "minmax"


@dataclass(frozen=True)
class Learn:
    """How the grid of a uniform quantizer is trained with the weights, from the range that calibration chose.

    ``form``: ``step``, the step alone, at fixed bits (Esser et al. 2020, LSQ, arXiv:1902.08153); ``step_range``, step
    and range, from which the bits follow, up to 8 (Uhlich et al. 2020, arXiv:1905.11452); ``fixed``, neither.
    ``backward``: what the derivative of the rounding is taken to be, and ``strength`` its delta, in [0, 2] (see
    :func:`bitsmith.numerics.rounding.slope`).

    >>> Learn("step_range", backward="ewgs")
    Learn(form='step_range', backward='ewgs', strength=0.005)
    """

    form: Literal["fixed", "step", "step_range"] = "step"
    backward: Backward = "ste"
    strength: float = 5e-3

    def __post_init__(self) -> None:
        if self.form not in ("fixed", "step", "step_range"):
            raise ValueError(f"Learn(form={self.form!r}): must be 'fixed', 'step' or 'step_range'")
        if self.backward not in get_args(Backward):
            raise ValueError(f"Learn(backward={self.backward!r}): must be one of {', '.join(get_args(Backward))}")
        if not 0.0 <= self.strength <= 2.0:
            raise ValueError(f"Learn(strength={self.strength}): must be 0 to 2; beyond, gradients change sign")


@dataclass(frozen=True)
class Format:
    """The integer format of a tensor: ``bits``, ``signed`` or not, ``symmetric`` (zero point 0) or affine.

    Unsigned symmetric means zero point 0 and no negative values. ``range`` is how its limits are chosen, ``learn`` how
    they are trained; where bits are learned, ``bits`` are those at the start.

    >>> Format(8).levels
    (0, 255)
    >>> Format(4, signed=True, symmetric=True).levels
    (-8, 7)
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    range: Range = Range()
    learn: Learn | None = None

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(f"Format(bits={self.bits}): must be 2 to 8, or 16")
        if self.learn is not None and self.bits > 8:
            raise ValueError(f"Format(bits={self.bits}, learn={self.learn}): grids of at most 8 bits are learned")

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the greatest integer."""
        if self.signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    def __str__(self) -> str:
        return f"{'i' if self.signed else 'u'}{self.bits}{'s' if self.symmetric else ''}"


@dataclass(frozen=True)
class Operand:
    """One data argument of a site: an activation (``tensor`` names it) or a weight (``constant``).

    ``key`` is the state-dict key of a weight that is a parameter or buffer itself; "" if it is computed from them.
    ``parameters``: the keys it depends on.
    """

    argument: str
    tensor: str
    shape: Shape
    dtype: str
    constant: bool = False
    key: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True)
class Fold:
    """A batch normalisation that the producing layer can absorb: ``y = (x - mean) * gamma / sqrt(var + eps) + beta``.

    ``site`` is the normalisation's own site, ``module`` the path of its module.
    """

    site: str
    module: str
    eps: float


@dataclass(frozen=True)
class Site:
    """One place in the forward pass where an operation is computed.

    ``kind``: the operation (see ``bitsmith.operations``), or ``module`` for a whole module taken as one site.
    ``role``: ``integer``, ``float`` or ``composite``. ``calls``, ``macs``: per forward pass of the recorded example.
    ``operands``: data arguments in order; ``writes``: names of the output tensors, ``out_shapes`` their shapes.
    ``arguments``: the remaining arguments (stride, dim, ...) of the first call, tensors left out.
    ``epilogue``: the sites fused behind it (normalisation, ReLU-like); ``tail``: the tensor that leaves the last one.
    ``parent``: the composite it belongs to. ``bias``: state-dict keys of the bias.
    """

    name: str
    kind: str
    path: str
    role: Literal["integer", "float", "composite"]
    operands: tuple[Operand, ...]
    writes: tuple[str, ...]
    out_shapes: tuple[Shape, ...]
    calls: int = 1
    macs: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    epilogue: tuple[str, ...] = ()
    tail: str = ""
    fold: Fold | None = None
    parent: str | None = None
    bias: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self

    @property
    def weight(self) -> Operand | None:
        """The site's weight: its first constant floating operand, or None."""
        return next((o for o in self.operands if o.constant and o.floating), None)

    @property
    def activations(self) -> tuple[Operand, ...]:
        return tuple(o for o in self.operands if not o.constant and o.floating)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the weight as float32; 0 without one."""
        return 4 * self.weight.numel if self.weight is not None else 0


@dataclass(frozen=True)
class Edge:
    """Data flow between two sites: ``producer`` (or ``@input``), ``consumer``, which operand, which tensor."""

    producer: str
    consumer: str
    operand: int
    tensor: str


@dataclass(frozen=True)
class TensorInfo:
    """A tensor between sites: who writes it ("" for an input or an unknown origin) and who reads it."""

    name: str
    shape: Shape
    dtype: str
    producer: str
    readers: tuple[str, ...] = ()
    is_output: bool = False


@dataclass(frozen=True)
class Record:
    """What one recorded forward pass showed, and what was collected afterwards.

    ``sites`` in execution order. ``tensors`` by name. ``statistics``: streaming statistics by tensor name (see
    ``bitsmith.numerics.statistics``), and what observers collected by ((site name, operand), observer). ``weights``:
    detached weight of each site, by site name and operand index. ``grids``: (scale, zero point) of weights that a
    prepare step has rounded already, in the same way. ``importance``: what the loss feels of a squared error of each
    weight, from a prepare step, in the same way.
    ``biases``, ``folds``: the same for bias and folded normalisation ``(mean, var, gamma, beta, eps)``.
    """

    sites: Mapping[str, Site]
    tensors: Mapping[str, TensorInfo]
    outputs: tuple[str, ...] = ()
    statistics: Mapping[Any, Any] = field(default_factory=dict)
    weights: Mapping[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    grids: Mapping[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    folds: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]] = field(
        default_factory=dict
    )
    importance: Mapping[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def site(self, name: str) -> Site:
        """The site of that name; an unknown name is an error that offers the closest ones."""
        try:
            return self.sites[name]
        except KeyError:
            raise UnknownSiteError(name, self.sites) from None

    def edges(self) -> Iterator[Edge]:
        """Every read of an activation by a site, with the site that computed it.

        The producer is the site at the head of the epilogue: ``conv1`` for what leaves ``conv1``'s ReLU.
        """
        heads = {member: site.name for site in self.sites.values() for member in site.epilogue}
        opened = {site.parent for site in self.sites.values()}  # what is inside them does the reading
        for site in self.sites.values():
            if site.name in heads or site.name in opened:
                continue
            for index, operand in enumerate(site.operands):
                if operand.constant or not operand.floating:
                    continue
                info = self.tensors.get(operand.tensor)
                origin = info.producer if info is not None else ""
                yield Edge(heads.get(origin, origin) or operand.tensor, site.name, index, operand.tensor)


class UnknownSiteError(KeyError, ValueError):
    """A name that no site has. Says which names are close, or that it is a module which the example never calls."""

    def __init__(self, name: str, known: Iterable[str], uncalled: bool = False) -> None:
        self.name = name
        known = list(known)
        if uncalled:
            super().__init__(
                f"the module {name!r} was never reached by the example (the first item of the calibration data): the "
                "model took another branch; give data that goes through it, or leave it out of the plan"
            )
            return
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
        hint = (
            f"closest: {', '.join(close)}"
            if close
            else f"the model has {len(known)} sites: {', '.join(known[:5])}, ..."
        )
        super().__init__(f"no site is called {name!r}; {hint}. List them with bitsmith.sites(model, example)")

    def __str__(self) -> str:
        return str(self.args[0])


def inner_path(name: str) -> str:
    """The module path under which the inside of ``name`` lives.

    >>> inner_path("layer1.0"), inner_path("layer1.0:add.1")
    ('layer1.0', 'layer1.0.add.1')
    """
    return name.replace(":", ".")


def contains(outer: str, inner: str) -> bool:
    """Whether the site (or module) ``outer`` contains the site ``inner``.

    >>> contains("layer1.0", "layer1.0:add"), contains("layer1.0", "layer1.0.conv1"), contains("layer1", "layer10")
    (True, True, False)
    """
    if outer == inner:
        return False
    path = inner_path(outer)
    return inner.startswith((path + ".", path + ":"))
