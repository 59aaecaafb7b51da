"""Range methods chosen once for each technique, and found again in every plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.chosen import _SAMPLES, ChosenRanges
from bitsmith.model.formats import place
from bitsmith.model.network import Network, network
from bitsmith.prepare.ranges import choose_ranges
from bitsmith.site import Format, Range, Record, Site
from bitsmith.store import Store
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.technique import Cell, Technique
from bitsmith.testing import MockTarget
from smallnet import batches, small

DATA = batches(2, seed=2)
SITES = ("stem", "left", "right", ":add", ":mean", "head")
TARGETS = {"mock": MockTarget(), "onnxruntime": OnnxRuntime(threads=1)}
TECHNIQUES = (bs.Int(8, 8), bs.Int(8, 8, granularity="tensor"))


class Ends(nn.Module):
    """A convolution whose result is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.relu(self.first(x)))
        return found


@dataclass(frozen=True)
class Plain(Technique):
    """A stranger's, without ranges."""

    factor: float = 1.0

    def fits(self, site: Site) -> bool:
        return True

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        raise NotImplementedError


@dataclass(frozen=True)
class Half(Plain):
    """A stranger's with one of the two."""

    range: Range = Range()  # noqa: RUF009  (frozen)


@dataclass(frozen=True)
class Ranged(Plain):
    """A stranger's with both, which reads as ``Int(8, 8)`` does."""

    range: Range = Range()  # noqa: RUF009
    weight_range: Range = Range()  # noqa: RUF009

    def reads(self, site: Site) -> tuple[Format | None, ...]:
        return bs.Int(8, 8, range=self.range).reads(site)

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return bs.Int(8, 8, range=self.range, weight_range=self.weight_range).build(site, record, rng)


@pytest.fixture(scope="module")
def net() -> Network:
    return network(small(), DATA[0][0])


@pytest.fixture(scope="module")
def picked(net: Network) -> Callable[[str, Technique], bs.Plan]:
    """What :func:`choose_ranges` picks for the plan that has the technique everywhere, by target."""
    known: dict[tuple[str, Technique], bs.Plan] = {}

    def plan(target: str, technique: Technique) -> bs.Plan:
        if (target, technique) not in known:
            everywhere = bs.Plan(dict.fromkeys(SITES, technique))
            known[target, technique] = choose_ranges(
                net, TARGETS[target].adapt(everywhere, net.record), DATA, samples=_SAMPLES
            )
        return known[target, technique]

    return plan


@pytest.fixture(scope="module")
def chosen(net: Network) -> dict[str, ChosenRanges]:
    """One for each target, for all tests: what was chosen is kept."""
    return {name: ChosenRanges(net, target, DATA, Store(None), {}) for name, target in TARGETS.items()}


def methods(technique: Technique) -> tuple[Range, Range]:
    return technique.range, technique.weight_range  # type: ignore[attr-defined]


@pytest.mark.parametrize("technique", [*TECHNIQUES, Ranged()], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_site_takes_what_the_plan_everywhere_takes(
    net: Network,
    picked: Callable[[str, Technique], bs.Plan],
    chosen: dict[str, ChosenRanges],
    target: str,
    technique: Technique,
) -> None:
    expected = picked(target, technique)
    adapted = TARGETS[target].adapt(bs.Plan(dict.fromkeys(SITES, technique)), net.record)
    refined = chosen[target].refined(adapted)
    assert refined == expected
    assert list(refined.sites) == list(adapted.sites)
    assert {methods(t) for t in refined.sites.values()} != {(Range(), Range())}  # or this would show nothing


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(SITES), st.sampled_from(TECHNIQUES), min_size=1), st.sampled_from(list(TARGETS)))
def test_the_same_in_every_plan(sites: dict[str, Technique], target: str) -> None:
    net, plans, found = _shared()
    adapted = TARGETS[target].adapt(bs.Plan(sites), net.record)
    refined = found[target].refined(adapted)
    assert set(refined.sites) == set(adapted.sites)
    for name, technique in refined.sites.items():
        other = plans[target, sites[name]].sites.get(name)
        wanted = (Range(), Range()) if other is None else methods(other)
        assert methods(technique) == wanted
        # and nothing else is changed, besides the range of an output's format
        assert dataclasses.replace(technique, range=Range(), weight_range=Range(), out=None) == dataclasses.replace(
            adapted[name], range=Range(), weight_range=Range(), out=None
        )
        assert (technique.out is None) == (adapted[name].out is None)


