"""Techniques that need training, scored and searched after a short one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bitsmith as bs
import smallnet
from bitsmith.sensitivities import InterLayer, loss_rise, output_error
from bitsmith.testing import MockTarget
from bitsmith.training import Training

STEP = bs.Distil(steps=25, lr=3e-3)
BINARY = bs.Binary()


def task() -> bs.Task:
    return dataclasses.replace(smallnet.task(), loss=torch.nn.functional.cross_entropy)


def scores(found: bs.Profile) -> dict[str, float]:
    return {row.site: row.loss for row in found.rows if row.technique == BINARY and not row.refused}


def test_what_needs_training_is_left_out_with_what_would_bring_it_in() -> None:
    found = bs.profile(smallnet.small(), task(), [bs.Int(8, 8), BINARY], MockTarget())
    assert not scores(found)
    reasons = {row.refused for row in found.rows if row.technique == BINARY}
    assert any("train=bitsmith.Distil" in reason and "trained=[" in reason for reason in reasons)


@pytest.mark.parametrize("sensitivity", [None, output_error, loss_rise])
def test_it_is_scored_after_the_step_and_better_for_it(sensitivity) -> None:
    model, given = smallnet.small(), {} if sensitivity is None else {"sensitivity": sensitivity}
    as_it_is = bs.profile(
        model, task(), [BINARY], MockTarget(), trained=[BINARY], sensitivity=sensitivity or output_error
    )
    shortly = bs.profile(model, task(), [BINARY], MockTarget(), train=STEP, **given)
    before, after = scores(as_it_is), scores(shortly)
    assert before.keys() == after.keys()
    assert sum(after.values()) < 0.7 * sum(before.values())
    assert "Distil(steps=25" in shortly.notes["trained shortly"]
    assert "trained shortly" not in as_it_is.notes


def test_gates_cannot_hold_networks_of_other_weights() -> None:
    with pytest.raises(ValueError, match=r"sensitivity=bitsmith\.sensitivities\.output_error"):
        bs.profile(smallnet.small(), task(), [BINARY], MockTarget(), train=STEP, sensitivity=InterLayer())


def test_whole_plans_are_trained_too_and_say_so(tmp_path) -> None:
    model = smallnet.small(steps=60)
    found = bs.optimize(
        *(model, task(), MockTarget(), bs.Budget(drop=0.5)),
        techniques=[BINARY],
        minimize="mib",
        train=STEP,
        folder=tmp_path,
    )
    assert BINARY in found.plan.sites.values()
    assert found.plan.prepare[-1] == STEP
    assert bs.Plan.load(tmp_path / "plan.json") == found.plan


def test_the_step_comes_to_plans_that_need_it_alone() -> None:
    training = Training(STEP, (bs.Binary(scaling="none"),))
    assert training.of(bs.Plan({"a": bs.Int(8, 8), "b": bs.Binary(scaling="none")})).prepare == ()
    assert training.of(bs.Plan({"a": BINARY}, prepare=(bs.CorrectBias(),))).prepare == (bs.CorrectBias(), STEP)
    assert Training().of(bs.Plan({"a": BINARY})).prepare == ()
    assert [Training().can(it) for it in (bs.Int(8, 8), BINARY)] == [True, False]
