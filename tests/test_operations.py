"""The table of operations: every spelling of a call binds to the same arguments, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitsmith.operations import ACTIVATIONS, BY_FUNCTION, OPERATIONS, pads_with_zeros

G = torch.Generator().manual_seed(0)
X, Y = torch.rand(3, 4, generator=G), torch.rand(3, 4, generator=G)
SQUARE, BATCH = torch.rand(4, 4, generator=G), torch.rand(2, 3, 4, generator=G)
ROWS = torch.tensor([0, 2, 1])
SPARSE = torch.sparse_coo_tensor([[0, 1, 1], [2, 0, 1]], [0.5, 1.0, 2.0], (3, 3), check_invariants=False)
IMAGE, KERNEL = torch.rand(1, 2, 6, 6, generator=G), torch.rand(4, 2, 3, 3, generator=G)

CALLS: dict[str, list[Callable[[], Any]]] = {
    "add": [
        lambda: X + Y,
        lambda: torch.add(X, Y),
        lambda: X.add(Y),
        lambda: torch.add(input=X, other=Y),
        lambda: torch.add(X, Y, alpha=1),
        lambda: X.clone().add_(Y),
        lambda: X.clone().__iadd__(Y),
    ],
    "sub": [lambda: X - Y, lambda: torch.sub(X, other=Y), lambda: X.clone().sub_(Y), lambda: torch.sub(X, Y, alpha=1)],
    "mul": [lambda: X * Y, lambda: torch.mul(X, Y), lambda: X.clone().mul_(Y)],
    "matmul": [
        lambda: X @ SQUARE,
        lambda: torch.matmul(X, SQUARE),
        lambda: torch.mm(X, mat2=SQUARE),
        lambda: X.mm(SQUARE),
    ],
    "baddbmm": [
        lambda: torch.addmm(Y, X, SQUARE),
        lambda: Y.addmm(X, SQUARE),
        lambda: torch.addmm(input=Y, mat1=X, mat2=SQUARE, beta=1, alpha=1),
        lambda: torch.baddbmm(Y[None], X[None], SQUARE[None])[0],
        lambda: torch.baddbmm(input=Y[None], batch1=X[None], batch2=SQUARE[None])[0],
    ],
    "einsum": [lambda: torch.einsum("ab,bc->ac", X, SQUARE), lambda: torch.einsum("ab,bc->ac", [X, SQUARE])],
    "cat": [
        lambda: torch.cat([X, Y], 1),
        lambda: torch.cat((X, Y), dim=1),
        lambda: torch.concat([X, Y], dim=1),
        lambda: torch.cat(tensors=[X, Y], axis=1),
    ],
    "mean": [lambda: X.mean(1), lambda: torch.mean(X, dim=1), lambda: X.mean(axis=1), lambda: torch.mean(X, (1,))],
    "softmax": [
        lambda: torch.softmax(X, 1),
        lambda: F.softmax(X, dim=1),
        lambda: X.softmax(dim=-1),
        lambda: F.softmax(X, 1, 5),
        lambda: torch.softmax(X, 1, torch.float32),
    ],
    "log_softmax": [
        lambda: torch.log_softmax(X, 1),
        lambda: F.log_softmax(X, dim=1, _stacklevel=5),
        lambda: X.log_softmax(1),
    ],
    "relu": [
        lambda: F.relu(X - 0.5),
        lambda: torch.relu(X - 0.5),
        lambda: (X - 0.5).relu(),
        lambda: F.relu(X - 0.5, inplace=True),
        lambda: torch.relu_(X - 0.5),
        lambda: F.relu_(X - 0.5),
    ],
    "clamp": [
        lambda: X.clamp(0.2, 0.5),
        lambda: torch.clamp(X, min=0.2, max=0.5),
        lambda: X.clone().clamp_(0.2, max=0.5),
    ],
    "conv2d": [
        lambda: F.conv2d(IMAGE, KERNEL, None, 1, 1),
        lambda: torch.conv2d(IMAGE, KERNEL, padding=1),
        lambda: F.conv2d(input=IMAGE, weight=KERNEL, bias=None, padding=(1, 1)),
    ],
    "linear": [lambda: F.linear(X, SQUARE), lambda: F.linear(input=X, weight=SQUARE, bias=None)],
    "spmm": [
        lambda: torch.sparse.mm(SPARSE, X),
        lambda: torch.sparse.mm(SPARSE.coalesce(), X),
        lambda: torch.sparse.mm(SPARSE, dense=X),
    ],
    "embedding": [lambda: F.embedding(ROWS, SQUARE), lambda: F.embedding(input=ROWS, weight=SQUARE, padding_idx=None)],
    "index_add": [lambda: X.index_add(0, ROWS, Y), lambda: X.clone().index_add_(0, ROWS, Y, alpha=1)],
    "scatter_add": [
        lambda: X.scatter_add(0, ROWS[:, None].expand(3, 4), Y),
        lambda: torch.scatter_add(X, dim=0, index=ROWS[:, None].expand(3, 4), src=Y),
        lambda: X.clone().scatter_add_(0, ROWS[:, None].expand(3, 4), Y),
    ],
    "scatter_reduce": [
        lambda: X.scatter_reduce(0, ROWS[:, None].expand(3, 4), Y, "sum"),
        lambda: torch.scatter_reduce(X, 0, ROWS[:, None].expand(3, 4), src=Y, reduce="sum", include_self=True),
    ],
    "layer_norm": [lambda: F.layer_norm(X, (4,)), lambda: F.layer_norm(X, [4], None, None, 1e-5)],
    "gelu": [lambda: F.gelu(X), lambda: F.gelu(X, approximate="none")],
    "avg_pool2d": [lambda: F.avg_pool2d(IMAGE, 2), lambda: F.avg_pool2d(IMAGE, kernel_size=(2, 2), stride=None)],
    "adaptive_avg_pool2d": [
        lambda: F.adaptive_avg_pool2d(IMAGE, 1),
        lambda: F.adaptive_avg_pool2d(IMAGE, output_size=(1, 1)),
    ],
    "scaled_dot_product_attention": [
        lambda: F.scaled_dot_product_attention(BATCH, BATCH, BATCH),
        lambda: F.scaled_dot_product_attention(query=BATCH, key=BATCH, value=BATCH, attn_mask=None),
    ],
}


class Split(TorchFunctionMode):
    """Computes every call of the table through its row, as a cell does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = BY_FUNCTION.get(func)
        if operation is None:
            return func(*args, **(kwargs or {}))
        target = operation.target(func, args, kwargs or {})
        operands, rest = operation.split(args, kwargs or {})
        rest.pop("inplace", None)
        self.seen.append((operation.kind, len(operands), target is not None))
        output = operation.compute(*operands, **rest)
        return output if target is None else target.copy_(output)


