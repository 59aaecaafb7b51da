"""The profile: which rows there are, what they hold, where they come from, and the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitsmith as bs
from bitsmith.testing import MockTarget
from smallnet import batches, small, task


@dataclass(frozen=True)
class Halved(bs.Technique):
    """Weights rounded to halves (a toy of these tests): computes in float."""

    step: float = 0.5

    def fits(self, site: bs.Site) -> bool | bs.No:
        return site.kind == "conv2d" or bs.No("convolutions only")

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return HalvedCell(site, self.step)

    def bits(self, site: bs.Site) -> float:
        return 4.0 * site.weight.numel if site.weight is not None else 0.0


class HalvedCell(bs.Cell):
    def __init__(self, site: bs.Site, step: float) -> None:
        super().__init__(site)
        self.step_size = step

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Any:
        return self.op(x, torch.round(weight / self.step_size) * self.step_size, **rest)


@dataclass(frozen=True)
class Trained(Halved):
    """As :class:`Halved`, and useless before training."""

    needs_training = True


class Untouchable:
    """A loader that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("this split must not be read")


@pytest.fixture(scope="module")
def found() -> bs.Profile:
    reading = task(validation=Untouchable(), test=Untouchable())
    return bs.profile(small(), reading, [bs.Int(8, 8), bs.Int(4, 8), Halved()], MockTarget())


def test_one_row_per_site_and_technique(found: bs.Profile) -> None:
    options = found.options()
    assert list(options) == ["stem", "left", "right", ":add", ":mean", "head"]
    for site, rows in options.items():
        asked = [bs.Float(), bs.Int(8, 8)] + ([bs.Int(4, 8)] if site in ("stem", "left", "right", "head") else [])
        given = [row.technique for row in rows if row.technique != Halved() and row.technique != bs.Int(4, 8)]
        assert given == asked[:2]
    refused = {(row.site, row.technique): row.refused for row in found.rows if row.refused}
    assert refused["head", Halved()] == "convolutions only"
    assert not any(row.refused for row in found.rows if row.technique == Halved() and row.site == "stem")


def test_a_technique_that_computes_in_float_is_timed_like_any_other(found: bs.Profile) -> None:
    rows = {row.site: row for row in found.rows if row.technique == Halved() and not row.refused}
    assert set(rows) == {"stem", "left", "right"}
    assert all(row.ms > 0 and row.loss > 0 for row in rows.values())


def test_float_loses_nothing_and_fewer_bits_lose_more(found: bs.Profile) -> None:
    loss = {(row.site, row.technique): row.loss for row in found.rows if not row.refused}
    assert all(value == 0.0 for (_, technique), value in loss.items() if technique == bs.Float())
    assert 0 < loss["left", bs.Int(8, 8)] < loss["left", bs.Int(4, 8)] < 1


def test_output_error_is_the_relative_squared_error_of_the_output() -> None:
    model, data = small(), batches(2, seed=2)
    found = bs.profile(model, task(), [Halved()], MockTarget(), sensitivity=bs.output_error, patterns=("left",))
    net = bs.apply(model, bs.Plan({"left": Halved()}), data)
    with torch.no_grad():
        plain = torch.cat([model(x) for x, _ in data]).double()
        other = torch.cat([net(x) for x, _ in data]).double()
    expected = float((other - plain).square().sum() / plain.square().sum())
    (row,) = [row for row in found.rows if row.site == "left" and row.technique == Halved()]
    assert row.loss == pytest.approx(expected, rel=1e-6)


def test_rise_of_the_task_loss_as_the_sensitivity() -> None:
    model, data = small(), batches(2, seed=2)
    found = bs.profile(model, task(), [Halved()], MockTarget(), sensitivity=bs.loss_rise, patterns=("left",))
    net = bs.apply(model, bs.Plan({"left": Halved()}), data)

    def mean(m: Any) -> float:
        with torch.no_grad():
            return sum(float(torch.nn.functional.cross_entropy(m(x), y)) for x, y in data) / len(data)

    assert [row.loss for row in found.rows if row.technique == Halved()] == pytest.approx(
        [max(mean(net) - mean(model), 0.0)], abs=1e-6
    )
    assert found.loss_name == "loss rise"


