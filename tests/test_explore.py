"""Design space exploration in Python: the front, the limits, and a search at random beside it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import bitsmith as bs
import smallnet
from bitsmith.explore import every_technique, limited, objectives_of
from bitsmith.search.hypervolume import hypervolume
from bitsmith.sensitivity.base import Sensitivity
from bitsmith.testing import MockTarget

pytest.importorskip("optuna", reason='needs Optuna: pip install "bitsmith[explore]"')

OFFERED = [bs.Int(8, 8), bs.Int(4, 8), bs.Int(4, 4)]


def test_words_become_quantities() -> None:
    assert objectives_of("energy") == ("drop", "mj")
    assert objectives_of(["latency", "size"]) == ("ms", "mib")
    assert objectives_of(["drop", "area", "mm2"]) == ("drop", "mm2")
    with pytest.raises(ValueError, match=r"objective 'speed': must be of accuracy, latency, size"):
        objectives_of("speed")
    with pytest.raises(ValueError, match=r"is missing"):
        objectives_of([])


def test_points_become_a_drop() -> None:
    assert limited(None, 1.0) == bs.Budget(drop=0.01)
    assert limited(bs.Budget(mib=2.0), 0.5) == bs.Budget(mib=2.0, drop=0.005)
    assert limited(bs.Budget(ms=1.0), None) == bs.Budget(ms=1.0)
    with pytest.raises(ValueError, match=r"say the drop in one place"):
        limited(bs.Budget(drop=0.1), 1.0)
    with pytest.raises(ValueError, match=r"give accuracy_drop, in points, or a budget"):
        limited(None, None)


def test_every_technique_is_one_of_each_class_at_least() -> None:
    found = every_technique()
    assert len(found) == len(set(found))
    names = {type(technique).__name__ for technique in found}
    assert {"Int", "Sparse", "Winograd", "Binary", "Float"} <= names
    assert bs.Float() not in found  # what a site is without a technique


def test_the_front_keeps_the_tolerance_and_is_not_beaten_at_random(tmp_path: Path) -> None:
    model, task, target = smallnet.small(), smallnet.task(), MockTarget(watts=2.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = bs.explore(
        model, task, target, accuracy_drop=5.0, objective="energy", techniques=OFFERED, trials=24, folder=tmp_path
    )
    assert all((value == state[name]).all() for name, value in model.state_dict().items())
    got = found.result.best.evaluation
    assert got is not None
    assert got.drop is not None
    assert got.drop <= 0.05
    # the front is monotone: what costs less loses more
    costs = [(point.value("mj"), point.value("drop")) for point in found.front]
    ordered = sorted(costs)
    assert [drop for _, drop in ordered] == sorted((drop for _, drop in costs), reverse=True)
    assert found.plan == bs.Plan.load(tmp_path / "plan.json")
    assert [path.name for path in found.files] == ["plan.json", "frontier.json", "frontier.html"]
    # as many plans at random, from the same profile
    evaluate, generator = bs.evaluator(model, task, target), random.Random(0)
    options = found.profile.options()
    tried = []
    for _ in range(24):
        plan = bs.Plan({site: generator.choice(rows).technique for site, rows in options.items()})
        seen = evaluate(plan)
        assert seen.mj is not None
        assert seen.drop is not None
        tried.append([seen.drop, seen.mj])
    least = evaluate(bs.Plan()).mj
    assert least is not None
    reference = [0.5, 1.5 * least]
    mine = hypervolume([[drop, mj] for mj, drop in costs], reference)
    assert mine >= hypervolume(tried, reference)


def test_the_sensitivity_is_the_one_that_was_asked_for() -> None:
    model, task, target = smallnet.small(), smallnet.task(), MockTarget()

    def found(sensitivity: Sensitivity | None) -> bs.Explored:
        return bs.explore(
            *(model, task, target),
            accuracy_drop=50.0,
            objective="size",
            techniques=OFFERED,
            trials=2,
            sensitivity=sensitivity,
        )

    given = found(bs.sensitivities.output_error)
    assert given.profile.loss_name == "output error"
    assert given.report.loss_name == "output error"
    profiled = bs.profile(model, task, OFFERED, target, sensitivity=bs.sensitivities.output_error)
    assert [row.loss for row in given.profile.rows] == [row.loss for row in profiled.rows]
    assert "InterLayer" in found(None).profile.loss_name


def test_a_limit_that_nothing_keeps_is_an_error_with_the_closest_plan() -> None:
    with pytest.raises(bs.BudgetError) as caught:
        bs.explore(
            smallnet.small(),
            smallnet.task(),
            MockTarget(),
            budget=bs.Budget(mib=1e-4),
            objective="size",
            techniques=OFFERED,
            trials=4,
        )
    assert caught.value.best.missed["mib"] > 0