_KEPT: list[Any] = []


def _shared() -> Any:
    """Fixtures cannot be had where inputs vary: made once."""
    if not _KEPT:
        net = network(small(), DATA[0][0])
        plans = {
            (name, technique): choose_ranges(
                net, target.adapt(bs.Plan(dict.fromkeys(SITES, technique)), net.record), DATA, samples=_SAMPLES
            )
            for name, target in TARGETS.items()
            for technique in TECHNIQUES
        }
        found = {name: ChosenRanges(net, target, DATA, Store(None), {}) for name, target in TARGETS.items()}
        _KEPT.extend((net, plans, found))
    return _KEPT


@pytest.mark.parametrize(
    "explicit",
    [
        bs.Int(8, 8, range=Range("percentile", 97.0)),
        bs.Int(8, 8, weight_range=Range("mse")),
        bs.Int(8, 8, range=Range("mse"), weight_range=Range("mse")),
    ],
    ids=lambda technique: technique.label(),
)
def test_a_method_that_is_named_stays(
    chosen: dict[str, ChosenRanges], picked: Callable[[str, Technique], bs.Plan], explicit: Technique
) -> None:
    plan = bs.Plan({"stem": explicit, "left": bs.Int(8, 8)})
    refined = chosen["mock"].refined(plan)
    assert refined["stem"] == explicit
    assert refined["left"] == picked("mock", bs.Int(8, 8))["left"]


@pytest.mark.parametrize("technique", [bs.Float(), bs.Float("bfloat16"), Plain(2.0), Half()], ids=str)
def test_techniques_without_ranges_stay(net: Network, monkeypatch: pytest.MonkeyPatch, technique: Technique) -> None:
    monkeypatch.setattr("bitsmith.chosen.choose_ranges", None)
    found = ChosenRanges(net, TARGETS["mock"], DATA, Store(None), {})
    plan = bs.Plan({"stem": technique, "head": technique}, groups=(("stem", "head"),))
    assert found.refined(plan) == plan


def test_a_group_whose_members_come_to_differ_is_none_any_more(
    chosen: dict[str, ChosenRanges], picked: Callable[[str, Technique], bs.Plan]
) -> None:
    expected = picked("mock", bs.Int(8, 8))
    unlike = next((a, b) for a in SITES for b in SITES if methods(expected[a]) != methods(expected[b]))
    alike = next((a, b) for a in SITES for b in SITES if a < b and methods(expected[a]) == methods(expected[b]))
    for group, kept in ((unlike, ()), (alike, (alike,))):
        plan = bs.Plan(dict.fromkeys(group, bs.Int(8, 8)), groups=(group,))
        assert chosen["mock"].refined(plan).groups == kept


