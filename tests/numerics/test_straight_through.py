from __future__ import annotations

import torch

from bitsmith.numerics.straight_through import rounded, straight_through


def test_the_value_is_given_back_bit_for_bit_with_the_slope_as_gradient() -> None:
    x = torch.tensor([0.3, -1e9, 5.0], requires_grad=True)
    value, slope = torch.tensor([1e-30, 7.0, -0.0], dtype=torch.float64), torch.tensor([0.5, 0.0, 2.0])
    got = straight_through(x, value, slope)
    assert torch.equal(got.view(torch.int64), value.view(torch.int64))
    (got * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.0, 6.0]
    with torch.no_grad():
        assert straight_through(x, value) is value


def test_rounded_is_to_even_and_clips_with_its_gradient() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 7.4, 7.6, -9.0], requires_grad=True)
    got = rounded(x, 7)
    assert got.tolist() == [0.0, 2.0, -2.0, 7.0, 7.0, -7.0]
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
