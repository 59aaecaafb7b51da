"""LSTM, GRU and RNN as torch computes them: ``torch.lstm`` and its like, with the gates in torch's order.

ONNX has one layer in one or two directions, weights (directions, gates * H, I) and biases (directions, 2 * gates * H)
for input and recurrence. Gate order: LSTM i o f c (torch: i f c o), GRU z r h (torch: r z h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .graph import Argument, Built, Call, Given, Literal, Operator, Own, Weight

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Layer:
    """What one node says. ``order``: torch's gates among ONNX's. ``run``: the fused function of torch, if it fits."""

    hidden: int
    directions: int
    backwards: bool
    batch_first: bool
    states: int
    run: Callable[..., Any] | None
    outputs: tuple[bool, ...]

    def __call__(self, x: Tensor, lengths: Tensor | None, h: Tensor | None, c: Tensor | None, *weights: Tensor) -> Any:
        """x (T, N, I) -> Y (T, directions, N, H), Y_h and Y_c (directions, N, H); layout 1 has N first."""
        if self.batch_first:
            x = x.transpose(0, 1)
        steps, batch = x.shape[0], x.shape[1]
        states = tuple(self._start(state, x, batch) for state in (h, c)[: self.states])
        if lengths is not None:
            made, last = self._packed(x, lengths, states, weights)
        else:
            made, last = self._whole(x.flip(0) if self.backwards else x, states, weights)
            made = made.flip(0) if self.backwards else made
        sequence = made.reshape(steps, batch, self.directions, self.hidden)
        sequence = sequence.permute(1, 0, 2, 3) if self.batch_first else sequence.permute(0, 2, 1, 3)
        final = tuple(state.transpose(0, 1) if self.batch_first else state for state in last)
        found = (sequence, *final)[: len(self.outputs)]
        return found[0] if len(self.outputs) == 1 else found

    def _start(self, state: Tensor | None, x: Tensor, batch: Any) -> Tensor:
        if state is None:
            return x.new_zeros(self.directions, batch, self.hidden)
        return state.transpose(0, 1) if self.batch_first else state

    def _whole(self, x: Tensor, states: State, weights: State) -> tuple[Tensor, State]:
        if self.run is None:
            return _gru_reset_before(x, states[0], weights, self.directions)
        start: Any = states if self.states == 2 else states[0].contiguous()
        made = self.run(x, start, weights, True, 1, 0.0, False, self.directions == 2, False)
        return made[0], tuple(made[1:])

    def _packed(self, x: Tensor, lengths: Tensor, states: State, weights: State) -> tuple[Tensor, State]:
        """Sequences of different lengths: nothing is computed behind a sequence's end, its outputs there are 0."""
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None
        assert back is not None
        states = tuple(state.index_select(1, order) for state in states)
        start: Any = states if self.states == 2 else states[0]
        assert self.run is not None
        made = self.run(packed.data, packed.batch_sizes, start, weights, True, 1, 0.0, False, self.directions == 2)
        whole, _ = pad_packed_sequence(packed._replace(data=made[0]), total_length=x.shape[0])
        return whole, tuple(state.index_select(1, back) for state in made[1:])


def _gru_reset_before(x: Tensor, start: Tensor, weights: State, directions: int) -> tuple[Tensor, State]:
    """GRU with the reset gate before the recurrent product (Cho et al. 2014; ``linear_before_reset = 0``)."""
    made, last = [], []
    for direction in range(directions):
        w_ih, w_hh, b_ih, b_hh = weights[4 * direction : 4 * direction + 4]
        r_w, z_w, n_w = w_hh.chunk(3)
        r_b, z_b, n_b = b_hh.chunk(3)
        h = start[direction]
        outputs: list[Tensor] = []
        for at in reversed(range(x.shape[0])) if direction else range(x.shape[0]):
            r_x, z_x, n_x = F.linear(x[at], w_ih, b_ih).chunk(3, -1)
            r = torch.sigmoid(r_x + F.linear(h, r_w, r_b))
            z = torch.sigmoid(z_x + F.linear(h, z_w, z_b))
            n = torch.tanh(n_x + F.linear(r * h, n_w, n_b))
            h = n + z * (h - n)
            outputs.append(h)
        made.append(torch.stack(outputs[::-1] if direction else outputs))
        last.append(h)
    return torch.cat(made, -1), (torch.stack(last),)


