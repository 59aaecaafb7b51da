"""One call from a float network to an integer one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.testing import MockTarget
from smallnet import batches, small


def sqnr(reference: nn.Module, net: nn.Module) -> float:
    x = batches(1, size=64, seed=8)[0][0]
    with torch.no_grad():
        clean, got = reference(x).double(), net(x).double()
    return float(10 * torch.log10(clean.square().sum() / (clean - got).square().sum()))


def test_by_default_every_site_with_a_kernel_becomes_int8() -> None:
    model = small()
    net = bs.quantize(model, batches(2, seed=2))
    plan = bs.plan_of(net)
    assert set(plan.sites) == {"stem", "left", "right", ":add", ":mean", "head"}
    assert all(isinstance(technique, bs.Int) and technique.w == technique.a == 8 for technique in plan.sites.values())
    assert sqnr(model, net) > 25
    assert set(model.state_dict()) < set(net.state_dict())


def test_the_rounding_of_four_bits_is_learned_unless_there_is_nothing_to_round() -> None:
    model, data = small(), batches(4, size=64, seed=2)
    ours, nearest = (
        bs.quantize(model, data, MockTarget(), bs.Int(4, 8), prepare=steps)
        for steps in (None, (bs.EqualiseDepthwise(),))
    )
    assert any(isinstance(step, bs.AdaRound) for step in bs.plan_of(ours).prepare)
    assert sqnr(model, ours) > sqnr(model, nearest)

    rows = [(torch.randint(0, 10, (4, 3)), torch.zeros(4))]
    net = bs.quantize(nn.Sequential(nn.Embedding(10, 8)), rows, MockTarget(), bs.Int(4, 8))
    assert list(bs.plan_of(net).sites) == ["0"]


def test_fewer_bits_are_coarser() -> None:
    model, data = small(), batches(2, seed=2)
    nets = [bs.quantize(model, data, MockTarget(), bs.Int(bits, 8)) for bits in (8, 4, 2)]
    got = [sqnr(model, net) for net in nets]
    assert got[0] > got[1] + 6 > got[2] + 12


@pytest.mark.parametrize(("exclude", "left"), [(("stem",), {"stem"}), ((":*", "head"), {":add", ":mean", "head"})])
def test_excluded_sites_stay_float(exclude: tuple[str, ...], left: set[str]) -> None:
    every = {"stem", "left", "right", ":add", ":mean", "head"}
    net = bs.quantize(small(), batches(2, seed=2), exclude=exclude)
    assert set(bs.plan_of(net).sites) == every - left


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(bs.UnknownSiteError, match="closest: stem"):
        bs.quantize(small(), batches(2, seed=2), exclude=("stemm",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ("*",)}, "all are excluded"),
        ({"technique": bs.Int(4, 8)}, "no kernel for weights below 8 bits"),
        (
            {"target": MockTarget(refuses=dict.fromkeys(("conv2d", "linear", "add", "mean"), "resting"))},
            "conv2d: resting",
        ),
    ],
)
def test_zero_changed_sites_is_an_error_with_the_reasons(options: dict[str, Any], message: str) -> None:
    technique = options.get("technique", bs.Int(8, 8))
    if technique.w == 4:
        options = {**options, "exclude": (":*",)}
    with pytest.raises(ValueError, match=f"changes not one site on .*{message}"):
        bs.quantize(small(), batches(2, seed=2), **options)


def test_how_the_model_is_run_is_passed_on() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, batch: dict[str, Tensor], *, scale: float) -> Tensor:
            logits: Tensor = self.inner(batch["image"]) * scale
            return logits

    def forward(model: Any, inputs: Any) -> Any:
        return model(inputs["batch"], scale=2.0)

    model = Two().eval()
    data = [({"batch": {"image": x}}, y) for x, y in batches(2, seed=2)]
    net = bs.quantize(model, data, forward=forward)
    assert "inner.left" in bs.plan_of(net).sites
    x = batches(1, seed=8)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(net({"image": x}, scale=2.0), model({"image": x}, scale=2.0), atol=0.5, rtol=0.1)


def test_the_seed_decides_everything() -> None:
    data = batches(2, seed=2)
    one, two = (bs.quantize(small(), data, seed=3).state_dict() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
