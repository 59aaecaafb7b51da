"""The quantizer whose range follows what it sees, against its equations written plainly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from bitsmith.numerics.ranges import qparams
from bitsmith.numerics.running import RunningQuantizer
from bitsmith.site import Format


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_grid(x: torch.Tensor, low: float, high: float, bits: int) -> np.ndarray:
    scale, zero = qparams(min(low, 0.0), max(high, 0.0), Format(bits))
    levels = np.clip(np.round(x.double().numpy() / scale) + zero, 0, 2**bits - 1)
    return (levels - zero) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_extremes_as_a_running_mean(bits: int) -> None:
    quantizer = RunningQuantizer(Format(bits), momentum=0.25)
    low = high = 0.0
    for step in range(4):
        x = draw(step, 20, 3) * (step + 1)
        got = quantizer(x)
        share = 1.0 if step == 0 else 0.25
        low, high = low + share * (float(x.min()) - low), high + share * (float(x.max()) - high)
        np.testing.assert_allclose(got.numpy(), on_grid(x, low, high, bits), atol=1e-5)
    assert int(quantizer.seen) == 4
    quantizer.eval()
    quantizer(100 * draw(9, 20, 3))
    assert int(quantizer.seen) == 4
    np.testing.assert_allclose([float(quantizer.low), float(quantizer.high)], [low, high], rtol=1e-5)


def test_without_momentum_the_range_only_widens() -> None:
    quantizer = RunningQuantizer(Format(8), momentum=None)
    batches = [draw(0, 30), 0.1 * draw(1, 30), 3 * draw(2, 30)]
    for x in batches:
        quantizer(x)
    every = torch.cat(batches)
    assert (float(quantizer.low), float(quantizer.high)) == (float(every.min()), float(every.max()))


def test_percentiles_leave_so_many_values_out_on_each_side() -> None:
    x = draw(0, 100, 10)
    quantizer = RunningQuantizer(Format(8), percentile=1.0)
    quantizer(x)
    ordered = np.sort(x.numpy().ravel())
    assert (float(quantizer.low), float(quantizer.high)) == (ordered[10], ordered[-11])
    sampled = RunningQuantizer(Format(8), percentile=1.0, sample=300)
    sampled(x)
    assert abs(float(sampled.high) - ordered[-11]) < 0.7


@pytest.mark.parametrize("percentile", [None, 5.0])
@pytest.mark.parametrize("sample", [0, 64])
def test_protected_rows_stay_and_move_nothing(percentile: float | None, sample: int) -> None:
    x, spared = draw(0, 40, 6), torch.arange(40) % 4 == 0
    x[spared] *= 100
    quantizer = RunningQuantizer(Format(4), percentile, sample=sample)
    got = quantizer(x, spared)
    assert torch.equal(got[spared], x[spared])
    assert float(quantizer.high) <= float(x[~spared].max())
    np.testing.assert_allclose(
        got[~spared].numpy(), on_grid(x[~spared], float(quantizer.low), float(quantizer.high), 4), atol=1e-5
    )
    # with a gradient the same comes out, and rows that are protected have theirs whole
    trained = x.clone().requires_grad_()
    again = RunningQuantizer(Format(4), percentile, sample=sample)(trained, spared)
    assert torch.equal(again.detach(), got)
    again.sum().backward()
    assert torch.equal(trained.grad[spared], torch.ones_like(x[spared]))


def test_where_every_row_is_protected_nothing_is_seen() -> None:
    for percentile in (None, 1.0):
        quantizer, x = RunningQuantizer(Format(8), percentile), draw(0, 5, 2)
        assert torch.equal(quantizer(x, torch.ones(5, dtype=torch.bool)), x)
        assert int(quantizer.seen) == 0


def test_gradients_outside_the_range() -> None:
    for clips, wanted in ((True, [0.0, 1.0, 0.0]), (False, [1.0, 1.0, 1.0])):
        quantizer = RunningQuantizer(Format(8), clips=clips)
        quantizer(torch.tensor([-1.0, 1.0]))
        quantizer.eval()
        x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
        quantizer(x).sum().backward()
        assert x.grad.tolist() == wanted


def test_before_anything_was_seen_a_tensor_has_its_own_range() -> None:
    quantizer, x = RunningQuantizer(Format(4)).eval(), 1 + draw(0, 30).abs()
    np.testing.assert_allclose(quantizer(x).numpy(), on_grid(x, 0.0, float(x.max()), 4), atol=1e-5)
    assert int(quantizer.seen) == 0
    assert quantizer(torch.zeros(0, 3)).shape == (0, 3)


def test_state_round_trip() -> None:
    quantizer, x = RunningQuantizer(Format(8), percentile=1.0), draw(0, 50, 2)
    quantizer(x)
    other = RunningQuantizer(Format(8), percentile=1.0)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.eval()(x), quantizer.eval()(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        RunningQuantizer(Format(8))(torch.tensor([1.0, value]))
