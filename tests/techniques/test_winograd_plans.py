"""Winograd in plans: what it fits and refuses, what it stores, its neighbours, and the steps."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import additions_of, computer_of
from bitsmith.model.network import network
from bitsmith.numerics.errors import sqnr_db
from bitsmith.site import Format, Range
from bitsmith.technique import No
from bitsmith.techniques.winograd import Winograd
from winograd_layers import Normalised, one

# -- the technique -----------------------------------------------------------------------------------------------------


def site_of(layer: nn.Module, *shape: int) -> bs.Site:
    return network(nn.Sequential(layer).eval(), torch.zeros(shape)).record.sites["0"]


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(4, 4, 3, stride=2), (1, 4, 8, 8), r"stride \(2, 2\)"),
        (nn.Conv2d(4, 4, 3, stride=(1, 2)), (1, 4, 8, 8), r"stride \(1, 2\)"),
        (nn.Conv2d(4, 4, 3, dilation=2), (1, 4, 8, 8), r"dilation \(2, 2\)"),
        (nn.Conv2d(4, 4, 3, groups=2), (1, 4, 8, 8), "groups 2"),
        (nn.Conv2d(4, 4, 5), (1, 4, 8, 8), "kernel is 5x5"),
        (nn.Conv2d(4, 4, 1), (1, 4, 8, 8), "kernel is 1x1"),
        (nn.Conv2d(4, 4, (3, 2)), (1, 4, 8, 8), "kernel is 3x2"),
        (nn.Conv2d(4, 4, 3, padding=3), (1, 4, 8, 8), r"padding \(3, 3\)"),
        (nn.Conv2d(4, 4, 3), (4, 8, 8), "3 dimensions"),
        (nn.Conv3d(4, 4, 3), (1, 4, 8, 8, 8), "conv3d"),
        (nn.ConvTranspose2d(4, 4, 3), (1, 4, 8, 8), "transposed"),
        (nn.Linear(4, 4), (1, 4), "linear"),
    ],
)
def test_refusals(layer: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    verdict = Winograd().fits(site_of(layer, *shape))
    assert isinstance(verdict, No)
    with pytest.raises(ValueError, match=reason):
        bs.apply(nn.Sequential(layer).eval(), bs.Plan({"0": Winograd()}), [(torch.zeros(shape), None)])


def test_weights_that_are_computed_are_refused() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(x, w)

    given_ = torch.zeros(1, 2, 5, 5), torch.zeros(2, 2, 3, 3)
    (site,) = network(Dynamic().eval(), given_).record.sites.values()
    verdict = Winograd().fits(site)
    assert "computed while it runs" in str(verdict)


def test_reflected_padding_is_computed_before() -> None:
    """It is an operation of its own, behind which the convolution has none; its zeros are not assumed."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 9, 9)
    model = nn.Sequential(nn.ReLU(), layer).eval()
    net = bs.apply(model, bs.Plan({"1": Winograd(4, 16)}), [(x, None)])
    with torch.no_grad():
        assert sqnr_db(model(x), net(x)) > 35


def test_an_accumulator_that_could_overflow_is_refused() -> None:
    layer = nn.Conv2d(1, 1, 3)
    site = site_of(layer, 1, 1, 4, 4)
    wide = dataclasses.replace(site.operands[1], shape=(1, 132105, 3, 3))
    verdict = Winograd().fits(dataclasses.replace(site, operands=(site.operands[0], wide)))
    assert "66052" in str(verdict)


TARGETS = (bs.targets.OnnxRuntime(), bs.targets.OpenVino(), bs.targets.Roofline(float32=50, bandwidth_gb_s=20))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_target_has_it_by_default(target: Any) -> None:
    site = site_of(nn.Conv2d(4, 4, 3), 1, 4, 8, 8)
    for technique in (Winograd(), Winograd(6), Winograd(4, 32, "flex")):
        verdict = target.supports(technique, site)
        assert isinstance(verdict, No)
        assert "inograd" in str(verdict)


