"""Plans: what they refuse, and files that read back the same or say what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitsmith.model.network import network
from bitsmith.plan import Budget, Plan, PlanError
from bitsmith.site import Format, Range, Record, Site, UnknownSiteError
from bitsmith.technique import Cell, No, Technique
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int


@dataclasses.dataclass(frozen=True)
class Mine(Technique):
    """A stranger's technique (2026)."""

    ratio: float = 0.5

    def fits(self, site: Site) -> bool | No:
        return True

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        raise NotImplementedError


FULL = Plan(
    {
        "a": Int(4, None, granularity="group", group=32, weight_range=Range("mse")),
        "b:add.1": Int(8, 8, out=Format(8, signed=True, range=Range("percentile", 99.9))),
        "c": Float("bfloat16"),
        "d": Float("bfloat16"),
    },
    groups=(("c", "d"),),
)


def test_files_read_back_the_same(tmp_path: Path) -> None:
    path = FULL.save(tmp_path / "plan.json")
    assert Plan.load(path) == FULL
    assert Plan.load(path).digest() == FULL.digest()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads(path.read_text())["sites"]["c"] == {"type": "Float", "dtype": "bfloat16"}


@given(st.integers(2, 8), st.sampled_from([2, 8, 16, None]), st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_every_setting_reads_back(w: int, a: int | None, flag: bool, method: Any) -> None:
    plan = Plan({"x": Int(w, a, flag, not flag, flag, range=Range(method), out=Format(8, flag) if flag else None)})
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_of_steps_alone_is_not_empty() -> None:
    assert Plan().empty
    assert not Plan({"a": Int(8, 8)}).empty
    assert not Plan(prepare=(Mine(),)).empty  # type: ignore[arg-type]


def test_strangers_techniques_are_named_by_the_caller_only(tmp_path: Path) -> None:
    path = Plan({"a": Mine(0.25)}).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"unknown type 'Mine'.*techniques="):
        Plan.load(path)
    assert Plan.load(path, techniques=[Mine])["a"] == Mine(0.25)
    with pytest.raises(PlanError, match="frozen dataclass"):
        Plan.load(path, techniques=[object])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "something"}, "not a Bitsmith plan"),
        ({"schema": 99}, "newer Bitsmith"),
        ({"schema": "1"}, "unknown to this version"),
        ({"extra": 1}, "unknown keys"),
        ({"sites": []}, "must be an object"),
        ({"sites": {"a": {"type": "Int", "w": 11}}}, "weight bits"),
        ({"sites": {"a": {"type": "Int", "bits": 8}}}, "no field bits"),
        ({"sites": {"a": {"type": "os.system"}}}, "unknown type"),
        ({"sites": {"a": {"type": ["Int"]}}}, "unknown type"),
        ({"sites": {"a": {"type": "Format"}}}, "not a technique"),
        ({"sites": {"a": 8}}, "not a technique"),
        ({"prepare": [{"type": "Int"}]}, "not a prepare step"),
        ({"sites": {"a": {"type": "Int"}, "a:add": {"type": "Int"}}}, "inside it"),
    ],
)
def test_broken_plans(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**FULL.to_json(), **change}))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_cut_off_and_binary_files(tmp_path: Path) -> None:
    path = FULL.save(tmp_path / "plan.json")
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(PlanError, match="broken or cut off"):
            Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="broken"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "absent.json")


def test_a_plan_never_names_a_module_and_its_inside() -> None:
    for outer, inner in (("a", "a.b"), ("a", "a:add"), ("a:lstm", "a.lstm.l0:linear")):
        with pytest.raises(PlanError, match="inside it"):
            Plan({outer: Float(), inner: Int()})
    assert len(Plan({"a": Float(), "ab": Int(), "a1.b": Int()})) == 3


def test_groups_decide_together() -> None:
    with pytest.raises(PlanError, match="share one decision"):
        Plan({"a": Int(), "b": Float()}, groups=(("a", "b"),))
    with pytest.raises(PlanError, match="two groups"):
        Plan({"a": Int(), "b": Int()}, groups=(("a", "b"), ("b",)))


def test_assign_by_pattern() -> None:
    among = ["layer1.0.conv1", "layer1.0:add", "layer2.0.conv1"]
    plan = Plan().assign(Int(8, 8), "layer1.*", among=among).assign(Int(4, 8), "*.conv1", among=among)
    assert plan.sites == {"layer1.0.conv1": Int(4, 8), "layer1.0:add": Int(8, 8), "layer2.0.conv1": Int(4, 8)}
    with pytest.raises(UnknownSiteError, match=r"layer3"):
        plan.assign(Int(), "layer3.*", among=among)


def test_check_against_a_network() -> None:
    record = network(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()).eval(), torch.ones(1, 2)).record
    Plan({"0": Int()}).check(record)
    with pytest.raises(UnknownSiteError):
        Plan({"9": Int()}).check(record)
    with pytest.raises(ValueError, match=r"'1'.*computed in float"):
        Plan({"1": Int()}).check(record)


def test_what_is_no_technique() -> None:
    with pytest.raises(PlanError, match=r"bitsmith\.Int\(8, 8\)"):
        Plan({"a": "int8"})  # type: ignore[dict-item]


def test_citations_come_once() -> None:
    plan = Plan({"a": Int(), "b": Int(4), "c": Mine()})
    assert len(plan.cite()) == 2
    assert "A stranger's technique (2026)." in plan.cite()


def test_budgets() -> None:
    assert Budget(ms=2.0, drop=0.01).missed(ms=1.0, drop=0.03) == {"drop": pytest.approx(0.02)}
    assert Budget(mib=1.0).missed(ms=9.0) == {}
    for wrong in ({}, {"ms": 0}, {"mib": -1}, {"drop": float("nan")}, {"mj": True}):
        with pytest.raises(ValueError, match="Budget"):
            Budget(**wrong)
