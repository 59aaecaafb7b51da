"""Learned precision: what it must keep, that it does, what it counts and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.model.apply import computer_of
from bitsmith.numerics.grid import Grid
from smallnet import batches, small

SITES = ("stem", "left", "right", "head")
LEARN = bs.Learn("step_range")


def applied(w: int = 4, a: int = 4, granularity: Any = "channel", learn: bs.Learn | None = LEARN) -> nn.Module:
    technique = bs.Int(w, a, granularity=granularity, learn=learn, weight_learn=learn)
    return bs.apply(small(), bs.Plan(dict.fromkeys(SITES, technique)), batches(2))


def by_hand(net: nn.Module, w: int, a: int, extra: int) -> tuple[float, float]:
    """Bytes of a network whose every weight has ``w`` bits and every tensor that is read ``a``."""
    weights, tensors = 0.0, dict[str, int]()
    for name in SITES:
        site = computer_of(net).record_sites[name]
        weight, operand = site.operands[1], site.operands[0]
        weights += weight.numel * w + weight.shape[0] * (32 + extra)
        tensors[operand.tensor] = operand.numel // operand.shape[0]
    return weights / 8, sum(tensors.values()) * a / 8


def test_sizes_are_those_counted_by_hand() -> None:
    for learn, extra in ((LEARN, 3), (None, 0)):
        net = applied(learn=learn)
        sizes = bs.learned_sizes(net)
        weights, activations = by_hand(net, 4, 4, extra)
        assert float(sizes.weights.detach()) == pytest.approx(weights)
        assert float(sizes.activations.detach()) == pytest.approx(activations)
        assert float(sizes.total.detach()) == pytest.approx(weights + activations)
        greatest = bs.learned_sizes(net, "max").activations
        assert float(greatest.detach()) == pytest.approx(8 * 12 * 12 * 4 / 8)


def test_the_greatest_tensor_alone_gets_the_gradient_of_the_maximum() -> None:
    net = applied()
    bs.learned_sizes(net, "max").activations.backward()
    moved = {
        name: float(module.log_step.grad or 0.0)
        for name, module in net.named_modules()
        if isinstance(module, Grid) and "tensors" in name
    }
    assert len([slope for slope in moved.values() if slope]) >= 1
    assert all(slope <= 0 for slope in moved.values())
    assert any(slope == 0 for slope in moved.values())


def test_sites_that_are_not_planned_count_as_float() -> None:
    net = bs.apply(small(), bs.Plan({"left": bs.Int(4, 4, learn=LEARN, weight_learn=LEARN)}), batches(2))
    floats = sum(net.state_dict()[f"{name}.weight"].numel() for name in ("stem", "right", "head"))
    assert float(bs.learned_sizes(net).weights.detach()) == pytest.approx(4 * floats + 8 * 8 * 9 / 2 + 8 * 35 / 8)


def test_a_site_left_in_float_counts_as_not_planned() -> None:
    plan = bs.Plan({"left": bs.Int(4, 4), "right": bs.Int(4, 4)})
    with_sum = bs.apply(small(), plan.replace(sites={**plan.sites, ":add": bs.Float()}), batches(2))
    assert repr(bs.learned_sizes(with_sum)) == repr(bs.learned_sizes(bs.apply(small(), plan, batches(2))))


METHODS = ("allocation", "penalty")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_limits_are_kept_and_the_network_still_works(granularity: Any, method: Any) -> None:
    net, data = applied(5, 5, granularity), batches(20, seed=3)
    before = bs.learned_sizes(net)
    limits = {"weights": 0.8 * float(before.weights.detach()), "activations": 0.6 * float(before.activations.detach())}
    common: dict[str, Any] = {"lr": 2e-3, "grid_lr": 3e-2, "validation": batches(2, seed=4), "method": method, **limits}
    found = bs.learn_precision(net, data, F.cross_entropy, steps=(5, 80, 10), **common)
    assert found.weights <= limits["weights"]
    assert found.activations <= limits["activations"]
    assert len(found.history) == 80
    assert (found.kept is None) == (method == "allocation")
    sizes = bs.learned_sizes(found.net)
    assert (found.weights, found.activations) == (float(sizes.weights.detach()), float(sizes.activations.detach()))
    assert {t.a for t in found.plan.sites.values() if isinstance(t, bs.Int)} <= set(range(2, 9))
    with torch.no_grad():
        right = torch.cat([found.net(x).argmax(1) == y for x, y in batches(10, seed=5)])
    assert float(right.float().mean()) > 0.9
    again = bs.learn_precision(net, data, F.cross_entropy, steps=(5, 80, 10), **common)
    assert all(torch.equal(a, b) for a, b in zip(found.net.parameters(), again.net.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_on_both_together_and_a_teacher_without_a_loss(method: Any) -> None:
    net = applied(5, 5)
    limit = 0.7 * float(bs.learned_sizes(net).total.detach())
    data = batches(10, seed=3)
    found = bs.learn_precision(
        *(net, data),
        **{"steps": (1, 60, 0), "total": limit, "teacher": small(), "lr": 2e-3, "grid_lr": 0.1, "method": method},
        rhythm=2,
    )
    assert found.weights + found.activations <= limit
    assert found.net.training == net.training
    assert found.history[-1].weights + found.history[-1].activations <= limit * (1 if method == "allocation" else 2)


def test_the_greatest_activation_can_be_limited_alone() -> None:
    net = applied(5, 5)
    greatest = float(bs.learned_sizes(net, "max").activations.detach())
    found = bs.learn_precision(
        *(net, batches(5, seed=3), F.cross_entropy), steps=(3, 0, 2), activations=0.6 * greatest, count="max"
    )
    # a half is kept by 3 of 5 bits; what is small may have all 8
    assert found.activations == pytest.approx(0.6 * greatest)
    assert max(grid.bits().max().item() for grid in found.net.modules() if isinstance(grid, Grid)) == 8


def test_all_bits_are_given_out_and_move_where_the_method_says() -> None:
    net = applied(5, 5)
    limit = 0.95 * float(bs.learned_sizes(net).total.detach())
    found = bs.learn_precision(
        *(net, batches(10, seed=3), F.cross_entropy), steps=(3, 9, 3), total=limit, moves=3, grid_lr=1e-2
    )
    totals = [step.weights + step.activations for step in found.history]
    assert len(set(totals[:2])) == 1  # moved after steps 3, 6 and 9
    assert max(totals) <= limit < min(totals) + 8 * 12 * 12 / 8  # one bit more of the greatest tensor is too much


def test_under_a_penalty_the_grids_move_in_the_mixed_phase_only_and_by_every_nth_step() -> None:
    net = applied(5, 5)
    limit = 0.95 * float(bs.learned_sizes(net).total.detach())
    found = bs.learn_precision(
        *(net, batches(10, seed=3), F.cross_entropy),
        **{"steps": (3, 9, 3), "total": limit, "rhythm": 3, "grid_lr": 0.6, "judged": 9, "method": "penalty"},
    )
    totals = [step.weights + step.activations for step in found.history]
    assert totals[0] == totals[1] == totals[2] > totals[3]
    assert totals[3] == totals[4] == totals[5]
    assert totals[0] == pytest.approx(float(bs.learned_sizes(net).total.detach()))


@pytest.mark.parametrize("what", ["weights", "activations", "total"])
def test_a_limit_that_the_fewest_bits_pass_is_refused_before_training(what: str) -> None:
    with pytest.raises(bs.SizeError, match="fewest bits"):
        bs.learn_precision(applied(), batches(1), F.cross_entropy, steps=(1, 1, 0), **{what: 10.0})  # type: ignore[arg-type]


def test_a_limit_that_was_not_kept_says_how_far_it_was() -> None:
    net = applied()
    limit = 0.6 * float(bs.learned_sizes(net).total.detach())
    with pytest.raises(bs.SizeError, match="the last takes"):
        bs.learn_precision(
            net, batches(1), F.cross_entropy, steps=(0, 2, 0), total=limit, grid_lr=1e-6, method="penalty"
        )


def test_bad_calls_say_what_to_do() -> None:
    net, data = applied(), batches(1)
    with pytest.raises(ValueError, match="three numbers"):
        bs.learn_precision(net, data, F.cross_entropy, steps=(1, 0, 1), total=1e6, method="penalty")
    with pytest.raises(ValueError, match="which it measures in"):
        bs.learn_precision(net, data, F.cross_entropy, steps=(0, 1, 1), total=1e6)
    with pytest.raises(ValueError, match="must be 'allocation' or 'penalty'"):
        bs.learn_precision(net, data, F.cross_entropy, steps=(1, 1, 1), total=1e6, method="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most one more"):
        bs.learn_precision(net, data, F.cross_entropy, steps=(1, 1, 1), total=1e6, moves=3)
    with pytest.raises(ValueError, match="limit in bytes"):
        bs.learn_precision(net, data, F.cross_entropy, steps=(1, 1, 1))
    with pytest.raises(ValueError, match="loss"):
        bs.learn_precision(net, data, steps=(1, 1, 1), total=1e6)
    with pytest.raises(ValueError, match="infers bits"):
        bs.learn_precision(applied(learn=bs.Learn()), data, F.cross_entropy, steps=(1, 1, 1), total=1e6)
    with pytest.raises(bs.TrainingError, match="step 1 of 2"):
        bs.learn_precision(net, data, lambda output, y: output.sum() * float("nan"), steps=(1, 1, 0), total=1e6)
