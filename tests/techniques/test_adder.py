"""Adder layers: what the cell computes, rounds, trains and ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs


def given(model: nn.Module, x: Tensor, technique: bs.Adder) -> nn.Module:
    return bs.apply(nn.Sequential(model), bs.Plan({"0": technique}), [(x, None)])


def distances(x: Tensor, layer: nn.Conv2d, weight: Tensor | None = None) -> Tensor:
    """The equation, patch by patch, in float64."""
    weight = layer.weight.detach().double() if weight is None else weight
    top = (layer.kernel_size[0] - 1) // 2 if layer.padding == "same" else int(layer.padding[0])
    padded = F.pad(x.double(), (top,) * 4)
    cut = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)  # [n, c * k * k, places]
    cut = cut.view(len(x), layer.groups, -1, cut.shape[2])
    own = weight.view(layer.groups, len(weight) // layer.groups, -1)
    found = -(cut[:, :, None] - own[None, :, :, :, None]).abs().sum(3).flatten(1, 2)
    assert layer.bias is not None
    high = (padded.shape[2] - layer.dilation[0] * (layer.kernel_size[0] - 1) - 1) // layer.stride[0] + 1
    return found.view(*found.shape[:2], high, -1) + layer.bias.detach().double().view(-1, 1, 1)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2}, {"padding": 2, "dilation": 2, "groups": 2}, {"padding": "same"}], ids=str
)
def test_a_convolution(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(given(layer, x, bs.Adder())(x).double(), distances(x, layer), rtol=1e-5, atol=1e-5)


def test_one_dimension_and_linear() -> None:
    torch.manual_seed(0)
    line, x = nn.Conv1d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 11)
    cut = F.pad(x, (1, 1)).unfold(2, 3, 2)  # [n, c, places, k]
    wanted = -(cut[:, None] - line.weight[None, :, :, None]).abs().sum((2, 4)) + line.bias[:, None]  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(given(line, x, bs.Adder())(x), wanted)
        dense, rows = nn.Linear(7, 4), torch.randn(2, 5, 7)
        wanted = -(rows[:, :, None] - dense.weight).abs().sum(3) + dense.bias
        torch.testing.assert_close(given(dense, rows, bs.Adder())(rows), wanted)


@pytest.mark.parametrize("scales", ["shared", "separate"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_both_lie_on_their_grids(bits: int, scales: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, padding=1), 3 * torch.randn(2, 4, 9, 9)
    limit = 2 ** (bits - 1) - 1
    weight = layer.weight.detach().double()
    steps = torch.stack((x.abs().max().double(), weight.abs().max())) / limit
    if scales == "shared":
        steps = steps.max().expand(2)
    on_grid = torch.round(x.double() / steps[0]) * steps[0]
    wanted = distances(on_grid, layer, torch.round(weight / steps[1]) * steps[1])
    net = given(layer, x, bs.Adder(precision=bits, scales=scales))
    with torch.no_grad():
        torch.testing.assert_close(net(x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_integers_on_one_grid_are_subtracted_as_they_are() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8, bias=False), 0.01 * torch.randn(5, 64)
    net = given(layer, x, bs.Adder(precision=8))
    scale = layer.weight.detach().abs().max() / 127  # the greater range is that of the filters
    a, b = (torch.round(t.detach() / scale).long() for t in (x, layer.weight))
    with torch.no_grad():
        torch.testing.assert_close(net(x), -(a[:, None] - b).abs().sum(2) * scale)


def test_the_range_follows_training_and_then_stays() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8, bias=False), torch.randn(5, 16)
    net = given(layer, x, bs.Adder(precision=8))

    def greatest() -> float:
        (found,) = (float(value) for key, value in net.state_dict().items() if key.endswith(".greatest"))
        return found

    with torch.no_grad():
        net.eval()(x)
        assert greatest() == 0.0
        net.train()(2 * x)
        first = float(2 * x.abs().max())
        assert greatest() == pytest.approx(first)
        net(4 * x)
        assert greatest() == pytest.approx(0.9 * first + 0.1 * 2 * first)
        kept, y = greatest(), net.eval()(100 * x)
        assert greatest() == kept
        clipped = torch.round((100 * x / kept * 127).clamp(-127, 127)) * kept / 127
        weight = torch.round(layer.weight / kept * 127) * kept / 127
        torch.testing.assert_close(y, -(clipped[:, None] - weight).abs().sum(2))


def test_size_and_operations() -> None:
    site = bs.sites(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), torch.zeros(1, 8, 5, 5))["0"]
    assert bs.Adder().bits(site) == 32 * 1152
    assert bs.Adder(precision=8).bits(site) == 8 * 1152 + 32
    assert bs.Adder(precision=8, scales="separate").bits(site) == 8 * 1152 + 64
    assert bs.Adder().operations(site) == {"subtract": 25 * 1152, "add": 25 * 1152}


def test_training_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
    x = torch.randn(64, 3, 6, 6)
    y = (x.mean((2, 3)).argmax(1) + (x[:, 0, 0, 0] > 0)).long()
    net = bs.apply(model, bs.Plan({"0": bs.Adder(precision=8)}), [(x, y)])
    trained = bs.finetune(net, [(x, y)], F.cross_entropy, steps=60, lr=1e-2, freeze_norms=False)
    with torch.no_grad():
        assert F.cross_entropy(trained(x), y) < 0.5 * F.cross_entropy(net(x), y)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_exported_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1)), torch.randn(2, 4, 9, 7)
    net = bs.apply(model, bs.Plan({"0": bs.Adder(precision=8)}), [(x, None)])
    target = bs.targets.OnnxRuntime(threads=1)
    artifact = bs.export(net, target, tmp_path / "net.onnx", x)
    (got,) = target.run(artifact, [x[:1].numpy()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), net(x[:1]), rtol=1e-4, atol=1e-4)


def test_what_has_no_adder_form_is_refused() -> None:
    model = nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU())
    sites = bs.sites(model, torch.zeros(1, 2, 3, 3, 3))
    assert "three dimensions" in str(bs.Adder().fits(sites["0"]))
    assert not bs.Adder().fits(sites["1"])


@pytest.mark.parametrize(
    "options",
    [{"gradient": "half"}, {"rate": 0.0}, {"rate": float("inf")}, {"rate": True}, {"precision": 3}, {"scales": "one"}],
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        bs.Adder(**options)
