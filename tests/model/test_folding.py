"""Batch normalisation is absorbed by the layer before it: in eval only, and only where that is the same function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.model.apply import apply, computer_of, materialised
from bitsmith.model.network import network
from bitsmith.plan import Plan
from bitsmith.site import Format
from bitsmith.techniques.int_ import Int

FOLDING: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (4, 3, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()), (4, 3, 9, 9)),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU6()), (4, 3, 9, 9)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), (4, 3, 9, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 5, 5, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=1e-2)), (8, 6)),
}


def build(make: Callable[[], nn.Sequential], shape: tuple[int, ...]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    norm = next(m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm))
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.1, 3)
        if norm.affine:
            norm.weight.uniform_(-2, 2)
            norm.bias.uniform_(-1, 1)
    return model.eval(), x


@pytest.mark.parametrize("name", FOLDING)
def test_folded_net_is_the_quantized_folded_layer(name: str) -> None:
    """The same as Int on one layer whose weights were folded beforehand, by the textbook."""
    model, x = build(*FOLDING[name])
    layer, norm = model[0], model[1]
    shape = (-1, *([1] * (layer.weight.dim() - 1)))
    with torch.no_grad():
        gamma = norm.weight if norm.affine else torch.ones(norm.num_features)
        factor = gamma / torch.sqrt(norm.running_var + norm.eps)
        shift = (0 if layer.bias is None else layer.bias) - norm.running_mean
        reference = build(*FOLDING[name])[0]
        reference[0].weight = nn.Parameter(layer.weight * factor.reshape(shape))
        reference[0].bias = nn.Parameter(shift * factor + (norm.bias if norm.affine else 0.0))
        reference[1] = nn.Identity()
    assert network(model, x).record.sites["0"].fold is not None
    ours = apply(model, Plan({"0": Int(8, 8)}), [(x, None)])
    theirs = apply(reference, Plan({"0": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        assert (ours(x) - model(x)).abs().max() < 0.1
        shipped = materialised(ours, lambda net: net(x))
        torch.testing.assert_close(shipped(x), ours(x), rtol=1e-6, atol=1e-6)
    assert [k for k in ours.state_dict() if not k.startswith("_bitsmith.")] == list(model.state_dict())


@pytest.mark.parametrize("w", [8, 4])
def test_training_normalises_with_the_batch(w: int) -> None:
    model, x = build(*FOLDING["conv2d"])
    net = apply(model, Plan({"0": Int(w, None)}), [(x, None)]).train()
    out = net(x)
    assert int(net[1].num_batches_tracked) == 1
    cell = computer_of(net).cells["0"]
    gamma = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    on_grid = cell._on_grid(model[0].weight * gamma.reshape(-1, 1, 1, 1)) / gamma.reshape(-1, 1, 1, 1)
    y = F.conv2d(x, on_grid, model[0].bias)
    expected = F.relu(F.batch_norm(y, None, None, model[1].weight, model[1].bias, True))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (net[0].weight, net[1].weight, net[1].bias))
    net.eval()
    with torch.no_grad():
        before = net(x)
    net.train()(x + 1)
    with torch.no_grad():
        assert not torch.equal(net.eval()(x), before)  # the fold follows the statistics


class Custom(nn.Module):
    def __init__(self, body: Callable[[Custom, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = layer or nn.Conv2d(3, 5, 3)
        self.norm, self.other = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def several(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + m.other(y)


def elsewhere(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def shared(m: Custom, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + m.other(m.conv(x * 2))


def between(m: Custom, x: Tensor) -> Tensor:
    return m.norm(F.relu(m.conv(x)))


def unknown(m: Custom, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y.abs()


def padded(m: Custom, x: Tensor) -> Tensor:
    # a norm gives the zeros another value: folded into the convolution they would stay zeros
    return m.norm(F.pad(m.conv(x), (1, 1, 1, 1)))


@pytest.mark.parametrize("body", [several, elsewhere, shared, between, unknown, padded], ids=lambda f: f.__name__)
def test_what_must_not_fold(body: Callable[[Custom, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Custom(body).train(), torch.randn(4, 3, 9, 9)
    model(x)
    model.eval()
    assert network(model, x).record.sites["conv"].fold is None
    net = apply(model, Plan({"conv": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=0.1, atol=0.15)


def test_only_the_normalised_axis_folds() -> None:
    """A linear layer over (N, L, C) is normalised along L: same sizes, another function."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).train(), torch.randn(8, 5, 6)
    model(x)
    model.eval()
    assert network(model, x).record.sites["0"].fold is None
    net = apply(model, Plan({"0": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=0.1, atol=0.1)


def test_without_running_statistics_nothing_folds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)).eval()
    x = torch.randn(4, 3, 9, 9)
    assert network(model, x).record.sites["0"].fold is None
    with torch.no_grad():
        assert (apply(model, Plan({"0": Int(8, 8)}), [(x, None)])(x) - model(x)).abs().max() < 0.1


def test_a_frozen_normalisation_folds_while_the_rest_trains() -> None:
    model, x = build(*FOLDING["conv2d"])
    net = apply(model, Plan({"0": Int(8, 8, out=Format(8))}), [(x, None)])
    with torch.no_grad():
        expected = net(x)
    net.train()
    net[1].eval()
    torch.testing.assert_close(net(x).detach(), expected, rtol=1e-6, atol=1e-6)
    assert int(net[1].num_batches_tracked) == 0
