"""What composites are made of: the same function, written in operations that are visible.

Used only where a plan (or a listing) asks for something inside a composite; everywhere else the fused function runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operations import Operation
from .intercept import nested


class ClosedError(NotImplementedError):
    """This call of a composite cannot be shown inside. Raised before anything is computed."""


def available(kind: str) -> bool:
    """Whether the inside of that composite can be shown."""
    return kind in _TABLE


def run(operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Compute a composite call out of visible operations."""
    bound = operation.bind(args, kwargs)
    if operation.kind in _RECURRENT:
        return _TABLE[operation.kind](*args, **kwargs)
    return _TABLE[operation.kind](**bound)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(q k^T * scale + mask) v`` (Vaswani et al. 2017, eq. 1), as torch documents it.

    ``query`` (..., L, E), ``key`` (..., S, E), ``value`` (..., S, Ev) -> (..., L, Ev).
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        repeat = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(seen.logical_not(), float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = _masked(scores, attn_mask)
    weights = torch.softmax(scores, dim=-1)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value)


def multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) as ``nn.MultiheadAttention`` computes it.

    ``query`` (L, N, E), ``key``, ``value`` (S, N, E) or without N -> (L, N, E), and the weights if asked for.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise ClosedError(
            "nn.MultiheadAttention with bias_k, bias_v, add_zero_attn or static keys cannot be seen inside; "
            "plan the module as a whole"
        )
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
    if use_separate_proj_weight:
        weights: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: Sequence[Tensor | None] = in_proj_bias.chunk(3) if in_proj_bias is not None else (None, None, None)
    # a line each, so that each is a site with one weight
    q = _heads(F.linear(query, weights[0], biases[0]), num_heads)  # type: ignore[arg-type]
    k = _heads(F.linear(key, weights[1], biases[1]), num_heads)  # type: ignore[arg-type]
    v = _heads(F.linear(value, weights[2], biases[2]), num_heads)  # type: ignore[arg-type]
    mask = _merge_masks(attn_mask, key_padding_mask, q.shape[0], num_heads, q.dtype)
    scores = torch.matmul(q, k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = _masked(scores, mask)
    attn = torch.softmax(scores, dim=-1)
    dropped = torch.dropout(attn, dropout_p, training) if dropout_p > 0 else attn
    mixed = torch.matmul(dropped, v)
    n, heads, length, width = mixed.shape
    output = F.linear(mixed.permute(2, 0, 1, 3).reshape(length, n, heads * width), out_proj_weight, out_proj_bias)
    shown = (attn.mean(dim=1) if average_attn_weights else attn) if need_weights else None
    if not batched:
        return output.squeeze(1), shown.squeeze(0) if shown is not None else None
    return output, shown


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    # not a site: what has minus infinity in it cannot be quantized
    with torch._C.DisableTorchFunction():
        return scores + mask


def _heads(x: Tensor, heads: int) -> Tensor:
    length, n, width = x.shape
    return x.reshape(length, n, heads, width // heads).permute(1, 2, 0, 3)


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, n: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask)
        if mask.dim() == 3:
            mask = mask.reshape(n, heads, *mask.shape[1:])
    if padding is not None:
        extra = additive(padding)[:, None, None, :]
        mask = extra if mask is None else _masked(mask, extra)
    return mask


# -- recurrent ---------------------------------------------------------------------------------------------------

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
State = tuple[Tensor, ...]


def lstm_cell(x: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> State:
    """Hochreiter and Schmidhuber 1997 with forget gate: x (N, I), h, c (N, H) -> h, c."""
    h, c = hx
    gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    """Cho et al. 2014, in torch's variant (reset gate behind the product): x (N, I), h (N, H) -> h."""
    r_x, z_x, n_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return n + z * (h - n)


def _elman(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
        return function(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return cell


def _recurrent(cell: Callable[..., Any], gated: bool) -> Callable[..., Any]:
    """The loop over layers, directions and time of ``torch.lstm`` and its like (the form for unpacked input)."""

    def forward(
        x: Tensor,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        train: Any,
        bidirectional: Any,
        batch_first: Any = None,
    ) -> Any:
        if batch_first is None:  # (data, batch_sizes, ...): one argument fewer
            raise ClosedError(
                "a recurrent layer on a PackedSequence cannot be seen inside; plan the layer as a whole or unpack"
            )
        directions = 2 if bidirectional else 1
        per = len(params) // (num_layers * directions)
        if per not in (2, 4) or (per == 4 and not has_biases):
            raise ClosedError("a recurrent layer with a projection (proj_size) cannot be seen inside")
        states: State = tuple(hx) if gated else (hx,)
        sequence = x.transpose(0, 1) if batch_first else x
        final: list[list[Tensor]] = [[] for _ in states]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                weights = params[at * per : (at + 1) * per]
                state = tuple(s[at] for s in states)
                steps = []
                times = range(sequence.shape[0])
                for t in reversed(times) if direction else times:
                    new = nested(
                        f"l{layer}{'_reverse' if direction else ''}",
                        functools.partial(cell, sequence[t], state if gated else state[0], *weights),
                    )
                    state = new if gated else (new,)
                    steps.append(state[0])
                outputs.append(torch.stack(steps[::-1] if direction else steps))
                for kept, s in zip(final, state, strict=True):
                    kept.append(s)
            sequence = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if dropout and train and layer < num_layers - 1:
                sequence = torch.dropout(sequence, dropout, True)
        out = sequence.transpose(0, 1) if batch_first else sequence
        return (out, *(torch.stack(kept) for kept in final))

    return forward


_TABLE: Mapping[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head,
    "lstm": _recurrent(lstm_cell, True),
    "gru": _recurrent(gru_cell, False),
    "rnn_tanh": _recurrent(_elman(torch.tanh), False),
    "rnn_relu": _recurrent(_elman(torch.relu), False),
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "rnn_tanh_cell": _elman(torch.tanh),
    "rnn_relu_cell": _elman(torch.relu),
}