def _gates(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    return torch.cat([weight.chunk(len(order))[gate] for gate in order]).contiguous()


def _recurrent(kind: str, order: tuple[int, ...], standard: tuple[str, ...]) -> Callable[[Call], Built]:
    def build(call: Call) -> Built:
        direction = call.attribute("direction", "forward")
        directions = 2 if direction == "bidirectional" else 1
        activations = tuple(
            name.decode() if isinstance(name, bytes) else name for name in call.attribute("activations") or ()
        )
        run = _function(call, kind, standard, activations, directions)
        w, r, b = call.constant(1), call.constant(2), call.constant(3)
        if w is None or r is None or (b is None and call.given(3)):
            raise call.refuse("with weights that are computed")
        if call.attribute("clip") is not None:
            raise call.refuse("with clip")
        if kind == "lstm" and (call.given(7) or call.attribute("input_forget", 0)):
            raise call.refuse("with peepholes or coupled gates")
        lengths = _lengths(call)
        if lengths and (direction == "reverse" or run is None):
            raise call.refuse("with sequence lengths in this form (reverse, or the reset gate before the product)")
        hidden = r.shape[2]
        bias = torch.zeros(directions, 2 * len(order) * hidden) if b is None else b
        weights: dict[str, Weight] = {}
        for at in range(directions):
            suffix = "_reverse" if at else ""
            b_ih, b_hh = bias[at].chunk(2)
            parts = (("weight_ih", w[at], 1), ("weight_hh", r[at], 2), ("bias_ih", b_ih, 3), ("bias_hh", b_hh, 3))
            for name, value, index in parts:
                source = call.graph.key(call.node.inputs[index]) if call.given(index) else (call.node.label,)
                weights[f"{name}_l0{suffix}"] = Weight(_gates(value, order), (*source, kind, name, str(at)))
        layer = _Layer(
            hidden,
            directions,
            direction == "reverse",
            bool(call.attribute("layout", 0)),
            2 if kind == "lstm" else 1,
            run,
            tuple(bool(name) for name in call.node.outputs),
        )
        arguments: list[Argument] = [Given(0, tensor=True), Given(4, tensor=True) if lengths else Literal(None)]
        for name, index in (("h_0", 5), ("c_0", 6)):
            state = call.constant(index)
            if state is not None:
                weights[name] = call.weight(index, learned=False)
                arguments.append(Own(name))
            else:
                arguments.append(Given(index, tensor=True) if call.given(index) else Literal(None))
        arguments += [Own(name) for name in weights if name.startswith(("weight", "bias"))]
        return Built(layer, tuple(arguments), weights)

    return build


def _function(
    call: Call, kind: str, standard: tuple[str, ...], activations: tuple[str, ...], directions: int
) -> Callable[..., Any] | None:
    """The function of torch that computes this; None for the one form that is written out here."""
    given = tuple(name.lower() for name in activations) or standard * directions
    if kind == "rnn":
        if given in (("tanh",) * directions, ("relu",) * directions):
            return getattr(torch, f"rnn_{given[0]}")  # type: ignore[no-any-return]
        raise call.refuse(f"with activations {activations}")
    if given != standard * directions:
        raise call.refuse(f"with activations {activations}")
    if kind == "gru" and not call.attribute("linear_before_reset", 0):
        return None
    return getattr(torch, kind)  # type: ignore[no-any-return]


def _lengths(call: Call) -> bool:
    """Whether sequence lengths matter: constant ones that are all as long as the input do not."""
    constant = call.constant(4)
    if constant is None:
        return call.given(4)
    kind = call.graph.types.get(call.node.inputs[0])
    axis = 1 if call.attribute("layout", 0) else 0
    if kind is not None and kind.shape is not None and all(length == kind.shape[axis] for length in constant.tolist()):
        return False
    raise call.refuse("with constant sequence lengths")


OPERATORS: dict[str, Operator] = {
    "LSTM": Operator(
        _recurrent("lstm", (0, 2, 3, 1), ("sigmoid", "tanh", "tanh")),
        note="peepholes, clip, coupled gates, other activations, computed weights",
    ),
    "GRU": Operator(
        _recurrent("gru", (1, 0, 2), ("sigmoid", "tanh")),
        note="clip, other activations, computed weights; unrolled where linear_before_reset is 0",
    ),
    "RNN": Operator(
        _recurrent("rnn", (0,), ("tanh",)), note="clip, activations other than Tanh and Relu, computed weights"
    ),
}
"""Recurrent layers."""
