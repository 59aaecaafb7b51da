from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitsmith.export.program import ExportError, exported_program, with_batch


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.drop(x) - 2 * y


X, Y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize("example", [(X, Y), {"y": Y, "x": X}], ids=["tuple", "mapping"])
def test_inputs_reach_the_model_by_position_and_by_name(example: Any) -> None:
    program = exported_program(Named(), example)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    assert torch.equal(program.module()(*args, **kwargs), X - 2 * Y)


def test_training_mode_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    net[1].eval()
    program = exported_program(net, X)
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert torch.allclose(program.module()(X), net[0](X))


def test_a_dynamic_batch_takes_other_sizes() -> None:
    program = exported_program(nn.Linear(3, 4), X, dynamic_batch=True)
    assert program.module()(torch.zeros(7, 3)).shape == (7, 4)


def test_a_branch_on_values_is_an_error_that_says_so() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"Branching cannot be exported.*no branches on tensor values"):
        exported_program(Branching(), X)


def test_with_batch_cuts_and_repeats() -> None:
    assert torch.equal(with_batch(X, 1), X[:1])
    repeated = with_batch((X, torch.tensor(1.0)), 5)
    assert torch.equal(repeated[0], X[[0, 1, 0, 1, 0]])
    assert repeated[1] == 1.0