# -- output formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [("first", "last"), ("last",)])
def test_output_formats_take_their_range_too(sites: tuple[str, ...]) -> None:
    """Here what leaves the last convolution has a few values far out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Ends().eval()
    data = [(x.pow(5), y) for x, y in DATA]
    net, target = network(model, data[0][0]), TARGETS["onnxruntime"]
    everywhere = target.adapt(bs.Plan(dict.fromkeys(("first", "last"), bs.Int(8, 8))), net.record)
    expected = choose_ranges(net, everywhere, data, samples=_SAMPLES)
    wanted = expected["last"].out  # type: ignore[attr-defined]
    assert wanted.range != Range()
    adapted = target.adapt(bs.Plan(dict.fromkeys(sites, bs.Int(8, 8))), net.record)
    assert adapted["last"].out == Format(8)  # type: ignore[attr-defined]
    refined = ChosenRanges(net, target, data, Store(None), {}).refined(adapted)
    assert refined["last"] == expected["last"]
    assert refined["last"].out == Format(8, range=wanted.range)  # type: ignore[attr-defined]


def formats(plan: bs.Plan, net: Network) -> dict[str, set[Format]]:
    """The formats that each tensor takes in an adapted plan."""
    found: dict[str, set[Format]] = {}
    for tensor, fmt in place(plan, net.record).tensors:
        found.setdefault(tensor, set()).add(fmt)
    return found


@pytest.mark.parametrize("sites", [("stem",), ("left", "head"), ("stem", "left")])
def test_a_tensor_has_one_format_in_all_plans(
    net: Network, chosen: dict[str, ChosenRanges], sites: tuple[str, ...]
) -> None:
    """``("stem", "left")``: what the stem writes is rounded twice, to two formats, as an addition reads it as well."""
    target = TARGETS["onnxruntime"]

    def refined(names: tuple[str, ...]) -> bs.Plan:
        plan = bs.Plan(dict.fromkeys(names, bs.Int(8, 8)))
        return chosen["onnxruntime"].refined(target.adapt(plan, net.record))

    whole = formats(refined(SITES), net)
    assert all(len(found) == 1 for found in whole.values())
    for tensor, found in formats(refined(sites), net).items():
        assert found == whole[tensor], tensor


# -- the store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_choice_is_made_once_and_kept(
    net: Network,
    picked: Callable[[str, Technique], bs.Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    target: str,
) -> None:
    asked: list[bs.Plan] = []

    def counted(net: Network, plan: bs.Plan, data: Any, samples: int) -> bs.Plan:
        asked.append(plan)
        return picked(target, next(t for t in TECHNIQUES if t.granularity == plan["head"].granularity))  # type: ignore[attr-defined]

    monkeypatch.setattr("bitsmith.chosen.choose_ranges", counted)
    plan = TARGETS[target].adapt(bs.Plan({"stem": TECHNIQUES[0], "left": TECHNIQUES[0]}), net.record)
    mixed = TARGETS[target].adapt(bs.Plan({"stem": TECHNIQUES[1], "left": TECHNIQUES[0]}), net.record)
    results, notes = [], []
    for _ in range(2):  # the second time as another process would
        with Store(tmp_path / "runs.db") as store:
            found = ChosenRanges(net, TARGETS[target], DATA, store, {"state": "a"})
            results.append([found.refined(p, notes.append) for p in (plan, plan, mixed, mixed)])
        assert len(asked) == 2
        assert asked[0].sites.keys() == picked(target, TECHNIQUES[0]).sites.keys()
    assert results[0] == results[1]
    assert results[0][0]["left"] == results[0][2]["left"]
    assert len(notes) == 4  # each technique once in each of them
    with Store(tmp_path / "runs.db") as store:  # of other weights, or other data
        ChosenRanges(net, TARGETS[target], DATA, store, {"state": "b"}).refined(plan)
    assert len(asked) == 3


def test_a_strangers_technique_comes_back_from_the_store(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = Store(None), bs.Plan(dict.fromkeys(SITES, Ranged(3.0)))
    first = ChosenRanges(net, TARGETS["mock"], DATA, store, {}).refined(plan)
    assert first != plan
    monkeypatch.setattr("bitsmith.chosen.choose_ranges", None)
    assert ChosenRanges(net, TARGETS["mock"], DATA, store, {}).refined(plan) == first


def test_what_a_worker_is_sent_is_enough(
    net: Network, chosen: dict[str, ChosenRanges], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = chosen["mock"].known([*TECHNIQUES, bs.Float(), Plain()])
    assert set(TECHNIQUES) <= set(known)
    assert not {bs.Float(), Plain()} & set(known)
    monkeypatch.setattr("bitsmith.chosen.choose_ranges", None)
    worker = ChosenRanges(net, TARGETS["mock"], DATA, Store(None), {})
    worker.take(known)
    plan = bs.Plan({"stem": TECHNIQUES[0], "head": TECHNIQUES[1], ":add": TECHNIQUES[0]})
    assert worker.refined(plan) == chosen["mock"].refined(plan)
