"""The operations that can be sites: their names, their arguments, and what they cost.

An :class:`Operation` says which torch functions compute it, which of its canonical arguments are tensors that carry
data (*operands*), and how many multiply-accumulates one call takes. Everything that is not in this table computes as
before and is not a site.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Role = Literal["integer", "float", "composite"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    ``role``: ``integer`` (a technique may compute it another way), ``float`` (visible, its time counts, never
    quantized) or ``composite`` (made of other operations: see ``bitsmith.model.decompose``).
    ``signature``: canonical argument names, in order; ``operands``: those that are activations or weights;
    ``compute``: the function of the operands by position and the rest by canonical name.
    """

    kind: str
    compute: Callable[..., Any]
    functions: tuple[Callable[..., Any], ...]
    signature: tuple[str, ...]
    operands: tuple[str, ...]
    role: Role = "integer"
    inplace: frozenset[Callable[..., Any]] = frozenset()
    macs: Callable[[Sequence[Shape], Sequence[Shape]], int] = lambda inputs, outputs: 0
    variadic: bool = False  # the first argument is a list of operands (cat)
    synonyms: Mapping[str, str] = field(default_factory=lambda: dict(_SYNONYMS))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments under their canonical names, in canonical order; only what the caller gave."""
        bound = dict(zip(self.signature, args, strict=False))
        if self.kind == "einsum":  # einsum(equation, a, b) and einsum(equation, [a, b])
            rest = args[1:]
            bound["operands"] = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        for name, value in kwargs.items():
            bound[self.synonyms.get(name, name)] = value
        return bound

    def split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(operands, rest)``: the data arguments by position, everything else by canonical name."""
        rest = self.bind(args, kwargs)
        if self.variadic:
            return tuple(rest.pop(self.operands[0])), rest
        return tuple(rest.pop(name) for name in self.operands if name in rest), rest

    def target(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The tensor that the call overwrites (``x += y``, ``F.relu(x, inplace=True)``), or None."""
        if function not in self.inplace and not (
            "inplace" in self.signature and self.bind(args, kwargs).get("inplace")
        ):
            return None
        target: Tensor = self.bind(args, kwargs)["input"]
        return target

    def on_tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the call can be a site at all: it has floating operands, and arithmetic has two of them.

        ``x + 1`` and ``x * scale`` with a scalar are not a meeting of two tensors.
        """
        found = [t for t in self.split(args, kwargs)[0] if isinstance(t, Tensor)]
        if self.kind in ("add", "sub", "mul"):
            return len(found) == 2 and all(t.dim() > 0 and t.is_floating_point() for t in found)
        return any(t.is_floating_point() for t in found)


def _conv_macs(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    weight = inputs[1]
    return math.prod(outputs[0]) * math.prod(weight[1:])


def _transposed_macs(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _linear_macs(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return math.prod(outputs[0]) * inputs[0][-1]


def _attention_macs(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    queries, keys, values = inputs[:3]
    return math.prod(queries) * keys[-2] + math.prod(queries[:-1]) * math.prod(values[-2:])


def _einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *operands)


def _cat(*tensors: Tensor, dim: int = 0) -> Tensor:
    return torch.cat(tensors, dim)


def _baddbmm(input: Tensor, other: Tensor, *, bias: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    function = torch.addmm if input.dim() == 2 else torch.baddbmm
    return function(bias, input, other, beta=beta, alpha=alpha)


def _index_add(input: Tensor, source: Tensor, *, dim: int, index: Tensor, alpha: float = 1) -> Tensor:
    return torch.index_add(input, dim, index, source, alpha=alpha)


def _scatter_add(input: Tensor, source: Tensor, *, dim: int, index: Tensor) -> Tensor:
    return torch.scatter_add(input, dim, index, source)


def _scatter_reduce(
    input: Tensor, source: Tensor, *, dim: int, index: Tensor, reduce: str, include_self: bool = True
) -> Tensor:
    return torch.scatter_reduce(input, dim, index, source, reduce, include_self=include_self)


def _spmm(input: Tensor, other: Tensor, *, reduce: str | None = None) -> Tensor:
    found: Tensor = torch.sparse.mm(input, other) if reduce is None else torch.sparse.mm(input, other, reduce)
    return found


def _softmax(
    input: Tensor, *, dim: int | None = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None
) -> Tensor:
    # torch.softmax and F.softmax disagree about the third argument
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    return F.softmax(input, dim, dtype=dtype)


def _log_softmax(
    input: Tensor, *, dim: int | None = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None
) -> Tensor:
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    return F.log_softmax(input, dim, dtype=dtype)


def _recurrent(kind: str) -> Callable[..., Any]:
    """``torch.lstm`` and its like, which take positional arguments only."""
    function = getattr(torch, kind)
    return lambda *operands, **rest: function(*operands, *rest.values())


def _einsum_macs(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    # without the equation: the geometric mean of the three sizes is exact for a matrix product (ab, bc -> ac)
    if len(inputs) != 2:
        return 0
    return round(math.sqrt(math.prod(inputs[0]) * math.prod(inputs[1]) * math.prod(outputs[0])))


def _names(*names: str) -> tuple[Callable[..., Any], ...]:
    """The functions of that name in torch, torch.Tensor and torch.nn.functional, as a function mode sees them."""
    found: list[Callable[..., Any]] = []
    for name in names:
        for owner in (torch, torch.Tensor, F):
            function = getattr(owner, name, None)
            if callable(function) and function not in found and not inspect.ismodule(function):
                found.append(function)
    return tuple(found)


def _elementwise(kind: str, *extra: str) -> Operation:
    inplace = _names(f"{kind}_", f"__i{kind}__")
    return Operation(
        kind,
        getattr(torch, kind),
        _names(kind, f"__{kind}__", *extra) + inplace,
        ("input", "other", "alpha"),
        ("input", "other"),
        inplace=frozenset(inplace),
    )


def _activation(kind: str, *parameters: str) -> Operation:
    inplace = _names(f"{kind}_")
    compute = getattr(F, kind, None) or getattr(torch, kind)
    return Operation(
        kind, compute, _names(kind) + inplace, ("input", *parameters), ("input",), "float", frozenset(inplace)
    )


_SYNONYMS: dict[str, str] = {
    "self": "input",
    "mat2": "other",
    "axis": "dim",
    "keepdims": "keepdim",
    "src": "source",
    "x1": "input",
    "x2": "other",
}
_ADDED_TO = {
    "self": "bias",
    "input": "bias",
    **dict.fromkeys(("mat1", "batch1"), "input"),
    "mat2": "other",
    "batch2": "other",
}
_SPARSE = {"sparse": "input", "mat1": "input", "mat2": "other", "dense": "other"}
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_T = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_TABLE: tuple[Operation, ...] = (
    *(
        Operation(
            f"conv{n}d", getattr(F, f"conv{n}d"), _names(f"conv{n}d"), _CONV, ("input", "weight"), macs=_conv_macs
        )
        for n in (1, 2, 3)
    ),
    *(
        Operation(
            f"conv_transpose{n}d",
            getattr(F, f"conv_transpose{n}d"),
            _names(f"conv_transpose{n}d"),
            _CONV_T,
            ("input", "weight"),
            macs=_transposed_macs,
        )
        for n in (1, 2, 3)
    ),
    Operation(
        "linear", F.linear, _names("linear"), ("input", "weight", "bias"), ("input", "weight"), macs=_linear_macs
    ),
    Operation(
        "matmul",
        torch.matmul,
        _names("matmul", "__matmul__", "bmm", "mm"),
        ("input", "other"),
        ("input", "other"),
        macs=_linear_macs,
    ),
    Operation(
        "baddbmm",
        _baddbmm,
        _names("baddbmm", "addmm"),
        ("bias", "input", "other", "beta", "alpha"),
        ("input", "other"),
        macs=_linear_macs,
        synonyms=_ADDED_TO,
    ),
    Operation(
        "einsum", _einsum, _names("einsum"), ("equation", "operands"), ("operands",), macs=_einsum_macs, variadic=True
    ),
    _elementwise("add", "__radd__"),
    _elementwise("sub"),
    _elementwise("mul", "__rmul__"),
    Operation("cat", _cat, _names("cat", "concat", "concatenate"), ("tensors", "dim"), ("tensors",), variadic=True),
    Operation(
        "embedding",
        F.embedding,
        _names("embedding"),
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        ("input", "weight"),
    ),
    *(
        Operation(f"avg_pool{n}d", getattr(F, f"avg_pool{n}d"), _names(f"avg_pool{n}d"), _POOL, ("input",))
        for n in (1, 2, 3)
    ),
    *(
        Operation(
            f"adaptive_avg_pool{n}d",
            getattr(F, f"adaptive_avg_pool{n}d"),
            _names(f"adaptive_avg_pool{n}d"),
            ("input", "output_size"),
            ("input",),
        )
        for n in (1, 2, 3)
    ),
    Operation("mean", torch.mean, _names("mean"), ("input", "dim", "keepdim", "dtype"), ("input",)),
    # no runtime has an integer kernel for it, and other techniques cannot read sparse tensors
    Operation(
        "spmm", _spmm, (torch.sparse.mm,), ("input", "other", "reduce"), ("input", "other"), "float", synonyms=_SPARSE
    ),
    Operation(
        "index_add",
        _index_add,
        _names("index_add", "index_add_"),
        ("input", "dim", "index", "source", "alpha"),
        ("input", "source"),
        inplace=frozenset(_names("index_add_")),
    ),
    Operation(
        "scatter_add",
        _scatter_add,
        _names("scatter_add", "scatter_add_"),
        ("input", "dim", "index", "source"),
        ("input", "source"),
        inplace=frozenset(_names("scatter_add_")),
    ),
    Operation(
        "scatter_reduce",
        _scatter_reduce,
        _names("scatter_reduce", "scatter_reduce_"),
        ("input", "dim", "index", "source", "reduce", "include_self"),
        ("input", "source"),
        inplace=frozenset(_names("scatter_reduce_")),
    ),
    # float only, but visible: their time counts
    Operation(
        "batch_norm",
        F.batch_norm,
        (F.batch_norm,),
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        ("input",),
        "float",
    ),
    Operation(
        "layer_norm",
        F.layer_norm,
        (F.layer_norm,),
        ("input", "normalized_shape", "weight", "bias", "eps"),
        ("input",),
        "float",
    ),
    Operation(
        "group_norm",
        F.group_norm,
        (F.group_norm,),
        ("input", "num_groups", "weight", "bias", "eps"),
        ("input",),
        "float",
    ),
    Operation("softmax", _softmax, _names("softmax"), ("input", "dim", "_stacklevel", "dtype"), ("input",), "float"),
    Operation(
        "log_softmax",
        _log_softmax,
        _names("log_softmax"),
        ("input", "dim", "_stacklevel", "dtype"),
        ("input",),
        "float",
    ),
    _activation("relu", "inplace"),
    _activation("relu6", "inplace"),
    _activation("hardtanh", "min_val", "max_val", "inplace"),
    _activation("clamp", "min", "max"),
    _activation("leaky_relu", "negative_slope", "inplace"),
    _activation("elu", "alpha", "inplace"),
    _activation("silu", "inplace"),
    _activation("gelu", "approximate"),
    _activation("hardswish", "inplace"),
    _activation("hardsigmoid", "inplace"),
    _activation("sigmoid"),
    _activation("tanh"),
    _activation("softplus", "beta", "threshold"),
    _activation("mish", "inplace"),
    # composites
    Operation(
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        (F.scaled_dot_product_attention,),
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        ("query", "key", "value"),
        "composite",
        macs=_attention_macs,
    ),
    Operation(
        "multi_head_attention_forward",
        F.multi_head_attention_forward,
        (F.multi_head_attention_forward,),
        tuple(inspect.signature(F.multi_head_attention_forward).parameters),
        ("query", "key", "value"),
        "composite",
    ),
    *(
        Operation(
            kind,
            _recurrent(kind),
            (getattr(torch, kind),),
            # of a packed sequence the names are shifted by one, which only the order matters for
            ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"),
            ("input",),
            "composite",
        )
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    ),
    *(
        Operation(
            kind,
            _recurrent(kind),
            (getattr(torch, kind),),
            ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"),
            ("input",),
            "composite",
        )
        for kind in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    ),
)

OPERATIONS: Mapping[str, Operation] = {operation.kind: operation for operation in _TABLE}
"""Every operation that can be a site, by kind."""

BY_FUNCTION: Mapping[Callable[..., Any], Operation] = {
    function: operation for operation in _TABLE for function in operation.functions
}
"""The operation that a torch function computes."""

ACTIVATIONS: frozenset[str] = frozenset({"relu", "relu6", "hardtanh", "clamp"})
"""Activations that every integer runtime fuses behind the operation before them."""

VALUE_PRESERVING: frozenset[Callable[..., Any]] = frozenset(
    (
        *_names("reshape", "view", "flatten", "unflatten", "transpose", "permute", "contiguous", "expand", "squeeze"),
        *_names("unsqueeze", "chunk", "split", "unbind", "narrow", "select", "movedim", "swapaxes", "clone", "detach"),
        *_names("view_as", "reshape_as", "expand_as", "repeat", "tile", "flip", "roll", "index_select", "gather", "t"),
        *_names("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "channel_shuffle", "pixel_shuffle"),
        *_names(
            "alias", "unfold", "repeat_interleave", "stack_identity", "mT", "squeeze_", "unsqueeze_", "requires_grad_"
        ),
        torch.Tensor.__getitem__,
        torch.Tensor.to,
        torch.Tensor.float,
        torch.Tensor.T.__get__,  # type: ignore[attr-defined]
        torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    )
)
"""Functions whose output holds only values of their first input (views, copies, maxima): identity passes through."""

PADDING: Mapping[Callable[..., Any], tuple[str, ...]] = {
    F.pad: ("input", "pad", "mode", "value"),
    torch.constant_pad_nd: ("input", "pad", "value"),
}
"""Functions that pad or crop, with their arguments in order; ``nn.ZeroPad2d`` and its like call the first."""


def pads_with_zeros(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call surrounds its first input with zeros (or crops it, where a pad is negative).

    Zero lies exactly on the grid of every quantizer, for all of their ranges hold it: identity passes through.
    """
    if function not in PADDING:
        return False
    given = {**dict(zip(PADDING[function], args, strict=False)), **kwargs}
    value = given.get("value")
    return given.get("mode", "constant") == "constant" and (
        value is None or (isinstance(value, (int, float)) and value == 0)
    )