def test_bits_by_hand() -> None:
    site = site_of(nn.Conv2d(10, 6, 3), 1, 10, 8, 8)
    assert Winograd(2).bits(site) == 16 * 60 * 8 + 16 * 6 * 32 + 17 * 10 * 16
    assert Winograd(4, 16).bits(site) == 36 * 60 * 16 + 36 * 6 * 32 + 37 * 10 * 16
    assert Winograd(6).bits(site) == 64 * 60 * 8 + 64 * 6 * 32 + 64 * 10 * 32
    assert Winograd(4, 32).bits(site) == 36 * 60 * 32
    assert Winograd(2, 8, "flex").bits(site) == 16 * 60 * 8 + 16 * 6 * 32 + 16 * 10 * 32 + 32 * (8 + 16 + 12)
    assert Winograd(2).bits(site_of(nn.Conv1d(10, 6, 3), 1, 10, 8)) == 4 * 60 * 8 + 4 * 6 * 32 + 5 * 10 * 16


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile": 3},
        {"tap_bits": 4},
        {"transforms": "learned"},
        {"weight_range": Range("entropy")},
    ],
)
def test_bad_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Winograd(**wrong)


def test_round_trip_of_plan_and_state(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    technique = Winograd(4, 16, "flex", weight_range=Range("mse"), out=Format(8))
    plan = bs.Plan({"0": technique, "1": Winograd(), "2": Winograd(6)})
    assert bs.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert repr(technique) == (
        "Winograd(tile=4, tap_bits=16, transforms='flex', weight_range=Range(method='mse', percentile=99.99), "
        "out=Format(bits=8, signed=False, symmetric=False, range=Range(method='minmax', percentile=99.99), "
        "learn=None))"
    )
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3)]
    model = nn.Sequential(*layers).eval()
    net = bs.apply(model, plan, [(x, None)])
    with torch.no_grad():
        additions_of(net).cells["0"].bt.add_(0.01)
        other = bs.apply(model, plan, [(3 * torch.randn(2, 3, 9, 9), None)])
        assert not torch.equal(other(x), net(x))
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), net(x))
        assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_static_transforms_are_not_in_the_state() -> None:
    net, _ = one(nn.Conv2d(3, 3, 3), Winograd(), torch.randn(1, 3, 8, 8))
    names = {name.rpartition(".")[2] for name in net.state_dict() if ".cells." in name}
    assert names == {"tap_limits", "tap_beyond", "tap_power"}


def test_one_tensor_read_by_two_techniques_has_one_quantizer() -> None:
    """The same format as ``Int``: both read what is stored once."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            y: Tensor = self.a(x) + self.b(x)
            return y

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = bs.apply(Two().eval(), bs.Plan({"a": Winograd(), "b": bs.Int(8, 8)}), [(x, None)])
    cells = computer_of(net).cells
    assert cells["a"].quantizers[0] is cells["b"].quantizers[0]
    assert list(computer_of(net).written) == [":relu"]


# -- steps -------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Normalised(8, 8) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y.mean((2, 3))


@pytest.mark.parametrize("technique", [Winograd(2), Winograd(4), Winograd(4, 8, "flex")], ids=repr)
def test_bias_correction_takes_the_mean_error_away(technique: Winograd) -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    data = [(torch.randn(64, 8, 8, 8), None) for _ in range(4)]
    sites = {f"blocks.{k}.conv": technique for k in range(4)}
    plain = bs.apply(model, bs.Plan(sites), data)
    corrected = bs.apply(model, bs.Plan(sites, (bs.CorrectBias(),)), data)
    x = torch.randn(256, 8, 8, 8)
    with torch.no_grad():
        errors = [float((net(x) - model(x)).mean(0).square().sum()) for net in (plain, corrected)]
    assert errors[1] < 0.3 * errors[0]


def test_range_methods_are_chosen_for_it() -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    data = [(torch.randn(32, 8, 8, 8), None) for _ in range(2)]
    net = network(model, data[0][0])
    plan = bs.choose_ranges(net, bs.Plan({f"blocks.{k}.conv": Winograd() for k in range(4)}), data)
    assert all(isinstance(t, Winograd) for t in plan.sites.values())
    x = data[0][0]
    with torch.no_grad():
        assert sqnr_db(model(x), bs.apply(model, plan, data)(x)) > 20


def test_rounding_steps_leave_its_weights_alone() -> None:
    """They round weights on a grid of their own; these are rounded after the transform."""
    torch.manual_seed(0)
    model = Stack().eval()
    data = [(torch.randn(16, 8, 8, 8), None)]
    sites: dict[str, bs.Technique] = {"blocks.0.conv": Winograd(), "blocks.1.conv": bs.Int(4, 8)}
    net = bs.apply(model, bs.Plan(sites, (bs.Gptq(),)), data)
    assert torch.equal(dict(net.named_parameters())["blocks.0.conv.weight"], model.blocks[0].conv.weight)
    assert not torch.equal(dict(net.named_parameters())["blocks.1.conv.weight"], model.blocks[1].conv.weight)
