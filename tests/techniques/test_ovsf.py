"""Generated weights: what the cell computes, stores, trains and ships."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.numerics import ovsf

CONVS: tuple[dict[str, Any], ...] = (
    {"padding": 1},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": 2, "dilation": 2, "groups": 2},
    {"padding": "same"},
)


def given(model: nn.Module, x: torch.Tensor, technique: bs.Ovsf) -> nn.Module:
    return bs.apply(nn.Sequential(model), bs.Plan({"0": technique}), [(x, None)])


def layer(seed: int = 0, **options: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(6, 8, 3, **options)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["weights", "basis"])
@pytest.mark.parametrize("scope", ["filter", "kernel"])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_the_whole_ratio_reproduces_a_convolution(options: dict[str, Any], scope: Any, compute: Any) -> None:
    model, x = layer(**options), torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        close(given(model, x, bs.Ovsf(1.0, scope, compute=compute))(x), model(x))


@pytest.mark.parametrize("codes", ["energy", "first"])
@pytest.mark.parametrize("scope", ["filter", "kernel"])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_generated_weights_are_the_projection(options: dict[str, Any], scope: Any, codes: Any) -> None:
    model, x = layer(**options), torch.randn(2, 6, 9, 7)
    weight = model.weight.detach()
    vectors = weight.double().reshape(-1, *weight.shape[1 if scope == "filter" else 2 :])
    count = -(-3 * vectors[0].numel() // 10)
    index = ovsf.chosen(vectors, count) if codes == "energy" else torch.arange(count)
    matrix = ovsf.codes(index, vectors.shape[1:]).flatten(1).double()
    projected = (vectors.flatten(1) @ torch.linalg.pinv(matrix) @ matrix).view_as(weight).float()
    wanted = F.conv2d(x, projected, model.bias, model.stride, model.padding, model.dilation, model.groups)
    for compute in ("weights", "basis"):
        with torch.no_grad():
            close(given(model, x, bs.Ovsf(0.3, scope, codes, compute=compute))(x), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", ["weights", "basis"])
def test_linear(compute: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(12, 5), torch.randn(3, 4, 12)
    with torch.no_grad():
        close(given(model, x, bs.Ovsf(1.0, compute=compute))(x), model(x))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantized_coefficients_lie_on_a_grid_by_output_channel(bits: int) -> None:
    model, x = layer(padding=1), torch.randn(2, 6, 9, 7)
    net = given(model, x, bs.Ovsf(0.5, "kernel", coefficient_bits=bits))
    with torch.no_grad():
        made = nn.Conv2d(6, 8, 3, padding=1)
        made.weight.copy_(model.weight)
        index = ovsf.chosen(model.weight.detach().view(48, 3, 3), 5)
        matrix = ovsf.codes(index, (3, 3)).flatten(1).double()
        alpha = ovsf.coefficients(model.weight.detach().view(48, 3, 3), index).view(8, 30)
        if bits == 1:
            alpha = torch.where(alpha >= 0, 1.0, -1.0) * alpha.abs().mean(1, keepdim=True)
        else:
            step = alpha.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            alpha = torch.round(alpha / step) * step
        weight = (alpha.view(48, 5) @ matrix).view(8, 6, 3, 3).float()
        close(net(x), F.conv2d(x, weight, model.bias, padding=1))


def test_size_counts_coefficients_scales_and_the_choice() -> None:
    site = bs.sites(nn.Sequential(nn.Conv2d(64, 16, 3)), torch.zeros(1, 64, 5, 5))["0"]
    filters, codes = 16 * 288, 64 * 16
    assert bs.Ovsf(0.5, codes="first").bits(site) == 32 * filters
    assert bs.Ovsf(0.5).bits(site) == 32 * filters + codes  # a bit for each code there is
    assert bs.Ovsf(0.5, coefficient_bits=4).bits(site) == 4 * filters + 32 * 16 + codes
    assert bs.Ovsf(0.01).bits(site) == 32 * 16 * 6 + 6 * 10  # the numbers of six
    assert bs.Ovsf(0.5, "kernel").bits(site) == 32 * 16 * 64 * 5 + 16


def test_operations_of_the_basis_form() -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1))
    site = bs.sites(model, torch.zeros(1, 8, 5, 5))["0"]
    assert bs.Ovsf(0.4, "kernel").basis_operations(site) == (25 * 8 * 4 * 9, 25 * 32 * 8 * 4)
    assert bs.Ovsf(0.5).basis_operations(site) == (25 * 36 * 72, 25 * 32 * 36)
    assert bs.Ovsf(0.5).operations(site) is None
    counted = bs.Ovsf(0.5, compute="basis").operations(site)
    assert counted == {"multiply": 25 * 32 * 36, "add": 25 * 36 * 72 + 25 * 32 * 36}


@pytest.mark.parametrize("compute", ["weights", "basis"])
def test_training_moves_coefficients_and_leaves_the_weights(compute: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        wanted = model(x) + 0.1
    plan = bs.Plan({"0": bs.Ovsf(0.5), "2": bs.Ovsf(0.5, "kernel", coefficient_bits=6, compute=compute)})
    net = bs.apply(model, plan, [(x, wanted)])
    trained = bs.finetune(net, [(x, wanted)], F.mse_loss, steps=60, lr=1e-2)
    with torch.no_grad():
        assert F.mse_loss(trained(x), wanted) < 0.7 * F.mse_loss(net(x), wanted)
    for key, value in model.state_dict().items():
        if key.endswith("weight"):
            assert torch.equal(trained.state_dict()[key], value)


def test_energy_holds_more_than_the_first_codes() -> None:
    model, x = layer(padding=1), torch.randn(4, 6, 9, 9)
    with torch.no_grad():
        errors = [
            F.mse_loss(given(model, x, bs.Ovsf(0.5, codes=codes))(x), model(x))  # type: ignore[arg-type]
            for codes in ("energy", "first")
        ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("compute", ["weights", "basis"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_exported_computes_the_same(compute: Any, tmp_path: Path) -> None:
    model, x = nn.Sequential(layer(padding=1)), torch.randn(2, 6, 9, 7)
    net = bs.apply(model, bs.Plan({"0": bs.Ovsf(0.4, "kernel", compute=compute)}), [(x, None)])
    artifact = bs.export(net, bs.targets.OnnxRuntime(threads=1), tmp_path / "net.onnx", x)
    (got,) = bs.targets.OnnxRuntime(threads=1).run(artifact, [x[:1].numpy()])
    close(torch.from_numpy(got), net(x[:1]).detach())
    # plain weights, or codes and coefficients; not the ones that they took the place of as well
    initializers = sum(math.prod(one.dims) for one in onnx.load(artifact.path).graph.initializer)
    assert initializers <= {"weights": 8 * 54 + 8, "basis": 6 * 4 * 9 + 8 * 24 + 8}[compute] + 8


def test_what_cannot_be_generated_is_refused() -> None:
    sites = bs.sites(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), torch.zeros(1, 8, 5, 5))
    assert bs.Ovsf(0.5).fits(sites["0"])
    assert "one weight" in str(bs.Ovsf(0.5, "kernel").fits(sites["0"]))
    assert not bs.Ovsf(0.5).fits(sites["1"])


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan"), True, "half"])
def test_impossible_ratios(ratio: Any) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        bs.Ovsf(ratio)


@pytest.mark.parametrize(
    "options", [{"coefficient_bits": 0}, {"coefficient_bits": 9}, {"scope": "layer"}, {"codes": ""}, {"compute": "x"}]
)
def test_impossible_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        bs.Ovsf(**options)