def test_prediction_is_the_sum_of_rows_edges_and_what_is_fixed(found: bs.Profile) -> None:
    plan = bs.Plan({"left": bs.Int(8, 8), "head": bs.Int(4, 8)})
    rows = {
        row.site: row for row in found.rows if not row.refused and row.technique == (plan.get(row.site) or bs.Float())
    }
    got = found.predict(plan)
    assert got["bytes"] == pytest.approx(found.fixed_bytes + sum(row.bytes for row in rows.values()))
    assert got["loss"] == pytest.approx(rows["left"].loss + rows["head"].loss)
    edges = 0.0
    for edge in found.edges:
        writes = rows[edge.producer].writes if edge.producer in rows else "float"
        reads = rows[edge.consumer].reads[edge.operand] if edge.consumer in rows else "float"
        edges += edge.ms if (writes, reads) == (edge.produced, edge.consumed) else 0.0
    assert edges != 0.0
    assert got["ms"] == pytest.approx(found.fixed_ms + edges + sum(row.ms for row in rows.values()))


def test_the_float_prediction_is_near_the_measured_whole(found: bs.Profile) -> None:
    whole = float(found.notes["float, whole"].split()[0])
    assert found.predict(bs.Plan())["ms"] == pytest.approx(whole, rel=0.05)
    assert found.source == "simulated"


def test_patterns_choose_the_sites_to_decide_on() -> None:
    target = MockTarget()
    found = bs.profile(small(), task(), [bs.Int(8, 8)], target, patterns=("le*", "head"))
    assert list(found.options()) == ["left", "head"]
    with pytest.raises(bs.UnknownSiteError, match="left"):
        bs.profile(small(), task(), [bs.Int(8, 8)], target, patterns=("lefft",))


@pytest.mark.parametrize(
    ("techniques", "patterns", "message"),
    [
        ([], ("*",), "no technique was given"),
        ([bs.Float()], ("*",), "no technique was given"),
        ([Halved()], ("head",), "convolutions only"),
        ([Trained()], ("*",), "needs training"),
        ([bs.Int(8, 8)], (":relu",), "no site of :relu"),
    ],
)
def test_zero_sites_that_can_change_is_an_error_with_the_reasons(
    techniques: list[bs.Technique], patterns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"not one site can change on mock: .*{message}"):
        bs.profile(small(), task(), techniques, MockTarget(), patterns=patterns)


def test_energy_is_time_at_the_float_networks_power(found: bs.Profile) -> None:
    assert all(row.mj is None for row in found.rows)
    powered = bs.profile(small(), task(), [bs.Int(8, 8)], MockTarget(watts=3.0))
    assert [row.mj for row in powered.rows] == pytest.approx([3.0 * row.ms for row in powered.rows], rel=1e-3)


def test_a_measured_target_gives_times_of_its_own() -> None:
    target = bs.targets.OnnxRuntime(threads=1)
    found = bs.profile(small(), task(), [bs.Int(8, 8)], target, patterns=("left", "right"))
    assert found.source == "measured"
    assert found.target == "onnxruntime"
    assert int(found.notes["probes"]) > 5
    assert found.predict(bs.Plan())["ms"] > 0


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_reads_back(found: bs.Profile, tmp_path: Path) -> None:
    path = found.save(tmp_path / "profile.json")
    assert bs.Profile.load(path, techniques=[Halved]) == found
    with pytest.raises(bs.PlanError, match="Halved"):
        bs.Profile.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "pip install -U bitsmith"),
        ({"kind": "bitsmith.plan"}, "not a Bitsmith profile"),
        ({"rows": 7}, "garbled"),
        ({"rows": [[]]}, "garbled"),
        ({"edges": [{"ms": 1}]}, "garbled"),
        ({"fixed_ms": "a lot"}, "not a number"),
    ],
)
def test_a_garbled_or_newer_file(found: bs.Profile, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**found.to_json(), **change}))
    with pytest.raises(bs.PlanError, match=message):
        bs.Profile.load(path, techniques=[Halved])


@pytest.mark.parametrize("key", ["rows", "edges", "flow", "fixed_ms", "notes", "groups"])
def test_a_file_that_lacks_something(found: bs.Profile, key: str) -> None:
    data = found.to_json()
    del data[key]
    with pytest.raises(bs.PlanError, match=key):
        bs.Profile.from_json(data, techniques=[Halved])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_cut_off(found: bs.Profile, tmp_path: Path, share: float) -> None:
    text = found.save(tmp_path / "profile.json").read_text()
    (tmp_path / "cut.json").write_text(text[: int(share * len(text))])
    with pytest.raises(bs.PlanError, match="broken or cut off"):
        bs.Profile.load(tmp_path / "cut.json")
