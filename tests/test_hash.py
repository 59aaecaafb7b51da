from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith._hash import canonical, hash_function, hash_json, hash_source, hash_state, technique_key, update
from bitsmith.site import Range


class Net(nn.Module):
    hidden: Tensor

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.register_buffer("hidden", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + i // 2)
            self.b.weight.copy_(self.a.weight)
        if tied:
            self.b.weight = self.a.weight


def test_state_hash_is_of_the_content() -> None:
    base = hash_state(Net())
    assert hash_state(Net()) == base
    assert hash_state(Net().eval().requires_grad_(False)) == base
    transposed = Net()
    transposed.a.weight = nn.Parameter(transposed.a.weight.detach().t().contiguous().t())  # other strides, same values
    assert hash_state(transposed) == base


def test_every_change_of_the_state_changes_the_hash() -> None:
    def flip_one_bit(net: Net) -> None:
        net.b.bias.detach().view(torch.uint8)[7] ^= 1

    def hidden(net: Net) -> None:
        net.hidden[1] = 1

    def dtype(net: Net) -> None:
        net.a.bias = nn.Parameter(net.a.bias.detach().view(torch.int32), requires_grad=False)

    def shape(net: Net) -> None:
        net.a.weight = nn.Parameter(net.a.weight.detach().reshape(9, 1))

    def name(net: Net) -> None:
        net.c = net.b
        del net.b

    def swap(net: Net) -> None:
        net.a, net.b = net.b, net.a

    hashes = {hash_state(Net()), hash_state(Net(tied=True))}
    changes = [flip_one_bit, hidden, dtype, shape, name, swap]
    for change in changes:
        net = Net()
        change(net)
        hashes.add(hash_state(net))
    assert len(hashes) == len(changes) + 2


def test_weights_without_values_are_an_error_that_names_them() -> None:
    with pytest.raises(TypeError, match=r"bias: .*lazy"):
        hash_state(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"0\.bias.*meta"):
        hash_state(nn.Sequential(nn.Linear(2, 2, device="meta")))


def digest(value: Any) -> str:
    hasher = hashlib.sha256()
    update(hasher, value)
    return hasher.hexdigest()


def test_structure_cannot_be_confused() -> None:
    one = torch.ones(2)
    values: list[Any] = [
        one, [one], [[one]], [one, one], torch.ones(2, 1), torch.ones(1, 2), torch.ones(4), one.numpy(), {"a": one},
        ["a", one], "ab", ["a", "b"], b"ab", 1, 1.0, True, None, "None", [], {}, torch.tensor(1.0), torch.zeros(0),
        torch.zeros(0, 2), torch.float16, np.float32(1), {1, 2}, -0.0, 0.0,
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(torch.eye(3).to_sparse()) == digest(torch.eye(3))
    assert digest(torch.tensor([1j]).conj()) == digest(torch.complex(torch.zeros(1), -torch.ones(1)))


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.floats() | st.none(), max_size=5))
def test_json_hash_ignores_the_order_of_keys(value: dict[str, Any]) -> None:
    if "$float" not in value:
        assert hash_json(value) == hash_json(dict(reversed(value.items())))
        assert len(hash_json(value)) == 64


def test_canonical_json_is_strict() -> None:
    assert canonical({"b": (1, np.int64(2)), "a": np.float32(0.5)}) == '{"a":0.5,"b":[1,2]}'
    assert len({hash_json(x) for x in (float("nan"), float("inf"), float("-inf"), "nan", None)}) == 5


SOURCE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Ternary:
    threshold: float = 0.7

def helper(x):
    return x + 1
"""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("plug_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "plug_in", module)
        spec.loader.exec_module(module)
        module.source_hash = hash_source(module.Ternary)
        module.key = technique_key(module.Ternary(0.5))
    return module


def test_source_hash_follows_the_file_not_its_place(tmp_path: Path) -> None:
    here, there, edited = tmp_path / "a.py", tmp_path / "deep" / "b.py", tmp_path / "c.py"
    there.parent.mkdir()
    here.write_text(SOURCE)
    shutil.copyfile(here, there)
    edited.write_text(SOURCE.replace("x + 1", "x + 2"))  # not even inside the class
    one, moved, other = load(here), load(there), load(edited)
    assert one.source_hash == moved.source_hash == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert other.source_hash != one.source_hash
    assert one.key == moved.key
    assert one.key != other.key
    assert hash_source(one.helper) == one.source_hash


def test_source_hash_of_what_has_no_file() -> None:
    def typed(text: str) -> Any:
        scope: dict[str, Any] = {"__name__": "typed_at_a_prompt"}
        exec(text, scope)
        return scope["thing"]

    assert hash_source(typed("def thing(x): return x + 1")) == hash_source(typed("def thing(x): return x + 1"))
    assert hash_source(typed("def thing(x): return x + 1")) != hash_source(typed("def thing(x): return x + 2"))
    first, second = (typed(f"class thing:\n  def run(self): return {i}") for i in (1, 2))
    assert hash_source(first) != hash_source(second)
    assert hash_source(dict) != hash_source(list)


@dataclass(frozen=True)
class Cell:
    bits: int = 8
    range: Range = Range()  # noqa: RUF009
    shape: tuple[int, ...] = ()


def test_technique_key_has_every_field_also_defaults() -> None:
    key = technique_key(Cell(4))
    assert key["type"] == "Cell"
    assert key["fields"]["bits"] == 4
    assert key["fields"]["range"]["fields"] == {"method": "minmax", "percentile": 99.99}
    assert key["source"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    keys = [Cell(), Cell(4), Cell(range=Range("mse")), Cell(shape=(1,))]
    assert len({hash_json(technique_key(technique)) for technique in keys}) == len(keys)


def scaled(x: Tensor, k: float = 1.0, table: Any = None) -> Tensor:
    return x * k


class Scorer:
    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.k

    def other(self, x: Tensor) -> Tensor:
        return x


def closing(value: Any) -> Any:
    def inner(x: Tensor) -> Tensor:
        return x * value

    return inner


def test_function_hash_sees_source_arguments_fields_and_closures() -> None:
    def make() -> list[Any]:
        return [
            scaled,
            functools.partial(scaled, k=2.0),
            functools.partial(scaled, k=3.0),
            functools.partial(scaled, table=[scaled, 1]),
            functools.partial(scaled, table=[scaled, 2]),
            Scorer(1.0),
            Scorer(2.0),
            Scorer(1.0).other,
            closing(1.0),
            closing(torch.tensor(1.0)),
            closing(torch.float16),
            closing({"f": closing(2.0)}),
            closing({"f": closing(3.0)}),
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(weight=torch.ones(2)),
            F.cross_entropy,
            torch.add,
            torch.mul,
            np.add,
            np.multiply,
        ]

    hashes = [hash_function(function) for function in make()]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [hash_function(function) for function in make()]


def test_a_function_that_closes_over_itself_ends() -> None:
    def count(n: int) -> int:
        return n and count(n - 1)

    assert hash_function(count) == hash_function(count)
