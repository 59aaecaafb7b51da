"""The metaplastic update against its equations at float64, against torch's Adam, and in a fine-tune."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bitsmith as bs
from smallnet import batches, small


def reference(w: np.ndarray, gradients: list[np.ndarray], lr: float, m: float) -> np.ndarray:
    """Adam's moments, and the factor where the update goes towards 0, element by element."""
    w = w.astype(np.float64).copy()
    first, second = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        u = -lr * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        for place in np.ndindex(*w.shape):
            shrinks = u[place] * np.where(w[place] >= 0, 1, -1) < 0
            w[place] += u[place] * (1 - np.tanh(m * w[place]) ** 2 if shrinks else 1.0)
    return w


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 3), st.floats(1e-4, 0.5))
def test_it_is_the_published_update(seed: int, m: float, lr: float) -> None:
    rng = np.random.default_rng(seed)
    start, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(5)]
    w = torch.nn.Parameter(torch.tensor(start))
    optimizer = bs.Metaplastic([w], lr=lr, m=m)
    for gradient in gradients:
        w.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(w.detach().numpy(), reference(start, gradients, lr, m), rtol=1e-5, atol=1e-7)


def test_without_metaplasticity_and_for_biases_it_is_adam() -> None:
    ours, theirs = small(), copy.deepcopy(small())
    first = bs.Metaplastic(ours.parameters(), lr=0.01, m=0.0)
    second = torch.optim.Adam(theirs.parameters(), 0.01)
    for x, y in batches(5):
        for model, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    bias = torch.nn.Parameter(torch.tensor([5.0]))
    bias.grad = torch.tensor([1.0])
    bs.Metaplastic([bias], lr=0.1, m=3.0).step()
    assert float(bias.detach()) == pytest.approx(4.9)


def test_the_state_goes_on_where_it_was() -> None:
    def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[torch.Tensor, ...]]) -> None:
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    whole, data = small(), batches(4)
    run(whole, bs.Metaplastic(whole.parameters()), data)
    halves = small()
    first = bs.Metaplastic(halves.parameters())
    run(halves, first, data[:2])
    second = bs.Metaplastic(halves.parameters())
    second.load_state_dict(first.state_dict())
    run(halves, second, data[2:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_finetune_takes_it_and_far_weights_stay() -> None:
    data = batches(20, seed=3)
    plan = bs.Plan(dict.fromkeys(("left", "right"), bs.Binary("xnor", clip_weights="never")))
    model = small()
    with torch.no_grad():
        for layer in (model.left, model.right):
            layer.weight.mul_(20)
    net = bs.apply(model, plan, data[:2])

    def turned(m: float) -> float:
        make = lambda parameters: bs.Metaplastic(parameters, lr=0.3, m=m)  # noqa: E731
        trained = bs.finetune(net, data, F.cross_entropy, steps=20, optimizer=make)
        pairs = [(net.get_submodule(n).weight, trained.get_submodule(n).weight) for n in ("left", "right")]
        return float(sum(((a >= 0) != (b >= 0)).float().mean() for a, b in pairs)) / 2  # type: ignore[operator]

    assert turned(3.0) < 0.5 * turned(0.0)


@pytest.mark.parametrize("values", [{"lr": -1.0}, {"m": -0.5}, {"betas": (1.0, 0.9)}, {"eps": float("nan")}])
def test_wrong_values(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"Metaplastic\\({next(iter(values))}="):
        bs.Metaplastic([torch.nn.Parameter(torch.ones(1))], **values)  # type: ignore[arg-type]