@pytest.mark.parametrize(
    ("kind", "index"), [(kind, index) for kind, calls in CALLS.items() for index in range(len(calls))]
)
def test_every_spelling(kind: str, index: int) -> None:
    call = CALLS[kind][index]
    expected = call()
    mode = Split()
    with mode:
        got = call()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, CALLS[kind][0](), rtol=1e-6, atol=1e-6)
    assert [k for k, _, _ in mode.seen][-1] == kind
    wanted = 2 if OPERATIONS[kind].variadic else len(OPERATIONS[kind].operands)
    assert mode.seen[-1][1] == wanted


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_products_with_a_reduction() -> None:
    matrix = SPARSE.to_sparse_csr()
    expected = torch.sparse.mm(matrix, X, "mean")
    with Split() as mode:
        assert torch.equal(torch.sparse.mm(matrix, X, "mean"), expected)
    assert mode.seen == [("spmm", 2, False)]


def test_in_place_calls_know_what_they_overwrite() -> None:
    relu, add = OPERATIONS["relu"], OPERATIONS["add"]
    assert relu.target(F.relu, (X,), {"inplace": True}) is X
    assert relu.target(F.relu, (X, True), {}) is X
    assert relu.target(F.relu, (X,), {"inplace": False}) is None
    assert relu.target(F.relu, (X,), {}) is None
    assert relu.target(torch.relu_, (X,), {}) is X
    assert add.target(Tensor.__iadd__, (X, Y), {}) is X
    assert add.target(Tensor.add_, (X, Y), {"alpha": 2}) is X
    assert add.target(torch.add, (X, Y), {}) is None


@pytest.mark.parametrize(
    ("kind", "args", "site"),
    [
        ("add", (X, Y), True),
        ("add", (X, 1.0), False),
        ("add", (X, torch.tensor(2.0)), False),
        ("add", (ROWS, ROWS), False),
        ("mul", (X, torch.tensor(2.0)), False),
        ("cat", ([X, Y],), True),
        ("cat", ([ROWS, ROWS],), False),
        ("embedding", (ROWS, SQUARE), True),
        ("mean", (X,), True),
    ],
)
def test_arithmetic_with_scalars_and_integers_is_no_site(kind: str, args: tuple[Any, ...], site: bool) -> None:
    assert OPERATIONS[kind].on_tensors(args, {}) is site


def test_the_table_is_sound() -> None:
    assert set(OPERATIONS) == {operation.kind for operation in BY_FUNCTION.values()}
    assert set(OPERATIONS) >= ACTIVATIONS
    for operation in OPERATIONS.values():
        assert set(operation.operands) <= set(operation.signature), operation.kind
        assert operation.inplace <= set(operation.functions), operation.kind
        assert operation.functions, operation.kind
        assert sum(len(o.functions) for o in OPERATIONS.values()) == len(BY_FUNCTION)  # no function in two rows


class Padding(TorchFunctionMode):
    """Asks of every call whether it pads with zeros."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(pads_with_zeros(function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "zeros"),
    [
        (lambda: F.pad(IMAGE, (0, 1, 0, 1)), True),
        (lambda: F.pad(input=IMAGE, pad=(0, 1), value=0), True),
        (lambda: F.pad(IMAGE, (-1, 2), "constant", 0.0), True),
        (lambda: nn.ZeroPad2d(1)(IMAGE), True),
        (lambda: nn.ConstantPad1d(1, 0.0)(IMAGE), True),
        (lambda: torch.constant_pad_nd(IMAGE, (1, 1)), True),
        (lambda: torch.constant_pad_nd(IMAGE, (1, 1), value=1), False),
        (lambda: F.pad(IMAGE, (1, 1), "constant", 0.5), False),
        (lambda: F.pad(IMAGE, (1, 1), value=float("-inf")), False),
        (lambda: F.pad(IMAGE, (1, 1, 1, 1), mode="reflect"), False),
        (lambda: F.pad(IMAGE, (1, 1, 1, 1), "replicate"), False),
        (lambda: IMAGE.flip(0), False),
    ],
)
def test_zeros_around_a_tensor_are_told_from_other_padding(call: Callable[[], Tensor], zeros: bool) -> None:
    with Padding() as mode:
        call()
    assert mode.found[0] is zeros
